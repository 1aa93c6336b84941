"""How few directions hold the keys and the values of each head, and what a cache of those would take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import NotCaptured, SchemaError
from bnviz.schema import Finding, Judgement, Saving, Variable, diagnostic, stamp

from ._kv_spectrum import Floats, Spectra, effective, left_out, ranks, spectra
from ._passage import step_row

_HEADS = ("layer", "kv_head")
_PLACES = 64  # of one finding, least rank first


def _declared(of: str, optional: bool) -> tuple[Variable, ...]:
    """The variables of keys, or of values."""
    return (
        Variable(
            f"{of}_eigenvalue",
            (*_HEADS, "rank"),
            "1",
            f"mean squared length of a head's {of}s along their 1st, 2nd, ... direction; NaN: no token",
            optional=optional,
        ),
        Variable(
            f"{of}_error",
            (*_HEADS, "rank"),
            "1",
            "share of that energy which so many directions leave out, 0 to 1; NaN: no energy",
            optional=optional,
        ),
        Variable(
            f"{of}_rank",
            ("threshold", *_HEADS),
            "count",
            "fewest directions that hold a share of the energy; NaN: no energy",
            optional=optional,
        ),
        Variable(
            f"{of}_effective_rank",
            _HEADS,
            "1",
            "exp of the entropy of the shares of energy: 1 for one direction, the head's size for a ball",
            optional=optional,
        ),
        Variable(
            f"{of}_mean_share",
            _HEADS,
            "1",
            f"of the mean squared length of a head's {of}s, what their mean makes up, 0 to 1",
            optional=optional,
        ),
        Variable(f"{of}_size", ("layer",), "count", f"channels of a {of} of one head", optional=optional),
    )


@diagnostic(
    question="How few directions hold the keys and values of each head?",
    needs=("kv_spectra.key_moment",),
    wants=("kv_spectra.value_moment", "keys_values.bytes_per_token"),
    gives=(
        *_declared("key", False),
        *_declared("value", True),
        Variable("tokens", _HEADS, "token", "tokens whose keys were seen, over all steps and sequences"),
        Variable("bytes_whole", ("layer",), "B", "their keys and values in the cache; NaN: not known"),
        Variable(
            "bytes_kept",
            ("threshold", "layer"),
            "B",
            "the same at the rank of each head for that share, with its directions and its mean",
        ),
    ),
    order=33,
)
def kv_rank(
    kv_spectra: xr.Dataset,
    keys_values: xr.Dataset | None = None,
    *,
    thresholds: Sequence[float] = (0.9, 0.95, 0.99),
    centred: bool = True,
    step: int | None = None,
) -> xr.Dataset:
    """Measure the spectrum of the keys and of the values of each key-value head, and the error of every smaller rank.

    Read `key_rank` and `value_rank` against the size of a head: a head of 128 channels whose keys have a rank of 20 at 99 % can
    keep 20 numbers a key and lose 1 % of their spread. Energy is not output: a direction with little energy can be the one a
    query asks for, so compare the loss of the model before believing a rank.

    Parameters
    ----------
    kv_spectra : Dataset
        Record of the probe `kv_spectra`.
    keys_values : Dataset, optional
        Record of the probe `keys_values`: how large the model's weights are, beside which bytes are judged.
    thresholds : sequence of float
        Shares of the energy that are to stay, in (0, 1].
    centred : bool
        Energy about the mean of a head, so that the error is that of x = m + projection of (x - m). A mean of keys adds the same
        to all logits of a query, which a softmax without sinks or soft cap does not see; weights sum to 1, so a mean of values
        can be added to the output: a mean costs one vector a head. False: about zero, the error of a projection without a mean,
        where the mean counts as a direction and often as the largest.
    step : int, optional
        Label of a step; None: all steps together, prompts and what was written after them.

    Returns
    -------
    Dataset
        See `kv_rank.spec.gives`; what is said of values is absent where attention by hand does not show them. Coordinates:
        threshold, layer with path, kv_head, rank from 1. attrs: model, tokens, centred, threshold (by which it is judged),
        model_bytes.

    Raises
    ------
    NotCaptured
        No `key_moment`.
    UnknownName
        A step that does not exist.
    SchemaError
        A threshold that is no share.

    Notes
    -----
    With a_1 >= a_2 >= ... the eigenvalues of sum (x - m)(x - m)ᵀ / n of one head (m = 0 where not centred):
    `error` at rank r = sum_(i > r) a_i / sum a, which is ||X - X P||_F^2 / ||X||_F^2 of these very tokens (less m) with P the
    projection on the r leading directions, the least of all projections of that rank (Eckart and Young 1936). `rank` =
    min{r : error <= 1 - threshold}. `effective_rank` = exp(-sum p ln p), p = a / sum a (Roy and Vetterli 2007). `mean_share` =
    ||m||^2 / mean ||x||^2.
    `bytes_kept` of a head = (n r + d r + d) x bytes of a number, at most the n d it has now: r numbers a token, the directions,
    and the mean where centred.
    Directions are found and judged on the same tokens: ranks are low where tokens are few, and at most n. Keys are those of the
    cache, after rotation: a rotation turns what was one direction into others as positions go by.

    Cost O(layers x heads x head size^3).

    Sources: MatryoshkaKV (arXiv:2410.14731), which begins with these directions and trains them on; Eigen Attention
    (arXiv:2408.05646); compressing heads (arXiv:2406.07056).

    Examples
    --------
    >>> x = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> head, own = ("step", "layer", "kv_head"), ("feature", "feature_to")
    >>> record = xr.Dataset({"key_tokens": (head, [[[4]]]), "key_sum": ((*head, "feature"), [[[[0.0, 0.0]]]])})
    >>> record["key_moment"], record["key_bytes"] = ((*head, *own), [[[x.T @ x]]]), (head[:2], [[8]])
    >>> result = kv_rank(record)
    >>> result["key_error"].values.tolist(), result["key_rank"].values.ravel().tolist()
    ([[[0.1, 0.0]]], [1.0, 2.0, 2.0])
    """
    told = sorted({float(t) for t in thresholds})
    if not told or not all(0 < t <= 1 for t in told):
        raise SchemaError(f"kv_rank: thresholds are {list(thresholds)}, expected shares above 0 and up to 1.")
    if "key_moment" not in kv_spectra:
        raise NotCaptured('kv_rank needs kv_spectra.key_moment; add probes=["kv_spectra"] and run again.')
    if step is not None:
        kv_spectra = kv_spectra.isel(step=[step_row(kv_spectra, step, name="kv_spectra")])
    sides = {of: spectra(kv_spectra, of, centred=centred) for of in ("key", "value") if f"{of}_moment" in kv_spectra}
    found: dict[str, Any] = {}
    whole, kept = np.zeros(kv_spectra.sizes["layer"]), np.zeros((len(told), kv_spectra.sizes["layer"]))
    for of, one in sides.items():
        lost = left_out(one.eigenvalue)
        rank = ranks(lost, told)
        found |= {
            f"{of}_eigenvalue": ((*_HEADS, "rank"), one.eigenvalue),
            f"{of}_error": ((*_HEADS, "rank"), lost),
            f"{of}_rank": (("threshold", *_HEADS), rank),
            f"{of}_effective_rank": (_HEADS, effective(one.eigenvalue)),
            f"{of}_mean_share": (_HEADS, one.mean_share),
            f"{of}_size": (("layer",), one.size),
        }
        before, after = _bytes(one, rank, centred)
        whole, kept = whole + before, kept + after
    tokens = sides["key"].tokens
    result = xr.Dataset(
        {
            **found,
            "tokens": (_HEADS, tokens),
            "bytes_whole": (("layer",), whole),
            "bytes_kept": (("threshold", "layer"), kept),
        },
        coords=_coordinates(kv_spectra, told),
    )
    result.attrs = {
        "model": str(kv_spectra.attrs.get("model", "model")),
        "tokens": int(tokens.max(initial=0)),
        "centred": bool(centred),
        "threshold": told[-1] if told[-1] < 1 or len(told) == 1 else told[-2],
        "model_bytes": None if keys_values is None else keys_values.attrs.get("model_bytes"),
    }
    return stamp(result, kv_rank.spec.gives)  # type: ignore[attr-defined]


def _bytes(one: Spectra, rank: Floats, centred: bool) -> tuple[Floats, Floats]:
    """Bytes of a layer (layer,) as it is, and (threshold, layer) at the rank of each head; a head without energy stays."""
    size, n = one.size[:, None].astype(float), one.tokens.astype(float)
    now = n * size
    then = np.where(np.isfinite(rank), (n + size) * rank + (size if centred else 0.0), now)
    return now.sum(-1) * one.itemsize, np.minimum(then, now).sum(-1) * one.itemsize


def _coordinates(record: xr.Dataset, thresholds: Sequence[float]) -> dict[str, Any]:
    layers = record.sizes["layer"]
    labels = record["layer"].values if "layer" in record.coords else np.arange(layers)
    paths = record["path"].values if "path" in record.coords else np.array([""] * layers)
    return {
        "threshold": np.array(thresholds),
        "layer": labels.astype(np.int64),
        "path": ("layer", paths.astype(object)),
        "kv_head": np.arange(record.sizes["kv_head"]),
        "rank": np.arange(1, record.sizes["feature"] + 1),
    }


def judge(result: xr.Dataset, *, small: float = 0.5, enough: float = 4.0) -> Judgement:
    """Heads whose keys, and whose values, keep almost all their energy in few directions.

    Parameters
    ----------
    small : float
        Share of a head's channels up to which its rank is low.
    enough : float
        Tokens a channel from which a rank is judged: with fewer it is low for want of tokens.
    """
    attrs = result.attrs
    held = f"{q.setting(100 * float(attrs['threshold']))} %"
    about = "about the mean of a head" if attrs["centred"] else "about zero"
    subtitle = (
        f"directions that hold {held} of the energy {about} · {attrs['model']}, {result.sizes['layer']} layers × "
        f"{q.counted(result.sizes['kv_head'], 'kv head')} · {q.counted(attrs['tokens'], 'token')}"
    )
    sides = [of for of in ("key", "value") if f"{of}_rank" in result and np.isfinite(_ranks(result, of)).any()]
    if not sides:
        return Judgement("Neither keys nor values have any energy", subtitle, caveats=tuple(_caveats(result, enough)))
    title = f"{_span(result, sides[0])} of {_sizes(result, sides[0])} directions hold {held} of the {sides[0]}s' energy"
    both = title + (f", {_span(result, 'value')} of {_sizes(result, 'value')} the values'" if len(sides) > 1 else "")
    title = both if len(both) <= 90 else title
    findings = [finding for of in sides for finding in _low(result, of, small, enough)]
    summary = f"{title}, by head; {' '.join(_middle(result, of) for of in sides)}"
    return Judgement(title, subtitle, summary, tuple(_caveats(result, enough)), tuple(findings))


def _ranks(result: xr.Dataset, of: str) -> Floats:
    return np.asarray(result[f"{of}_rank"].sel(threshold=result.attrs["threshold"]).values)


def _span(result: xr.Dataset, of: str) -> str:
    known = _ranks(result, of)
    low, high = int(np.nanmin(known)), int(np.nanmax(known))
    return str(low) if low == high else f"{low} to {high}"


def _sizes(result: xr.Dataset, of: str) -> str:
    sizes = result[f"{of}_size"].values
    some = sizes[sizes > 0]
    return str(some.min()) if some.min() == some.max() else f"{some.min()} to {some.max()}"


def _middle(result: xr.Dataset, of: str) -> str:
    return f"Half of the heads hold theirs of the {of}s in {int(np.nanmedian(_ranks(result, of)))} or fewer."


def _low(result: xr.Dataset, of: str, small: float, enough: float) -> list[Finding]:
    """Heads with a low rank, and what a cache of that rank would spare."""
    rank, size, tokens = _ranks(result, of), result[f"{of}_size"].values[:, None], result["tokens"].values
    with np.errstate(invalid="ignore"):
        found = np.argwhere((rank <= small * size) & (tokens >= enough * size))
    judged = int(((tokens >= enough * size) & np.isfinite(rank)).sum())
    if not len(found):
        return []
    found = found[np.argsort((rank / size)[tuple(found.T)], kind="stable")]
    most, sizes = int(np.nanmax(rank[tuple(found.T)])), _sizes(result, of)
    layers, paths, shown = result["layer"].values, [str(p) for p in result["path"].values], found[:_PLACES]
    where: dict[str, Any] = {
        "layer": [int(layers[i]) for i, _ in shown],
        "kv_head": [int(j) for _, j in shown],
        "path": [paths[i] for i, _ in shown],
    }
    who = f"{of.capitalize()}s of {len(found)} of {q.counted(judged, 'kv head')} keep"
    if len(found) == 1:
        where = {name: values[0] for name, values in where.items()}
        who = f"{of.capitalize()}s of layer {where['layer']} kv head {where['kv_head']} keep"
    held = q.setting(100 * float(result.attrs["threshold"]))
    return [
        Finding(
            code=f"kv_rank/low_{of}s",
            sentence=f"{who} {held} % of their energy in {most} of {sizes} directions or fewer (limit {q.share(small)} of them)",
            severity="low",
            where=where,
            value=float((rank / size)[tuple(found[-1])]),
            limit=small,
            advice=f"Project them on so many leading directions (MatryoshkaKV, arXiv:2410.14731; result['{of}_rank'] has them) "
            f'and measure what that changes: bnviz.experiment(model, batch, "kv_compression", {_option(result, of)}).',
            saving=_saving(result, of, found),
        )
    ]


def _option(result: xr.Dataset, of: str) -> str:
    """Of the experiment: these keys, or values, alone at this share of the energy."""
    return f'energies=["{of[0]}{q.setting(float(result.attrs["threshold"]))}"]'


def _saving(result: xr.Dataset, of: str, found: Any) -> Saving | None:
    """Of these heads, as a share of the model's weights and the cache; of the cache alone where the weights are unknown."""
    whole, at = float(result["bytes_whole"].sum()), tuple(found.T)
    size, n = result[f"{of}_size"].values[found[:, 0]].astype(float), result["tokens"].values[at].astype(float)
    numbers = np.sum([_numbers(result, side) for side in ("key", "value") if f"{side}_size" in result], axis=0)
    itemsize = np.divide(result["bytes_whole"].values, numbers, out=np.full(len(numbers), np.nan), where=numbers > 0)
    spared = n * size - (n + size) * _ranks(result, of)[at] - (size if result.attrs["centred"] else 0.0)
    amount = float((np.maximum(spared, 0.0) * itemsize[found[:, 0]]).sum())
    if not amount > 0 or not np.isfinite(whole):
        return None
    weights, how = result.attrs["model_bytes"], "computed from ranks and shapes, as a share of "
    if weights is None:
        return Saving(amount, "B", amount / whole, how + "the KV cache")
    return Saving(amount, "B", amount / (whole + weights), how + "weights and KV cache")


