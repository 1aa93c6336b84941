"""A block that ran without its router module, as fused kernels do: the router's forward, once more beside it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn

from .lineage import tensors
from .route import Route, within


def shadow(router: nn.Module, read: Tensor, count: int) -> Route | None:
    """What `router` makes of what its block read, without grad, hooks or a trace in the random state; None: no choice.

    Only in evaluation: a router in training may draw noise, and would not draw the kernel's.
    """
    if router.training or not read.numel():
        return None
    rows = read.detach().clone().reshape(-1, read.shape[-1])
    devices = [rows.device] if rows.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for given in (rows, rows.reshape(read.shape)):
            with contextlib.suppress(Exception):
                return _told(router.forward(given), len(rows), count)
    return None


def _told(output: object, rows: int, count: int) -> Route | None:
    values = [v for v in tensors(output) if v.dim() >= 1]
    whole = [v for v in values if not v.is_floating_point() and v.dtype != torch.bool and v.numel() % rows == 0]
    ids = next((v.reshape(rows, -1) for v in whole if 0 < v.numel() // rows <= count), None)
    floats = [v.reshape(rows, -1) for v in values if v.is_floating_point() and v.numel() % rows == 0]
    logits = next((v for v in floats if v.shape[1] >= count), None)
    if ids is None:
        return None
    weights = next((v for v in floats if v.shape == ids.shape), None)
    if weights is None:
        dense = [v for v in floats if v.shape[1] == count and v is not logits]
        weights = dense[0].gather(-1, ids.long()) if dense else None
    return Route(*within(ids.long(), weights, count), count, logits, verified=False) if weights is not None else None
