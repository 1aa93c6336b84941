"""How findings are ranked, and how their places and savings are written, wherever they are shown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from . import quantities
from .schema import DIMENSIONS, SEVERITIES, Finding, Saving

NOT_ESTIMATED = "saving not estimated"
LARGE = 0.05
"""The share of the run's whole from which a saving goes before severity."""


def rank(findings: Iterable[Finding]) -> list[Finding]:
    """Findings in the order to act on them.

    First those that save a twentieth (`LARGE`) of the run's whole or more, by that share. Then all others by severity, and
    within one severity by their share: a `high` whose saving nobody can estimate stands above a `low` that saves 1 %. One
    whose saving was not estimated comes after those of the same severity that have one; equals keep their order.

    Examples
    --------
    >>> def low(name, share): return Finding("a/b", name, "low", saving=Saving(8, "B", share, "computed"))
    >>> [f.sentence for f in rank([low("1 %", 0.01), Finding("a/b", "high", "high"), low("9 %", 0.09)])]
    ['9 %', 'high', '1 %']
    """

    def key(finding: Finding) -> tuple[float, int, float, bool]:
        share = share_of(finding)
        ahead = share if share >= LARGE else 0.0
        return -ahead, SEVERITIES.index(finding.severity), -share, finding.saving is None

    return sorted(findings, key=key)


def share_of(finding: Finding) -> float:
    """The share of the run's whole that acting would save; 0 where it was not estimated."""
    share = finding.saving.share if finding.saving is not None else 0.0
    return min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0


def place(where: Mapping[str, Any], limit: int = 3) -> str:
    """Where a finding is, in words; lists are several places, of which `limit` are named.

    Examples
    --------
    >>> place({"layer": 1, "head": 3, "path": "model.layers.1.self_attn"})
    'layer 1, head 3, model.layers.1.self_attn'
    >>> place({"layer": [0, 1, 2, 5], "expert": [4, 7, 1, 1]})
    'layer 0 expert 4; layer 1 expert 7; layer 2 expert 1 and 1 more'
    >>> place({"layer": [0, 1, 2, 5, 9]})
    'layers 0, 1, 2 and 2 more'
    """
    at = {name: value for name, value in where.items() if name != "path" and name in DIMENSIONS}
    lists = [name for name, value in at.items() if isinstance(value, (list, tuple))]
    words = [f"{_word(name)} {value}" for name, value in at.items() if name not in lists]
    if lists:
        count = max(len(at[name]) for name in lists)
        rest = f" and {count - limit} more" if count > limit else ""
        if len(lists) == 1:
            plural = f"{_word(lists[0])}{'s' if count > 1 else ''}"
            words.append(f"{plural} {', '.join(str(v) for v in at[lists[0]][:limit])}{rest}")
        else:
            rows = zip(*(at[name][:limit] for name in lists), strict=False)
            named = (" ".join(f"{_word(n)} {v}" for n, v in zip(lists, row, strict=True)) for row in rows)
            words.append("; ".join(named) + rest)
    path = where.get("path")
    if isinstance(path, str) and path:
        words.append(path)
    return ", ".join(words)


def _word(dim: str) -> str:
    return {"kv_head": "KV head"}.get(dim, dim.replace("_", " "))


def amount(saving: Saving) -> str:
    """What would be saved, in its unit.

    Examples
    --------
    >>> amount(Saving(419430.4, "B", 0.15, "computed from shapes")), amount(Saving(0.034, "s", 0.1, "measured"))
    ('410 KiB', '34.0 ms')
    """
    return quantities.written(saving.amount, saving.unit, 2 if saving.unit == "%" else 3)


def saving_words(finding: Finding) -> str:
    """`saves 410 KiB (15 %)`, or that it was not estimated.

    Examples
    --------
    >>> saving_words(Finding("a/b", "Small", "low", saving=Saving(419430.4, "B", 0.15, "computed from shapes")))
    'saves 410 KiB (15 %)'
    """
    if finding.saving is None:
        return NOT_ESTIMATED
    share = "" if finding.saving.unit == "%" else f" ({quantities.share(finding.saving.share)})"
    return f"saves {amount(finding.saving)}{share}"
