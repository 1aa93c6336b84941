"""How small the KV cache may be: which keys each published score would keep, and what attention that keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding, Judgement, Saving, Variable, diagnostic, stamp

from ._eviction import (
    Passage,
    Ranked,
    agreement,
    check_budgets,
    mass_kept,
    needed,
    overlap,
    passage,
    ranked,
    tokens_kept,
)
from ._mass_check import mass_check, mass_words
from ._passage import cached, one_of, phases, sequences, text

NULL = "random"
_BUDGETS = tuple(round(0.1 * i, 1) for i in range(1, 11))
_KEY = ("method", "layer", "kv_head", "key")


@diagnostic(
    question="How small may the KV cache be, and which score should choose what stays?",
    needs=("attention.mass",),
    wants=(
        "keys_values.key_norm",
        "keys_values.bytes_per_token",
    ),
    gives=(
        Variable(
            "score", _KEY, "1", "importance of a key in the method's own unit, larger stays longer; inf: always kept"
        ),
        Variable(
            "keep_rank",
            _KEY,
            "count",
            "place in the order of keeping, 0 is dropped last; a budget of n keeps those below n",
        ),
        Variable(
            "needed", ("method", "key"), "token", "smallest budget at which half of all layers and kv heads keep a key"
        ),
        Variable(
            "mass_kept",
            ("method", "budget", "layer", "kv_head"),
            "1",
            "share of the attention mass on the kept keys, 0 to 1; NaN: no mass",
        ),
        Variable("mass_kept_mean", ("method", "budget"), "1", "mass_kept, mean over layers and kv heads"),
        Variable("mass_kept_least", ("method", "budget"), "1", "mass_kept of the layer and kv head that loses most"),
        Variable("tokens_kept", ("budget",), "token", "tokens a budget keeps in each layer and kv head"),
        Variable("bytes_kept", ("budget",), "B", "bytes of the cache at a budget, all layers; NaN: not captured"),
        Variable(
            "agreement",
            ("method", "method_to", "layer"),
            "1",
            "Spearman's correlation of two orders, −1 to 1, mean over heads",
        ),
        Variable("agreement_mean", ("method", "method_to"), "1", "agreement, mean over layers"),
        Variable(
            "overlap",
            ("method", "method_to", "budget", "layer"),
            "1",
            "Jaccard index of two kept sets, mean over heads",
        ),
        Variable("overlap_mean", ("method", "method_to", "budget"), "1", "overlap, mean over layers"),
    ),
    order=30,
)
def kv_importance(
    attention: xr.Dataset,
    keys_values: xr.Dataset | None = None,
    *,
    methods: Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
    budgets: Sequence[float] = _BUDGETS,
    aggregate: str = "mean",
    step: int | None = None,
    sequence: int = 0,
    **further: xr.Dataset,
) -> xr.Dataset:
    """Rank the keys of one passage by published scores and measure the attention that a smaller cache keeps.

    Read `mass_kept_mean` against its `random` row: a method earns its place by the distance to it. `keep_rank` and `needed` say
    which tokens go. Where decoding was captured after the passage, the mass is that of the decode queries, which no score
    has seen; otherwise it is that of the passage's own queries, by which h2o ranks.

    Parameters
    ----------
    attention : Dataset
        Record of the probe `attention`: `mass`, and for some scores `window_mass`, `last_row` (step, layer, head, key).
    keys_values : Dataset, optional
        Record of the probe `keys_values`. Gives the number of key-value heads, `key_norm` and the bytes of a token. Without it
        every query head is ranked alone, as in a model without grouped heads, and bytes are NaN.
    methods : sequence of str, or mapping of str to options, optional
        Scores from `bnviz.scores`, e.g. `{"snapkv": {"kernel": 7}, "random": {}}`. None: all that these records allow; those
        left out are in `attrs["skipped"]` with the reason, those whose probe has to be asked for in `attrs["on_request"]`.
    budgets : sequence of float
        Shares of the cache that are kept, in (0, 1]; the same number of tokens in every layer and head.
    aggregate : {"mean", "max", "sum"}
        How the query heads that share a key-value head are put together, where a score does not say.
    step : int, optional
        Label of a step; None: the first that is not decoding.
    sequence : int
        Of the batch.
    **further : Dataset
        Records that only some scores read, by name: `keyformer`, `query_moments` (expected_attention), `projected_values`
        (value_norm with `norm="projected"`), or that of a probe of your own. Records that no score reads change nothing.

    Returns
    -------
    Dataset
        See `kv_importance.spec.gives`. Coordinates: method, method_to, budget, layer with path, kv_head, key (the position).
        Select a method with `result.sel({"method": "h2o"})`: `sel(method=...)` is xarray's own option and selects nothing.
        attrs: model, tokens, heads, kv_heads, aggregate, window, mass_of, skipped, tokens_text; with `keyformer`
        also keyformer_spread (standard deviation of a key's score over draws of noise, as a share of its mean; median over
        layers, heads and keys) and keyformer_seeds, the draws.

    Raises
    ------
    UnknownName
        A method, an aggregate, a step or a sequence that does not exist; the valid ones are named.
    NotCaptured
        A method was named whose statistics were not captured.
    SchemaError
        A method was named that this passage is too short for, or a budget is not a share.

    Notes
    -----
    With m_gj the attention mass on key j, summed over the query heads of key-value head g, and S_g(n) the n keys that a method
    ranks first, mass_kept = sum_{j in S_g(n)} m_gj / sum_j m_gj, n = max(1, floor(budget x keys)). The chance level of
    `overlap` is near budget / (2 − budget). Cost O(methods x layers x kv_heads x keys log keys).

    Sources: H2O arXiv:2306.14048, SnapKV arXiv:2404.14469, TOVA arXiv:2401.06104, key norm arXiv:2406.11430, StreamingLLM
    arXiv:2309.17453.

    Examples
    --------
    >>> mass = xr.DataArray(np.array([[[[4.0, 1.0, 3.0, 2.0]]]]), dims=("step", "layer", "head", "key"))
    >>> result = kv_importance(xr.Dataset({"mass": mass}), methods={"h2o": {"recent": 0.0}}, budgets=(0.5, 1.0))
    >>> result["mass_kept_mean"].values.tolist(), result["keep_rank"].values.ravel().tolist()
    ([[0.7, 1.0]], [0, 3, 1, 2])
    """
    shares = check_budgets(budgets, aggregate)
    of = passage(attention, keys_values, step, sequence, further)
    methods_ranked = ranked(of, methods, aggregate)
    result = _measured(of, methods_ranked, shares)
    result = result.assign_coords(_coordinates(attention, of, methods_ranked, shares))
    first = of.layers[0]
    result.attrs = {
        "model": str(attention.attrs.get("model", "model")),
        "tokens": first.keys,
        "step": int(attention["step"].values[of.row]) if "step" in attention.coords else of.row,
        "phase": phases(attention)[of.row],
        "sequence": int(sequence),
        "heads": first.heads,
        "kv_heads": first.kv_heads,
        "kv_heads_known": keys_values is not None,
        "aggregate": aggregate,
        "window": first.window,
        "mass_of": of.mass_of,
        "model_bytes": None if keys_values is None else keys_values.attrs.get("model_bytes"),
        "skipped": methods_ranked.skipped,
        "on_request": methods_ranked.on_request,
        "sequences": sequences(attention, of.row),
        "cached": cached(attention, of.row, of.where),
        "mass_check": mass_check(attention, of.row, sequence, of.where),
        "tokens_text": text(attention, of.row, of.where),
    }
    if of.draws:
        result.attrs |= {"keyformer_spread": of.spread, "keyformer_seeds": of.draws}
    return stamp(result, kv_importance.spec.gives)  # type: ignore[attr-defined]


def _measured(of: Passage, by: Ranked, shares: np.ndarray) -> xr.Dataset:
    """All variables, without coordinates."""
    kept = tokens_kept(shares, of.layers[0].keys)
    mass = mass_kept(of.mass, by.ranks, kept, of.layers[0].kv_heads)
    flat = mass.reshape(*mass.shape[:2], -1)
    defined = np.isfinite(flat).any(axis=-1)
    mean, least = (np.full(defined.shape, np.nan) for _ in range(2))
    mean[defined], least[defined] = np.nanmean(flat[defined], axis=-1), np.nanmin(flat[defined], axis=-1)
    pairs, sets = agreement(by.ranks), overlap(by.ranks, kept)
    return xr.Dataset(
        {
            "score": (_KEY, by.scores),
            "keep_rank": (_KEY, by.ranks),
            "needed": (("method", "key"), needed(by.ranks)),
            "mass_kept": (("method", "budget", "layer", "kv_head"), mass),
            "mass_kept_mean": (("method", "budget"), mean),
            "mass_kept_least": (("method", "budget"), least),
            "tokens_kept": (("budget",), kept),
            "bytes_kept": (("budget",), kept * of.bytes_per_token),
            "agreement": (("method", "method_to", "layer"), pairs),
            "agreement_mean": (("method", "method_to"), pairs.mean(axis=-1)),
            "overlap": (("method", "method_to", "budget", "layer"), sets),
            "overlap_mean": (("method", "method_to", "budget"), sets.mean(axis=-1)),
        }
    )


def _coordinates(attention: xr.Dataset, of: Passage, by: Ranked, shares: np.ndarray) -> dict[str, Any]:
    layers = len(of.layers)
    labels = attention["layer"].values if "layer" in attention.coords else np.arange(layers)
    paths = attention["path"].values if "path" in attention.coords else np.array([""] * layers)
    methods = np.array(by.names, dtype=object)
    return {
        "method": methods,
        "method_to": methods,
        "budget": shares,
        "layer": labels.astype(np.int64),
        "path": ("layer", paths.astype(object)),
        "kv_head": np.arange(of.layers[0].kv_heads),
        "key": np.arange(of.layers[0].keys),
    }


def judge(result: xr.Dataset, *, lost: float = 0.05, uneven: float = 0.3) -> Judgement:
    """The smallest budget at which a score loses less than `lost` of the attention mass, against chance.

    Parameters
    ----------
    lost : float
        Share of the attention mass that may go.
    uneven : float
        Difference of the smallest budgets of two layers from which layers should have budgets of their own.
    """
    attrs, tokens = result.attrs, int(result.attrs["tokens"])
    least = {str(m): _smallest(result, str(m), lost) for m in result["method"].values}
    null = least.pop(NULL, float("nan"))
    subtitle = (
        f"share of attention mass on kept keys · {attrs['model']}, {result.sizes['layer']} layers × {attrs['kv_heads']} "
        f"kv heads · {q.count(tokens)} tokens, {attrs['phase']}, mass of {attrs['mass_of']}"
    )
    ranking = sorted((b, -_mass_at(result, m, b), m) for m, b in least.items() if np.isfinite(b))
    ahead = [entry for entry in ranking if entry[0] < (null if np.isfinite(null) else 1.0)]
    held = q.share(1 - lost)
    findings: list[Finding] = []
    if tokens < 2:
        title = "One token: there is nothing to rank"
    elif ahead:
        budget, _, best = ahead[0]
        named = best if len(best) <= 20 else f"{best[:19]}…"
        title = f"{q.share(budget)} of the keys hold {held} of the attention mass when ranked by {named}"
        if attrs.get("cached", True):
            findings = [_shrink(result, best, budget, null, lost), *_uneven(result, best, lost, uneven)]
    else:
        title = f"No score holds {held} of the attention mass with fewer keys than chance"
    others = ", ".join(f"{m} {q.share(b)}" for b, _, m in ranking[1:])
    summary = f"{title}." + (f" Others: {others}." if others else "")
    if np.isfinite(null):
        summary += f" Random needs {q.share(null)}."
    return Judgement(title, subtitle, summary, tuple(_caveats(result)), tuple(findings))


def _smallest(result: xr.Dataset, method: str, lost: float, layer: int | None = None) -> float:
    """Smallest budget that loses less than `lost`; NaN when none does."""
    if layer is None:
        mass = result["mass_kept_mean"].sel({"method": method}).values
    else:
        mass = result["mass_kept"].sel({"method": method}).isel(layer=layer).mean("kv_head").values
    enough = np.flatnonzero(mass > 1 - lost)
    return float(result["budget"].values[enough[0]]) if len(enough) else float("nan")


def _mass_at(result: xr.Dataset, method: str, budget: float) -> float:
    return float(result["mass_kept_mean"].sel({"method": method, "budget": budget}))


def _shrink(result: xr.Dataset, best: str, budget: float, null: float, lost: float) -> Finding:
    tokens, full = (float(result["tokens_kept"].sel(budget=budget)), float(result.attrs["tokens"]))
    taken = float(result["bytes_kept"].sel(budget=budget))
    saving = None
    if np.isfinite(taken) and tokens < full:
        saving = _saved(taken / tokens * full, tokens / full, result.attrs["model_bytes"])
    chance = f"random needs {q.share(null)}" if np.isfinite(null) else "random was not ranked"
    return Finding(
        code="kv_importance/budget",
        sentence=f"{q.share(budget)} of the keys hold {q.share(_mass_at(result, best, budget), int(full))} of the attention "
        f"mass when ranked by {best} (limit {q.share(1 - lost)}, {chance})",
        severity="medium" if budget <= 0.5 else "low",
        value=budget,
        limit=null,
        advice=f"Evict to {q.count(tokens)} of {q.count(full)} tokens a head by {best}, and measure what it costs first: "
        'bnviz.experiment(model, batch, "kv_eviction").',
        saving=saving,
    )


def _saved(cache: float, kept: float, weights: float | None) -> Saving:
    """Bytes that go, as a share of weights and cache together; of the cache alone when the weights are unknown."""
    amount = cache * (1 - kept)
    if weights is None:
        return Saving(amount, "B", 1 - kept, "computed from shapes, as a share of the KV cache")
    return Saving(amount, "B", amount / (cache + weights), "computed from shapes, as a share of weights and KV cache")


def _uneven(result: xr.Dataset, best: str, lost: float, uneven: float) -> list[Finding]:
    needs = np.array([_smallest(result, best, lost, layer) for layer in range(result.sizes["layer"])])
    if np.isnan(needs).all():
        return []
    low, high = int(np.nanargmin(needs)), int(np.nanargmax(needs))
    apart = float(needs[high] - needs[low])
    if apart < uneven - 1e-9:
        return []
    layers, paths = result["layer"].values, result["path"].values
    return [
        Finding(
            code="kv_importance/uneven",
            sentence=f"By {best}, layer {layers[low]} needs {q.share(needs[low])} of its keys and layer {layers[high]} "
            f"{q.share(needs[high])} (limit {q.share(uneven)} apart)",
            severity="low",
            where={"layer": [int(layers[low]), int(layers[high])], "path": [str(paths[low]), str(paths[high])]},
            value=apart,
            limit=uneven,
            advice="Give each layer its own budget in the same total (PyramidKV, arXiv:2406.02069) and compare the loss.",
        )
    ]


def _caveats(result: xr.Dataset) -> list[str]:
    attrs = result.attrs
    lines = [
        'Mass is not output error: a key with little attention can still matter; bnviz.experiment(model, batch, "kv_eviction") '
        f"measures that. {one_of(attrs)}"
    ]
    if not attrs.get("cached", True):
        lines.append(
            "There is no cache of all these keys to make smaller: queries see later keys too, or a window has dropped some."
        )
    if attrs["mass_of"] != "decode queries":
        lines.append(
            "Judged by the passage's own queries, which h2o ranks by; capture decoding for queries no score has seen."
        )
    if not attrs["kv_heads_known"]:
        lines.append("Keys and values were not captured: each query head is ranked alone, and bytes are unknown.")
    elif attrs["heads"] != attrs["kv_heads"]:
        lines.append(
            f"{attrs['heads'] // attrs['kv_heads']} query heads share a kv head; their scores are put together by "
            f"{attrs['aggregate']}."
        )
    if "keyformer" in result["method"].values and "keyformer_seeds" in attrs:
        lines.append(_of_draws(attrs["keyformer_seeds"], attrs["keyformer_spread"]))
    if attrs["mass_check"]:
        lines.append(mass_words(attrs["mass_check"]))
    lines += [f"Left out: {reason}" for reason in attrs["skipped"].values()]
    if attrs["on_request"]:
        probes = ", ".join(f'"{probe}"' for probe in attrs["on_request"].values())
        lines.append(f"On request: {', '.join(attrs['on_request'])}, with probes=[..., {probes}].")
    return lines


def _of_draws(draws: int, spread: float) -> str:
    """What the noise of keyformer's score leaves open."""
    if draws == 1:
        return "keyformer's score is one draw of noise (seeds=1): how much it differs from draw to draw is not known."
    if not np.isfinite(spread):
        return f"keyformer's score is the mean of {draws} draws of noise (seeds={draws}); their spread is not known."
    return (
        f"keyformer's score is the mean of {draws} draws of noise (seeds={draws}); from draw to draw a key's score varies by "
        f"{q.share(spread)} (standard deviation, median over keys): keys that are nearer than that have no order."
    )
