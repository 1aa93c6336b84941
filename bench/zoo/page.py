"""The page in the documentation that a sweep writes."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence

from .table import EXACT, Row, counted, faults, verdict

_MEANING = """\
Every model type of the installed transformers, built tiny from its config with random weights, and models that are not from
transformers (`zoo/...`, written for this sweep as people write them), each run plain, counted, and captured. `make coverage`
makes this page in about a quarter of an hour on one core, without a network:

    python -m bench.coverage --write docs/coverage.md

**Attention** is counted by an independent census of the operators of one forward: kernels that compute attention whole, and
products of matrices whose rows went through a softmax and into a second product. A model is right when the capture shows the
same attentions, each with its number of heads, queries and keys, and no other. What a hand-written model must show stands in
its source. *Weights* made of what the probes were shown, in float64, are compared with those of the census, row by row in any
order (the largest, the sum of squares, the mean place of the keys). Rows whose every key is masked see nothing, where a softmax
of masked logits is even; a sink's share may be taken off weights or off outputs. A fused kernel of a whole layer and attention
that runs in pieces give no weights to compare.

**Routers** are counted by the modules that own experts and ran. Their experts are computed once more from the captured ids and
weights, with random weights of a size that tells experts apart; the difference to what the model's own experts gave, over the
largest of their outputs, may be 1e-5.

**Blocks** are held against every number of layers that the config states: each must be the size of a list of blocks. *Residual
writers* are the parts of a block whose outputs add up to what it added; a block that is no such sum (post-norm, convolutions)
has none, and that is no fault.

