"""Queries before rotary positions turned them: found in whatever layout and pairing a model has, and only where it is true."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bnviz
from bnviz.capture.attention.turns import misfits, turned, ways
from bnviz.observation import AttentionSeen, Rotary
from bnviz.probes.query_moments import QueryMoments

rotary_of = importlib.import_module("bnviz.capture.attention.rotary")

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = BASE | {"num_key_value_heads": 2}
GPT = {"vocab_size": 97, "n_embd": 128, "n_layer": 2, "n_head": 8, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 2,
}
# what gives the queries, and how many channels turn in each layer
FAMILIES: dict[str, tuple[dict[str, Any], str, tuple[int, ...]]] = {
    "mistral": (GROUPED, "q_proj", (16, 16)),
    "qwen2": (GROUPED, "q_proj", (16, 16)),
    "gemma2": (GROUPED | {"head_dim": 16}, "q_proj", (16, 16)),
    "cohere": (GROUPED, "q_proj", (16, 16)),  # neighbours
    "glm": (GROUPED | {"head_dim": 16}, "q_proj", (8, 8)),  # neighbours, half of the channels
    "stablelm": (GROUPED, "q_proj", (4, 4)),
    "persimmon": (BASE, "q_layernorm", (8, 8)),
    "phi3": (GROUPED, "qkv_proj", (16, 16)),  # queries, keys, values
    "falcon": (
        GROUPED | {"new_decoder_architecture": True, "num_kv_heads": 2},
        "query_key_value",
        (16, 16),
    ),  # by group
    "codegen": (GPT | {"rotary_dim": 8}, "qkv_proj", (8, 8)),  # in four parts
    "gpt_oss": (GROUPED | {"head_dim": 16, "num_local_experts": 4}, "q_proj", (16, 16)),  # YaRN
    "deepseek_v3": (BASE | LATENT, "q_b_proj", (8, 8)),  # the last channels, put into halves
    "smollm3": (GROUPED | {"no_rope_layers": [1, 0]}, "q_proj", (16, 0)),  # a layer without
    "bloom": ({**GPT, "hidden_size": 128}, "query_key_value", (0, 0)),
    "gpt_bigcode": (GPT, "c_attn", (0, 0)),
    "mpt": ({"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 4}, "Wqkv", (0, 0)),
}


def small(kind: str, given: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given)).eval()


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[AttentionSeen]:
    """Observations of the captures that follow."""
    found: list[AttentionSeen] = []

    def observe(self: QueryMoments, seen: AttentionSeen) -> dict[str, Tensor]:
        found.append(seen)
        return {"verified": torch.ones(())}

    monkeypatch.setattr(QueryMoments, "observe", observe)
    return found


def after(rotary: Rotary) -> Tensor:
    """Queries turned, by the definition."""
    tokens = rotary.query.shape[2]
    angles = rotary.angle[:, None] + rotary.rate[:, None] * torch.arange(1 - tokens, 1)[:, None]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    x = rotary.query.double()
    return cos * x + sin * rotary.sign * x[..., rotary.partner]


def channels(rotary: Rotary) -> int:
    return int((rotary.rate[0].abs() > 1e-7).sum())


@pytest.mark.parametrize("kind", FAMILIES)
def test_families_of_all_layouts(kind: str, shown: list[AttentionSeen]) -> None:
    given, name, turning = FAMILIES[kind]
    model = small(kind, given)
    ids = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    made = []
    for path, module in model.named_modules():
        if path.endswith(f".{name}"):
            module.register_forward_hook(lambda module, args, output: made.append(output.detach()))
    with torch.no_grad(), bnviz.capture(model, probes=["query_moments"], strict=True):
        model(ids)
    assert len(shown) == len(made) == 2
    for seen, count, given_by in zip(shown, turning, made, strict=True):
        assert seen.rotary is not None and seen.rotary.holds.all()
        torch.testing.assert_close(
            after(seen.rotary), seen.query.double(), rtol=1e-3, atol=1e-4 * seen.query.abs().max()
        )
        assert channels(seen.rotary) == count
        if kind != "gpt_oss":  # whose rotation multiplies; of all others, each value is one that the module gave
            assert np.isin(seen.rotary.query.flatten(), given_by.flatten()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions_and_autocast(dtype: torch.dtype, shown: list[AttentionSeen]) -> None:
    model = small("llama", GROUPED)
    ids = torch.randint(3, 97, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), bnviz.capture(model, probes=["query_moments"], strict=True), torch.autocast("cpu", dtype):
        model(ids)
    with torch.no_grad(), bnviz.capture(model.to(dtype), probes=["query_moments"], strict=True):
        model(ids)
    exact = 1e4 ** -(torch.arange(8).double() / 8)
    rounded = model.model.rotary_emb.inv_freq.double()  # of the model in half precision
    for seen, rates in zip(shown, (exact, exact, rounded, rounded), strict=True):
        assert seen.rotary is not None and seen.rotary.holds.all()
        torch.testing.assert_close(seen.rotary.rate[0], rates.repeat(2), rtol=0, atol=5e-6)


def test_positions_go_on_from_any_start(shown: list[AttentionSeen]) -> None:
    model = small("llama", GROUPED)
    ids = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(700, 740)[None]
    with torch.no_grad(), bnviz.capture(model, probes=["query_moments"], strict=True):
        model(ids, position_ids=positions)
    rotary = shown[0].rotary
    assert rotary is not None and rotary.holds.all()
    wanted = 739 * 1e4 ** -(torch.arange(8).double() / 8)
    assert torch.allclose((rotary.angle[0, :8] - wanted).cos(), torch.ones(8).double(), atol=1e-6)


def test_an_error_in_looking_for_queries_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("an error of its own")

    monkeypatch.setattr(rotary_of, "_rotary", fail)
    model, ids = small("llama", GROUPED), torch.arange(3, 43)[None]
    with torch.no_grad(), bnviz.capture(model, probes=["query_moments", "keys_values"]) as recorder:
        model(ids)
    assert (recorder.run["query_moments"]["verified"] == 0).all()
    assert np.isfinite(recorder.run["keys_values"]["key_norm"]).all()
    assert [note for note in recorder.notes if "before rotation" in note and "an error of its own" in note]


# --------------------------------------------------------------------------------------------- as it is decided on a GPU
class Waiting(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"), name
        return function(*args, **(kwargs or {}))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are on a device that is not asked for numbers."""
    monkeypatch.setattr(rotary_of, "_here", lambda values: False)
    held = {name: getattr(rotary_of, name) for name in ("_asked_there", "_rotary")}

    def without_waiting(name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with Waiting():
                return held[name](*args)

        return run

    for name in held:
        monkeypatch.setattr(rotary_of, name, without_waiting(name))
    observe = QueryMoments.observe

    def quietly(self: QueryMoments, seen: AttentionSeen) -> dict[str, Tensor]:
        with Waiting():
            return observe(self, seen)

    monkeypatch.setattr(QueryMoments, "observe", quietly)


KINDS = ("mistral", "falcon", "codegen", "deepseek_v3", "smollm3", "gpt_bigcode", "phi3", "nanochat")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_what_is_decided_without_the_host_is_the_same(kind: str, padded: bool, request: pytest.FixtureRequest) -> None:
    model = small(kind, FAMILIES[kind][0] if kind in FAMILIES else GROUPED)
    ids = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9] = 0

    def watch() -> Any:
        with torch.no_grad(), bnviz.capture(model, probes=["query_moments"], strict=True) as recorder:
            for _ in range(2):
                model(ids, attention_mask=mask)
        return recorder.run["query_moments"]

    here = watch()
    request.getfixturevalue("elsewhere")
    there = watch()
    assert (there["verified"] == here["verified"]).all()
    assert bool((here["verified"] == (0 if kind == "nanochat" else 1)).all())
    np.testing.assert_allclose(there["expected_logit"], here["expected_logit"], rtol=1e-5, atol=1e-5)


