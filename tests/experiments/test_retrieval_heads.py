"""Retrieval heads by a prompt told again: heads solved on paper, whole attention matrices, and what it leaves behind."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bnviz
from bnviz.errors import BnvizError, SchemaError
from bnviz.experiments._prompt import context_of, ids_of, told_again

from .test_kv_eviction import hooks

LETTERS = sorted({*b"\n !',-.12:;?ABCDEFGHIJKLMNOPRSTUWYZabcdefghiklmnoprstuvwxyz"})


def measured(model: nn.Module, **options: Any) -> xr.Dataset:
    return bnviz.experiment(model, None, "retrieval_heads", progress=False, **options)["retrieval_heads"]


# ---------------------------------------------------------------------------------------------------------------- on paper
class Head(nn.Module):
    """Attention whose queries and keys are one-hot tokens or places; `kinds` says which, a head each."""

    def __init__(self, kinds: tuple[str, ...], back: int) -> None:
        super().__init__()
        self.kinds, self.back = kinds, back

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        places = torch.eye(hidden.shape[1]).expand(len(hidden), -1, -1)
        before = torch.cat([0 * hidden[:, :1], hidden[:, :-1]], 1)  # what a previous-token head hands to the next layer
        pairs = {
            "echo": (hidden, hidden),
            "induction": (hidden, before),
            "fixed": (torch.roll(places, -self.back, -1), places),
            "even": (0 * hidden, hidden),
        }
        width = max(hidden.shape[1:])
        query, key = (
            torch.stack([nn.functional.pad(of, (0, width - of.shape[-1])) for of in side], 1)
            for side in zip(*(pairs[kind] for kind in self.kinds), strict=True)
        )
        value = hidden[:, None].expand(-1, len(self.kinds), -1, -1)
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=60.0)
        return hidden + 0 * out.mean(1)


class Made(nn.Module):
    """Two blocks of such heads on one-hot tokens; no position is encoded but for the head that looks a fixed way back."""

    def __init__(self, tokens: int, *kinds: str, back: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(tokens, tokens, _weight=torch.eye(tokens))
        self.layers = nn.ModuleList(Head(kinds, back) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_echo_and_induction_solved_on_paper() -> None:
    """An echo head spreads evenly over the copies and the token itself: (r - 1) / r in the r-th block. Induction: all of it."""
    found = measured(Made(12, "echo", "induction", "even"), tokens=12, repeats=4, prompts=2)
    shares = np.mean([1 / 2, 2 / 3, 3 / 4])
    np.testing.assert_allclose(found["echo"].values[:, :, 0], shares, atol=1e-6)
    np.testing.assert_allclose(found["echo_latest"].values[:, :, 0], np.mean([1 / 2, 1 / 3, 1 / 4]), atol=1e-6)
    np.testing.assert_allclose(found["induction"].values[:, :, 0], 0, atol=1e-6)
    np.testing.assert_allclose(found["induction"].values[:, :, 1], 1, atol=1e-6)
    np.testing.assert_allclose(found["echo"].values[:, :, 1], 0, atol=1e-6)
    latest = np.mean([1 / (n // 12) for n in range(12, 48)])
    np.testing.assert_allclose(found["induction_latest"].values[:, :, 1], latest, atol=1e-6)
    even = np.mean([(n // 12) / (n + 1) for n in range(12, 48)])
    np.testing.assert_allclose(found["even"], even, atol=1e-6)
    np.testing.assert_allclose(found["echo"].values[:, :, 2], even, atol=1e-6)
    np.testing.assert_allclose(found["induction"].values[:, :, 2], even, atol=1e-6)
    assert found.attrs["tokens"] == 48 and found.attrs["block"] == 12


def test_a_head_that_looks_a_fixed_way_back_is_told_by_its_control() -> None:
    found = measured(Made(24, "fixed", "echo", back=12), tokens=12, repeats=2, prompts=1)
    assert float(found["echo"][0, 0, 0]) == pytest.approx(1)
    assert float(found["echo_control"][0, 0, 0]) == pytest.approx(1)
    assert float(found["echo"][0, 0, 1]) == pytest.approx(0.5)
    same = shuffled_in_place(24, 12)
    assert float(found["echo_control"][0, 0, 1]) == pytest.approx(0.5 * same, abs=1e-6)


def shuffled_in_place(vocabulary: int, tokens: int) -> float:
    """Share of the second block that stands where it stood in the first, by chance."""
    _, shuffled = told_again(torch.arange(vocabulary), tokens, 0, repeats=2, first=None)
    return float((shuffled[0, :tokens] == shuffled[0, tokens:]).double().mean())


# ------------------------------------------------------------------------------------------------- whole attention matrices
def by_hand(weights: torch.Tensor, tokens: int, first: int) -> dict[str, np.ndarray]:
    """(layer, head) of attention (layer, head, query, key), key by key."""
    layers, heads, every, _ = weights.shape
    made = {name: np.zeros((layers, heads)) for name in ("echo", "induction", "echo_latest", "induction_latest")}
    counted = 0
    for query in range(first + tokens, every):
        copies = list(range(query - tokens, first - 1, -tokens))
        counted += 1
        for name, beside in (("echo", 0), ("induction", 1)):
            at = [key + beside for key in copies]
            made[name] += weights[:, :, query, at].sum(-1).numpy()
            made[f"{name}_latest"] += weights[:, :, query, at[0]].numpy()
    return {name: values / counted for name, values in made.items()}


@pytest.mark.parametrize(("tokens", "repeats", "first"), [(7, 4, None), (5, 3, 3), (3, 2, None)])
def test_against_whole_attention_matrices(load_model: Any, tokens: int, repeats: int, first: int | None) -> None:
    model = load_model("llama-bard")
    found = measured(model, tokens=tokens, repeats=repeats, first=first, prompts=2, seed=5)
    for at, seed in enumerate((5, 6)):
        prompts = told_again(ids_of(model, None, None), tokens, seed, repeats=repeats, first=first)
        for prompt, suffix in zip(prompts, ("", "_control"), strict=True):
            with torch.no_grad():
                weights = load_model("llama-bard", "eager")(prompt, output_attentions=True).attentions
            wanted = by_hand(torch.cat(weights).double(), tokens, int(first is not None))
            for name in ("echo", "induction") if suffix else wanted:
                np.testing.assert_allclose(found[f"{name}{suffix}"].values[at], wanted[name], atol=2e-6)
    assert found["kv_heads"].values.tolist() == [2] * 4
    assert found["bytes_per_token"].values.tolist() == [2 * 2 * 16 * 4] * 4
    assert found["sample"].values.tolist() == [5, 6]


def test_the_latest_copy_is_what_the_probe_attention_has(load_model: Any) -> None:
    model = load_model("llama-bard")
    found = measured(model, tokens=9, repeats=3, prompts=1)
    prompt, _ = told_again(ids_of(model, None, None), 9, 0, repeats=3, first=None)
    with torch.no_grad(), bnviz.capture(model, probes=["attention"], progress=False) as recorder:
        model(prompt)
    for name in ("echo", "induction"):
        masses = recorder.run["attention"][f"{name}_mass"].values[0, :, :, 9:]
        np.testing.assert_allclose(found[f"{name}_latest"].values[0], masses.mean(-1), atol=1e-6)


@pytest.mark.parametrize("family", ["Mistral", "Qwen3", "GPT2", "Bloom", "Gemma2"])
def test_of_other_families_too(family: str) -> None:
    """A sliding window, norms of queries and keys, learned positions, a bias in the mask, a softcap."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    more: dict[str, dict[str, Any]] = {
        "Mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 8},
        "Qwen3": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        "Bloom": {"n_layer": 2, "n_head": 4},
        "Gemma2": {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8},
    }
    if family in ("GPT2", "Bloom"):
        sizes = {"vocab_size": 64} | ({"hidden_size": 32} if family == "Bloom" else {})
    torch.manual_seed(0)
    heads = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{family}Config")(**sizes, **more[family])
    kind = getattr(transformers, f"{family}{heads}")
    config._attn_implementation = "eager"
    model = kind(config).eval()
    found = measured(model, tokens=6, repeats=3, prompts=1)
    prompt, _ = told_again(ids_of(model, None, None), 6, 0, repeats=3, first=None)
    with torch.no_grad():
        weights = torch.cat(model(prompt, output_attentions=True).attentions).double()
    for name, wanted in by_hand(weights, 6, 0).items():
        np.testing.assert_allclose(found[name].values[0], wanted, atol=1e-5)
    alike = (weights > 0).double()
    even = by_hand(alike / alike.sum(-1, keepdim=True), 6, 0)
    np.testing.assert_allclose(found["even"].values[0], np.maximum(even["echo"], even["induction"])[:, 0], atol=1e-6)


