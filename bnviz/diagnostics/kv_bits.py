"""How many bits a key and a value need: by groups, coded by channel, against a neighbour, and more where attention is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from bnviz.errors import NotCaptured, SchemaError, UnknownName
from bnviz.schema import Judgement, Variable, diagnostic, stamp

from ._bits_findings import caveats, coarse, local, splits, summary, title, words
from ._passage import phases, places, step_row
from ._token_split import Floats, Split, split

METHODS = ("groups", "channels", "differences")
_HEADS = ("layer", "kv_head")
_CODES = ("method", "bits", *_HEADS)
_SIDES = ("key", "value")


def _declared(of: str) -> tuple[Variable, ...]:
    """The variables of keys, or of values."""
    told: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
        ("bits", _CODES, "bit", f"bits a number of a {of} takes, with the ends of its group, or after coding"),
        ("error", _CODES, "1", "squared error over squared length; NaN: a head of zeros"),
        ("bits_mean", ("method", "bits"), "bit", "bits, mean over layers and kv heads"),
        ("error_mean", ("method", "bits"), "1", "error, mean over layers and kv heads"),
        ("fewest_bits", _HEADS, "bit", "fewest bits of a code in groups whose error is within the limit; NaN: none"),
        (
            "locality",
            _HEADS,
            "1",
            "variance of what a token adds to the first of its run over that of tokens; 2 as strangers",
        ),
        (
            "split_error",
            _HEADS,
            "1",
            "error weighted by attention: tokens with most of it at more bits, over the same bits for all",
        ),
        ("random_error", _HEADS, "1", "the same with more bits for tokens drawn at random: the mean over all draws"),
    )
    return tuple(Variable(f"{of}_{name}", dims, unit, doc, optional=True) for name, dims, unit, doc in told)


@diagnostic(
    question="How many bits do keys and values need?",
    needs=("kv_codes.code_bits",),
    wants=(
        *(
            f"kv_codes.{of}_{name}"
            for of in _SIDES
            for name in ("entropy", "delta_entropy", "channel_error", "group_error", "locality", "token_error")
        ),
        "attention.mass",
    ),
    gives=(
        *_declared("key"),
        *_declared("value"),
        Variable("important_mass", _HEADS, "1", "share of the attention on the tokens with more bits", optional=True),
    ),
    order=34,
)
def kv_bits(
    kv_codes: xr.Dataset,
    attention: xr.Dataset | None = None,
    *,
    limit: float = 0.01,
    mixed: Sequence[int] = (2, 3, 4),
    step: int | None = None,
    sequence: int = 0,
) -> xr.Dataset:
    """Error against bits of three ways to code keys and values, and of a split of the bits by attention.

    Read `error` against `bits`: of two ways, the one that loses less with the same bits is better. `locality` below 1 says that
    neighbours are alike; near 2 that they are strangers. `split_error` below 1 says that more bits for the tokens with attention
    pay; `random_error` is what the same split loses when tokens are drawn. Error of a vector is not error of an output.

    Parameters
    ----------
    kv_codes : Dataset
        Record of the probe `kv_codes`.
    attention : Dataset, optional
        Record of the probe `attention`, for the split.
    limit : float
        Error that a head may have, above 0: gives `fewest_bits`.
    mixed : sequence of 3 int
        Bits of tokens with little attention, bits for all, bits of tokens with much. Ascending; a split is left out where one of
        them was not captured.
    step : int, optional
        Label of a step; None: the first that is not decoding.
    sequence : int
        Of the batch, whose tokens are split. All other numbers are of all sequences together.

    Returns
    -------
    Dataset
        See `kv_bits.spec.gives`; what is said of keys, or of values, is absent where they were not seen. Coordinates: method
        (groups, channels, differences), bits (of a code), layer with path, kv_head. attrs: model, tokens, phase, limit, mixed,
        share (of the tokens with more bits), group, run, channels.

    Raises
    ------
    NotCaptured
        No codes, or only decoding was captured.
    UnknownName
        A step or a sequence that does not exist.
    SchemaError
        An option out of its range.

    Notes
    -----
    With b bits of a code. `groups` (KIVI, arXiv:2402.02750): b + overhead bits, error of codes whose ends are those of a group.
    `channels` (CacheGen, arXiv:2310.07240): the entropy of codes whose ends are those of a channel, each channel coded by its own
    frequencies. `differences`: the same codes, those that are not the first of a run of r tokens coded as differences to it:
    entropy / r + (1 - 1 / r) delta_entropy; the error is that of `channels`, as whole numbers lose nothing.
    Split (ZipVL, arXiv:2410.08584): with low, even, high bits, the floor(n (even - low) / (high - low)) tokens with most
    attention mass C_j (mean over the query heads of a kv head) get high bits, the rest low: no more bits than even for all. With
    e_j(b) the squared error of token j in groups, whose ends are the same whatever its bits: sum_j C_j e_j(b_j) over
    sum_j C_j e_j(even). For values sum_j p_ij e_j is at least the squared error of a query's output (Jensen), so C weights what
    that may come to; for keys it says where logits that matter move. Cost O(layers x heads x keys log keys).

    Examples
    --------
    >>> head = ("step", "layer", "bits", "kv_head")
    >>> record = xr.Dataset({"code_bits": (head[:3], [[[2, 4]]]), "key_overhead": (head[:2], [[1.0]])})
    >>> for name, of in {"entropy": (1.5, 3.0), "delta_entropy": (0.5, 1.0), "group_error": (0.1, 0.01)}.items():
    ...     record[f"key_{name}"] = (head, [[[[of[0]], [of[1]]]]])
    >>> record["key_channel_error"] = 2 * record["key_group_error"]
    >>> result = kv_bits(record.assign_attrs(run=10))
    >>> result["key_bits_mean"].values.round(2).tolist(), result["key_fewest_bits"].item()
    ([[3.0, 5.0], [1.5, 3.0], [0.6, 1.2]], 4.0)
    """
    low, even, high = _check(limit, mixed)
    if "code_bits" not in kv_codes:
        raise NotCaptured('kv_bits needs kv_codes.code_bits; add probes=["kv_codes"] and run again.')
    row = step_row(kv_codes, step, name="kv_codes")
    record = kv_codes.isel(step=row)
    bits = record["code_bits"].max("layer").values.astype(int)
    run = int(kv_codes.attrs.get("run", 10))
    found: dict[str, Any] = {}
    for of in _SIDES:
        if f"{of}_group_error" in record:
            found |= _codes(record, of, bits, run, limit)
    share = (even - low) / (high - low)
    mass = None if attention is None else _mass(kv_codes, attention, row, sequence)
    if mass is not None and {low, even, high} <= set(bits.tolist()):
        found |= _splits(kv_codes, row, sequence, mass, [bits.tolist().index(b) for b in (low, even, high)], share)
    result = xr.Dataset(found, coords=_coordinates(kv_codes, bits))
    result.attrs = {
        "model": str(kv_codes.attrs.get("model", "model")),
        "tokens": _tokens(kv_codes, row),
        "phase": phases(kv_codes)[row],
        "limit": float(limit),
        "mixed": [low, even, high],
        "share": share,
        "group": int(kv_codes.attrs.get("group", 32)),
        "run": run,
        "channels": int(kv_codes.attrs.get("channels", 16)),
    }
    return stamp(result, kv_bits.spec.gives)  # type: ignore[attr-defined]


def _check(limit: float, mixed: Sequence[int]) -> tuple[int, int, int]:
    if not limit > 0:
        raise SchemaError(f"kv_bits: limit is {limit}, expected an error above 0.")
    told = [int(b) for b in mixed]
    if len(told) != 3 or not told[0] < told[1] < told[2]:
        raise SchemaError(f"kv_bits: mixed is {list(mixed)}, expected three ascending numbers of bits, as (2, 3, 4).")
    return told[0], told[1], told[2]


def _codes(record: xr.Dataset, of: str, bits: Any, run: int, limit: float) -> dict[str, Any]:
    """Bits and errors of keys, or of values."""

    def given(name: str) -> Floats:
        return np.asarray(record[f"{of}_{name}"].transpose("bits", "layer", "kv_head").values, dtype=np.float64)

    plain, lost = given("entropy"), given("group_error")
    over = record[f"{of}_overhead"].values.astype(float)[:, None] if f"{of}_overhead" in record else 0.0
    fixed = np.where(np.isfinite(lost), bits[:, None, None] + over, np.nan)
    taken = np.stack([fixed, plain, plain / run + (1 - 1 / run) * given("delta_entropy")])
    error = np.stack([lost, given("channel_error"), given("channel_error")])
    within = lost <= limit
    fewest = np.where(within.any(0), bits[within.argmax(0)], np.nan)
    found: dict[str, Any] = {
        f"{of}_bits": (_CODES, taken),
        f"{of}_error": (_CODES, error),
        f"{of}_bits_mean": (_CODES[:2], _mean(taken)),
        f"{of}_error_mean": (_CODES[:2], _mean(error)),
        f"{of}_fewest_bits": (_HEADS, fewest),
    }
    if f"{of}_locality" in record:
        found[f"{of}_locality"] = (_HEADS, record[f"{of}_locality"].transpose(*_HEADS).values)
    return found


def _mean(values: Floats) -> Floats:
    """Over the last two axes; NaN where all are."""
    flat = values.reshape(*values.shape[:-2], -1)
    count = np.isfinite(flat).sum(-1)
    return np.asarray(np.divide(np.nansum(flat, -1), count, out=np.full(count.shape, np.nan), where=count > 0))


def _mass(kv_codes: xr.Dataset, attention: xr.Dataset, row: int, sequence: int) -> Floats | None:
    """(layer, kv_head, key) of the same tokens; None where the record of attention has no such step or other tokens."""
    if "mass" not in attention or "key" not in kv_codes.dims:
        return None
    if "layer" in attention.coords and "layer" in kv_codes.coords:
        attention = attention.sel(layer=kv_codes["layer"].values)
    try:
        at = step_row(attention, int(kv_codes["step"].values[row]) if "step" in kv_codes.coords else None)
    except UnknownName:
        return None
    own, keys = places(attention, at, sequence), places(kv_codes, row, sequence)
    mass = attention["mass"].isel(step=at).transpose("layer", "head", "key").values[..., own].astype(np.float64)
    heads = kv_codes.sizes["kv_head"]
    if len(own) != len(keys) or mass.shape[1] % heads:
        return None
    return np.asarray(mass.reshape(len(mass), heads, -1, mass.shape[-1]).mean(2))


def _splits(
    kv_codes: xr.Dataset, row: int, sequence: int, mass: Floats, at: Sequence[int], share: float
) -> dict[str, Any]:
    """What splitting the bits by attention loses, beside the same bits for all and a draw."""
    where, found = places(kv_codes, row, sequence), dict[str, Any]()
    for of in _SIDES:
        if f"{of}_token_error" not in kv_codes:
            continue
        lost = kv_codes[f"{of}_token_error"].isel(step=row).transpose("bits", "layer", "kv_head", "key").values
        low, even, high = (lost[i][..., where].astype(np.float64) for i in at)
        one: Split = split(low, even, high, mass, share)
        found |= {f"{of}_split_error": (_HEADS, one.by_mass), f"{of}_random_error": (_HEADS, one.at_random)}
        found["important_mass"] = (_HEADS, one.mass)
    return found


def _tokens(kv_codes: xr.Dataset, row: int) -> int:
    if "key_position" in kv_codes.coords:
        return int((kv_codes["key_position"].values[row] >= 0).sum())
    return int(kv_codes.sizes.get("key", 0))


def _coordinates(record: xr.Dataset, bits: Any) -> dict[str, Any]:
    layers = record.sizes["layer"]
    labels = record["layer"].values if "layer" in record.coords else np.arange(layers)
    paths = record["path"].values if "path" in record.coords else np.array([""] * layers)
    return {
        "method": np.array(METHODS, dtype=object),
        "bits": bits.astype(np.int64),
        "layer": labels.astype(np.int64),
        "path": ("layer", paths.astype(object)),
        "kv_head": np.arange(record.sizes.get("kv_head", 0)),
    }


def judge(result: xr.Dataset, *, gain: float = 0.1, pays: float = 0.9) -> Judgement:
    """The fewest bits that all heads can do with, heads that need more than most, and ways that take or lose less.

    Parameters
    ----------
    gain : float
        Share of the bits that differences must save in a head to be named.
    pays : float
        A split of the bits by attention pays where its error is at most this of that of the same bits for all.
    """
    findings = [*coarse(result), *local(result, gain), *splits(result, pays)]
    return Judgement(title(result), words(result), summary(result), tuple(caveats(result)), tuple(findings))
