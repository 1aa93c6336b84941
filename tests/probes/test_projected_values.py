"""Norms of values behind the output projection: against the model's own weights, family by family; and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnviz
from bnviz.errors import NotCaptured
from bnviz.observation import AttentionSeen, Context, Projection, Site
from bnviz.probes.projected_values import ProjectedValues, _norms

from .test_query_moments import ids_of, small

PROJECTIONS = {"gpt2": "c_proj", "gpt_neox": "dense", "opt": "out_proj", "gptj": "out_proj", "phi": "dense"}
FAMILIES = ("llama", "qwen3", "gemma3_text", "olmo2", "phi", "gpt_neox", "gptj", "gpt2", "opt")
PROBES = ["projected_values", "keys_values", "attention"]


def captured(model: nn.Module, *args: Any, probes: Any = "projected_values", **kwargs: Any) -> Any:
    with bnviz.capture(model, probes=probes, strict=True) as recorder, torch.no_grad():
        model(*args, **kwargs)
    return recorder.run


def matrices(model: nn.Module, kind: str, heads: int) -> list[Tensor]:
    """(heads, dim, features) float64 of each layer, by the name that the family gives the module."""
    name = PROJECTIONS.get(kind, "o_proj")
    found = [
        m for n, m in model.named_modules() if (n.endswith(name) and "attn" in n) or n.endswith(f"attention.{name}")
    ]
    weights = [m.weight if type(m).__name__ == "Conv1D" else m.weight.T for m in found]
    return [w.detach().double().unflatten(0, (heads, -1)) for w in weights]


def expected(value: Tensor, matrix: Tensor) -> Tensor:
    """(batch, heads, keys): value (batch, kv_heads, keys, dim)."""
    repeated = value.double().repeat_interleave(len(matrix) // value.shape[1], 1)
    return torch.einsum("bhkd,hdf->bhkf", repeated, matrix).abs().sum(-1)


# ---------------------------------------------------------------------------------------------------- families
@pytest.mark.parametrize("kind", FAMILIES)
def test_norms_are_those_of_the_models_own_matrices(kind: str) -> None:
    model = small(kind)
    ids = ids_of(model, 2, 21)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    record = captured(model, ids)["projected_values"]
    assert record["verified"].values.tolist() == [[1.0, 1.0]]
    for layer, matrix in enumerate(matrices(model, kind, 4)):
        wanted = expected(cache.layers[layer].values, matrix)
        for sequence in range(2):
            where = record["key_sequence"].values.reshape(-1) == sequence
            found = record["value_norm_projected"].values[0, layer][:, where]
            np.testing.assert_allclose(found, wanted[sequence], rtol=2e-5)


def test_padding_in_front_changes_nothing() -> None:
    model = small("llama")
    ids = ids_of(model, 1, 17)
    padded = F.pad(ids, (5, 0), value=0).repeat(2, 1)
    padded[0] = ids_of(model, 1, 22)[0]
    mask = torch.ones_like(padded)
    mask[1, :5] = 0
    record = captured(model, input_ids=padded, attention_mask=mask)["projected_values"]
    alone = captured(model, ids)["projected_values"]["value_norm_projected"].values
    where = record["key_sequence"].values.reshape(-1) == 1
    assert record["verified"].values.tolist() == [[1.0, 1.0]] and where.sum() == 17
    np.testing.assert_allclose(record["value_norm_projected"].values[..., where], alone, rtol=1e-3)


def test_half_precision_is_summed_in_float32() -> None:
    model = small("llama").to(torch.bfloat16)
    ids = ids_of(model, 1, 33)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    record = captured(model, ids)["projected_values"]
    assert record["verified"].values.tolist() == [[1.0, 1.0]]
    wanted = expected(cache.layers[0].values, matrices(model, "llama", 4)[0])
    np.testing.assert_allclose(record["value_norm_projected"].values[0, 0], wanted[0], rtol=1e-5)


def test_torchs_own_attention() -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(24, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.attn(x, x, x, need_weights=False)[0]
            return x + mixed

    model, x = nn.Sequential(Block(), Block()).eval(), torch.randn(1, 9, 24)
    record = captured(model, x)["projected_values"]
    value = F.linear(x, *(one[48:] for one in (model[0].attn.in_proj_weight, model[0].attn.in_proj_bias)))
    matrix = model[0].attn.out_proj.weight.detach().T.double().unflatten(0, (3, 8))
    wanted = expected(value.detach().unflatten(2, (3, 8)).transpose(1, 2), matrix)
    np.testing.assert_allclose(record["value_norm_projected"].values[0, 0], wanted[0], rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- by hand
class Hand(nn.Module):
    """Attention of two heads; the output passes `between` before the projection, and the projection may be called otherwise."""

    def __init__(self, between: Any = None, more: bool = False) -> None:
        super().__init__()
        self.qkv, self.out, self.between = nn.Linear(16, 48), nn.Linear(16, 16, bias=False), between
        self.after = nn.Linear(16, 16) if more else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        mixed = mixed if self.between is None else self.between(mixed)
        made: Tensor = self.out(mixed)
        return made if self.after is None else self.after(made)


class Body(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": Hand(**options)}) for _ in range(2))
        self.register_buffer("zero", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["attn"](x)
        return x


@pytest.mark.parametrize("more", [False, True])
def test_the_projection_is_told_from_a_module_that_only_fits_it(more: bool) -> None:
    model, x = Body(more=more).eval(), torch.randn(1, 11, 16)
    record = captured(model, x)["projected_values"]
    hand = model.layers[0]["attn"]
    value = hand.qkv(x).detach().unflatten(-1, (3, 2, 8))[:, :, 2].transpose(1, 2)
    wanted = expected(value, hand.out.weight.detach().T.double().unflatten(0, (2, 8)))
    np.testing.assert_allclose(record["value_norm_projected"].values[0, 0], wanted[0], rtol=1e-5)


@pytest.mark.parametrize("between", [lambda x: x * x.sigmoid(), lambda x: x.flip(-1), lambda x: 2 * x])
def test_what_is_done_before_the_projection_is_noticed(between: Any) -> None:
    record = captured(Body(between=between).eval(), torch.randn(1, 11, 16))["projected_values"]
    assert record["verified"].values.tolist() == [[0.0, 0.0]]
    assert np.isnan(record["value_norm_projected"].values).all()


def test_a_write_into_what_the_projection_was_given_is_noticed() -> None:
    class Writes(Hand):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            made: Tensor = self.out(mixed)
            mixed.zero_()
            return made

    model = Body().eval()
    for layer in model.layers:
        layer["attn"].__class__ = Writes
    assert captured(model, torch.randn(1, 11, 16))["projected_values"]["verified"].values.tolist() == [[0.0, 0.0]]


def test_inference_mode_and_one_token() -> None:
    model = small("llama")
    with bnviz.capture(model, probes="projected_values", strict=True) as recorder, torch.inference_mode():
        model(ids_of(model, 1, 1))
    assert recorder.run["projected_values"]["verified"].values.tolist() == [[1.0, 1.0]]


def test_calls_that_go_on_with_a_cache_have_none() -> None:
    model = small("llama")
    with bnviz.capture(model, probes=PROBES, strict=True) as recorder, torch.no_grad():
        model.generate(ids_of(model, 1, 9), max_new_tokens=4, do_sample=False)
    run = recorder.run
    assert "decode" in run["attention"]["phase"].values
    assert run["projected_values"].sizes["step"] == 1 or np.isnan(run["projected_values"]["verified"].values[1]).all()


# ---------------------------------------------------------------------------------------------------- the probe alone
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "features"), [(4, 2, 3, 5), (1, 1, 1, 1), (6, 6, 2, 31)])
def test_chunks_are_the_whole(
    monkeypatch: pytest.MonkeyPatch, heads: int, kv_heads: int, dim: int, features: int
) -> None:
    generator = torch.Generator().manual_seed(heads)
    value = torch.randn(2, kv_heads, 13, dim, dtype=torch.float64, generator=generator)
    weight = torch.randn(heads, dim, features, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(_norms(value, weight), expected(value, weight))
    monkeypatch.setattr(sys.modules[ProjectedValues.__module__], "AT_ONCE", 3 * features)
    torch.testing.assert_close(_norms(value, weight), expected(value, weight))


def test_without_a_projection_or_values_there_is_no_norm() -> None:
    q, v = torch.zeros(1, 2, 3, 4), torch.zeros(1, 1, 3, 0)
    site, context = Site("attention", "attn", 0), Context(0, 0, "forward")
    onto = Projection(torch.zeros(2, 4, 5), torch.tensor(True))
    for value, projection in ((v, onto), (q[:, :1], None)):
        seen = AttentionSeen(site, context, q, q[:, :1], value, None, True, 1.0, projection=projection)
        kept = ProjectedValues().observe(seen)
        assert kept["value_norm_projected"].isnan().all() and kept["verified"] == 0
        assert kept["value_norm_projected"].shape == (1, 2, 3)


# ---------------------------------------------------------------------------------------------------- the score
def test_value_norm_ranks_by_it() -> None:
    model = small("llama")
    run = captured(model, ids_of(model, 1, 40), probes=PROBES)
    options = {"kv_importance": {"methods": {"value_norm": {"norm": "projected"}}}}
    result = bnviz.diagnose(run, "kv_importance", strict=True, options=options)["kv_importance"]
    norms = run["projected_values"]["value_norm_projected"].values[0].reshape(2, 2, 2, 40)
    np.testing.assert_allclose(result["score"].values[0], norms.mean(2), rtol=1e-6)
    with pytest.raises(NotCaptured, match=r"needs .value_norm_projected.*add \"projected_values\" to probes="):
        bnviz.diagnose(
            captured(model, ids_of(model, 1, 40), probes=PROBES[1:]), "kv_importance", strict=True, options=options
        )


def test_an_eviction_captures_what_its_scores_read() -> None:
    model = small("llama")
    methods = {"value_norm": {"norm": "projected"}, "keyformer": {}, "expected_attention": {}}
    run = bnviz.experiment(model, ids_of(model, 1, 40), "kv_eviction", methods=methods, budgets=[0.5], greedy=0)
    assert run["kv_eviction"]["method"].values.tolist() == list(methods)
    assert np.isfinite(run["kv_eviction"]["divergence"].values).all()


# ---------------------------------------------------------------------------------------------------- what looks like it
@pytest.mark.parametrize("noisy", [False, True])
def test_a_parametrized_matrix_is_never_read(noisy: bool) -> None:
    class Noise(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + 0.1 * torch.randn_like(weight)

    def run(watch: bool) -> tuple[Tensor, Tensor]:
        model = Body().train()
        for layer in model.layers:
            out = layer["attn"].out
            if noisy:
                nn.utils.parametrize.register_parametrization(out, "weight", Noise())
            else:
                nn.utils.parametrizations.spectral_norm(out)
        torch.manual_seed(3)
        x = torch.randn(1, 11, 16)
        if not watch:
            return model(x).detach(), torch.get_rng_state()
        with bnviz.capture(model, probes="projected_values", strict=True) as recorder:
            made = model(x).detach()
        assert recorder.run["projected_values"]["verified"].values.tolist() == [[0.0, 0.0]]
        return made, torch.get_rng_state()

    for plain, watched in zip(run(False), run(True), strict=True):
        assert torch.equal(plain, watched)


def test_an_adapter_beside_the_matrix_is_not_taken_for_it() -> None:
    class Adapted(nn.Module):
        """LoRA as its libraries have it: the matrix, and a narrow pair of matrices beside it that reads the same."""

        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.down, self.up = base, nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.base(x) + self.up(self.down(x))
            return made

    model, x = Body().eval(), torch.randn(1, 11, 16)
    before = captured(model, x)["projected_values"]["value_norm_projected"].values[0, 0]
    for layer in model.layers:
        layer["attn"].out = Adapted(layer["attn"].out)
    record = captured(model, x)["projected_values"]
    np.testing.assert_array_equal(record["value_norm_projected"].values[0, 0], before)


def test_two_matrices_that_read_the_heads_are_none() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.one(x) + self.two(x)
            return made

    model = Body().eval()
    for layer in model.layers:
        layer["attn"].out = Both()
    assert captured(model, torch.randn(1, 11, 16))["projected_values"]["verified"].values.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("between", [lambda x: x * x.sigmoid(), lambda x: x.flip(-1)])
def test_what_is_done_before_the_projection_is_noticed_in_half_precision(between: Any) -> None:
    model = Body(between=between).to(torch.bfloat16).eval()
    record = captured(model, torch.randn(1, 40, 16, dtype=torch.bfloat16))["projected_values"]
    assert record["verified"].values.tolist() == [[0.0, 0.0]]


def test_a_forward_of_ones_own_on_torchs_attention_is_asked() -> None:
    class Gated(nn.MultiheadAttention):
        def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
            q, k, v = (
                F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out_proj(10 * mixed * x.sigmoid()), None

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = Gated(24, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(x)[0]

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).eval()
    with bnviz.capture(model, probes=["attention", "projected_values"]) as recorder, torch.no_grad():
        model(torch.randn(1, 9, 24))
    kept = (
        recorder.run["projected_values"]["verified"].values if "projected_values" in recorder.run.kinds else np.zeros(1)
    )
    assert not kept.any()
