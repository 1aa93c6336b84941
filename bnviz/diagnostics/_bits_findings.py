"""The words, the findings and the caveats of `kv_bits`."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz import quantities as q
from bnviz.schema import Finding

_PLACES = 64  # of one finding
_NOT_OUTPUT = (
    'Error of keys and values is not error of the output, which bnviz.experiment(model, batch, "kv_compression") measures. One '
    "passage of text."
)


def sides(result: xr.Dataset) -> list[str]:
    """Of "key" and "value", what was coded."""
    return [
        of for of in ("key", "value") if f"{of}_error" in result and np.isfinite(result[f"{of}_error"].values).any()
    ]


def _worst(result: xr.Dataset, of: str, bits: int) -> float:
    error = result[f"{of}_error"].sel({"method": "groups", "bits": bits}).values
    return float(np.nanmax(error)) if np.isfinite(error).any() else float("nan")


def enough(result: xr.Dataset) -> int | None:
    """Fewest bits at which every head of keys and of values loses no more than the limit."""
    for bits in result["bits"].values.astype(int):
        if all(_worst(result, of, int(bits)) <= result.attrs["limit"] for of in sides(result)):
            return int(bits)
    return None


def title(result: xr.Dataset) -> str:
    """What every head can do with."""
    told = sides(result)
    if not told:
        return "Neither keys nor values have anything to code"
    limit, bits = _limit(result), enough(result)
    if bits is None:
        most = int(result["bits"].values.max())
        worst = max(_worst(result, of, most) for of in told)
        return f"Codes of {most} bits lose {q.share(worst, 1000)} in the worst head (limit {limit})"
    lost = ", ".join(f"{q.share(_worst(result, of, bits), 1000)} of {of}s" for of in told)
    short = f"Codes of {q.counted(bits, 'bit')} lose at most {lost} in any head"
    return f"{short} (limit {limit})" if len(short) + len(limit) <= 80 else short


def _limit(result: xr.Dataset) -> str:
    return f"{q.setting(100 * float(result.attrs['limit']))} %"


def words(result: xr.Dataset) -> str:
    """The subtitle."""
    attrs = result.attrs
    return (
        f"squared error over squared length, ends of groups of {attrs['group']} · {attrs['model']}, "
        f"{result.sizes['layer']} layers × {q.counted(result.sizes['kv_head'], 'kv head')} · "
        f"{q.counted(attrs['tokens'], 'token')}, {attrs['phase']}"
    )


def summary(result: xr.Dataset) -> str:
    """For a screen reader: the title, what coding takes, and what a split loses."""
    lines = [title(result) + "."]
    bits = enough(result) or (int(result["bits"].values.max()) if result.sizes.get("bits") else 0)
    for of in sides(result):
        taken = result[f"{of}_bits_mean"].sel(bits=bits)
        lines.append(
            f"Codes of {bits} bits of {of}s take {q.significant(float(taken.sel({'method': 'groups'})))} bits in groups, "
            f"{q.significant(float(taken.sel({'method': 'channels'})))} coded by channel and "
            f"{q.significant(float(taken.sel({'method': 'differences'})))} as differences, mean over heads."
        )
    return " ".join([*lines, *(f"{line}." for line in split_words(result))])


def split_words(result: xr.Dataset) -> list[str]:
    """What more bits for the tokens with attention lose, a sentence for keys and one for values."""
    found = []
    low, even, high = result.attrs.get("mixed", (0, 0, 0))
    for of in sides(result):
        ratio, drawn = (_middle(result, f"{of}_{name}") for name in ("split_error", "random_error"))
        if not np.isfinite(ratio):
            continue
        found.append(
            f"{q.share(result.attrs['share'])} of the {of}s at {high} bits by attention, the rest at {low}, lose "
            f"{q.factor(ratio)} what {even} bits for all lose, weighted by attention; {q.factor(drawn)} if drawn (median head)"
        )
    return found


def _middle(result: xr.Dataset, name: str) -> float:
    if name not in result or not np.isfinite(result[name].values).any():
        return float("nan")
    return float(np.nanmedian(result[name].values))


def _where(result: xr.Dataset, found: Any) -> dict[str, Any]:
    layers, paths = result["layer"].values, [str(p) for p in result["path"].values]
    where: dict[str, Any] = {
        "layer": [int(layers[i]) for i, _ in found[:_PLACES]],
        "kv_head": [int(j) for _, j in found[:_PLACES]],
        "path": [paths[i] for i, _ in found[:_PLACES]],
    }
    return {name: values[0] for name, values in where.items()} if len(found) == 1 else where


def coarse(result: xr.Dataset) -> list[Finding]:
    """Heads that need more bits than half of the heads do."""
    found, bits = [], result["bits"].values.astype(int)
    for of in sides(result):
        fewest = result[f"{of}_fewest_bits"].values
        known = np.isfinite(result[f"{of}_error"].sel({"method": "groups"}).values).all(0)
        needed = np.where(known & ~np.isfinite(fewest), np.inf, fewest)
        usual = np.sort(needed[known])[(known.sum() - 1) // 2]
        more = np.argwhere(known & (needed > usual))
        if not np.isfinite(usual) or not len(more):
            continue
        error = result[f"{of}_error"].sel({"method": "groups", "bits": int(usual)}).values
        more = more[np.argsort(-error[tuple(more.T)], kind="stable")]
        worst = float(error[tuple(more[0])])
        who = f"{of.capitalize()}s of {len(more)} of {q.counted(int(known.sum()), 'kv head')} lose"
        if len(more) == 1:
            one = _where(result, more)
            who = f"{of.capitalize()}s of layer {one['layer']} kv head {one['kv_head']} lose"
        found.append(
            Finding(
                code=f"kv_bits/coarse_{of}s",
                sentence=f"{who} up to {q.share(worst, 1000)} at {q.counted(usual, 'bit')}, which half of the heads can do with "
                f"(limit {_limit(result)})",
                severity="low",
                where=_where(result, more),
                value=worst,
                limit=float(result.attrs["limit"]),
                advice=f"Keep these in {_next(bits, int(usual))} bits, or in smaller groups: bnviz.capture(model, "
                f'probes=["kv_codes"], group={max(1, result.attrs["group"] // 2)}) says what that loses.',
            )
        )
    return found


def _next(bits: Any, usual: int) -> int:
    return int(min((b for b in bits if b > usual), default=16))


def local(result: xr.Dataset, gain: float) -> list[Finding]:
    """Heads whose codes take fewer bits as differences to a neighbour."""
    found, bits = [], enough(result) or int(result["bits"].values.max(initial=1))
    for of in sides(result):
        taken = result[f"{of}_bits"].sel(bits=bits)
        plain, against = (taken.sel({"method": name}).values for name in ("channels", "differences"))
        saved = 1 - np.divide(against, plain, out=np.full(plain.shape, np.nan), where=plain > 0)
        with np.errstate(invalid="ignore"):
            heads = np.argwhere(saved >= gain)
        if not len(heads):
            continue
        heads = heads[np.argsort(-saved[tuple(heads.T)], kind="stable")]
        best = float(saved[tuple(heads[0])])
        run = int(result.attrs["run"])
        found.append(
            Finding(
                code=f"kv_bits/local_{of}s",
                sentence=f"{of.capitalize()}s of {len(heads)} of {q.counted(int(np.isfinite(saved).sum()), 'kv head')} take up "
                f"to {q.share(best)} fewer bits as differences to the first of {run} tokens (limit {q.share(gain)})",
                severity="note",
                where=_where(result, heads),
                value=best,
                limit=gain,
                advice="Code these heads so where a cache is stored or sent (CacheGen, arXiv:2310.07240), and leave the others "
                f"as they are: result['{of}_bits'] has both.",
            )
        )
    return found


def splits(result: xr.Dataset, pays: float) -> list[Finding]:
    """Keys, or values, for which more bits where attention is lose less than the same bits for all."""
    found = []
    for of, sentence in zip(
        [s for s in sides(result) if f"{s}_split_error" in result], split_words(result), strict=False
    ):
        ratio = _middle(result, f"{of}_split_error")
        if not ratio <= pays:
            continue
        found.append(
            Finding(
                code=f"kv_bits/split_{of}s",
                sentence=f"{sentence} (limit {q.factor(pays)})",
                severity="low",
                value=ratio,
                limit=pays,
                advice=_measured(result),
            )
        )
    return found


def _measured(result: xr.Dataset) -> str:
    """The call that measures a split of the bits."""
    low, even, high = result.attrs["mixed"]
    half = f'bits=[{even}, "{high}/{low}"]'
    return (
        "Give tokens bits by their attention (ZipVL, arXiv:2410.08584), and measure what the model then says: "
        f'bnviz.experiment(model, batch, "kv_compression", {half}).'
    )


def caveats(result: xr.Dataset) -> list[str]:
    """What the numbers do not say, most general first."""
    attrs, lines = result.attrs, [_NOT_OUTPUT]
    if not sides(result):
        return lines
    most = int(result["bits"].values.max())
    needed = 4 * 2**most
    if attrs["tokens"] < needed:
        lines.append(
            f"{q.counted(attrs['tokens'], 'token')}: entropies of codes of {most} bits are too low for want of tokens; they need "
            f"about {q.count(needed)}."
        )
    lines.append(
        f"Bits after coding are those of an ideal coder that was told the frequencies, from {attrs['channels']} evenly spaced "
        "channels of a head at most."
    )
    lines.append("All tokens are quantised; KIVI keeps the last ones as they are, and loses less by that.")
    if split_words(result):
        lines.append(
            "Tokens get more bits, and are judged, by the same attention: that of this passage, of which early tokens get more."
        )
    else:
        lines.append("More bits by attention: not told, as attention or one of the numbers of bits was not captured.")
    return lines
