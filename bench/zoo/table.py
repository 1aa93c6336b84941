"""The results of a sweep as words: a line a model, totals, and the page in the documentation."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
EXACT = 1e-5  # by how much experts' outputs made of captured ids and weights may differ, over the largest


def faults(row: Row) -> list[str]:
    """What was not right about a model that was built."""
    found = []
    if row["error"]:
        found.append("failed")
    else:
        if row["missing"] or row["extra"]:
            found.append("attention")
        if row["routers_missing"] or row["routers"] < row["routers_expected"]:
            found.append("routers")
        if not row["rebuilt_error"] <= EXACT:
            found.append("experts")
        if not row["equal"] and row["repeats"]:
            found.append("outputs")
        if row["left"]:
            found.append("left behind")
        if row["notes"] and any("stopped at call" in n for n in row["notes"]):
            found.append("probe")
    return found


def verdict(row: Row) -> str:
    """ "right", "not built", or the faults."""
    if row["reason"]:
        return "not built"
    return ", ".join(faults(row)) or "right"


def line(row: Row) -> str:
    """One model in one line."""
    if row["reason"]:
        return f"{row['name']}: {row['reason']}"
    if row["error"]:
        return f"{row['name']}: {row['error'].splitlines()[0]}"
    said = [
        f"{row['name']:<28} attention {row['attention']}/{row['attention_expected']}",
        f"routers {row['routers']}/{row['routers_expected']}",
        f"blocks {row['blocks_seen']}/{row['blocks']}, {row['writers']} with writers",
        "/".join(row["mechanisms"]),
        verdict(row),
    ]
    said += [f"missing {row['missing'][0]}"] if row["missing"] else []
    said += [f"extra {row['extra'][0]}"] if row["extra"] else []
    said += [f"router {row['routers_missing'][0]}"] if row["routers_missing"] else []
    said += [f"{row['rebuilt']} experts rebuilt to {row['rebuilt_error']:.0e}"] if row["rebuilt"] else []
    said += [f"not rebuilt {row['not_rebuilt'][0]}"] if row["not_rebuilt"] else []
    said += [f"left {row['left'][0]}"] if row["left"] else []
    said += [row["notes"][0][:120]] if row["notes"] else []
    return " · ".join(filter(None, said))


def share(rows: Iterable[Row], right: Any) -> str:
    """ "right of all, percent"."""
    rows = list(rows)
    good = sum(bool(right(r)) for r in rows)
    return f"{good} of {len(rows)}" + (f" ({100 * good / len(rows):.1f} %)" if rows else "")


def counted(stored: Mapping[str, Row]) -> list[tuple[str, str]]:
    """The totals: what is claimed, of how many."""
    built = [r for r in stored.values() if not r["reason"]]
    ran = [r for r in built if not r["error"]]
    attending = [r for r in ran if r["attention_expected"]]
    quiet = [r for r in ran if not r["attention_expected"]]
    routed = [r for r in ran if r["routers_expected"]]
    return [
        ("built and run", share(stored.values(), lambda r: not r["reason"] and not r["error"])),
        ("outputs bit-identical", share(ran, lambda r: r["equal"] or not r["repeats"])),
        ("nothing left behind", share(ran, lambda r: not r["left"])),
        (
            "with attention: every site, its heads, queries and keys",
            share(attending, lambda r: not r["missing"] and not r["extra"]),
        ),
        ("without attention: none claimed", share(quiet, lambda r: not r["extra"])),
        ("with routers: every router", share(routed, lambda r: "routers" not in faults(r))),
        ("blocks found", share(ran, lambda r: r["blocks_seen"])),
        ("verified residual writers in a block", share(ran, lambda r: r["writers"])),
    ]


def totals(stored: Mapping[str, Row]) -> str:
    """The totals as text."""
    return "\n".join(f"{what:<58}{of}" for what, of in counted(stored))


def markdown(stored: Mapping[str, Row]) -> str:
    """The page: versions, totals, what was not right in full, what was right in one line a group, what was left out."""
    import torch
    import transformers

    import bnviz

    rows = list(stored.values())
    wrong = [r for r in rows if not r["reason"] and faults(r)]
    lines = [
        "# Coverage",
        "",
        "Every model type of the installed transformers, built tiny with random weights, and models that are not from",
        "transformers, run plain and captured. `make coverage` makes this page:",
        "`python -m bench.coverage --write docs/coverage.md`.",
        "",
        f"bnviz {bnviz.__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}.",
        "",
        *_meaning(),
        "",
        "| | |",
        "|---|---|",
        *(f"| {what} | {of} |" for what, of in counted(stored)),
        "",
        "## Not right",
        "",
        *(_full(wrong) if wrong else ["Nothing."]),
        "",
        "## Right",
        "",
        *_groups([r for r in rows if not r["reason"] and not faults(r)]),
        "",
        "## Not built here",
        "",
        *_left_out([r for r in rows if r["reason"]]),
    ]
    return "\n".join(lines) + "\n"


def _meaning() -> list[str]:
    return [
        "Attention is counted by an independent census of the operators of one forward: kernels that compute attention whole,",
        "and products of matrices whose rows went through a softmax and into a second product. A model is right when the",
        "capture shows the same attentions, each with its number of heads, queries and keys, and no other. Routers are counted",
        "by the modules that own experts and ran. Outputs are compared bit for bit, all tensors, caches included; *left behind*",
        "compares hooks, attributes and classes of every module, function modes, global hooks, random numbers,",
        "`torch.nn.functional` and transformers' attention interface before and after.",
    ]


def _full(rows: list[Row]) -> list[str]:
    lines = ["| type | blocks | attention | routers | what | where |", "|---|---|---|---|---|---|"]
    for r in rows:
        where = [
            *r["missing"][:2],
            *(f"not counted: {e}" for e in r["extra"][:2]),
            *r["routers_missing"][:2],
            *r["left"][:2],
        ]
        where = where or list(r["notes"][:1]) or [r["error"].splitlines()[0] if r["error"] else ""]
        told = "; ".join(where).replace("|", "\\|")
        lines.append(
            f"| {r['name']} | {r['blocks_seen']} of {r['blocks']} | {r['attention']} of {r['attention_expected']} "
            f"| {r['routers']} of {r['routers_expected']} | {verdict(r)} | {told} |"
        )
    return lines


def _groups(rows: list[Row]) -> list[str]:
    """Types that were right, together where they were seen alike."""
    groups: dict[str, list[str]] = {}
    for r in rows:
        kind = f"attention by {', '.join(r['mechanisms']) or 'name'}" if r["attention_expected"] else "no attention"
        kind += ", routers" if r["routers_expected"] else ""
        groups.setdefault(kind, []).append(f"{r['name']} {r['attention']}" if r["attention"] else r["name"])
    lines = ["The number is how many attentions one forward of the tiny model computes.", ""]
    for kind, members in sorted(groups.items(), key=lambda g: -len(g[1])):
        lines += [f"**{kind}** ({len(members)}): {', '.join(members)}.", ""]
    return lines


def _left_out(rows: list[Row]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for r in rows:
        reasons.setdefault(r["reason"], []).append(r["name"])
    return [
        f"- {', '.join(members)}: {reason}" for reason, members in sorted(reasons.items(), key=lambda g: -len(g[1]))
    ]