**Outputs** are compared bit for bit, all tensors, caches included. *Left behind* compares hooks, attributes and classes of every
module, function modes, global hooks, random numbers, `torch.nn.functional` and transformers' attention interface, before and
after.
"""


def markdown(stored: Mapping[str, Row]) -> str:
    """Versions, totals, what was not right in full, and every type in the place where it belongs."""
    rows = list(stored.values())
    ran = [r for r in rows if not r["reason"] and not r["error"]]
    wrong = [r for r in rows if not r["reason"] and faults(r)]
    parts = (
        ("", ["# Coverage", "", _versions(), "", _MEANING, "| of | right |", "|---|---|", *_totals(stored)]),
        ("Not right", _wrong(wrong)),
        ("Routers", _routers([r for r in ran if r["routers"] or r["routers_expected"]])),
        ("Layers", _layers([r for r in ran if r["layers_lost"]])),
        ("Run in part", _idle([r for r in ran if r["idle"] or r["blocks_seen"] < r["blocks"]])),
        ("Right", _groups([r for r in ran if not faults(r)])),
        ("Not built", _left_out([r for r in rows if r["reason"]])),
    )
    return "\n".join(line for title, lines in parts for line in (*([f"## {title}", ""] if title else ()), *lines, ""))


def _versions() -> str:
    import torch
    import transformers

    import bnviz

    return (
        f"bnviz {bnviz.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}."
    )


def _totals(stored: Mapping[str, Row]) -> list[str]:
    return [f"| {what} | {of} |" for what, of in counted(stored)]


def _wrong(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["Nothing."]
    lines = [
        "Numbers are *seen of counted*. *What* is attention, weights, routers, experts, blocks or outputs that are not as they",
        "should be; *failed*: the model or the capture raised.",
        "",
        "| type | what | attention | routers | where |",
        "|---|---|---|---|---|",
    ]
    return lines + [
        f"| {r['name']} | {verdict(r)} | {r['attention']} of {r['attention_expected']} "
        f"| {r['routers']} of {r['routers_expected']} | {_cell('; '.join(_where(r)))} |"
        for r in rows
    ]


def _where(row: Row) -> list[str]:
    if row["error"]:
        return [row["error"].splitlines()[0]]
    return [
        *(f"not seen: {one}" for one in row["missing"][:2]),
        *(f"seen and not counted: {one}" for one in row["extra"][:2]),
        *(f"weights of {one}" for one in row["weights_wrong"][:2]),
        *(f"no router seen: {one}" for one in row["routers_missing"][:2]),
        *([f"experts differ by {row['rebuilt_error']:.0e}"] if not row["rebuilt_error"] <= EXACT else []),
        *(f"no blocks for {one.removesuffix(': ')}" for one in row["layers_lost"] if one.endswith(": ")),
        *(f"left: {one}" for one in row["left"][:2]),
        *row["notes"][:1],
    ]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _routers(rows: Sequence[Row]) -> list[str]:
    lines = [
        "The difference is the largest of all routers of the model; 0 where the model itself adds in the same order.",
        "",
        "| type | routers seen of counted | experts rebuilt | difference |",
        "|---|---|---|---|",
    ]
    for r in rows:
        told = f"{r['rebuilt_error']:.1e}" if r["rebuilt"] else "; ".join(r["not_rebuilt"]) or "none seen"
        lines.append(
            f"| {r['name']} | {r['routers']} of {r['routers_expected']} | {r['rebuilt']} of {r['routers']} | {_cell(told)} |"
        )
    return lines


def _layers(rows: Sequence[Row]) -> list[str]:
    """Numbers of layers in a config that are no list of blocks, by the reason."""
    reasons: dict[str, list[str]] = {}
    for r in rows:
        for one in r["layers_lost"]:
            field, _, why = one.partition(": ")
            reasons.setdefault(why or "not known: see above", []).append(f"{r['name']} `{field}`")
    return _listed(
        "Numbers of layers that a config states and that are the size of no list of blocks, with the reason.", reasons
    )


def _idle(rows: Sequence[Row]) -> list[str]:
    """Models of which one call leaves a part idle, by what was left out."""
    reasons: dict[str, list[str]] = {}
    for r in rows:
        what, _, why = r["idle"].partition(" (")
        told = f"{r['name']} ({r['blocks_seen']} of {r['blocks']} blocks ran{f': {why[:-1]}' if why else ''})"
        reasons.setdefault(what or "parts that this call does not reach, or that are not called as modules", []).append(
            told
        )
    return _listed(
        "What ran was watched and is in the tables; what was left out is a type of its own in most.", reasons
    )


def _listed(lead: str, reasons: Mapping[str, Sequence[str]]) -> list[str]:
    if not reasons:
        return ["None."]
    ranked = sorted(reasons.items(), key=lambda g: (-len(g[1]), g[0]))
    return [lead, "", *(f"- **{why}** ({len(members)}): {', '.join(members)}." for why, members in ranked)]


_BY = {
    "": "no place where attention is looked for",
    "interface": "transformers' attention interface",
    "native": "torch's own layers",
    "softmax": "softmax written by hand",
    "sdpa": "torch's scaled_dot_product_attention",
    "multi_head": "torch's multi_head_attention_forward",
    "flex": "flex_attention",
}


def _groups(rows: Sequence[Row]) -> list[str]:
    """Types that were right, together where they were seen alike."""
    groups: dict[str, list[str]] = {}
    for r in rows:
        by = ", ".join(_BY.get(m, m) for m in r["mechanisms"])
        by = by or "code that does not show it before it runs"  # `bnviz.sites` says that it is named attention
        kind = f"Attention by {by}" if r["attention_expected"] else "No attention"
        groups.setdefault(kind, []).append(f"{r['name']} {r['attention']}" if r["attention"] else r["name"])
    lines = ["The number is how many attentions one forward of the tiny model computes, all of them seen.", ""]
    for kind, members in sorted(groups.items(), key=lambda g: -len(g[1])):
        lines += [f"**{kind}** ({len(members)}): {', '.join(members)}.", ""]
    return lines[:-1]


def _left_out(rows: Sequence[Row]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for r in rows:
        why = re.sub(r"^\w+ requires the (\w+) library.*", r"needs the package \1, which is not installed", r["reason"])
        reasons.setdefault(why, []).append(r["name"])
    return _listed("Types without a row above, with the reason.", reasons)
