"""Every score against full attention matrices of a real model, and what a run says of its own sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bnviz
from bnviz.catalog import names
from bnviz.diagnostics.kv_importance import judge, kv_importance
from bnviz.errors import NotCaptured
from tests.reduce._gumbel_definition import noisy, uniform


@pytest.fixture(scope="module")
def watched(load_model: Any) -> tuple[Any, torch.Tensor, np.ndarray, torch.Tensor, torch.Tensor]:
    """Run, ids, and what eager attention says: weights (layer, head, query, key), keys and values (layer, kv_head, key, dim)."""
    text = (Path(bnviz.__file__).parent / "demo" / "data" / "tempest.txt").read_bytes()
    ids = torch.tensor([list(text[5000:5060])])
    model = load_model("llama-induction-byte")
    told = {"window": 8, "history": 20, "lag": 9}
    probes = ["attention", "keys_values", "keyformer", "query_moments"]
    with bnviz.capture(model, probes=probes, strict=True, **told) as recorder, torch.no_grad():
        model(ids)
    with torch.no_grad():
        out = load_model("llama-induction-byte", "eager")(ids, output_attentions=True, use_cache=True)
    weights = torch.stack(out.attentions)[:, 0].double().numpy()
    keys, values = (
        torch.stack([getattr(one, name)[0].double() for one in out.past_key_values.layers])
        for name in ("keys", "values")
    )
    return recorder.run, ids, weights, keys, values


def grouped(values: np.ndarray) -> np.ndarray:
    """(layer, 4 heads, key) to (layer, 2 kv heads, key): heads 0, 1 and heads 2, 3 share."""
    return np.stack([(values[:, 0] + values[:, 1]) / 2, (values[:, 2] + values[:, 3]) / 2], axis=1)


def expected_scores(weights: np.ndarray, key: torch.Tensor, value: torch.Tensor) -> dict[str, np.ndarray]:
    """The published scores written down a second time, from whole matrices."""
    keys, norms = weights.shape[-1], key.norm(dim=-1).numpy()
    h2o = grouped(weights.sum(2))
    h2o[..., keys - int(0.1 * keys) :] = np.inf
    window = torch.from_numpy(weights[:, :, -8:, :-8].mean(2))
    pooled = torch.nn.functional.avg_pool1d(window, 5, stride=1, padding=2, count_include_pad=True).numpy()
    snapkv = np.full((len(weights), 2, keys), np.inf)
    snapkv[..., :-8] = grouped(pooled)
    tova = np.repeat(weights[:, :, -1].mean(1)[:, None], 2, axis=1)
    streaming = np.broadcast_to(np.where(np.arange(keys) < 4, np.inf, np.arange(keys)), h2o.shape)
    found = {"h2o": h2o, "snapkv": snapkv, "tova": tova, "key_norm": -norms, "streaming_llm": streaming}
    return found | of_attention(weights, value) | of_keys(key, value)


def of_attention(weights: np.ndarray, value: torch.Tensor) -> dict[str, np.ndarray]:
    keys = weights.shape[-1]
    observed = grouped(weights.sum(2) / np.arange(keys, 0, -1))
    pivotal = weights > 1 / np.arange(1, keys + 1)[:, None]
    scissorhands = grouped(pivotal[:, :, -20:].sum(2).astype(float))
    scissorhands[..., -10:] = np.inf
    finch = np.full(observed.shape, np.inf)
    finch[..., :-8] = grouped((weights[:, :, -8:] * np.arange(keys - 8, keys)[:, None]).mean(2))[..., :-8]
    vatp = grouped(weights.sum(2)) * value.abs().sum(-1).numpy()
    vatp[..., :4] = np.inf
    return {"observed_attention": observed, "scissorhands": scissorhands, "finch": finch, "vatp": vatp}


def of_noise(weights: np.ndarray, seeds: int = 3) -> np.ndarray:
    """Keyformer's score: the logarithm of a weight is its logit, but for a number that its row shares."""
    keys, places, found = weights.shape[-1], np.arange(weights.shape[-1]), []
    sees = torch.ones(keys, keys, dtype=torch.bool).tril()
    for layer, logits in enumerate(torch.from_numpy(weights).log()):
        drawn = []
        for seed in range(seeds):
            noise = -(-torch.from_numpy(uniform(seed, layer, len(logits), places, places)).log()).log()
            drawn.append(noisy(logits[None], sees, noise)[0].sum(1))
        found.append(torch.stack(drawn).mean(0).numpy())
    scores = grouped(np.stack(found))
    scores[..., keys - int(0.1 * keys) :] = np.inf
    return scores


