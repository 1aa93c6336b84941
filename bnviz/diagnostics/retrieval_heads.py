"""Which heads look back at earlier copies and so need every key, and which may keep the first and the recent tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from bnviz import quantities as q
from bnviz.errors import SchemaError
from bnviz.schema import Finding, Judgement, Saving, Variable, diagnostic, stamp

from ._retrieval import LONG, Rule, bytes_held, groups_of, roles

_HEADS = ("layer", "head")
_PLACES = 64  # heads that a finding names, strongest first
TABLE = ("echo", "induction", "echo and induction")


@diagnostic(
    question="Which heads find earlier copies of a token, and so need the whole cache?",
    needs=("retrieval_heads.induction",),
    gives=(
        Variable("echo", _HEADS, "1", "attention on earlier copies of the token itself, mean over prompts, 0 to 1"),
        Variable("induction", _HEADS, "1", "attention on what followed those copies, mean over prompts, 0 to 1"),
        Variable("echo_control", _HEADS, "1", "`echo` of the same places where no copy stands: a fixed way back"),
        Variable("induction_control", _HEADS, "1", "`induction` of the same places where no copy stands"),
        Variable("echo_spread", _HEADS, "1", "standard deviation of `echo` from prompt to prompt; NaN: one prompt"),
        Variable("induction_spread", _HEADS, "1", "the same of `induction`"),
        Variable("even", ("layer",), "1", "what a head that attends evenly to all it sees has of either"),
        Variable("role", _HEADS, "name", "what makes it a retrieval head: index into attrs['table'], -1: it is none"),
        Variable("kv_heads", ("layer",), "count", "key-value heads of the layer"),
        Variable("bytes_per_token", ("layer",), "B", "bytes of one token's keys and values; NaN: not known"),
        Variable("bytes_whole", (), "B", "the KV cache of one text of attrs['length'] tokens; NaN: not known"),
        Variable("bytes_kept", (), "B", "the same where only retrieval heads keep every key"),
    ),
    order=33,
)
def retrieval_heads(
    retrieval_heads: xr.Dataset,
    *,
    shares: tuple[float, float] = (0.01, 0.14),
    least: float = 0.1,
    over: float = 2.0,
    length: int | None = None,
    sinks: int = 4,
    recent: float = 0.2,
) -> xr.Dataset:
    """Name the heads that find earlier copies, by RazorAttention's rule, and only where they really do.

    The paper takes the best 1 % of heads by echo and the best 14 % by induction, whatever their values: of a model without any
    such head it would take noise. So a head must also pass two limits: its share, less what its places get where no copy
    stands, is `least` or more, and its share is `over` times an even head's.

    Parameters
    ----------
    retrieval_heads : Dataset
        Record of the experiment `retrieval_heads`.
    shares : (float, float)
        Of all key-value heads, those kept for echo and for induction, rounded, at least one each. A key-value head counts by the
        best of the query heads that read it.
    least : float
        Share of its attention that a head must put on copies, above its control.
    over : float
        How many times an even head's share it must reach.
    length : int, optional
        Tokens of the cache whose bytes are counted; None: the model's context, or 32,768 where it is not known.
    sinks : int
        First tokens that the other heads keep.
    recent : float
        Recent tokens that they keep: a share of `length` below 1, or a number. RazorAttention's is max(4,000, length / 5), and
        one more token that stands for those dropped.

    Returns
    -------
    Dataset
        See `retrieval_heads.spec.gives`; NaN where a layer has fewer heads than another. attrs: model, tokens, block, repeats,
        prompts, table, shares, least, over, length, sinks, local, heads, left_out (heads above the limits that the shares leave
        out).

    Raises
    ------
    SchemaError
        An option out of its range.

    Notes
    -----
    bytes_kept = sum over layers and their kv heads of bytes_per_token / kv_heads x (length for a retrieval head, else
    min(length, sinks + recent)). Layers whose window is shorter than a block see no copy (`even` is 0); they are in neither sum.
    Cost O(prompts x layers x heads).

    Sources: RazorAttention, Tang et al. 2024, arXiv:2407.15891; the limits and the control are choices of bnviz.

    Examples
    --------
    >>> cell = ("sample", "layer", "head")
    >>> names = ("echo", "induction", "echo_control", "induction_control")
    >>> record = xr.Dataset({name: (cell, [[[0.0, 0.0, 0.01, 0.0]]]) for name in names})
    >>> record["induction"] = (cell, [[[0.0, 0.7, 0.02, 0.01]]])
    >>> record["even"] = (("sample", "layer"), [[0.01]])
    >>> record["kv_heads"], record["bytes_per_token"] = ("layer", [2]), ("layer", [256.0])
    >>> result = retrieval_heads(record.assign_coords(layer=[0]), length=1000)
    >>> result["role"].values.tolist(), float(result["bytes_kept"])  # 1,000 tokens of one kv head, 204 of the other
    ([[-1, 1, -1, -1]], 154112.0)
    """
    record = retrieval_heads
    size = length or int(record.attrs.get("context", 0)) or LONG
    rule = Rule(_checked(shares), least, over, _tokens(recent, size), sinks)
    made = {name: _over_prompts(record[name].values) for name in ("echo", "induction")}
    control = {name: _over_prompts(record[f"{name}_control"].values)[0] for name in made}
    even, kv_heads = np.asarray(record["even"].values[0], float), record["kv_heads"].values.astype(np.int64)
    groups = groups_of(made["induction"][0], kv_heads)
    role, left_out = roles({name: mean for name, (mean, _) in made.items()}, control, even, groups, rule)
    taken = record["bytes_per_token"].values.astype(float)
    whole, kept = bytes_held(role, np.where(even > 0, taken, 0.0), groups, size, rule)
    result = xr.Dataset(
        {name: (_HEADS, mean) for name, (mean, _) in made.items()}
        | {f"{name}_control": (_HEADS, values) for name, values in control.items()}
        | {f"{name}_spread": (_HEADS, spread) for name, (_, spread) in made.items()}
        | {"even": ("layer", even), "role": (_HEADS, role), "kv_heads": ("layer", kv_heads)}
        | {"bytes_per_token": ("layer", taken), "bytes_whole": ((), whole), "bytes_kept": ((), kept)},
        coords={name: record.coords[name] for name in ("layer", "path") if name in record.coords},
    )
    result.attrs = {name: int(record.attrs.get(name, 0)) for name in ("tokens", "block", "repeats", "model_bytes")}
    result.attrs |= {"model": str(record.attrs.get("model", "model")), "prompts": int(record.sizes["sample"])}
    result.attrs |= {"table": list(TABLE), "shares": list(rule.shares), "least": least, "over": over, "length": size}
    heads = int(groups.heads.sum())
    result.attrs |= {"sinks": sinks, "local": rule.recent, "heads": heads, "left_out": left_out}
    return stamp(result, _GIVES)


_GIVES: tuple[Variable, ...] = retrieval_heads.spec.gives  # type: ignore[attr-defined]  # the record has the same name


def _checked(shares: tuple[float, float]) -> tuple[float, float]:
    if len(shares) != 2 or not all(0 <= one <= 1 for one in shares):
        raise SchemaError(
            f"retrieval_heads: shares is {shares!r}, expected two numbers from 0 to 1: of echo, of induction."
        )
    return float(shares[0]), float(shares[1])


def _tokens(recent: float, length: int) -> int:
    if recent <= 0 or (recent >= 1 and recent != int(recent)):
        raise SchemaError(
            f"retrieval_heads: recent is {recent!r}, expected a share of the length below 1 or a number of tokens."
        )
    return int(recent) if recent >= 1 else max(1, int(recent * length))


def _over_prompts(values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Mean and standard deviation over the first axis; of one prompt the latter is NaN."""
    values = values.astype(float)
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], math.nan)
    return values.mean(axis=0), spread


