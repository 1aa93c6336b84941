"""Expected logits against the published formula in float64, on models of several families; and what is refused."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnviz
from bnviz.errors import NotCaptured, SchemaError
from bnviz.observation import AttentionSeen, Context, Site
from bnviz.probes.query_moments import QueryMoments
from bnviz.scores import Statistics
from bnviz.scores.expected_attention import expected_attention

SINKS = 4
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": SMALL | {"head_dim": 16},
    "gemma": SMALL | {"head_dim": 32},
    "gemma3_text": SMALL
    | {"head_dim": 16, "sliding_window": 512, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": SMALL,
    "phi": SMALL | {"partial_rotary_factor": 0.5},
    "gpt_neox": SMALL,
    "gptj": GPT | {"rotary_dim": 8},
    "gpt2": GPT,
    "opt": SMALL | {"word_embed_proj_dim": 64, "ffn_dim": 96},
}
QUERIES = {
    "qwen3": "q_norm",
    "gemma3_text": "q_norm",
    "olmo2": "q_norm",
    "gpt_neox": "query_key_value",
    "gpt2": "c_attn",
}


def small(kind: str, seed: int = 0, **more: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(FAMILIES.get(kind, SMALL) | more))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # biases are zeros, and norms ones, in a new model
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ids_of(model: nn.Module, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------ the formula, as it was published
def rotations(model: nn.Module, kind: str, positions: Tensor, dim: int) -> Tensor:
    """(positions, dim, dim) float64: what the model's own functions make of each unit vector."""
    if kind in ("gpt2", "opt"):
        return torch.eye(dim, dtype=torch.float64).expand(len(positions), dim, dim)
    rotary = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    apply = importlib.import_module(type(rotary).__module__).apply_rotary_pos_emb
    units = torch.eye(dim, dtype=torch.float64)[:, None].expand(dim, len(positions), dim)  # (unit, position, dim)
    if kind == "gptj":
        sin, cos = rotary(units.float(), position_ids=positions[None])
        width = 2 * cos.shape[-1]
        turned = apply(units[..., :width].transpose(0, 1)[None], sin.double(), cos.double())[0].transpose(0, 1)
        return torch.cat([turned, units[..., width:]], -1).permute(1, 2, 0)
    cos, sin = rotary(units.float(), positions[None])
    width = cos.shape[-1] if kind == "phi" else dim
    turned = apply(units[None, ..., :width], units[None, ..., :width], cos.double(), sin.double())[0][0]
    return torch.cat([turned, units[..., width:]], -1).permute(1, 2, 0)  # columns are what became of units


def queries_of(model: nn.Module, kind: str, ids: Tensor, mask: Tensor | None = None) -> tuple[list[Tensor], Any]:
    """Queries before rotation (batch, heads, tokens, dim) of each layer by a hook, and the cache."""
    heads, made = model.config.num_attention_heads, list[Tensor]()
    name = QUERIES.get(kind, "q_proj")

    def hear(module: nn.Module, args: Any, output: Tensor) -> None:
        made.append(output)

    hooks = [m.register_forward_hook(hear) for n, m in model.named_modules() if n.endswith(f".{name}")]
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    for hook in hooks:
        hook.remove()
    batch, tokens = ids.shape
    found = []
    for value in made:
        if kind == "gpt_neox":
            laid = value.view(batch, tokens, heads, 3, -1)[..., 0, :]
        elif kind == "gpt2":
            laid = value.chunk(3, -1)[0].view(batch, tokens, heads, -1)
        else:
            laid = value.transpose(1, 2) if kind == "gemma3_text" else value.view(batch, tokens, heads, -1)
        found.append(laid.double().transpose(1, 2))
    return found, cache