# -------------------------------------------------------------------------------------------------------- trained models
def test_the_known_circuit_is_found_and_nothing_in_the_control(load_model: Any) -> None:
    found = measured(load_model("llama-induction-byte"), tokens=16, vocabulary=LETTERS).mean("sample")
    excess = (found["induction"] - found["induction_control"]).values
    assert np.unravel_index(excess.argmax(), excess.shape) == (1, 3) and excess.max() > 0.4
    assert np.sort(excess.ravel())[-2] < 0.1
    assert float(found["induction"][1, 3]) > 1.3 * float(found["induction_latest"][1, 3])
    control = measured(load_model("llama-fixture"), tokens=16, vocabulary=LETTERS).mean("sample")
    assert float(control["induction"].max()) > 0.15  # a head that looks 15 tokens back
    assert float((control["induction"] - control["induction_control"]).max()) < 0.05


# -------------------------------------------------------------------------------------------------------------- the prompt
def test_ids_leave_special_tokens_out(load_model: Any) -> None:
    from bnviz.demo.models import load

    model, tokenizer = load("llama-bard")
    assert 0 not in ids_of(model, None, None).tolist() and len(ids_of(model, None, None)) == 1023
    known = ids_of(model, tokenizer, None).tolist()
    assert not set(tokenizer.all_special_ids) & set(known)
    assert ids_of(model, None, [7, 0, 9, 9]).tolist() == [7, 9]
    assert ids_of(model, None, torch.tensor([7, 9])).tolist() == [7, 9]
    assert ids_of(model, None, 5).tolist() == [1, 2, 3, 4]
    assert ids_of(Made(9), None, None).tolist() == list(range(9))
    assert context_of(model) == 512 and context_of(Made(9)) is None