def _numbers(result: xr.Dataset, of: str) -> Floats:
    """(layer,) numbers in the cache."""
    return np.asarray(result["tokens"].values.sum(-1) * result[f"{of}_size"].values, dtype=np.float64)


def _caveats(result: xr.Dataset, enough: float) -> list[str]:
    """What the numbers do not say, most general first."""
    attrs, lines = result.attrs, []
    lines.append(
        "Energy is not output: a direction with little energy can be the one that queries ask for; "
        'bnviz.experiment(model, batch, "kv_compression") measures what the model then says.'
    )
    lines.append("Directions are found and judged on the same tokens; another text can need others.")
    size, tokens = result["key_size"].values[:, None], result["tokens"].values
    short = (tokens > 0) & (tokens < enough * size)
    if short.any():
        lines.append(
            f"{q.counted(int(tokens[tokens > 0].min()), 'token')} for {_sizes(result, 'key')} channels: ranks are low for want "
            f"of tokens, and not judged under {q.setting(enough)} tokens a channel; capture a longer text."
        )
    if not attrs["centred"]:
        lines.append("Energy is about zero: the mean of a head counts as a direction, and often as the largest.")
    if "value_rank" not in result:
        lines.append("Values were not seen: nothing is said of them, and bytes are those of keys.")
    lines.append("Keys are as they lie in the cache, after rotation; before it, their ranks can be lower.")
    return lines
