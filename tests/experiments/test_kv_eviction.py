"""Eviction experiments: against one forward under an explicit mask, on paper, and what they leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bnviz
from bnviz.errors import BnvizError, NotCaptured, SchemaError, StoreError, UnknownName
from bnviz.experiments._cut import cut, layers_of, nbytes
from tests.traces import traces

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(load_model: Any) -> Any:
    return load_model("llama-bard")


def text(tokens: int, begin: int = 5) -> torch.Tensor:
    made = torch.Generator().manual_seed(begin)
    return torch.randint(5, 900, (1, tokens), generator=made)


def hooks(model: Any) -> list[tuple[int, ...]]:
    """What hangs on each module; transformers leaves hooks of its own where attention weights were asked for once."""
    return [(*m._forward_pre_hooks, *m._forward_hooks) for m in model.modules()]


def measured(model: Any, ids: Any, **options: Any) -> xr.Dataset:
    return bnviz.experiment(model, ids, "kv_eviction", progress=False, **options)["kv_eviction"]


OF_LLAMA = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


# ------------------------------------------------------------------------------------------------------------ against a mask
def under_a_mask(model: Any, ids: torch.Tensor, end: int, kept: list[int]) -> torch.Tensor:
    """Logits of the rest of a text in one forward whose rows after the prompt see only the kept tokens of it."""
    tokens = ids.shape[1]
    sees = torch.ones(tokens, tokens).tril().bool()
    sees[end:, :end] = False
    sees[end:, kept] = True
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(1, 1, tokens, tokens, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    with torch.no_grad():
        return model(ids, attention_mask=mask).logits[0, end:].double()


@pytest.mark.parametrize("budget", [0.25, 0.5])
def test_it_is_what_a_mask_over_the_dropped_keys_gives(model: Any, budget: float) -> None:
    ids = text(64)
    found = measured(model, ids, methods={"streaming_llm": {"sinks": 4}}, budgets=[budget], prompt=48, greedy=0)
    many = int(budget * 48)
    kept = [*range(4), *range(48 - many + 4, 48)]
    with torch.no_grad():
        whole = model(ids).logits[0, 48:].double()
    cut_off = under_a_mask(model, ids, 48, kept)
    apart = (whole.softmax(-1) * (whole.log_softmax(-1) - cut_off.log_softmax(-1))).sum(-1)
    losses = [float(torch.nn.functional.cross_entropy(logits[:-1], ids[0, 49:])) for logits in (cut_off, whole)]
    at = {"sample": 0, "method": 0, "budget": 0}
    assert float(found["divergence"].isel(at)) == pytest.approx(float(apart.mean()), rel=1e-4)
    assert float(found["divergence_most"].isel(at)) == pytest.approx(float(apart.max()), rel=1e-4)
    assert float(found["loss_change"].isel(at)) == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert float(found["loss"][0]) == pytest.approx(losses[1], rel=1e-6)
    assert float(found["same_token"].isel(at)) == pytest.approx(
        float((whole.argmax(-1) == cut_off.argmax(-1)).double().mean())
    )
    cache = 2 * 4 * 2 * 16 * 4  # keys and values, layers, kv heads, dim, float32
    assert (float(found["bytes_whole"][0]), float(found["bytes_kept"].isel(at))) == (48 * cache, many * cache)


FAMILIES = {
    "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "Qwen3": {"head_dim": 8},
    "GPTNeoX": {"num_key_value_heads": None},
    "GPTJ": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "Mixtral": {"num_local_experts": 4},
    "Falcon": {"num_key_value_heads": None},
}


@pytest.mark.parametrize(
    ("family", "dtype"), [*((name, torch.float32) for name in FAMILIES), ("Qwen3", torch.bfloat16)]
)
def test_of_other_families_too(family: str, dtype: torch.dtype) -> None:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2} | FAMILIES[family]
    sizes = {
        name: value
        for name, value in sizes.items()
        if value is not None and not (name in OF_LLAMA and "n_embd" in sizes)
    }
    torch.manual_seed(0)
    heads = {"GPT2": "LMHeadModel"}.get(family, "ForCausalLM")
    other = (
        getattr(transformers, f"{family}{heads}")(getattr(transformers, f"{family}Config")(**sizes)).to(dtype).eval()
    )
    ids = text(40) % 120
    found = measured(other, ids, methods=["streaming_llm"], budgets=[0.5, 1.0], prompt=32, greedy=2)["divergence"]
    with torch.no_grad():
        whole = other(ids).logits[0, 32:].double()
    cut_off = under_a_mask(other, ids, 32, [*range(4), *range(20, 32)])
    apart = (whole.softmax(-1) * (whole.log_softmax(-1) - cut_off.log_softmax(-1))).sum(-1).mean()
    assert float(found.isel(sample=0, method=0, budget=0)) == pytest.approx(
        float(apart), rel=0.02 if dtype != torch.float32 else 1e-3
    )
    assert float(found.isel(sample=0, method=0, budget=1)) == 0


def test_attention_outputs_are_those_under_the_mask(model: Any) -> None:
    ids, outputs = text(40), [list[torch.Tensor](), list[torch.Tensor]()]
    found = measured(model, ids, methods=["streaming_llm"], budgets=[0.5], prompt=32, greedy=0)
    for run, kept in enumerate((list(range(32)), [*range(4), *range(20, 32)])):
        hooks = [
            layer.self_attn.register_forward_hook(
                lambda _, __, out, to=outputs[run]: to.append(out[0][0, 32:].double())
            )
            for layer in model.model.layers
        ]
        under_a_mask(model, ids, 32, kept)
        for hook in hooks:
            hook.remove()
    error = [float((cut_off - whole).norm() / whole.norm()) for whole, cut_off in zip(*outputs, strict=True)]
    np.testing.assert_allclose(found["output_error"].isel(sample=0, method=0, budget=0), error, rtol=1e-4)
    assert found["path"].values.tolist() == [f"model.layers.{n}.self_attn" for n in range(4)]


def test_greedy_decoding_is_that_of_the_model(model: Any) -> None:
    ids = text(40)
    expected = model.generate(ids[:, :30], max_new_tokens=7, do_sample=False, pad_token_id=0, eos_token_id=None)[0, 30:]
    from bnviz.experiments._passage import Passage
    from bnviz.experiments._subject import subject
    from bnviz.experiments.kv_eviction import KvEviction

    with torch.no_grad():
        made = Passage(subject(model, ids), 0, (30, 40), KvEviction(methods=["random"], greedy=6))
        assert [made._next, *made._greedy] == expected.tolist()


# -------------------------------------------------------------------------------------------------------------- properties
def test_the_whole_cache_changes_nothing(model: Any) -> None:
    found = measured(model, text(50), budgets=[1.0], greedy=5, probes={"window": 8})
    assert found.sizes["method"] > 10
    assert (found["divergence"] == 0).all() and (found["divergence_most"] == 0).all()
    assert (found["loss_change"] == 0).all() and (found["output_error"] == 0).all()
    assert (found["same_token"] == 1).all() and (found["greedy_kept"] == 5).all()


def test_a_padded_batch_is_each_text_alone(model: Any) -> None:
    one, two = text(48), text(40, begin=7)
    batch = {
        "input_ids": torch.cat([one, torch.cat([torch.zeros(1, 8, dtype=torch.long), two], 1)]),
        "attention_mask": torch.tensor([[1] * 48, [0] * 8 + [1] * 40]),
    }
    options: dict[str, Any] = {"methods": ["tova", "random"], "budgets": [0.3], "greedy": 3}
    both = measured(model, batch, **options)
    for sample, alone in enumerate((one, two)):
        xr.testing.assert_allclose(
            both.isel(sample=[sample]).drop_vars("sample"), measured(model, alone, **options).drop_vars("sample")
        )


def test_each_head_keeps_its_own_tokens(model: Any) -> None:
    with torch.no_grad():
        cache = (
            model(text(20), use_cache=True).cache
            if hasattr(model(text(2)), "cache")
            else model(text(20)).past_key_values
        )
    layers = layers_of(cache)
    kept = [torch.tensor([[0, 5], [3, 19]])] * len(layers)
    made = layers_of(cut(cache, layers, kept))
    assert nbytes(made) * 10 == nbytes(layers)
    for (keys, values), (some, of_some) in zip(layers, made, strict=True):
        assert torch.equal(some[0, 0], keys[0, 0, [0, 5]]) and torch.equal(some[0, 1], keys[0, 1, [3, 19]])
        assert torch.equal(of_some[0, 1], values[0, 1, [3, 19]])
    whole = cut(cache, layers, None)
    layers_of(whole)[0][0].zero_()
    assert layers[0][0].any()  # a copy


# ------------------------------------------------------------------------------------------------- the model does not notice
def test_the_model_is_as_it_was(model: Any) -> None:
    ids = text(40)
    model.train()
    before, state, random = traces(model), {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    try:
        measured(model, ids, methods=["random"], budgets=[0.5], greedy=2)
        assert traces(model) == before
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(p, state[n]) and p.grad is None for n, p in model.named_parameters())
    finally:
        model.eval()


def test_an_interrupt_leaves_the_model_as_it_was_and_says_what_becomes_of_the_rest(model: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int, case: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    before = traces(model)
    options: dict[str, Any] = {"methods": ["random", "tova"], "budgets": [0.3, 0.6], "greedy": 2}
    with pytest.raises(KeyboardInterrupt) as interrupted:
        bnviz.experiment(model, text(40), "kv_eviction", progress=stop, **options)
    assert "interrupted after 2 cases; it is lost: give path=" in interrupted.value.__notes__[0]
    assert traces(model) == before


# ---------------------------------------------------------------------------------------------------------------- resumable
def test_it_goes_on_where_it_stopped(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnviz.experiments._passage import Passage

    path, ids = tmp_path / "run.zarr", text(40)
    options: dict[str, Any] = {"methods": ["random", "tova"], "budgets": [0.3, 0.6], "greedy": 2}
    counted, plain = list[str](), Passage.measured

    def counting(self: Any, method: str, budget: float) -> Any:
        counted.append(method)
        return plain(self, method, budget)

    monkeypatch.setattr(Passage, "measured", counting)
    told: list[tuple[int, int, str]] = []

    def stop(done: int, total: int, case: str) -> None:
        told.append((done, total, case))
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as interrupted:
        bnviz.experiment(model, ids, "kv_eviction", path=path, progress=stop, **options)
    partial = tmp_path / "run.zarr.partial"
    assert str(partial) in interrupted.value.__notes__[0]
    assert told[1] == (1, 4, "0 · random · 0.6") and len(counted) == 3
    with partial.open("a") as file:
        file.write('[["kv_eviction", 0, "tova"')  # a process that died in writing
    run = bnviz.experiment(model, ids, "kv_eviction", path=path, progress=False, **options)
    assert len(counted) == 4 and not partial.exists()
    xr.testing.assert_identical(
        run["kv_eviction"], bnviz.experiment(model, ids, "kv_eviction", progress=False, **options)["kv_eviction"]
    )
    assert bnviz.open(path)["kv_eviction"].sizes == run["kv_eviction"].sizes
    with pytest.raises(StoreError, match="exists; choose another path"):
        bnviz.experiment(model, ids, "kv_eviction", path=path, **options)


def test_the_beginnings_of_another_experiment_are_left_alone(model: Any, tmp_path: Path) -> None:
    def stop(done: int, total: int, case: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bnviz.experiment(model, text(40), "kv_eviction", path=tmp_path / "a.zarr", progress=stop, greedy=2)
    held = (tmp_path / "a.zarr.partial").read_text()
    for ids, greedy in ((text(40), 3), (text(40, begin=8), 2)):
        with pytest.raises(StoreError, match="beginnings of another experiment"):
            bnviz.experiment(model, ids, "kv_eviction", path=tmp_path / "a.zarr", greedy=greedy)
    assert (tmp_path / "a.zarr.partial").read_text() == held


# ----------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 4), r"found a batch of torch.float32 of shape \(2, 4\), expected token ids"),
        ({"ids": [1]}, "the batch holds ids, expected 'input_ids'"),
        ({"input_ids": [[1, 2]], "attention_mask": [[1]]}, r"attention_mask is \(1, 1\), expected \(1, 2\)"),
        ([[1, 2, 3]], "text 0 has 3 tokens and its prompt ends at 2"),
    ],
)
def test_a_batch_that_does_not_fit(model: Any, batch: Any, message: str) -> None:
    with pytest.raises(BnvizError, match=message):
        bnviz.experiment(model, batch, "kv_eviction")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": [0.0]}, "expected shares of the cache above 0"),
        ({"prompt": -1}, "expected a share of the text below 1 or a number"),
        ({"prompt": 1.5}, "expected a share of the text below 1 or a number"),
        ({"greedy": -1}, "greedy is -1, expected a whole number"),
        ({"most": 1}, "most is 1, expected a whole number, 2 or more"),
    ],
)
def test_options_out_of_range(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        bnviz.experiment(model, text(20), "kv_eviction", **options)


def test_names_that_do_not_exist(model: Any) -> None:
    with pytest.raises(UnknownName, match="Unknown experiment 'kv_evict'; did you mean 'kv_eviction'"):
        bnviz.experiment(model, text(20), "kv_evict")
    with pytest.raises(UnknownName, match="Unknown option of experiment 'budget'; did you mean 'budgets'"):
        bnviz.experiment(model, text(20), "kv_eviction", budget=[0.5])
    with pytest.raises(UnknownName, match="Unknown score 'h20'"):
        bnviz.experiment(model, text(40), "kv_eviction", methods=["h20"])
    with pytest.raises(BnvizError, match=r"found a int, expected a torch\.nn\.Module"):
        bnviz.experiment(3, text(20))  # type: ignore[arg-type]


def test_models_whose_cache_cannot_be_cut() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    with pytest.raises(BnvizError, match=r"Linear.forward takes no cache; expected a decoder of transformers"):
        bnviz.experiment(nn.Linear(2, 2), [[1, 2, 3, 4, 5, 6, 7, 8, 9]], "kv_eviction")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    sliding = MistralForCausalLM(MistralConfig(vocab_size=64, sliding_window=8, **sizes)).eval()
    with pytest.raises(BnvizError, match="layer 0 keeps a DynamicSlidingWindowLayer, expected every token"):
        bnviz.experiment(sliding, torch.arange(40)[None], "kv_eviction", probes={"window": 4})


def test_a_run_without_it_says_how_to_measure_it(model: Any) -> None:
    with torch.no_grad(), bnviz.capture(model, probes=["attention"]) as recorder:
        model(text(20))
    with pytest.raises(NotCaptured, match=r'bnviz.experiment\(model, batch, "kv_eviction"\)'):
        recorder.run["kv_eviction"]
    assert "bnviz.experiment(model, batch" in bnviz.diagnose(recorder.run).absent["eviction_cost"]