def published(query: Tensor, key: Tensor, value: Tensor, mean_turn: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Logits (heads, keys - sinks) and scores (kv_heads, keys - sinks) of one sequence, in float64."""
    query, key, value = query[:, SINKS:], key[:, SINKS:].double(), value[:, SINKS:].double()
    mu = query.mean(1)
    centred = query - mu[:, None]
    sigma = torch.einsum("hsi,hsj->hij", centred, centred) / query.shape[1]
    mu, sigma = mu @ mean_turn.T, mean_turn @ sigma @ mean_turn.T
    each = len(query) // len(key)
    keys = key.repeat_interleave(each, 0)
    logits = scale * torch.einsum("hd,hnd->hn", mu, keys)
    logits = logits + scale**2 / 2 * torch.einsum("hnd,hde,hne->hn", keys, sigma, keys)
    weight = logits.softmax(-1).unflatten(0, (len(key), each)).mean(1)
    return logits, weight * value.norm(dim=-1)


def scale_of(model: nn.Module, kind: str, dim: int) -> float:
    of = next((m for m in model.modules() if hasattr(m, "scaling") and isinstance(m.scaling, float)), None)
    return dim**-0.5 if of is None else of.scaling


def watched(model: nn.Module, *args: Any, **kwargs: Any) -> bnviz.Run:
    probes = ["attention", "keys_values", "query_moments"]
    with torch.no_grad(), bnviz.capture(model, probes=probes, strict=True) as recorder:
        model(*args, **kwargs)
    return recorder.run


def statistics(run: bnviz.Run, layer: int, where: slice = slice(None)) -> Statistics:
    logit = run["query_moments"]["expected_logit"].values[0, layer][:, where]
    norm = run["keys_values"]["value_norm"].values[0, layer][:, where]
    return Statistics(
        expected_logit=logit, value_norm=norm, keys=logit.shape[1], heads=len(logit), kv_heads=len(norm), layer=layer
    )


def check(model: nn.Module, kind: str, run: bnviz.Run, ids: Tensor, rtol: float = 2e-4) -> None:
    queries, cache = queries_of(model, kind, ids)
    tokens = ids.shape[1]
    for layer, query in enumerate(queries):
        dim = query.shape[-1]
        rotary = getattr(model.base_model, "rotary_emb", None)
        if kind == "gemma3_text":
            turns = of_gemma3(model, rotary, layer, torch.arange(tokens, tokens + 512), dim)
        else:
            turns = rotations(model, kind, torch.arange(tokens, tokens + 512), dim)
        held = cache.layers[layer]
        scaled = (
            (query * dim**-0.5, 1.0) if kind == "opt" else (query, scale_of(model, kind, dim))
        )  # OPT scales its queries
        logits, score = published(scaled[0][0], held.keys[0], held.values[0], turns.mean(0), scaled[1])
        found = run["query_moments"]["expected_logit"].values[0, layer]
        assert np.isnan(found[:, :SINKS]).all()
        np.testing.assert_allclose(found[:, SINKS:], logits, rtol=rtol, atol=rtol)
        scores = expected_attention(statistics(run, layer))
        assert np.isinf(scores[:, :SINKS]).all()
        np.testing.assert_allclose(scores[:, SINKS:], score, rtol=5 * rtol)


def of_gemma3(model: nn.Module, rotary: nn.Module, layer: int, positions: Tensor, dim: int) -> Tensor:
    apply = importlib.import_module(type(rotary).__module__).apply_rotary_pos_emb
    units = torch.eye(dim, dtype=torch.float64)[:, None].expand(dim, len(positions), dim)
    cos, sin = rotary(units.float(), positions[None], model.config.layer_types[layer])
    return apply(units[None], units[None], cos.double(), sin.double())[0][0].permute(1, 2, 0)


def test_it_is_the_published_formula_on_a_trained_llama_with_grouped_heads(load_model: Any) -> None:
    model = load_model("llama-bard")
    ids = ids_of(model, 1, 200)
    run = watched(model, ids)
    assert (run["query_moments"]["verified"] == 1).all()
    check(model, "llama", run, ids)


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_is_the_published_formula_on_every_family(kind: str) -> None:
    model = small(kind)
    ids = ids_of(model, 1, 60)
    run = watched(model, ids)
    assert (run["query_moments"]["verified"] == 1).all()
    check(model, kind, run, ids)


@pytest.mark.parametrize("tokens", [9, 300, 900])
def test_angles_are_read_from_texts_of_any_length(tokens: int) -> None:
    model = small("llama")
    ids = ids_of(model, 1, tokens)
    check(model, "llama", watched(model, ids), ids)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 1e4},
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
            "rope_theta": 5e5,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_frequencies_and_a_scaled_rotation_are_the_models_own(rope: dict[str, Any]) -> None:
    model = small("llama", rope_parameters=rope)
    ids = ids_of(model, 1, 60)
    check(model, "llama", watched(model, ids), ids)


def test_half_precision_is_near_what_single_precision_gives() -> None:
    model = small("llama")
    ids = ids_of(model, 1, 300)
    exact = watched(model, ids)["query_moments"]
    half = watched(model.to(torch.bfloat16), ids)["query_moments"]
    assert (half["verified"] == 1).all()
    np.testing.assert_allclose(half["expected_logit"], exact["expected_logit"], atol=0.1, rtol=0.05)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_padded_batch_gives_each_sequence_what_it_has_alone(kind: str, side: str) -> None:
    model = small(kind)
    whole, short = ids_of(model, 1, 50), ids_of(model, 1, 33, seed=2)
    pad = (17, 0) if side == "left" else (0, 17)
    mask = torch.cat([torch.ones_like(whole), F.pad(torch.ones_like(short), pad)])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    both = watched(model, torch.cat([whole, F.pad(short, pad)]), attention_mask=mask, position_ids=positions)
    assert (both["query_moments"]["verified"] == 1).all()
    for ids, where in ((whole, slice(0, 50)), (short, slice(50, 83))):
        alone = watched(model, ids)["query_moments"]["expected_logit"].values
        found = both["query_moments"]["expected_logit"].values[..., where]
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-4)


def test_inference_mode_and_training_give_the_same() -> None:
    model = small("llama")
    ids = ids_of(model, 1, 40)
    expected = watched(model, ids)["query_moments"]
    with bnviz.capture(model, probes=["query_moments"], strict=True) as recorder:
        model(ids).logits.sum().backward()
    assert np.array_equal(recorder.run["query_moments"]["expected_logit"], expected["expected_logit"], equal_nan=True)
    with torch.inference_mode(), bnviz.capture(model, probes=["query_moments"], strict=True) as recorder:
        model(ids)
    assert np.array_equal(recorder.run["query_moments"]["expected_logit"], expected["expected_logit"], equal_nan=True)


def test_generation_keeps_what_the_prompt_gave() -> None:
    model = small("llama")
    ids = ids_of(model, 1, 40)
    with torch.no_grad(), bnviz.capture(model, probes=["query_moments"], strict=True) as recorder:
        model.generate(ids, max_new_tokens=4, do_sample=False)
    found, alone = recorder.run["query_moments"], watched(model, ids)["query_moments"]
    assert list(found["phase"].values)[:1] == ["prefill"]
    np.testing.assert_array_equal(found["expected_logit"][0, ..., :40], alone["expected_logit"][0])


# ------------------------------------------------------------------------------------------------ models written by hand
class ByHand(nn.Module):
    """Attention with rotary positions in one of the ways people write them."""

    def __init__(self, how: str, heads: int = 4, dim: int = 16) -> None:
        super().__init__()
        self.how, self.heads, self.dim = how, heads, dim
        self.qkv, self.out = nn.Linear(64, 3 * heads * dim), nn.Linear(heads * dim, 64)
        self.turn = Turning(how)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (one.unflatten(-1, (self.heads, self.dim)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
        if self.how == "norm before":
            q, k = (F.rms_norm(one, (self.dim,)) for one in (q, k))
        q, k = self.turn(q), self.turn(k)
        if self.how == "norm after":
            q, k = (F.rms_norm(one, (self.dim,)) for one in (q, k))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Turning(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("rates", 100.0 ** -(torch.arange(8) / 8))
        self.strength = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[2], dtype=torch.float32)
        if self.how == "begins anew":
            positions = positions % (x.shape[2] // 2)
        if self.how == "crooked":
            positions = positions.sqrt() * 8
        angles = positions[:, None] * self.rates
        turns = torch.polar(torch.ones_like(angles), angles)
        turned = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (8, 2)).contiguous()) * turns).flatten(-2)
        return x.copy_(turned) if self.how == "in place" else turned


class Stack(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(ByHand(how) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def of_stack(how: str, mode: Any = torch.no_grad) -> Any:
    x = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    model = Stack(how)
    with mode(), bnviz.capture(model, probes=["query_moments", "keys_values"], strict=True) as recorder:
        model(x)
    return recorder.run


def test_complex_numbers_of_a_module_of_its_own_are_understood() -> None:
    run = of_stack("plain")
    assert (run["query_moments"]["verified"] == 1).all()
    model, x = Stack("plain"), torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k, v = (one.unflatten(-1, (4, 16)).transpose(1, 2) for one in model.blocks[0].qkv(x).chunk(3, -1))
        angles = torch.arange(40, 552)[:, None].double() * model.blocks[0].turn.rates
        cos, sin = angles.cos().mean(0), angles.sin().mean(0)
        turn = torch.block_diag(*(torch.tensor([[c, -s], [s, c]]) for c, s in zip(cos, sin, strict=True)))
        logits, _ = published(q[0].double(), model.blocks[0].turn(k)[0], v[0], turn.double(), 0.25)
    np.testing.assert_allclose(run["query_moments"]["expected_logit"][0, 0, :, SINKS:], logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("how", ["norm before", "norm after", "begins anew", "crooked", "in place"])
def test_what_cannot_be_verified_is_refused_with_its_reason(how: str, mode: Any) -> None:
    """The output of the module that turns is what the kernel got, as if nothing had turned it: it must not be believed."""
    if (how, mode) == ("in place", torch.inference_mode):
        run = of_stack(how, mode)  # what the projection gave was copied before
        assert (run["query_moments"]["verified"] == 1).all()
        np.testing.assert_allclose(
            run["query_moments"]["expected_logit"], of_stack("plain")["query_moments"]["expected_logit"], rtol=1e-5
        )
        return
    run = of_stack(how, mode)
    assert (run["query_moments"]["verified"] == 0).all()
    assert np.isnan(run["query_moments"]["expected_logit"]).all()
    with pytest.raises(NotCaptured, match="queries before rotation of layer 1 are not known"):
        expected_attention(statistics(run, 1))


@pytest.mark.parametrize("kind", ["nanochat", "llama4_text"])
def test_a_norm_after_the_rotation_is_refused(kind: str) -> None:
    run = watched(small(kind), torch.arange(3, 60)[None])
    assert (run["query_moments"]["verified"] == 0).all()


def test_a_norm_of_queries_that_nothing_turns_is_understood() -> None:
    class Normed(ByHand):
        def __init__(self, how: str) -> None:
            super().__init__(how)
            self.norm, self.turn = nn.RMSNorm(16), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (one.unflatten(-1, (4, 16)).transpose(1, 2) for one in self.qkv(x).chunk(3, -1))
            q = self.norm(q)
            return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

    model = nn.Sequential(Normed(""), Normed(""))
    with torch.no_grad(), bnviz.capture(model, probes=["query_moments"], strict=True) as recorder:
        model(torch.randn(1, 40, 64))
    assert (recorder.run["query_moments"]["verified"] == 1).all()


def test_torchs_own_layers_turn_nothing() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    x = torch.randn(2, 30, 32)
    with torch.no_grad(), bnviz.capture(model.eval(), probes=["query_moments"], strict=True) as recorder:
        model(x)
    assert (recorder.run["query_moments"]["verified"] == 1).all()


def test_too_few_tokens_tell_nothing_and_a_text_of_sinks_has_no_score() -> None:
    model = small("llama")
    run = watched(model, ids_of(model, 1, 7))
    with pytest.raises(NotCaptured, match="fewer than 8 tokens"):
        expected_attention(statistics(run, 0))
    with pytest.raises(SchemaError, match="4 keys, all of them sinks"):
        expected_attention(statistics(run, 0, slice(0, 4)))


# --------------------------------------------------------------------------------------------------- probe and score
def test_nothing_listens_where_no_probe_asks() -> None:
    model, _alive = small("llama"), QueryMoments()
    with bnviz.capture(model, probes=["keys_values"]) as recorder:
        hooks = [n for n, m in model.named_modules() if m._forward_hooks and n.endswith("q_proj")]
        with torch.no_grad():
            model(ids_of(model, 1, 12))
    assert not hooks and recorder.run is not None


def test_options_are_used_and_wrong_ones_refused() -> None:
    model = small("llama")
    ids = ids_of(model, 1, 40)
    with torch.no_grad(), bnviz.capture(model, probes=["query_moments"], sinks=2, future=16, strict=True) as recorder:
        model(ids)
    record = recorder.run["query_moments"]
    assert (np.isnan(record["expected_logit"]).sum("key") == 2).all()
    assert record.attrs["sinks"] == 2 and record.attrs["future"] == 16
    assert set(inspect.signature(QueryMoments).parameters) == {"sinks", "future"}
    for options in ({"sinks": -1}, {"future": 0}):
        with pytest.raises(SchemaError, match="expected"):
            QueryMoments(**options)


def test_calls_of_another_kind_have_none() -> None:
    q = torch.randn(1, 2, 3, 4)
    site = Site("attention", "a", 0)
    assert QueryMoments().observe(AttentionSeen(site, Context(0, 0, "decode"), q, q, q, None, True, 1.0)) == {}
    seen = AttentionSeen(site, Context(0, 0, "forward"), q, q, q, None, True, 1.0, across=True)
    assert QueryMoments().observe(seen) == {}


def test_the_score_has_the_options_of_the_paper() -> None:
    z = np.array([[np.nan, 0.0, np.log(3.0)], [np.nan, 0.0, 0.0]])
    s = Statistics(expected_logit=z, value_norm=np.array([[9.0, 2.0, 4.0]]), keys=3, heads=2, kv_heads=1)
    assert expected_attention(s)[0, 1:] == pytest.approx([0.375 * 2, 0.625 * 4])
    assert expected_attention(s, aggregate="max")[0, 1:] == pytest.approx([0.5 * 2, 0.75 * 4])
    assert expected_attention(s, epsilon=0.1)[0, 1:] == pytest.approx([0.475 * 2, 0.725 * 4])
    assert expected_attention(s, use_values=False)[0, 1:] == pytest.approx([0.375, 0.625])
    with pytest.raises(SchemaError, match="epsilon is -1"):
        expected_attention(s, epsilon=-1)
    large = Statistics(expected_logit=z + 1e4, value_norm=np.ones((1, 3)), keys=3, heads=2, kv_heads=1)
    assert np.isfinite(expected_attention(large)[0, 1:]).all()
