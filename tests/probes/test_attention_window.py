"""Exact weights of a window against the whole matrix of a model's eager attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.attention_window import AttentionWindow

from .test_query_moments import ids_of, small

SITE, CONTEXT = Site("attention", "attn", 0), Context(0, 0, "forward")


def whole(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> np.ndarray:
    """(layer, batch, head, query, key) of the model itself."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = torch.stack(model(ids, attention_mask=mask, output_attentions=True).attentions).numpy()
    model.set_attn_implementation("sdpa")
    return found


def captured(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    with bnviz.capture(model, probes=["attention_window"], strict=True, **options) as recorder, torch.no_grad():
        model(ids, attention_mask=mask)
    return recorder.run["attention_window"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "gpt2", "opt"])
def test_weights_are_those_of_the_model(kind: str) -> None:
    options = {"sliding_window": 9} if kind == "gemma3_text" else {}
    model = small(kind, **options)
    ids = ids_of(model, 2, 40)
    record = captured(model, ids, rows=(17, 30), columns=(3, 26), sequence=1)
    assert record["weight"].shape == (1, 2, 4, 13, 23)
    np.testing.assert_allclose(record["weight"].values[0], whole(model, ids)[:, 1, :, 17:30, 3:26], atol=2e-6)
    assert record["row_position"].values[0, 1].tolist() == list(range(17, 30))
    assert record["column_position"].values[0, 0].tolist() == list(range(3, 26))


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_are_counted_without_padding(side: str) -> None:
    model, ids = small("llama"), ids_of(small("llama"), 2, 30)
    mask = torch.ones(2, 30, dtype=torch.long)
    here = slice(0, 6) if side == "left" else slice(24, 30)
    mask[1, here], ids[1, here] = 0, 0
    record = captured(model, ids, mask, rows=(4, 28), columns=(0, 9), sequence=1)
    alone = whole(model, ids[1:, mask[1].bool()])[:, 0]
    np.testing.assert_allclose(record["weight"].values[0][:, :, :20], alone[:, :, 4:24, :9], atol=2e-6)
    assert np.isnan(record["weight"].values[0][:, :, 20:]).all()


def test_layers_that_were_not_named_are_left_out() -> None:
    record = captured(small("llama"), ids_of(small("llama"), 1, 12), rows=(0, 4), columns=(0, 4), layers=[1])
    assert record["layer"].values.tolist() == [1]


def test_a_window_beyond_the_text_or_the_batch_is_nan() -> None:
    model, ids = small("llama"), ids_of(small("llama"), 1, 12)
    assert np.isnan(captured(model, ids, rows=(20, 24), columns=(0, 4))["weight"].values).all()
    assert np.isnan(captured(model, ids, rows=(0, 4), columns=(0, 4), sequence=3)["weight"].values).all()
    part = captured(model, ids, rows=(8, 16), columns=(6, 14))["weight"].values[0]
    assert np.isfinite(part[:, :, :4, :6]).all() and np.isnan(part[:, :, 4:]).all() and np.isnan(part[..., 6:]).all()


def test_decode_steps_have_none() -> None:
    model = small("llama")
    with bnviz.capture(model, probes=["attention_window", "attention"], rows=(0, 4), columns=(0, 4)) as recorder:
        model.generate(ids_of(model, 1, 9), max_new_tokens=3, do_sample=False)
    weight = recorder.run["attention_window"]["weight"]
    assert np.isfinite(weight.values[0]).all()
    assert weight.sizes["step"] == 1 or np.isnan(weight.values[1:]).all()


@pytest.mark.parametrize("seed", range(3))
def test_masks_windows_caps_and_sinks_in_float64(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, heads, 23, 5, dtype=torch.float64, generator=generator) for heads in (6, 3))
    bias = torch.randn(1, 6, 23, 23, dtype=torch.float64, generator=generator)
    sinks = torch.randn(6, dtype=torch.float64, generator=generator)
    seen = AttentionSeen(SITE, CONTEXT, q, k, k, bias, True, 0.7, window=7, softcap=2.0, sinks=sinks)
    found = AttentionWindow(rows=(5, 20), columns=(2, 19), sequence=1).observe(seen)["weight"]
    logits = 2.0 * torch.tanh(0.7 * q @ k.repeat_interleave(2, 1).mT / 2.0) + bias
    at = torch.arange(23)
    logits = logits.masked_fill((at > at[:, None]) | ((at[:, None] - at) >= 7), -torch.inf)
    logits = torch.cat([logits, sinks[None, :, None, None].expand(2, 6, 23, 1)], -1)
    torch.testing.assert_close(found.double(), logits.softmax(-1)[1, :, 5:20, 2:19], rtol=1e-5, atol=1e-7)


def test_a_call_that_goes_on_with_a_cache_counts_from_the_first_token() -> None:
    q, k = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 10, 3)
    seen = AttentionSeen(SITE, CONTEXT, q, k, k, None, True, 0.5)
    found = AttentionWindow(rows=(4, 9), columns=(0, 3)).observe(seen)["weight"]
    logits = (0.5 * q @ k.mT).masked_fill(torch.arange(10) > torch.arange(6, 10)[:, None], -torch.inf)
    assert found[:, :2].isnan().all()
    torch.testing.assert_close(found[:, 2:], logits.softmax(-1)[0, :, :3, :3])


@pytest.mark.parametrize("rows", [(3, 3), (4, 2), (-1, 4), (0, 513), (1,), (0.0, 4.0), (True, 4)])
def test_windows_that_are_none(rows: Any) -> None:
    with pytest.raises(
        SchemaError, match=r"^Probe attention_window: rows is .*, expected the first token and the one after"
    ):
        AttentionWindow(rows=rows)
    with pytest.raises(SchemaError, match="sequence is -1"):
        AttentionWindow(sequence=-1)
