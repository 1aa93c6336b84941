"""What became of the findings of one report in another: new, gone, or the same with another value."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

from .quantities import counted, written
from .schema import Finding

CLOCK = 5.0
"""How much farther a value that rests on a clock must move to be told."""

_NUMBER = re.compile(r"[-−]?\d[\d.,]*(?:\s*[×·]\s*\d[\d.,]*)*")
_Pair = tuple[Finding, Finding]


def matched(
    before: Sequence[Finding], after: Sequence[Finding], *, moved: float = 0.1, timed: Sequence[str] = ()
) -> list[Finding]:
    """Findings of two reports against each other: what is new, what moved, what is gone.

    Two are the same finding when they have one code and one place; of several without a place those whose words are the same but
    for the numbers; and of lists of places those that share one. A finding is told as moved when its value, or its list of
    places, is another one.

    Parameters
    ----------
    before, after : sequence of Finding
    moved : float
        Change over the size of the value before, from which it is told.
    timed : sequence of str
        Diagnostics that rest on a clock: their values are told from `CLOCK` times that on.

    Returns
    -------
    list of Finding
        Codes `comparison/new`, `comparison/moved`, `comparison/gone`; each at the place of what it is about.

    Examples
    --------
    >>> def found(value, layer): return Finding("a/b", "It is so", "low", {"layer": layer}, value)
    >>> [f.sentence for f in matched([found(1.0, 0), found(1.0, 1)], [found(1.0, 0), found(2.0, 1), found(1.0, 2)])]
    ['New: It is so', 'Moved from 1.00 to 2.00: It is so']
    """
    old, new, pairs = list(before), list(after), list[_Pair]()
    for key, lone in ((_whole, False), (_spot, True), (_blanked, True)):
        pairs += _paired(old, new, key, lone=lone)
    pairs += _overlapping(old, new)
    pairs += _only_one(old, new, before, after)
    told = [replace(f, code="comparison/new", sentence=f"New: {f.sentence}") for f in new]
    for one, other in pairs:
        limit = moved * (CLOCK if other.code.partition("/")[0] in timed else 1.0)
        if words := _moved(one, other, limit):
            told.append(replace(other, code="comparison/moved", sentence=f"{words}: {other.sentence}", limit=one.value))
    return told + [_gone(f) for f in old]


def _gone(finding: Finding) -> Finding:
    advice = "Read what is new beside it: one place may have given way to another."
    sentence = f"No longer: {finding.sentence}"
    return replace(finding, code="comparison/gone", sentence=sentence, severity="note", advice=advice, saving=None)


# ------------------------------------------------------------------------------------------------------------ who is who
def _coordinates(finding: Finding) -> dict[str, Any]:
    return {name: value for name, value in finding.where.items() if name != "path"}


def _spot(finding: Finding) -> Hashable:
    """Code and place; None where it has no place."""
    at = _coordinates(finding)
    return (finding.code, json.dumps(at, sort_keys=True, default=lambda value: value.item())) if at else None


def _blanked(finding: Finding) -> Hashable:
    """Code and words without numbers; None where it has a place, which tells better."""
    return None if _coordinates(finding) else (finding.code, _NUMBER.sub("#", finding.sentence))


def _whole(finding: Finding) -> Hashable:
    return finding.code, _spot(finding), _NUMBER.sub("#", finding.sentence)


def _paired(old: list[Finding], new: list[Finding], key: Callable[[Finding], Hashable], *, lone: bool) -> list[_Pair]:
    """Take out of both lists those with one key; `lone`: only where no other has it."""
    keys = [(key(f), f) for f in old]
    pairs = []
    for other in list(new):
        mine = key(other)
        if mine is None:
            continue
        alike = [f for k, f in keys if k == mine and any(f is g for g in old)]
        if alike and not (lone and len(alike) > 1):
            pairs.append((alike[0], other))
            _take(old, alike[0])
            _take(new, other)
    return pairs


def _take(findings: list[Finding], one: Finding) -> None:
    del findings[next(i for i, f in enumerate(findings) if f is one)]


def _spots(finding: Finding) -> set[tuple[Any, ...]]:
    """Each place of a finding that may have several."""
    at = _coordinates(finding)
    lists = [value for value in at.values() if isinstance(value, (list, tuple))]
    rows = range(max(map(len, lists), default=1))
    return {
        tuple(
            (name, value[i] if isinstance(value, (list, tuple)) else value)
            for name, value in at.items()
            if _has(value, i)
        )
        for i in rows
    } - {()}


def _has(value: Any, row: int) -> bool:
    return not isinstance(value, (list, tuple)) or row < len(value)


def _overlapping(old: list[Finding], new: list[Finding]) -> list[_Pair]:
    """Of one code, and with a place in common: the list grew or shrank."""
    pairs = []
    for other in list(new):
        spots = _spots(other)
        shared = [(len(spots & _spots(f)), i) for i, f in enumerate(old) if f.code == other.code]
        most, at = max(shared, default=(0, -1), key=lambda pair: pair[0])
        if most:
            pairs.append((old[at], other))
            del old[at]
            _take(new, other)
    return pairs


def _only_one(
    old: list[Finding], new: list[Finding], before: Sequence[Finding], after: Sequence[Finding]
) -> list[_Pair]:
    """Of a code that each report has once and without a place, however it is worded."""
    pairs = []
    for other in list(new):
        same = [f for f in old if f.code == other.code and not _coordinates(f)]
        once = all(sum(f.code == other.code for f in some) == 1 for some in (before, after))
        if same and once and not _coordinates(other):
            pairs.append((same[0], other))
            _take(old, same[0])
            _take(new, other)
    return pairs


# -------------------------------------------------------------------------------------------------------------- what moved
def _moved(one: Finding, other: Finding, limit: float) -> str:
    """How it moved, in words; empty where it did not."""
    spots = _spots(one), _spots(other)
    if spots[0] != spots[1]:
        gained, lost = len(spots[1] - spots[0]), len(spots[0] - spots[1])
        words = [f"{counted(n, 'place')} {word}" for n, word in ((gained, "more"), (lost, "fewer")) if n]
        return f"At {' and '.join(words)}"
    values = one.value, other.value
    if one.unit != other.unit or not all(map(math.isfinite, values)):
        return ""
    if abs(values[1] - values[0]) <= limit * abs(values[0]):
        return ""
    return f"Moved from {written(values[0], one.unit)} to {written(values[1], other.unit)}"
