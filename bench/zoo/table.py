"""The results of a sweep as words: what was not right, a line a model, totals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
EXACT = 1e-5  # by how much weights may differ, and experts' outputs made of captured ids and weights, over the largest


def faults(row: Row) -> list[str]:
    """What was not right about a model that was built."""
    found = []
    if row["error"]:
        found.append("failed")
    else:
        if row["missing"] or row["extra"]:
            found.append("attention")
        if row["weights_wrong"]:
            found.append("weights")
        if row["routers_missing"] or row["routers"] < row["routers_expected"]:
            found.append("routers")
        if not row["rebuilt_error"] <= EXACT:
            found.append("experts")
        if any(lost.endswith(": ") for lost in row["layers_lost"]):
            found.append("blocks")
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
    said += [f"{row['weights']} weights to {row['weights_error']:.0e}"] if row["weights"] else []
    said += [f"router {row['routers_missing'][0]}"] if row["routers_missing"] else []
    said += [f"{row['rebuilt']} experts rebuilt to {row['rebuilt_error']:.0e}"] if row["rebuilt"] else []
    said += [f"not rebuilt {row['not_rebuilt'][0]}"] if row["not_rebuilt"] else []
    said += [f"layers {row['layers_lost'][0]}"] if row["layers_lost"] else []
    said += [f"left {row['left'][0]}"] if row["left"] else []
    said += [note[:120] for note in (*row["notes"][:1], row["idle"]) if note]
    return " · ".join(filter(None, said))


def share(rows: Iterable[Row], right: Any) -> str:
    """ "right of all, percent"."""
    rows = list(rows)
    good = sum(bool(right(r)) for r in rows)
    return f"{good} of {len(rows)}" + (f" ({100 * good / len(rows):.1f} %)" if rows else "")


def counted(stored: Mapping[str, Row]) -> list[tuple[str, str]]:
    """The totals: what is claimed, of how many."""
    ran = [r for r in stored.values() if not r["reason"] and not r["error"]]
    attending = [r for r in ran if r["attention_expected"]]
    quiet = [r for r in ran if not r["attention_expected"]]
    routed = [r for r in ran if r["routers_expected"] or r["routers"]]
    layered = [r for r in ran if r["layers"]]
    return [
        ("built and run, of all that were tried", share(stored.values(), lambda r: not r["reason"] and not r["error"])),
        ("outputs bit-identical with and without", share(ran, lambda r: "outputs" not in faults(r))),
        ("nothing left behind", share(ran, lambda r: not r["left"])),
        (
            "with attention: every site, its heads, queries, keys",
            share(attending, lambda r: "attention" not in faults(r)),
        ),
        (
            "with attention: weights to 1e-5, of those compared",
            share([r for r in ran if r["weights"]], lambda r: not r["weights_wrong"]),
        ),
        ("without attention: none claimed", share(quiet, lambda r: not r["extra"])),
        ("with routers: every router", share(routed, lambda r: "routers" not in faults(r))),
        ("with routers: all experts rebuilt to 1e-5", share(routed, _rebuilt)),
        ("config states layers: as many blocks, or the reason", share(layered, lambda r: "blocks" not in faults(r))),
        ("blocks found", share(ran, lambda r: r["blocks_seen"])),
        ("verified residual writers in a block", share(ran, lambda r: r["writers"])),
    ]


def _rebuilt(row: Row) -> bool:
    return "experts" not in faults(row) and row["rebuilt"] == row["routers"]


def totals(stored: Mapping[str, Row]) -> str:
    """The totals as text."""
    return "\n".join(f"{what:<58}{of}" for what, of in counted(stored))
