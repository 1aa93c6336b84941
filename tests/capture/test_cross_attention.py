"""Attention over another text, and every attention beside a layer's own: its kind, its number, its weights, its record."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnviz
from bnviz.errors import CaptureError

from .spied import close, watched
from .test_attention_functions import BATCH, HEADS, TOKENS, WIDTH, Kept, Plain, model_of
from .test_sites import Body, PreNorm

SOURCE, TARGET = torch.arange(2, 26).reshape(2, 12), torch.arange(3, 13).reshape(2, 5)
PADDED = torch.ones(2, 12, dtype=torch.long)
PADDED[1, 8:] = 0


def two_texts(name: str, attention: str = "eager") -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shared = {"vocab_size": 64, "decoder_start_token_id": 0, "attn_implementation": attention}
    if name == "T5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**shared, **sizes))
    else:
        sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        sizes |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        model = transformers.BartForConditionalGeneration(transformers.BartConfig(**shared, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_a_decoder_looks_at_its_own_text_and_at_the_other(name: str, attention: str) -> None:
    model, eager = two_texts(name, attention), two_texts(name)
    given = {"input_ids": SOURCE, "attention_mask": PADDED, "decoder_input_ids": TARGET}
    with torch.no_grad():
        seen = watched(model, lambda m: m(**given).logits)
        own = eager(**given, output_attentions=True)
    kinds = {kind: [s for s in seen if s.site.kind == kind] for kind in ("attention", "cross_attention")}
    assert [s.site.layer for s in kinds["attention"]] == [0, 1, 2, 3]
    assert [s.site.layer for s in kinds["cross_attention"]] == [0, 1]
    assert all("decoder" in s.site.path for s in kinds["cross_attention"])
    for one, weights in zip(kinds["attention"], [*own.encoder_attentions, *own.decoder_attentions], strict=True):
        rows = PADDED.bool() if one.query.shape[-2] == 12 else None
        close(one, weights, rows=rows)
        assert not one.across
    for one, weights in zip(kinds["cross_attention"], own.cross_attentions, strict=True):
        close(one, weights)
        assert one.across
        assert one.token_ids is None
        assert torch.equal(one.valid_keys, PADDED.bool())


def test_the_record_counts_places_and_leaves_the_other_texts_padding_out() -> None:
    model, eager = two_texts("T5", "sdpa"), two_texts("T5")
    given = {"input_ids": SOURCE, "attention_mask": PADDED, "decoder_input_ids": TARGET}
    with torch.no_grad(), bnviz.capture(model, strict=True) as recorder:
        model(**given)
    record = recorder.run["cross_attention"].isel(step=0)
    with torch.no_grad():
        own = eager(**given, output_attentions=True).cross_attentions
    assert list(record.layer.values) == [0, 1]
    assert list(record.path.values) == [f"decoder.block.{n}.layer.1.EncDecAttention" for n in range(2)]
    assert list(recorder.run["attention"].layer.values) == [0, 1, 2, 3]
    keep = PADDED.bool()
    for at, weights in enumerate(own):
        mass = torch.cat([weights[b].sum(1)[:, keep[b]] for b in range(2)], -1)
        assert np.allclose(record["mass"].isel(layer=at).values, mass, atol=1e-5)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).transpose(0, 1).flatten(1)
        assert np.allclose(record["entropy"].isel(layer=at).values, entropy, atol=1e-5)
    assert record["key_sequence"].values.tolist() == [0] * 12 + [1] * 8
    assert record["visible"].isel(layer=0).values.tolist() == [12] * 5 + [8] * 5
    assert np.isnan(record["previous_mass"]).all()
    assert np.isnan(record["local_mass"]).all()
    assert "echo_mass" not in record
    assert not [note for note in recorder.run.notes if "cross" in note]
    assert bnviz.capture(model, probes=["cross_attention"], window=3)._probes["cross_attention"].window == 3


def test_generation_adds_up_over_one_text() -> None:
    """The keys stay; every generated token adds a row, at its own position."""
    model, eager = two_texts("T5", "sdpa"), two_texts("T5")
    rule = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with torch.no_grad(), bnviz.capture(model, probes=["cross_attention"], strict=True) as recorder:
        words = model.generate(SOURCE, attention_mask=PADDED, **rule)
    with torch.no_grad():
        own = eager(input_ids=SOURCE, attention_mask=PADDED, decoder_input_ids=words[:, :-1], output_attentions=True)
    record = recorder.run["cross_attention"]
    keep = PADDED.bool()
    weights = own.cross_attentions[1]
    decoded = record.sel(step=record.step[record.phase == "decode"]).isel(step=0, layer=1)
    mass = torch.cat([weights[b, :, 1:].sum(1)[:, keep[b]] for b in range(2)], -1)
    assert np.allclose(decoded["mass"].values, mass, atol=1e-5)
    assert decoded["query_position"].values.tolist() == [1, 2, 3, 4, 5] * 2
    assert decoded["key_position"].values.tolist() == [*range(12), *range(8)]


def test_a_model_without_any_says_nothing_of_it() -> None:
    model = model_of(Plain)
    with torch.no_grad(), bnviz.capture(model) as recorder:
        model(torch.randn(BATCH, TOKENS, 8, dtype=torch.float64))
    assert "cross_attention" not in recorder.run
    assert not any("cross" in note for note in recorder.run.notes)
    with pytest.raises(CaptureError, match="no cross_attention found"):
        bnviz.capture(model, probes=["cross_attention"]).attach()


class Over(Kept):
    """Attention over something else than its own tokens."""

    def __init__(self, other: int = 3) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.randn(1, other, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(x)[0]
        _, k, v = self.split(self.other.expand(x.shape[0], -1, -1))
        self.keep(q, k)
        return self.join(F.scaled_dot_product_attention(q, k, v))


def branching(**parts: type[nn.Module]) -> Body:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            for name, part in parts.items():
                setattr(self, name, part())

        def forward(self, x: Tensor) -> Tensor:
            for name in parts:
                x = x + getattr(self, name)(self.norm(x))
            return x

    model = Body(Block, 2).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


@pytest.mark.parametrize(
    ("parts", "own"),
    [
        ({"attn1": Plain, "attn2": Over}, "attn1"),  # U-Nets
        ({"attn1": Over, "attn2": Plain}, "attn2"),  # names do not tell: where the keys come from does
        ({"temporal_attn": Plain, "spatial_attn": Plain}, "temporal_attn"),
        ({"cross_attn": Over, "self_attn": Plain}, "self_attn"),
        ({"cross_attn_a": Plain, "attn": Plain, "cross_attn_b": Plain}, "attn"),  # a name tells, whatever the keys
    ],
)
def test_a_layer_has_one_self_attention_and_the_rest_is_beside_it(parts: dict[str, Any], own: str) -> None:
    model, x = branching(**parts), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    with torch.no_grad(), bnviz.capture(model, strict=True) as recorder:
        model(x)
    for block in model.blocks:
        for name in parts:
            getattr(block, name).own.clear()
    seen = watched(model, lambda m: m(x))
    others = [name for name in parts if name != own]
    record, beside = recorder.run["attention"], recorder.run["cross_attention"]
    assert list(record.path.values) == [f"blocks.{n}.{own}" for n in range(2)]
    assert list(record.layer.values) == [0, 1]
    assert list(beside.path.values) == [f"blocks.{n}.{name}" for n in range(2) for name in others]
    assert list(beside.layer.values) == list(range(2 * len(others)))
    for one in seen:
        close(one, model.get_submodule(one.site.path).own[0])
        assert one.across is (isinstance(model.get_submodule(one.site.path), Over) or "cross" in one.site.path)


def test_a_layer_whose_only_attention_is_over_another_text_by_number_keeps_it() -> None:
    """Names do not say so, and nothing else claims the place: a perceiver's layers, pooled keys."""
    model, x = branching(attn=Over), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    with torch.no_grad(), bnviz.capture(model, strict=True) as recorder:
        model(x)
    record = recorder.run["attention"]
    assert list(record.path.values) == ["blocks.0.attn", "blocks.1.attn"]
    assert np.isnan(record["previous_mass"]).all()
    assert record["mass"].sizes["key"] == BATCH * 3


