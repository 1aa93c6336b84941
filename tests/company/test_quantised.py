"""Linear layers with weights of few bits: torchao, bitsandbytes and torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnviz

from .models import block_bytes, captured, llama, mixtral, tokens

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")  # what these packages say of themselves

WIDE = {"hidden_size": 64, "intermediate_size": 64}


def inner(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name and not name.endswith("gate")


def torchao(model: Any, kind: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    config = {
        "int8": quantization.Int8WeightOnlyConfig,
        "int8 activations": quantization.Int8DynamicActivationInt8WeightConfig,
        "float8": quantization.Float8WeightOnlyConfig,
        "int4": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(16)
        ),
    }[kind]()
    quantization.quantize_(model, config, filter_fn=inner)
    return model


def bitsandbytes(model: Any, kind: str) -> Any:
    nn_of = pytest.importorskip("bitsandbytes").nn

    def made(old: nn.Linear) -> nn.Module:
        sizes = (old.in_features, old.out_features, old.bias is not None)
        new = (
            nn_of.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32)
            if kind == "nf4"
            else nn_of.Linear8bitLt(*sizes, has_fp16_weights=False)
        )
        new.load_state_dict(old.state_dict())
        return new.to("cpu")

    for _, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if inner(child, name):
                setattr(module, name, made(child))
    return model


def dynamic(model: Any, _: str) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


WAYS = [
    (torchao, "int8", 0.26), (torchao, "int8 activations", 0.26), (torchao, "float8", 0.26), (torchao, "int4", 0.40),
    (bitsandbytes, "nf4", 0.13), (bitsandbytes, "int8", 0.26), (dynamic, "int8", 0.01),
]  # fmt: skip


@pytest.mark.parametrize(("way", "kind", "share"), WAYS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_quantised_layers_are_watched(way: Callable[[Any, str], Any], kind: str, share: float) -> None:
    plain, ids = llama(**WIDE), tokens()
    alone = captured(plain, lambda: plain(ids))
    model = way(llama(**WIDE), kind)
    run = captured(model, lambda: model(ids))
    assert list(run["activations"].path.values) == list(alone["activations"].path.values)
    assert list(run["activations"].kind.values) == ["block", "attention", "mlp"]
    assert run["attention"].sizes == alone["attention"].sizes
    assert np.allclose(run["attention"]["mass"].sum("key").values, 24, atol=1e-3)
    assert np.allclose(run["activations"]["cosine"], alone["activations"]["cosine"], atol=0.1)
    for less, whole in zip(block_bytes(run), block_bytes(alone), strict=True):
        assert less <= (share + 0.02) * whole


def test_routers_beside_quantised_layers() -> None:
    model, ids = torchao(mixtral(), "int8"), tokens()
    run = captured(model, lambda: model(ids), "routing")
    assert (run["routing"]["unverified"].values == 0).all()


def test_gradients_pass_through_frozen_quantised_layers() -> None:
    model, ids = torchao(llama(**WIDE), "int8").train(), tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name or "embed" in name)
    with bnviz.capture(model, probes=["gradients"], strict=True) as recorder:
        model(ids, labels=ids).loss.backward()
    assert np.isfinite(recorder.run["gradients"]["gradient_norm"].sel(kind="block")).all()
