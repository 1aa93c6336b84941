"""What generated tokens attend to, against whole attention matrices: on paper, in float64, and of models that generate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import Tensor

import bnviz
from bnviz.errors import CaptureError, SchemaError
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes._top_keys import in_cells, top_keys
from bnviz.probes.decode_attention import DecodeAttention
from bnviz.reduce._attention_pattern import Pattern
from tests.reduce._attention_definition import weights as formula

NEAR = 1e-5


def shown(past: int = 20, queries: int = 5, dtype: torch.dtype = torch.float64, **more: Any) -> AttentionSeen:
    generator = torch.Generator().manual_seed(3)
    query, key = (
        torch.randn(2, h, n, 8, generator=generator, dtype=dtype) for h, n in ((6, queries), (3, past + queries))
    )
    now = Context(1, 9, "decode", past)
    return AttentionSeen(Site("attention", "a", 0), now, query, key, key[..., :3], None, True, 0.6, **more)


def kept(seen: AttentionSeen, **options: Any) -> dict[str, np.ndarray]:
    found = DecodeAttention(**options).observe(seen)
    assert found is not None
    return {name: value.numpy() for name, value in found.items()}


def sets_agree(keys: np.ndarray, weights: np.ndarray) -> None:
    """`keys` (..., place) are those with most weight in `weights` (..., key), up to ties within rounding."""
    chosen = np.where(keys >= 0, np.take_along_axis(weights, np.maximum(keys, 0), -1), 0)
    most = -np.sort(-weights, -1)[..., : keys.shape[-1]]
    np.testing.assert_allclose(chosen[..., : most.shape[-1]], most, atol=NEAR)
    for row in keys.reshape(-1, keys.shape[-1]):
        assert len(np.unique(row[row >= 0])) == (row >= 0).sum()


def against(found: dict[str, np.ndarray], weights: np.ndarray, groups: int, width: int) -> None:
    """All that was kept of (batch, head, query, key) weights."""
    batch, heads, queries, keys = weights.shape
    by_group = weights.reshape(batch, groups, heads // groups, queries, keys).mean(2)
    sets_agree(found["top_key"], by_group)
    sets_agree(found["layer_key"], weights.mean(1))
    np.testing.assert_allclose(found["top_share"], np.nansum(found["top_weight"], -1) / by_group.sum(-1), atol=NEAR)
    cells = np.zeros(found["cells"].shape)
    for key in range(keys):
        cells[..., key // width] += weights.mean(1)[..., key]
    np.testing.assert_allclose(found["cells"], cells, atol=NEAR)


# --------------------------------------------------------------------------------------------------------------- on paper
def test_each_token_attends_to_the_key_it_was_made_for() -> None:
    key = torch.eye(12)[None, None]
    wanted = [3, 7, 0]
    query = 50 * torch.eye(12)[wanted][None, None]
    seen = AttentionSeen(Site("attention", "a", 0), Context(0, 1, "decode", 9), query, key, key, None, True, 1.0)
    found = kept(seen, top=1, steps=3, cells=6)
    assert found["top_key"][0, 0, :, 0].tolist() == wanted
    np.testing.assert_allclose(found["top_share"], 1, atol=1e-6)
    assert found["cell_width"] == 2
    assert found["cells"][0].argmax(-1).tolist() == [w // 2 for w in wanted]
    assert found["visible"].tolist() == [[10, 11, 12]]


def test_of_equal_weights_the_earlier_key_comes_first_whatever_is_beside_it() -> None:
    even = torch.full((2, 9), 1 / 9)
    assert top_keys(even, 3)[0].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert top_keys(torch.cat([even, torch.zeros(2, 40)], 1), 11)[0].tolist() == [[*range(9), -1, -1]] * 2
    assert torch.isnan(top_keys(torch.zeros(1, 4), 2)[1]).all()


@pytest.mark.parametrize(("keys", "width", "cells"), [(7, 3, 3), (1, 4, 2), (9, 2, 3), (6, 1, 6)])
def test_cells_are_sums_of_whole_keys(keys: int, width: int, cells: int) -> None:
    weights = torch.rand(2, keys, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.zeros(2, cells, dtype=torch.float64)
    for key in range(min(keys, width * cells)):
        expected[:, key // width] += weights[:, key]
    torch.testing.assert_close(in_cells(weights, width, cells), expected)


# --------------------------------------------------------------------------------------------- the formula, in float64
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"window": 6},
        {"softcap": 1.2},
        {"sinks": torch.linspace(-1, 3, 6)},
        {"allowed": torch.rand(2, 1, 5, 25, generator=torch.Generator().manual_seed(0)) > 0.4},
        {"allowed": torch.randn(1, 6, 5, 25, generator=torch.Generator().manual_seed(0)).double()},
    ],
    ids=["causal", "window", "softcap", "sinks", "mask", "bias"],
)
def test_it_is_the_formula_with_grouped_heads(more: dict[str, Any]) -> None:
    seen = replace(shown(), **more)
    pattern = Pattern(True, seen.window, seen.allowed, seen.softcap, seen.sinks, seen.scale)
    weights = formula(seen.query, seen.key, pattern, None)[0]
    found = kept(seen, top=7, steps=30, cells=9)
    against(found, weights.numpy(), 3, 6)
    np.testing.assert_array_equal(found["visible"], (weights > 0).sum(-1).amax(1))


def test_several_tokens_of_one_call_count_as_if_alone() -> None:
    seen, probe = shown(), DecodeAttention(top=6, steps=40, cells=8)
    together = probe.observe(seen)
    assert together is not None
    for at in range(5):
        stop = 21 + at
        alone = probe.observe(
            replace(
                seen,
                context=replace(seen.context, past=20 + at),
                query=seen.query[:, :, at : at + 1],
                key=seen.key[:, :, :stop],
                value=seen.value[:, :, :stop],
            )
        )
        assert alone is not None
        for name, value in alone.items():
            part = together[name]
            part = part[:, :, at : at + 1] if name.startswith("top") else part
            part = part[:, at : at + 1] if name in ("layer_key", "layer_weight", "cells", "visible") else part
            torch.testing.assert_close(value, part, equal_nan=True)


def test_padded_keys_are_left_out_and_positions_count_without_them() -> None:
    real = torch.ones(2, 25, dtype=torch.bool)
    real[1, :9] = False
    seen = replace(shown(), allowed=real[:, None, None].expand(2, 1, 5, 25), valid_keys=real)
    found = kept(seen, top=8, steps=30, cells=50)
    alone = replace(
        seen,
        context=replace(seen.context, past=11),
        query=seen.query[1:],
        key=seen.key[1:, :, 9:],
        allowed=None,
        valid_keys=None,
    )
    expected = kept(alone, top=8, steps=39, cells=50)
    for name in ("top_key", "layer_key"):
        np.testing.assert_array_equal(found[name][1:], expected[name])
    np.testing.assert_allclose(found["cells"][1:], expected["cells"])
    told = replace(seen.context, held=real[:, :20], valid=real[:, 20:])
    again = kept(replace(seen, valid_keys=None, context=told), top=8, steps=30, cells=50)
    np.testing.assert_array_equal(again["top_key"], found["top_key"])


def test_only_the_first_tokens_of_a_text_are_kept() -> None:
    probe = DecodeAttention(top=2, steps=3, cells=4)
    first = probe.observe(shown())
    assert first is not None
    assert (first["top_key"][:, :, :3] >= 0).all() and (first["top_key"][:, :, 3:] == -1).all()
    assert first["cells"][:, 3:].isnan().all() and first["visible"][:, 3:].isnan().all()
    later = replace(shown(25, 1), context=Context(1, 14, "decode", 25))
    assert probe.observe(later) is None
    assert probe.observe(replace(later, context=replace(later.context, step=2))) is not None  # another text


def test_passages_and_other_texts_have_none() -> None:
    seen = shown()
    for other in (
        replace(seen, context=replace(seen.context, phase="prefill")),
        replace(seen, across=True),
        replace(seen, context=replace(seen.context, past=4)),
    ):
        assert DecodeAttention().observe(other) is None


def test_nothing_is_written_to_and_no_randomness_is_used() -> None:
    seen = shown(dtype=torch.bfloat16)
    before, state = (seen.query.clone(), seen.key.clone()), torch.get_rng_state()
    one, two = (DecodeAttention(top=4).observe(seen) for _ in range(2))
    assert torch.equal(seen.query, before[0]) and torch.equal(seen.key, before[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert one is not None and two is not None
    assert all(torch.equal(one[name].nan_to_num(9), two[name].nan_to_num(9)) for name in one)
    assert one["top_weight"].dtype == torch.float32


def test_wrong_options_are_refused() -> None:
    for options in ({"top": 0}, {"steps": -1}, {"cells": 2.5}, {"top": True}):
        with pytest.raises(SchemaError, match=r"Probe decode_attention: .* is .*, expected a whole number from 1"):
            DecodeAttention(**options)  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="top is 1025, expected at most 1024"):
        DecodeAttention(top=1025)


# ---------------------------------------------------------------------------------------------------- models that generate
def generated(
    model: Any, ids: Tensor, tokens: int, capture: dict[str, Any] | None = None, **more: Any
) -> tuple[Tensor, xr.Dataset]:
    torch.manual_seed(0)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | more
    with torch.no_grad(), bnviz.capture(model, probes=["decode_attention"], strict=True, **(capture or {})) as recorder:
        out = model.generate(ids, max_new_tokens=tokens, **settings)
    return out, recorder.run["decode_attention"]


def matrices(model: Any, ids: Tensor) -> list[np.ndarray]:
    """(batch, head, query, key) of each layer, from one eager forward over the whole text."""
    with torch.no_grad():
        return [p.numpy() for p in model(ids, output_attentions=True).attentions]


def row_of(record: xr.Dataset, layer: int) -> dict[str, np.ndarray]:
    """One layer as the probe gives it, of one sequence."""
    return {str(name): record[name].values[:, layer] for name in record.data_vars if name != "cell_width"}


@pytest.mark.parametrize("tokens", [2, 3, 70])
def test_generation_of_a_trained_model_is_what_its_eager_weights_say(load_model: Any, tokens: int) -> None:
    ids = torch.arange(5, 45)[None]
    out, record = generated(load_model("llama-bard"), ids, tokens, {"top": 16, "steps": 80, "cells": 32})
    assert record.sizes["query"] == tokens - 1 and str(record["phase"].values[0]) == "decode"
    assert record["query_position"].values[0].tolist() == list(range(40, 39 + tokens))
    assert (record["cell_width"] == 4).all()
    for layer, weights in enumerate(matrices(load_model("llama-bard", "eager"), out[:, :-1])):
        against(row_of(record, layer), weights[:, :, 40:].astype(np.float64), record.sizes["kv_head"], 4)


def small(**config: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
    made = transformers.MistralConfig(**sizes, **heads, initializer_range=0.3, **config)
    return transformers.MistralForCausalLM(made).eval()


def test_a_sliding_cache_that_no_longer_holds_a_key_never_names_it() -> None:
    model = small(sliding_window=9)
    out, record = generated(model, torch.arange(3, 23)[None], 30, {"top": 12, "cells": 512, "steps": 40})
    at = record["query_position"].values[0]
    for layer, weights in enumerate(matrices(small(sliding_window=9, attn_implementation="eager"), out[:, :-1])):
        against(row_of(record, layer), weights[:, :, 20:].astype(np.float64), 2, 1)
        keys = record["top_key"].values[0, layer]
        assert ((keys > at[None, :, None] - 9) | (keys == -1)).all()
    assert (record["visible"].values[0] == 9).all()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_padded_batch_gives_each_sequence_what_it_has_alone(load_model: Any, kind: str) -> None:
    model = load_model("llama-bard")
    long, short = torch.arange(5, 45), torch.arange(60, 85)
    padded = torch.stack([long, torch.cat([torch.zeros(15, dtype=torch.long), short])])
    mask = torch.ones_like(padded)
    mask[1, :15] = 0
    options = {"top": 10, "steps": 40, "cells": 256}
    _, both = generated(
        model,
        padded,
        25,
        options,
        attention_mask=mask,
        **({} if kind == "dynamic" else {"cache_implementation": "static"}),
    )
    for number, ids in enumerate((long, short)):
        _, alone = generated(model, ids[None], 25, options)
        here = both["query_sequence"].values[0] == number
        assert both["query_position"].values[0, here].tolist() == alone["query_position"].values[0].tolist()
        np.testing.assert_allclose(both["top_weight"].values[..., here, :], alone["top_weight"].values, atol=NEAR)
        same = both["top_key"].values[..., here, :] == alone["top_key"].values
        assert same.mean() > 0.99  # but for two keys of one weight, up to rounding
        cells = alone["cells"].values
        np.testing.assert_allclose(both["cells"].values[..., here, :][..., : cells.shape[-1]], cells, atol=NEAR)


def test_steps_bound_what_is_kept_of_a_generation(load_model: Any) -> None:
    _, record = generated(load_model("llama-bard"), torch.arange(5, 25)[None], 60, {"top": 4, "steps": 10, "cells": 16})
    told = np.isfinite(record["visible"].values[0]).all(0)
    assert np.flatnonzero(told).tolist() == list(range(10)) and len(told) < 59


def test_beams_and_half_precision_are_taken(load_model: Any) -> None:
    import copy

    model = copy.deepcopy(load_model("llama-bard")).bfloat16()
    _, record = generated(model, torch.arange(5, 25)[None], 8, {"top": 4}, num_beams=3)
    assert record["top_weight"].dtype == np.float32
    shares = record["top_share"].values
    assert (shares[np.isfinite(shares)] <= 1.001).all() and np.isfinite(shares).any()


def test_a_passage_alone_leaves_nothing_to_keep(load_model: Any) -> None:
    model = load_model("llama-bard")
    with pytest.raises(CaptureError, match="Nothing was captured"), torch.no_grad():
        with bnviz.capture(model, probes=["decode_attention"]):
            model(torch.arange(12)[None])


def test_it_is_not_on_by_default(load_model: Any) -> None:
    model = load_model("llama-induction-byte")
    with torch.no_grad(), bnviz.capture(model, ceilings=False) as recorder:
        model.generate(torch.arange(12)[None], max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    assert "decode_attention" not in recorder.run