def judge(result: xr.Dataset) -> Judgement:
    """How many heads find earlier copies, and what the others could save."""
    attrs = result.attrs
    subtitle = (
        f"share of attention on earlier copies and on what followed them · {attrs['model']}, "
        f"{q.counted(attrs['heads'], 'head')} · {attrs['repeats']} × {q.count(attrs['block'])} random tokens, "
        f"{q.counted(attrs['prompts'], 'prompt')}"
    )
    found = _strongest(result)
    if not attrs["heads"]:
        return Judgement("No head was seen, so no copy could be looked for", subtitle)
    if not found:
        value, excess = _best(result)
        title = (
            f"No head finds earlier copies: at most {q.ratio(excess)} above chance (limit {q.setting(attrs['least'])})"
        )
        summary = f"{title}; the largest share is {q.ratio(value)}, among {q.counted(attrs['heads'], 'head')}."
        return Judgement(title, subtitle, summary, tuple(_caveats(result)))
    value, what, row, head = found[0]
    layer = int(result["layer"].values[row])
    of = f"{q.count(len(found))} of {q.counted(attrs['heads'], 'head')} {'finds' if len(found) == 1 else 'find'}"
    title = f"{of} earlier copies, most layer {layer} head {head} ({what} {q.ratio(value)})"
    summary = f"{title}; an even head has {q.ratio(float(result['even'].values[row]))}."
    return Judgement(title, subtitle, summary, tuple(_caveats(result)), (_finding(result, found),))