def test_blocks_hold_the_same_tokens_in_the_same_and_in_another_order() -> None:
    told, shuffled = told_again(torch.arange(50), 20, 3, repeats=3, first=49)
    assert told.shape == shuffled.shape == (1, 61) and told[0, 0] == 49
    blocks, others = told[0, 1:].view(3, 20), shuffled[0, 1:].view(3, 20)
    assert (blocks == blocks[0]).all() and len(set(blocks[0].tolist())) == 20
    assert (others.sort().values == blocks[0].sort().values).all() and (others[0] == blocks[0]).all()
    assert (others[1] != blocks[1]).any() and (others[2] != others[1]).any()
    assert (told_again(torch.arange(50), 20, 4, repeats=3, first=49)[0] != told).any()


def test_the_default_fits_the_context_and_the_vocabulary(load_model: Any) -> None:
    assert measured(load_model("llama-bard"), prompts=1).attrs["block"] == 128
    assert measured(load_model("llama-bard"), prompts=1, first=0).attrs["tokens"] == 509
    assert (
        measured(load_model("llama-induction-byte"), prompts=1, repeats=2).attrs["block"] == 255
    )  # ids but the one of bos


# ---------------------------------------------------------------------------------------------------------------- manners
def test_the_model_and_all_random_states_are_as_they_were(load_model: Any) -> None:
    model = load_model("llama-bard")
    model.train()
    hung = hooks(model)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    weights = [parameter.clone() for parameter in model.parameters()]
    try:
        one, two = (measured(model, tokens=8, prompts=2) for _ in range(2))
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    xr.testing.assert_identical(one, two)
    assert (torch.get_rng_state() == before[0]).all() and random.getstate() == before[2]
    assert np.random.get_state()[1].tolist() == before[1]
    assert all((new == old).all() for new, old in zip(model.parameters(), weights, strict=True))
    assert hooks(model) == hung


def test_it_goes_on_where_it_stopped(load_model: Any, tmp_path: Path) -> None:
    model, told = load_model("llama-bard"), list[tuple[int, int, str]]()

    def stop(done: int, total: int, case: str) -> None:
        told.append((done, total, case))
        if done == 2 and len(told) == 3:
            raise KeyboardInterrupt

    path, options = tmp_path / "heads.zarr", {"tokens": 6, "prompts": 3, "seed": 4}
    with pytest.raises(KeyboardInterrupt):
        bnviz.experiment(model, None, "retrieval_heads", path=path, progress=stop, **options)
    assert told == [(0, 3, "4"), (1, 3, "5"), (2, 3, "6")]
    run = bnviz.experiment(model, None, "retrieval_heads", path=path, progress=False, **options)
    xr.testing.assert_identical(run["retrieval_heads"], measured(model, **options))
    xr.testing.assert_equal(bnviz.open(path)["retrieval_heads"], run["retrieval_heads"])


def test_a_batch_is_neither_needed_nor_read(load_model: Any) -> None:
    model = load_model("llama-bard")
    given = bnviz.experiment(model, [[1, 2, 3]], "retrieval_heads", tokens=6, prompts=1)["retrieval_heads"]
    xr.testing.assert_identical(given, measured(model, tokens=6, prompts=1))
    with pytest.raises(BnvizError, match="kv_eviction: nothing could be measured; give a batch of token ids"):
        bnviz.experiment(model, None, "kv_eviction")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 2}, "tokens is 2, expected a whole number, 3 or more"),
        ({"repeats": 1}, "repeats is 1, expected a whole number, 2 or more"),
        ({"prompts": 0}, "prompts is 0, expected a whole number, 1 or more"),
        ({"seed": -1}, "seed is -1, expected a whole number, 0 or more"),
        ({"vocabulary": True}, "vocabulary is True, expected a whole number"),
        ({"first": 1.5}, "first is 1.5, expected a whole number"),
    ],
)
def test_options_out_of_range(load_model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        measured(load_model("llama-bard"), **options)


def test_prompts_that_do_not_fit(load_model: Any) -> None:
    model = load_model("llama-bard")
    with pytest.raises(BnvizError, match="tokens is 1500, and 1023 ids of the model's vocabulary"):
        measured(model, tokens=1500)
    with pytest.raises(BnvizError, match="4 blocks of 200 tokens are 800, and the model reads 512"):
        measured(model, tokens=200)
    with pytest.raises(BnvizError, match="4 blocks of 2 tokens are 8"):
        measured(model, vocabulary=[5, 6])


def test_models_without_words_or_attention() -> None:
    with pytest.raises(BnvizError, match="does not say how many tokens it knows; give vocabulary="):
        measured(nn.Linear(2, 2), tokens=4)
    with pytest.raises(BnvizError, match="no attention found in"):
        measured(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), tokens=4)