class TwoInOne(Kept):
    """Two attentions in one module: over rows of an image, then over its columns."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.unflatten(1, (3, 4)).flatten(0, 1)
        x = self.attend(rows).unflatten(0, (-1, 3)).flatten(1, 2)
        columns = x.unflatten(1, (3, 4)).transpose(1, 2).flatten(0, 1)
        return self.attend(columns).unflatten(0, (-1, 4)).transpose(1, 2).flatten(1, 2)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.keep(q, k)
        return self.join(F.scaled_dot_product_attention(q, k, v))


def test_a_second_attention_inside_one_call_is_a_place_of_its_own() -> None:
    model, x = model_of(TwoInOne), torch.randn(BATCH, 12, 8, dtype=torch.float64)
    seen = watched(model, lambda m: m(x))
    assert [(s.site.kind, s.site.layer, tuple(s.query.shape)) for s in seen] == [
        ("attention", 0, (BATCH * 3, HEADS, 4, 4)),
        ("cross_attention", 0, (BATCH * 4, HEADS, 3, 4)),
        ("attention", 1, (BATCH * 3, HEADS, 4, 4)),
        ("cross_attention", 1, (BATCH * 4, HEADS, 3, 4)),
    ]
    for n, block in enumerate(model.blocks):
        for one, weights in zip(seen[2 * n : 2 * n + 2], block.mix.own, strict=True):
            close(one, weights)


def test_what_a_number_of_places_is_called_says_which() -> None:
    model, x = model_of(TwoInOne), torch.randn(BATCH, 12, 8, dtype=torch.float64)
    with torch.no_grad(), bnviz.capture(model, strict=True) as recorder:
        model(x)
    paths = list(recorder.run["cross_attention"].path.values)
    assert paths == [f"blocks.{n}.mix (attention 2)" for n in range(2)]


def test_attention_outside_every_block_has_numbers_below_zero() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.attn_pool = Body(PreNorm, 2), Kept()
            self.extra = Plain()
            self.back = nn.Linear(4, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.extra(self.back(self.body(x)))

    model, x = Pooled().eval(), torch.randn(BATCH, TOKENS, 8)
    seen = watched(model, lambda m: m(x))
    assert [(s.site.layer, s.site.kind) for s in seen] == [(0, "attention"), (1, "attention"), (-1, "attention")]


def test_cross_attention_written_by_hand() -> None:
    class CrossAttention(Over):
        def forward(self, x: Tensor) -> Tensor:
            q = self.split(x)[0]
            _, k, v = self.split(self.other.expand(x.shape[0], -1, -1))
            weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
            self.own.append(weights.detach())
            return self.join(weights @ v)

    model, x = branching(attn=Plain, source=CrossAttention), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    seen = watched(model, lambda m: m(x))
    assert [s.site.kind for s in seen] == ["attention", "cross_attention"] * 2
    for one in seen:
        close(one, model.get_submodule(one.site.path).own[0])