def _strongest(result: xr.Dataset) -> list[tuple[float, str, int, int]]:
    """Retrieval heads as (share, of what, row of the layer, head), strongest first."""
    found = []
    for row, head in np.argwhere(result["role"].values >= 0).tolist():
        is_echo = int(result["role"].values[row, head]) == 0
        name = "echo" if is_echo else "induction"
        found.append((float(result[name].values[row, head]), name, row, head))
    return sorted(found, key=lambda one: (-one[0], *one[2:]))


def _best(result: xr.Dataset) -> tuple[float, float]:
    """The largest share of any head, and the largest above its control."""
    names = ("echo", "induction")
    value = max(float(np.nanmax(result[name].values)) for name in names)
    return value, max(float(np.nanmax(result[name].values - result[f"{name}_control"].values)) for name in names)


def _finding(result: xr.Dataset, found: list[tuple[float, str, int, int]]) -> Finding:
    attrs, layers = result.attrs, result["layer"].values
    paths = result["path"].values if "path" in result.coords else [""] * len(layers)
    whole, kept = float(result["bytes_whole"]), float(result["bytes_kept"])
    saving, others = None, ""
    if len(found) < attrs["heads"]:
        others = (
            f"; the others can keep {q.counted(attrs['sinks'], 'sink')} and {q.count(attrs['local'])} recent tokens"
        )
    if math.isfinite(whole) and kept < whole:
        beside = whole + attrs["model_bytes"]
        how = (
            f"computed from shapes, for a text of {q.count(attrs['length'])} tokens, as a share of weights and KV cache"
        )
        saving = Saving(whole - kept, "B", (whole - kept) / beside, how)
        others += f": {q.size(kept)} of {q.size(whole)} at {q.count(attrs['length'])} tokens"
    value, what, *_ = found[0]
    shown = found[:_PLACES]
    of = f"{q.count(len(found))} of {q.counted(attrs['heads'], 'head')} {'finds' if len(found) == 1 else 'find'}"
    return Finding(
        code="retrieval_heads/retrieval",
        sentence=f"{of} earlier copies ({what} {q.ratio(value)}, limit {q.setting(attrs['least'])} above "
        f"chance){others}",
        severity="low",
        where={
            "layer": [int(layers[at]) for *_, at, _ in shown],
            "head": [at for *_, at in shown],
            "path": [str(paths[at]) for *_, at, _ in shown],
        },
        value=value,
        limit=attrs["least"],
        advice='Keep every key for these heads alone: bnviz.head_lists.head_list(report["retrieval_heads"]) lists them for the '
        "cache of your own serving; compare the loss on long texts first.",
        saving=saving,
    )


def _caveats(result: xr.Dataset) -> list[str]:
    attrs = result.attrs
    lines = [
        "Measured on random tokens: a head that finds copies only where they make sense is not seen here. Chance is what its "
        "places get where the blocks are shuffled."
    ]
    if attrs["left_out"]:
        echo, induction = (q.share(one) for one in attrs["shares"])
        lines.append(
            f"{q.counted(attrs['left_out'], 'head')} more {'passes' if attrs['left_out'] == 1 else 'pass'} the limits and "
            f"{'stands' if attrs['left_out'] == 1 else 'stand'} beyond the best {echo} by echo and {induction} by induction; "
            "shares= takes more."
        )
    fixed = _fixed(result)
    if fixed:
        lines.append(fixed)
    blind = [str(int(n)) for n, even in zip(result["layer"].values, result["even"].values, strict=True) if even == 0]
    if blind:
        lines.append(
            f"The window of {'layer' if len(blind) == 1 else 'layers'} {', '.join(blind[:8])}{' ...' if blind[8:] else ''} is "
            "shorter than a block: no copy is in sight there, and its bytes are not counted."
        )
    return lines


def _fixed(result: xr.Dataset) -> str:
    """The head that most looks a fixed way back, whatever stands there; empty when none reaches the limit."""
    found: list[tuple[float, str, int, int]] = []
    floor = np.maximum(result.attrs["least"], result.attrs["over"] * result["even"].values)[:, None]
    for name in ("echo", "induction"):
        both = np.minimum(result[name].values, result[f"{name}_control"].values)
        known = np.nan_to_num(np.where((result["role"].values < 0) & (both >= floor), both, 0.0))
        at, head = divmod(int(known.argmax()), known.shape[1])
        found.append((float(known[at, head]), name, at, head))
    most, name, at, head = max(found, key=lambda one: one[0])
    if not most:
        return ""
    share, control = (float(result[one].values[at, head]) for one in (name, f"{name}_control"))
    return (
        f"Layer {int(result['layer'].values[at])} head {head} looks a fixed way back, whatever stands there: {name} "
        f"{q.ratio(share)}, and {q.ratio(control)} where no copy does."
    )