def test_what_a_module_that_turns_gave_is_not_taken_for_queries_there_either(elsewhere: None) -> None:
    class Turns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            angles = torch.arange(x.shape[2])[:, None] * 100.0 ** -(torch.arange(8) / 8)
            one, two = x.chunk(2, -1)
            return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.turn = nn.Linear(64, 192), Turns()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (one.unflatten(-1, (4, 16)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
            q, k = (self.turn(nn.functional.rms_norm(one, (16,))) for one in (q, k))
            return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    model = nn.Sequential(Attention(), Attention())
    with torch.no_grad(), bnviz.capture(model, probes=["query_moments"], strict=True) as recorder:
        model(torch.randn(1, 40, 64))
    assert (recorder.run["query_moments"]["verified"] == 0).all()


# ------------------------------------------------------------------------------------------------------- the arithmetic
def rotated(x: Tensor, row: int, rates: Tensor, start: int = 0) -> Tensor:
    """(batch, tokens, heads, dim) of `x`, in the order before, turned in one way, pair by pair."""
    way = ways(x.shape[-1], x.device)
    order, partner, sign = (one[row] for one in way)
    y = x[..., order].double()
    out = y.clone()
    pairs = [(c, int(partner[c])) for c in range(len(sign)) if sign[c] == -1]
    for n, (one, two) in enumerate(pairs):
        angle = ((start + torch.arange(x.shape[1])).double() * rates[n])[:, None]
        out[..., one] = angle.cos() * y[..., one] - angle.sin() * y[..., two]
        out[..., two] = angle.sin() * y[..., one] + angle.cos() * y[..., two]
    return out.to(x.dtype)


@pytest.mark.parametrize("dim", [8, 12, 80])
def test_every_way_is_told_from_all_others(dim: int) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(1, 32, 3, dim, generator=made)
    rates = 1e4 ** -(torch.arange(dim) / dim)
    some = ways(dim, x.device)
    for row in range(1, len(some.sign)):
        left = misfits(rotated(x, row, rates)[0], x[0], some)
        here = some.sign[row] != 0  # a way that turns more channels besides turns those by nothing
        same = ((some.partner == some.partner[row]) | ~here).all(1) & (some.order == some.order[row]).all(1)
        same &= ((some.sign == some.sign[row]) | ~here).all(1)
        assert (left[same] < 1e-6).all()
        assert (left[~same] > 0.02).all(), (row, left)


@pytest.mark.parametrize("tokens", [8, 100, 1000, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_are_exact_far_on(tokens: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, tokens, 4, 16, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rates = 1e4 ** -(torch.arange(8).double() / 8)
    y = 1.25 * rotated(x, 1, rates, start=300)
    way = ways(16, x.device).at(torch.tensor([1]))
    found = turned(y, x, way, None, 1e-3)
    assert found.holds.all()
    torch.testing.assert_close(found.scale.double(), torch.full((16,), 1.25).double(), rtol=1e-5, atol=0)
    far = found.angle[:, :8] + 512 * found.rate[:, :8]
    error = torch.polar(torch.ones_like(far), far - (299 + tokens + 512) * rates).angle()
    assert error.abs().max() < (2e-4 if tokens < 100 else 2e-6)


def test_one_head_or_one_sequence_that_is_turned_otherwise_is_noticed() -> None:
    x = torch.randn(2, 100, 8, 16, generator=torch.Generator().manual_seed(0))
    rates = 1e4 ** -(torch.arange(8).double() / 8)
    y = rotated(x, 1, rates)
    way = ways(16, x.device).at(torch.tensor([1]))
    y[0, :, 5] = x[0, :, 5]
    assert turned(y, x, way, None, 1e-3).holds.tolist() == [False, True]
    y = rotated(x, 1, rates)
    y[1, 50:] = rotated(x[1:, 50:], 1, rates)[0]  # positions begin anew
    assert turned(y, x, way, None, 1e-3).holds.tolist() == [True, False]
