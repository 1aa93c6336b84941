"""Training steps of small models, watched for their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

import bnviz


def inputs(count: int = 1, seed: int = 0) -> list[Tensor]:
    return list(torch.randn(count, 3, 5, 8, generator=torch.Generator().manual_seed(seed)))


def loss_of(output: Tensor) -> Tensor:
    return (output.square().sum(-1) + output[..., 0]).mean()


def reference(model: nn.Module, loss: Tensor, kept: Callable[[str], bool] = lambda name: True) -> float:
    """Norm of the gradient of `loss` with respect to the parameters whose names are kept, by torch.autograd.grad."""
    some = [p for name, p in model.named_parameters() if kept(name) and p.requires_grad]
    found = torch.autograd.grad(loss, some, allow_unused=True, retain_graph=True)
    return sum(float(g.double().square().sum()) for g in found if g is not None) ** 0.5


def watched(model: nn.Module, act: Callable[[Any], None], **options: Any) -> xr.Dataset:
    with bnviz.capture(model, probes=["gradients"], strict=True, **options) as recorder:
        act(recorder)
    return recorder.run["gradients"]


def of(record: xr.Dataset, name: str, step: int = 0, kind: str = "block") -> np.ndarray:
    found: np.ndarray = record[name].sel(step=step, kind=kind).values
    return found
