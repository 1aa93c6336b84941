"""Compression experiments: codes and projections by plain loops, against one forward with other keys, what they leave behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import bnviz
from bnviz.errors import BnvizError, NotCaptured, SchemaError, StoreError
from bnviz.experiments._compress import coded, projected
from bnviz.experiments._levels import levels
from tests.probes.test_query_moments import ids_of, small
from tests.traces import traces

from .test_kv_eviction import text

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(load_model: Any) -> Any:
    return load_model("llama-bard")


def measured(model: Any, ids: Any, **options: Any) -> xr.Dataset:
    return bnviz.experiment(model, ids, "kv_compression", progress=False, **options)["kv_compression"]


# ---------------------------------------------------------------------------------------------------------------- by hand
def by_loops(rows: np.ndarray, bits: Any, group: int, keys: bool) -> np.ndarray:
    """What codes give back, number by number; `bits` of a head and a token."""
    heads, tokens, dim = rows.shape
    found = np.empty_like(rows)
    for h in range(heads):
        for t in range(tokens):
            for d in range(dim):
                if keys:
                    first = t // group * group
                    mates = rows[h, first : min(first + group, tokens), d]
                else:
                    first = d // group * group
                    mates = rows[h, t, first : min(first + group, dim)]
                low, high, last = mates.min(), mates.max(), 2 ** bits(h, t) - 1
                step = (high - low) / last
                found[h, t, d] = low if step == 0 else low + np.round((rows[h, t, d] - low) / step) * step
    return found


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize(("shape", "group"), [((2, 7, 5), 3), ((1, 4, 6), 2), ((3, 1, 3), 8), ((2, 9, 1), 4)])
def test_codes_are_those_of_plain_loops(shape: tuple[int, int, int], group: int, keys: bool) -> None:
    rows = np.random.default_rng(1).standard_normal(shape)
    for bits in (1, 2, 3, 8):
        read, taken = coded(torch.from_numpy(rows), (float(bits),), group, keys=keys)
        np.testing.assert_allclose(read.numpy(), by_loops(rows, lambda *_, b=bits: b, group, keys), atol=1e-12)
        heads, tokens, dim = shape
        groups = heads * (dim * math.ceil(tokens / group) if keys else tokens * math.ceil(dim / group))
        assert taken == 2 * 8 * groups + math.ceil(bits * rows.size / 8)


@pytest.mark.parametrize("keys", [True, False])
def test_tokens_with_attention_have_codes_of_their_own_in_the_same_groups(keys: bool) -> None:
    rng = np.random.default_rng(2)
    rows, most = rng.standard_normal((2, 7, 5)), rng.random((2, 7)) < 0.5
    read, taken = coded(torch.from_numpy(rows), (4.0, 2.0), 3, keys=keys, chosen=torch.from_numpy(most))
    np.testing.assert_allclose(read.numpy(), by_loops(rows, lambda h, t: 4 if most[h, t] else 2, 3, keys), atol=1e-12)
    codes = 5 * sum(4 if one else 2 for one in most.flat) + 14
    assert taken == 16 * (2 * 5 * 3 if keys else 2 * 7 * 2) + math.ceil(codes / 8)


def test_a_projection_is_that_of_the_singular_vectors_about_the_mean() -> None:
    rows = np.random.default_rng(3).standard_normal((2, 40, 6)) * [5, 3, 2, 1, 0.5, 0.1] + 7
    for share in (0.5, 0.9, 0.99):
        read, taken = projected(torch.from_numpy(rows), (share,))
        numbers = 0
        for head in range(2):
            mean = rows[head].mean(0)
            left, sizes, right = np.linalg.svd(rows[head] - mean, full_matrices=False)
            held = np.cumsum(sizes**2) / (sizes**2).sum()
            rank = int(np.argmax(held >= share)) + 1
            expected = mean + left[:, :rank] * sizes[:rank] @ right[:rank]
            np.testing.assert_allclose(read[head].numpy(), expected, atol=1e-10)
            numbers += 40 * rank + 6 * rank + 6
        assert taken == 8 * numbers


def test_a_head_whose_directions_would_take_more_stays_as_it_is() -> None:
    rows = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    read, taken = projected(rows, (1.0,))
    assert torch.equal(read, rows) and taken == 5 * 4 * 4


@given(st.integers(0, 3), st.integers(8, 30), st.integers(0, 2**16))
def test_rows_of_a_low_rank_are_given_back(rank: int, tokens: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2, tokens, rank)) @ rng.standard_normal((2, rank, 6)) + rng.standard_normal((2, 1, 6))
    read, taken = projected(torch.from_numpy(rows), (1.0,))
    np.testing.assert_allclose(read.numpy(), rows, atol=1e-9)
    assert taken <= 2 * 8 * ((tokens + 6) * rank + 6)


@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.integers(1, 8), st.booleans())
def test_the_type_of_the_cache_stays_and_no_number_moves_more_than_half_a_step(
    dtype: torch.dtype, bits: int, keys: bool
) -> None:
    rows = torch.randn(2, 11, 6, generator=torch.Generator().manual_seed(bits)).to(dtype)
    read, _ = coded(rows, (float(bits),), 4, keys=keys)
    assert read.dtype == dtype and projected(rows, (0.9,))[0].dtype == dtype
    span = float(rows.float().max() - rows.float().min())
    most = float((read.float() - rows.float()).abs().max())
    assert most <= span / (2**bits - 1) / 2 * 1.01 + 4 * torch.finfo(dtype).eps * span


# ----------------------------------------------------------------------------------- against one forward with other keys
@contextmanager
def other_keys(model: Any, end: int, residual: int, read: Any) -> Iterator[None]:
    """Attention by hand: rows after the prompt see `read(keys, values, mass)` of its first tokens, the others all as it is."""
    from transformers import AttentionInterface

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        kv, tokens = key.shape[1:3]
        sees = torch.ones(tokens, tokens).tril().bool()

        def weights(keys: Any) -> Any:
            logits = query @ keys.repeat_interleave(query.shape[1] // kv, 1).mT * scale
            return logits.masked_fill(~sees, -torch.inf).softmax(-1)

        plain = weights(key)
        mass = plain[0, :, :end, : end - residual].sum(1).reshape(kv, -1, end - residual).mean(1)
        keys, values = key.clone(), value.clone()
        old = slice(0, end - residual)
        some = read(key[0, :, old].double().numpy(), value[0, :, old].double().numpy(), mass.double().numpy())
        keys[0, :, old], values[0, :, old] = (torch.from_numpy(one).to(key.dtype) for one in some)
        both = [(plain, value), (weights(keys), values)]
        outs = [w @ v.repeat_interleave(query.shape[1] // kv, 1) for w, v in both]
        out = torch.cat([outs[0][:, :, :end], outs[1][:, :, end:]], 2)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("other_keys", attend)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("other_keys")
        yield
    finally:
        model.set_attn_implementation(before)


def halves(mass: np.ndarray) -> np.ndarray:
    """Which half of the tokens of each head has most attention."""
    found = np.zeros(mass.shape, bool)
    for head, row in enumerate(mass):
        for token in sorted(range(len(row)), key=lambda t: -row[t])[: len(row) // 2]:
            found[head, token] = True
    return found


def by_directions(rows: np.ndarray, share: float) -> np.ndarray:
    found = np.empty_like(rows)
    for head, one in enumerate(rows):
        mean = one.mean(0)
        left, sizes, right = np.linalg.svd(one - mean, full_matrices=False)
        rank = int(np.argmax(np.cumsum(sizes**2) / (sizes**2).sum() >= share)) + 1
        less = len(one) * rank + one.shape[1] * (rank + 1) < one.size
        found[head] = mean + left[:, :rank] * sizes[:rank] @ right[:rank] if less else one
    return found


def by_bits(rows: np.ndarray, bits: int, keys: bool) -> np.ndarray:
    return by_loops(rows, lambda *_: bits, 8, keys)


WAYS: dict[str, Any] = {
    "2 bits": lambda k, v, _: (by_bits(k, 2, True), by_bits(v, 2, False)),
    "keys 4, values 2 bits": lambda k, v, _: (by_bits(k, 4, True), by_bits(v, 2, False)),
    "values 3 bits": lambda k, v, _: (k, by_bits(v, 3, False)),
    "4/2 bits": lambda k, v, mass: tuple(
        by_loops(one, lambda h, t: 4 if halves(mass)[h, t] else 2, 8, keys) for one, keys in ((k, True), (v, False))
    ),
    "90 % of energy": lambda k, v, _: (by_directions(k, 0.9), by_directions(v, 0.9)),
}


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])  # heads that share keys, and heads of their own
def test_it_is_what_one_forward_with_other_keys_and_values_gives(kind: str) -> None:
    model = small(kind)
    ids = ids_of(model, 1, 60)
    end, residual = 48, 5
    asked: dict[str, Any] = {"bits": (2, "k4v2", "v3", "4/2"), "energies": 0.9, "group": 8, "residual": residual}
    found = measured(model, ids, prompt=end, greedy=0, **asked)
    assert found["method"].values.tolist() == list(WAYS)
    with torch.no_grad():
        whole = model(ids).logits[0, end:].double()
    for name, read in WAYS.items():
        with torch.no_grad(), other_keys(model, end, residual, read):
            other = model(ids).logits[0, end:].double()
        apart = (whole.softmax(-1) * (whole.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
        losses = [float(torch.nn.functional.cross_entropy(one[:-1], ids[0, end + 1 :])) for one in (other, whole)]
        one = found.sel({"method": name}).isel(sample=0)
        assert float(one["divergence"]) == pytest.approx(float(apart.mean()), rel=1e-3)
        assert float(one["divergence_most"]) == pytest.approx(float(apart.max()), rel=1e-3)
        assert float(one["loss_change"]) == pytest.approx(losses[0] - losses[1], abs=1e-5)
        assert float(one["same_token"]) == pytest.approx(float((whole.argmax(-1) == other.argmax(-1)).double().mean()))


# ------------------------------------------------------------------------------------------------------------- properties
def test_all_of_the_energy_changes_nothing_and_more_bits_change_less(model: Any) -> None:
    found = measured(model, text(120), bits=(2, 4, 8), energies=(0.9, 1.0), residual=0, greedy=4).isel(sample=0)
    change = dict(zip(found["method"].values, found["divergence"].values, strict=True))
    assert change["100 % of energy"] < 1e-9 and change["8 bits"] < 1e-4
    assert change["8 bits"] < change["4 bits"] < change["2 bits"]
    assert change["90 % of energy"] > 1e-4
    kept = found["greedy_kept"].sel({"method": ["8 bits", "100 % of energy"]})
    assert (kept == 4).all()


def test_bytes_are_those_of_what_is_kept(model: Any) -> None:
    ways: dict[str, Any] = {"bits": (4, "k4", "v4"), "energies": ("k0.9", "v0.9", 0.9), "group": 10, "residual": 8}
    found = measured(model, text(60), prompt=48, greedy=0, **ways).isel(sample=0)
    taken, whole = found["bytes_kept"].values, float(found["bytes_whole"])
    heads, old, dim = 4 * 2, 40, 16
    each = [
        4 * old * heads * dim / 8
        + 2 * 4 * heads * dim * 4,  # keys: codes, and two ends of 4 B for 10 tokens of a channel
        4 * old * heads * dim / 8 + 2 * 4 * heads * old * 2,  # values: two groups of channels a token
    ]
    recent = 2 * 4 * heads * 8 * dim
    assert taken[0] == sum(each) + recent
    assert taken[1] == each[0] + recent / 2 + whole / 2
    for both, keys, values in ((0, 1, 2), (5, 3, 4)):
        assert taken[both] == taken[keys] + taken[values] - whole
        assert found["part"].values[[both, keys, values]].tolist() == ["both", "keys", "values"]
    assert found["way"].values.tolist() == ["bits"] * 3 + ["energy"] * 3


def test_of_a_cache_in_half_precision(load_model: Any) -> None:
    other = small("qwen3").to(torch.bfloat16)
    found = measured(other, ids_of(other, 1, 60), bits=(2, "4/2"), energies=(0.9, 1.0), residual=4, greedy=2)
    assert np.isfinite(found["divergence"].values).all()
    assert float(found["bytes_whole"][0]) == 2 * 2 * 2 * 45 * 16 * 2  # sides, layers, heads, tokens, dim, 2 B
    assert float(found["divergence"].sel({"method": "100 % of energy"})[0]) == 0


def test_a_padded_batch_is_each_text_alone(model: Any) -> None:
    one, two = text(48), text(40, begin=7)
    batch = {
        "input_ids": torch.cat([one, torch.cat([torch.zeros(1, 8, dtype=torch.long), two], 1)]),
        "attention_mask": torch.tensor([[1] * 48, [0] * 8 + [1] * 40]),
    }
    options: dict[str, Any] = {"bits": (2, "4/2"), "energies": (), "residual": 4, "greedy": 3}
    both = measured(model, batch, **options)
    for sample, alone in enumerate((one, two)):
        xr.testing.assert_allclose(
            both.isel(sample=[sample]).drop_vars("sample"), measured(model, alone, **options).drop_vars("sample")
        )


# ------------------------------------------------------------------------------------- the model does not notice, resumable
def test_the_model_is_as_it_was(model: Any) -> None:
    model.train()
    before, state, random = traces(model), {n: p.clone() for n, p in model.named_parameters()}, torch.get_rng_state()
    try:
        measured(model, text(60), bits=2, energies=0.9, greedy=2, residual=4)
        assert traces(model) == before and all(module.training for module in model.modules())
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(p, state[n]) and p.grad is None for n, p in model.named_parameters())
    finally:
        model.eval()


def test_it_goes_on_where_it_stopped(model: Any, tmp_path: Path) -> None:
    path, ids = tmp_path / "run.zarr", text(60)
    options: dict[str, Any] = {"bits": (2, 4), "energies": (0.9,), "greedy": 2, "residual": 4}
    told: list[tuple[int, int, str]] = []

    def stop(done: int, total: int, case: str) -> None:
        told.append((done, total, case))
        if done == 2:
            raise KeyboardInterrupt

    before = traces(model)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        bnviz.experiment(model, ids, "kv_compression", path=path, progress=stop, **options)
    assert "interrupted after 2 cases" in interrupted.value.__notes__[0] and traces(model) == before
    assert told == [(0, 3, "0 · 2 bits"), (1, 3, "0 · 4 bits"), (2, 3, "0 · 90 % of energy")]
    partial = (tmp_path / "run.zarr.partial").read_text().splitlines()
    assert len(partial) == 3  # what was asked for, and two cases
    with pytest.raises(StoreError, match="beginnings of another experiment"):
        bnviz.experiment(model, ids, "kv_compression", path=path, **(options | {"bits": (2, 3)}))
    run = bnviz.experiment(model, ids, "kv_compression", path=path, progress=False, **options)
    xr.testing.assert_identical(run["kv_compression"], measured(model, ids, **options))
    assert bnviz.open(path)["kv_compression"].sizes == run["kv_compression"].sizes


# -------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, r"bits holds 9, expected a whole number from 1 to 8"),
        ({"bits": (2, 2.5)}, r"bits holds 2.5, expected"),
        ({"bits": "2/4"}, r"bits holds '2/4', expected .* \"4/2\""),
        ({"bits": ("q4",)}, r"bits holds 'q4', expected .* \"k4v2\""),
        ({"bits": ""}, r"bits holds '', expected"),
        ({"bits": True}, r"bits holds True, expected"),
        ({"energies": 0.0}, r"energies holds 0.0, expected a share above 0"),
        ({"energies": "k1.5"}, r"energies holds 'k1.5', expected a share above 0"),
        ({"bits": (), "energies": ()}, r"bits and energies are empty"),
        ({"group": 0}, r"group is 0, expected a whole number, 1 or more"),
        ({"residual": -1}, r"residual is -1, expected a whole number, 0 or more"),
        ({"prompt": 1.5}, r"kv_compression: prompt is 1.5, expected a share"),
        ({"most": 1}, r"kv_compression: most is 1, expected a whole number, 2 or more"),
    ],
)
def test_options_out_of_range(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        bnviz.experiment(model, text(60), "kv_compression", **options)


def test_names_are_those_of_what_is_asked_for() -> None:
    ways = levels((1, "k1v1", "k8v4", 2, "v2"), ("k0.5v0.999", 1))
    assert [(way.name, way.part) for way in ways.values()] == [
        ("1 bit", "both"),
        ("keys 8, values 4 bits", "both"),
        ("2 bits", "both"),
        ("values 2 bits", "values"),
        ("keys 50, values 99.9 % of energy", "both"),
        ("100 % of energy", "both"),
    ]


def test_texts_and_models_that_do_not_fit(model: Any) -> None:
    with pytest.raises(
        BnvizError, match=r"text 0 has 30 tokens, and the last 32 stay as they are; expected 2 more or longer"
    ):
        bnviz.experiment(model, text(40), "kv_compression")
    with pytest.raises(BnvizError, match=r"kv_compression: text 0 has 3 tokens and its prompt ends at 2"):
        bnviz.experiment(model, text(3), "kv_compression")
    sliding = small("gemma3_text", sliding_window=8)
    with pytest.raises(BnvizError, match="keeps a DynamicSlidingWindowLayer"):
        bnviz.experiment(sliding, ids_of(sliding, 1, 60), "kv_compression", residual=4)
    broken = small("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    with pytest.raises(BnvizError, match="that are not finite"):
        bnviz.experiment(broken, ids_of(broken, 1, 60), "kv_compression", residual=4)


def test_a_run_without_it_says_how_to_measure_it(model: Any) -> None:
    with torch.no_grad(), bnviz.capture(model, probes=["attention"]) as recorder:
        model(text(20))
    with pytest.raises(NotCaptured, match=r'bnviz.experiment\(model, batch, "kv_compression"\)'):
        recorder.run["kv_compression"]
    assert "bnviz.experiment(model, batch" in bnviz.diagnose(recorder.run).absent["compression_cost"]
