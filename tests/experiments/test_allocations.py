"""Unlike budgets of layers and heads: against one forward under masks of the same text, through the model's own arguments."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bnviz
from bnviz.errors import BnvizError, SchemaError, UnknownName
from bnviz.experiments._cut import Reader, cut, layers_of
from bnviz.experiments._ragged import Kept, hidden, kept_of, readable
from bnviz.experiments._ways import whole_heads
from tests.probes.test_query_moments import ids_of, small

from .test_kv_eviction import hooks, measured, text


def ragged(model: nn.Module, ids: torch.Tensor, end: int, kept: list[Kept]) -> torch.Tensor:
    """Logits of the rest of a text behind a cache whose heads keep what they keep."""
    read = Reader(model)
    with torch.no_grad():
        _, cache = read(ids[:, :end])
        behind = cut(cache, layers_of(cache), [one.index for one in kept])
        with hidden(attentions(model), kept, 4):
            return read(ids[:, end:], behind, end)[0].double()


def attentions(model: nn.Module) -> list[nn.Module]:
    return [m for n, m in model.named_modules() if n.endswith((".self_attn", ".attn", ".attention"))]


def at_random(layers: int, heads: int, keys: int, seed: int = 0) -> list[Kept]:
    rng = np.random.default_rng(seed)
    ranks = np.argsort(rng.random((layers, heads, keys)), axis=-1)
    return [kept_of(rank, rng.integers(1, keys, heads)) for rank in ranks]


def mask_of(kept: Kept, heads: int, end: int, tokens: int) -> torch.Tensor:
    """(1, heads, tokens, tokens): the rest of the text does not see what is dropped of the prompt."""
    sees = torch.ones(heads, tokens, tokens).tril().bool()
    for head in range(heads):
        group = head // (heads // len(kept.index))
        sees[head, end:, :end] = False
        sees[head, end:, kept.index[group][kept.held[group]]] = True
    return torch.zeros(1, heads, tokens, tokens).masked_fill(~sees, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox", "gpt2", "olmo2", "phi"])
def test_heads_that_keep_unlike_numbers_are_one_forward_under_a_mask_of_heads(kind: str, attention: str) -> None:
    one = {"n_layer": 1} if kind == "gpt2" else {"num_hidden_layers": 1}
    model, ids = small(kind, **one), ids_of(small(kind), 1, 40)
    model.set_attn_implementation(attention)
    (kept,) = at_random(1, layers_of(Reader(model)(ids)[1])[0][0].shape[1], 30)
    assert len({int(n) for n in kept.held.sum(1)}) > 1
    with torch.no_grad():
        reference = model(ids, attention_mask=mask_of(kept, 4, 30, 40)).logits[0, 30:].double()
    torch.testing.assert_close(ragged(model, ids, 30, [kept]), reference, rtol=1e-4, atol=1e-5)


def test_layers_that_keep_unlike_numbers_are_one_forward_under_a_mask_of_each() -> None:
    model, ids = small("llama"), ids_of(small("llama"), 1, 40)
    kept = at_random(2, 2, 30, seed=3)
    assert kept[0].index.shape != kept[1].index.shape

    def given(mask: torch.Tensor) -> Any:
        return lambda _, args, kwargs: (args, {**kwargs, "attention_mask": mask})

    handles = [
        module.register_forward_pre_hook(given(mask_of(one, 4, 30, 40)), with_kwargs=True)
        for module, one in zip(attentions(model), kept, strict=True)
    ]
    with torch.no_grad():
        reference = model(ids).logits[0, 30:].double()
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ragged(model, ids, 30, kept), reference, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def found(load_model: Any) -> xr.Dataset:
    ways = ("", "+pyramidkv", "+adakv", "+zipvl", "+d2o")
    return measured(
        load_model("llama-bard"),
        text(80),
        methods=[*(f"{score}{way}" for score in ("h2o", "snapkv") for way in ways), "random"],
        budgets=[0.25, 1.0],
        greedy=4,
        probes={"window": 8},
    )


def test_the_whole_cache_changes_nothing_however_it_is_given_out(found: xr.Dataset) -> None:
    assert found.sizes["method"] == 11 and np.isfinite(found["divergence"].values).all()
    whole = found.sel(budget=1.0)
    assert np.abs(whole["divergence"].values).max() < 1e-9
    assert (whole["bytes_kept"].values == found["bytes_whole"].values).all()
    assert (whole["greedy_kept"].values == 4).all()


def test_a_budget_is_one_total_however_it_is_given_out(found: xr.Dataset) -> None:
    taken = found["bytes_kept"].sel(budget=0.25).values
    assert (taken == taken[0, 0]).all() and taken[0, 0] == found["bytes_whole"].values[0] / 4
    changes = found["divergence"].sel(budget=0.25).values[0][:10].reshape(2, 5)
    assert len(np.unique(changes[0].round(9))) >= 4  # they give unlike numbers to heads, and that is felt


def test_heads_that_look_far_keep_all_and_the_others_sinks_and_recent_tokens(load_model: Any) -> None:
    asked = {"sinks": 2, "local": 6}
    model, ids = load_model("llama-bard"), text(100)
    names = ["streaming_llm", "streaming_llm+duoattention", "random"]
    record = measured(model, ids, methods=names, budgets=[0.05, 0.4, 1.0], prompt=80, probes=asked, greedy=0)
    with bnviz.capture(model, probes=["attention", "keys_values"], **asked) as recorder, torch.no_grad():
        model(ids[:, :80])
    share = bnviz.diagnose(recorder.run, "kv_budget")["kv_budget"]["retrieval_share"].values.reshape(4, 2, 4).max(-1)
    token = float(record["bytes_whole"][0]) / (8 * 80)
    many = (32 - 8) * 8 // (80 - 8)  # of 8 heads with 32 tokens each: those of 80 that fit beside those of 8
    assert many == 2 and record["bytes_kept"].values[0, 1].tolist() == [
        8 * 4 * token,
        8 * 32 * token,
        8 * 80 * token,
    ]
    assert (
        record["divergence"].values[0, 1, 0] == record["divergence"].values[0, 0, 0]
    )  # too little for any head to keep all
    assert abs(record["divergence"].values[0, 1, 2]) < 1e-9
    tokens = whole_heads(share, 80, 32, 8)
    assert tokens.sum() == 8 * 32 and set(tokens[tokens < 80].tolist()) == {16}  # the others share what is left
    assert sorted(np.argwhere(tokens == 80).tolist()) == sorted(np.argwhere(share >= np.sort(share, None)[-2]).tolist())


def test_keys_that_a_score_always_keeps_are_shared_evenly_by_adakv(load_model: Any) -> None:
    methods = {"h2o": {"recent": 0.5}, "h2o+adakv": {"recent": 0.5}}
    both = measured(load_model("llama-bard"), text(80), methods=methods, budgets=[0.25], greedy=0)["divergence"]
    assert both.values[0, 0] == both.values[0, 1]


def test_the_report_ranks_them_with_the_others_and_tells_the_time(load_model: Any) -> None:
    asked = {"methods": ["h2o", "h2o+adakv", "random"], "budgets": [0.25, 0.5], "greedy": 0, "pairs": 3}
    model = load_model("llama-bard")
    run = bnviz.experiment(model, text(80), "kv_eviction", "decode_time", progress=False, **asked)
    for budget, limit in ((0.25, 9.0), (0.5, 0.0)):
        report = bnviz.diagnose(run, "eviction_cost", strict=True, options={"eviction_cost": {"divergence": limit}})
        result = report["eviction_cost"]
        assert result["method"].values.tolist() == ["h2o", "h2o+adakv", "random"]
        np.testing.assert_array_equal(result["step_ratio"].values, run["decode_time"]["step_ratio"].values[0])
        for one in report.findings:
            if one.code == "eviction_cost/budget":
                assert ("a decode step takes" in one.sentence) is ("+adakv" not in one.sentence), budget
    assert report.view("eviction_cost") is not None


def test_positions_that_are_places_in_the_cache_are_refused() -> None:
    from transformers import FalconConfig, FalconForCausalLM, GPTNeoConfig, GPTNeoForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4}
    with pytest.raises(BnvizError, match=r"FalconForCausalLM adds a bias by distance in the cache \(ALiBi\)"):
        measured(FalconForCausalLM(FalconConfig(alibi=True, **sizes, **heads)).eval(), text(40) % 128, methods=["h2o"])
    local = {
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["local"], 2]],
        "window_size": 8,
        "intermediate_size": 48,
    }
    with pytest.raises(BnvizError, match=r"queries of layer 0 see 8 of the prompt's 30 tokens, expected all"):
        measured(GPTNeoForCausalLM(GPTNeoConfig(**sizes, **local)).eval(), text(40) % 128, methods=["h2o"])


def test_a_text_that_is_too_short_for_a_score_costs_that_score_alone(load_model: Any) -> None:
    found = measured(load_model("llama-bard"), text(60), methods=["h2o", "snapkv+adakv"], budgets=[0.3], greedy=0)
    assert found["method"].values.tolist() == ["h2o"]
    assert any(why.startswith("text 0, snapkv: the sequence has 45 keys") for why in found.attrs["skipped"])
    with pytest.raises(SchemaError, match=r"^snapkv: the sequence has 45 keys"):
        measured(load_model("llama-bard"), text(60), methods=["snapkv"], budgets=[0.3])


def test_a_model_that_gives_nan_is_told_so(load_model: Any) -> None:
    broken = copy.deepcopy(load_model("llama-bard"))
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0] = torch.nan
    with pytest.raises(BnvizError, match=r"gives values that are not finite on text 0"):
        measured(broken, text(60), methods=["h2o"])


def test_batches_that_are_no_ids_of_the_model(load_model: Any) -> None:
    model = load_model("llama-bard")
    for batch in ("Shall I compare thee", [[1, 2, 3], [4, 5]]):
        with pytest.raises(BnvizError, match=r"is no array of numbers, expected token ids"):
            measured(model, batch)
    with pytest.raises(BnvizError, match=r"holds ids from 5 to 5000, and LlamaForCausalLM knows 0 to 1023"):
        measured(model, [[5, 5000, 7]])


def test_names_and_attention_that_do_not_fit(load_model: Any) -> None:
    model = load_model("llama-bard")
    with pytest.raises(UnknownName, match=r"Unknown way to give tokens out 'ada'.*Valid: adakv, d2o"):
        measured(model, text(64), methods=["h2o+ada"])
    with pytest.raises(
        SchemaError, match=r"h2o\+adakv is given no options, and h2o with another way \{'recent': 0.5\}"
    ):
        measured(model, text(64), methods={"h2o": {"recent": 0.5}, "h2o+adakv": {}})
    with pytest.raises(SchemaError, match=r"methods is empty"):
        measured(model, text(64), methods=[])
    config = model.config
    before = config._attn_implementation
    config._attn_implementation = "flash_attention_2"  # only its name is read here
    try:
        with pytest.raises(
            BnvizError, match=r"'flash_attention_2', and unlike budgets can be measured with sdpa or eager"
        ):
            readable(model)
    finally:
        config._attn_implementation = before


def test_nothing_is_left_on_the_model(load_model: Any) -> None:
    model = load_model("llama-bard")
    before = hooks(model)
    measured(model, text(64), methods=["h2o+adakv"], budgets=[0.5], greedy=1)
    assert hooks(model) == before
