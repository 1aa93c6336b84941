"""accelerate's device maps and offloading: weights that lie on the meta device between calls."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnviz
from bnviz.errors import CaptureError
from tests.capture.test_sites import Body, PreNorm

from .models import alike, captured, llama, mixtral, tokens

accelerate = pytest.importorskip("accelerate")

MAP = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk",
       "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip


def offloaded(model: nn.Module, way: str, folder: Path) -> nn.Module:
    if way == "host":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif way == "disk":
        accelerate.disk_offload(model, folder, execution_device="cpu")
    else:
        accelerate.dispatch_model(model, MAP, main_device="cpu", offload_dir=folder)
    return model


@pytest.mark.parametrize("way", ["host", "disk", "map"])
def test_offloaded_weights_are_watched_as_if_they_were_there(way: str, tmp_path: Path) -> None:
    model, ids = llama(), tokens()
    alone = captured(model, lambda: model(ids))
    offloaded(model, way, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    run = captured(model, lambda: model(ids))
    alike(run, alone)
    assert any(p.is_meta for p in model.parameters())
    assert run.provenance["device"] == ("cpu" if way == "map" else "offloaded")
    assert run["activations"].attrs["parameter_bytes"] == alone["activations"].attrs["parameter_bytes"]


@pytest.mark.parametrize("way", ["host", "disk"])
def test_offloaded_experts_and_plain_attention(way: str, tmp_path: Path) -> None:
    model, ids = mixtral(), tokens()
    alone = captured(model, lambda: model(ids), "routing", "attention")
    offloaded(model, way, tmp_path)
    alike(captured(model, lambda: model(ids), "routing", "attention"), alone, ("routing", "attention"))
    plain, x = Body(PreNorm), torch.randn(2, 6, 8)
    alone = captured(plain, lambda: plain(x))
    offloaded(plain, "host", tmp_path)
    alike(captured(plain, lambda: plain(x)), alone)


def test_generation_from_offloaded_weights(tmp_path: Path) -> None:
    model, ids = llama(), tokens(1)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected = model.generate(ids, **options)
    offloaded(model, "map", tmp_path)
    with bnviz.capture(model, probes=["attention"], strict=True) as recorder:
        assert torch.equal(model.generate(ids, **options), expected)
    assert list(recorder.run["attention"].phase.values) == ["prefill", "decode"]


def test_weights_that_nothing_fetches_are_refused_kindly() -> None:
    with torch.device("meta"):
        model = Body(PreNorm)
    with pytest.raises(CaptureError, match=r"on the meta device, without values \(stem.weight\); load its weights"):
        bnviz.capture(model).attach()
    half = copy.deepcopy(Body(PreNorm))
    half.blocks[1].to("meta")
    with pytest.raises(CaptureError, match=r"without values \(blocks.1.n1.weight\)"):
        bnviz.capture(half).attach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in half.modules())