def of_keys(key: torch.Tensor, value: torch.Tensor) -> dict[str, np.ndarray]:
    unit = torch.nn.functional.normalize(key, dim=-1)
    keydiff = -torch.nn.functional.cosine_similarity(key, unit.mean(2, keepdim=True), dim=-1).numpy()
    shares = []
    for square in (key.square().sum(-1), value.square().sum(-1)):
        windows = torch.split(square, 16, dim=-1)
        shares.append(torch.cat([w / w.sum(-1, keepdim=True) for w in windows], -1))
    cur = shares[0] * shares[1]
    cur = (cur / cur.sum(-1, keepdim=True)).numpy()
    cur[..., :4] = np.inf
    lagkv = np.full(keydiff.shape, np.inf)
    blocks = (key.shape[2] - 4) // 9
    for at in range(blocks - 1):
        own, after = slice(4 + 9 * at, 13 + 9 * at), slice(13 + 9 * at, 22 + 9 * at)
        mean = 0.0
        for states in (key, value):
            low, high = states[:, :, after].amin(2, keepdim=True), states[:, :, after].amax(2, keepdim=True)
            mean = mean + ((states[:, :, own] - low) / (high - low)).std(-1).softmax(-1) / 2
        lagkv[..., own] = mean.argsort(-1).argsort(-1).numpy() / 9
    return {"keydiff": keydiff, "cur": cur, "lagkv": lagkv, "value_norm": value.norm(dim=-1).numpy()}


def of_queries(model: Any, ids: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> np.ndarray:
    """Expected attention, from what the query projections give and the model's own positions."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    made = list[torch.Tensor]()
    hooks = [
        layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: made.append(output[0].double()))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    tokens, dim = key.shape[2:]
    cos, sin = model.model.rotary_emb(key.float(), torch.arange(tokens, tokens + 512)[None])
    units = torch.eye(dim).double()[:, None].expand(1, dim, 512, dim)
    turn = apply_rotary_pos_emb(units, units, cos.double(), sin.double())[0][0].mean(1).T
    query = torch.stack(made).view(len(made), tokens, -1, dim).transpose(1, 2)[:, :, 4:]
    keys = key[:, :, 4:].repeat_interleave(2, 1)
    mean = query.mean(2, keepdim=True)
    spread = turn @ ((query - mean).mT @ (query - mean) / (tokens - 4)) @ turn.T
    logit = (keys @ turn @ mean.mT)[..., 0] / dim**0.5 + ((keys @ spread) * keys).sum(-1) / (2 * dim)
    found = np.full(key.shape[:3], np.inf)
    found[..., 4:] = grouped(logit.softmax(-1).numpy()) * value[:, :, 4:].norm(dim=-1).numpy()
    return found


def test_every_score_is_the_one_of_full_matrices(watched: Any, load_model: Any) -> None:
    run, ids, weights, keys, values = watched
    records = {name: run[name] for name in ("keyformer", "query_moments")}
    result = kv_importance(run["attention"], run["keys_values"], **records)
    assert result.attrs["skipped"] == {} and result.attrs["window"] == 8
    written = expected_scores(weights, keys, values) | {"keyformer": of_noise(weights)}
    written["expected_attention"] = of_queries(load_model("llama-induction-byte"), ids, keys, values)
    assert {*written, "random"} == set(names("scores"))
    for name, expected in written.items():
        found = result["score"].sel({"method": name}).values
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6, err_msg=name)
        order = np.argsort(result["keep_rank"].sel({"method": name}).values, axis=-1)
        kept_first = np.take_along_axis(np.minimum(expected, 1e3), order, axis=-1)
        assert (np.diff(kept_first, axis=-1) <= 2e-5).all(), name  # equal bytes have equal norms, up to rounding
    half = weights.sum(2).reshape(2, 2, 2, -1).sum(2)
    kept = result["keep_rank"].sel({"method": "tova"}).values < int(result["tokens_kept"].sel(budget=0.5))
    np.testing.assert_allclose(
        result["mass_kept"].sel({"method": "tova", "budget": 0.5}), (half * kept).sum(-1) / half.sum(-1), rtol=1e-5
    )


def test_how_much_noise_is_in_a_score_is_said(watched: Any, load_model: Any) -> None:
    run, ids, *_ = watched
    record = run["keyformer"]
    result = kv_importance(run["attention"], run["keys_values"], keyformer=record)
    shares = (record["noisy_mass_spread"] / record["noisy_mass"]).values
    assert result.attrs["keyformer_spread"] == pytest.approx(np.median(shares)) and 0.05 < np.median(shares) < 1
    assert result.attrs["keyformer_seeds"] == 3 and json.loads(json.dumps(result.attrs)) == result.attrs
    line = next(line for line in judge(result).caveats if "draws of noise" in line)
    assert (
        "mean of 3 draws of noise (seeds=3)" in line and f"varies by {np.median(shares):.0%}".replace("%", " %") in line
    )
    by_name = kv_importance(run["attention"], run["keys_values"], keyformer=record, methods=["tova"])
    assert not any("noise" in line for line in judge(by_name).caveats)  # of a score that was not asked for
    told = bnviz.diagnose(run, "kv_importance", strict=True)["kv_importance"]
    assert "keyformer" in told["method"].values
    model, probes = load_model("llama-induction-byte"), ["attention", "keyformer"]
    with bnviz.capture(model, probes=probes, seeds=1, strict=True) as recorder, torch.no_grad():
        model(ids)
    one = kv_importance(recorder.run["attention"], keyformer=recorder.run["keyformer"])
    assert one.attrs["keyformer_seeds"] == 1 and np.isnan(one.attrs["keyformer_spread"])
    assert any("one draw of noise" in line for line in judge(one).caveats)


def test_without_noise_keyformer_is_left_out_and_says_how_to_get_it(watched: Any) -> None:
    run = watched[0]
    result = kv_importance(run["attention"], run["keys_values"])
    assert "keyformer_spread" not in result.attrs
    assert result.attrs["on_request"] == {"expected_attention": "query_moments", "keyformer": "keyformer"}
    assert not {"keyformer", "expected_attention"} & set(result.attrs["skipped"])
    assert (
        'On request: expected_attention, keyformer, with probes=[..., "query_moments", "keyformer"].'
        in judge(result).caveats
    )
    assert not any(line.startswith("Left out") for line in judge(result).caveats)
    # a record of other layers or of another step costs that score alone
    for other in (run["keyformer"].isel(layer=[0]), run["keyformer"].assign_coords(step=[7])):
        result = kv_importance(run["attention"], run["keys_values"], keyformer=other)
        assert "keyformer" in result.attrs["on_request"]
        assert {"tova", "key_norm"} <= set(result["method"].values)
    with pytest.raises(NotCaptured, match=r'needs .noisy_mass.*add "keyformer" to probes='):
        kv_importance(run["attention"], methods=["keyformer"])


def test_without_queries_expected_attention_is_left_out_and_says_why(watched: Any) -> None:
    run = watched[0]
    result = kv_importance(run["attention"], run["keys_values"])
    assert result.attrs["on_request"]["expected_attention"] == "query_moments"
    unknown = run["query_moments"].copy(deep=True)
    unknown["expected_logit"][:, 1] = np.nan
    result = kv_importance(run["attention"], run["keys_values"], query_moments=unknown)
    assert "queries before rotation of layer 1 are not known" in result.attrs["skipped"]["expected_attention"]
    assert any("queries before rotation of layer 1" in line for line in judge(result).caveats)
    told = bnviz.diagnose(run, "kv_importance", strict=True)["kv_importance"]
    assert "expected_attention" in told["method"].values


def test_a_run_checks_that_attention_sums_to_its_queries(watched: Any) -> None:
    run = watched[0]
    check = kv_importance(run["attention"], run["keys_values"]).attrs["mass_check"]
    assert check["queries"] == 60 and abs(check["share"] - 1) < 1e-5
    told = judge(kv_importance(run["attention"], run["keys_values"]))
    assert any(
        line.startswith("Self-check: the attention of each head sums to its queries (60)") for line in told.caveats
    )
    short = run["attention"].copy(deep=True)
    short["mass"][0, 1, 2] *= 0.8
    told = judge(kv_importance(short, run["keys_values"]))
    assert any("the attention of layer 1 head 2 sums to 80 % of its queries" in line for line in told.caveats)


def test_bytes_are_those_of_the_cache(watched: Any) -> None:
    run, ids, *_ = watched
    result = kv_importance(run["attention"], run["keys_values"])
    cache = 2 * 2 * 2 * ids.shape[1] * 16 * 4  # layers, keys and values, kv heads, tokens, dim, float32
    assert float(result["bytes_kept"].sel(budget=1.0)) == cache
    finding = next(f for f in judge(result).findings if f.code == "kv_importance/budget")
    assert finding.saving is not None
    kept = int(result["tokens_kept"].sel(budget=finding.value))
    assert finding.saving.amount == pytest.approx(cache * (1 - kept / ids.shape[1]))
    weights = run["keys_values"].attrs["model_bytes"]
    assert weights == 107_328 * 4
    assert finding.saving.share == pytest.approx(finding.saving.amount / (weights + cache))


@pytest.mark.parametrize("generate", [False, True])
def test_a_left_padded_batch_gives_each_sequence_what_it_has_alone(load_model: Any, generate: bool) -> None:
    model = load_model("llama-induction-byte")
    text = (Path(bnviz.__file__).parent / "demo" / "data" / "tempest.txt").read_bytes()
    whole, short = list(text[5000:5040]), list(text[6000:6025])

    def watch(rows: list[list[int]], mask: list[list[int]]) -> Any:
        given_ = {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}
        probes = ["attention", "keys_values", "keyformer"]
        with bnviz.capture(model, probes=probes, window=8, strict=True) as recorder, torch.no_grad():
            if generate:
                model.generate(**given_, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
            else:
                model(**given_)
        return recorder.run

    both = watch([whole, [0] * 15 + short], [[1] * 40, [0] * 15 + [1] * 25])
    for sequence, alone in enumerate((whole, short)):
        run = watch([alone], [[1] * len(alone)])
        one = kv_importance(both["attention"], both["keys_values"], keyformer=both["keyformer"], sequence=sequence)
        two = kv_importance(run["attention"], run["keys_values"], keyformer=run["keyformer"])
        assert "keyformer" in one["method"].values
        assert one.attrs["tokens"] == len(alone)
        assert one.attrs["mass_of"] == ("decode queries" if generate else "queries of the passage itself")
        np.testing.assert_allclose(one["score"], two["score"], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(one["mass_kept"], two["mass_kept"], atol=0.02)  # near ties may fall either way
