"""The head of a report: six numbers about the run, and what is known of where it came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import quantities
from .findings import share_of

if TYPE_CHECKING:
    from .report import Report

_UNITS = {"B": ("bytes", "budget"), "s": ("duration", "seconds", "overhead"), "count": ("parameters",)}


@dataclass(frozen=True, slots=True)
class Overview:
    """What is said around the diagnostics of a report.

    Parameters
    ----------
    title : str
    ran : str
        How many diagnostics did.
    about : tuple of str
        What and where, in one line.
    numbers : sequence of (label, value)
    nothing : str
        The words of a report without findings.
    facts : sequence of (label, value)
        Where the numbers came from.
    run, unanswered : str
        Headings of the facts, and of what was not answered.
    """

    title: str
    ran: str
    about: tuple[str, ...]
    numbers: Sequence[tuple[str, str]]
    nothing: str
    facts: Sequence[tuple[str, str]]
    run: str = "The run"
    unanswered: str = "Not answered by this run"


def of_run(report: Report) -> Overview:
    """Of a report on one run."""
    given = report.run.provenance
    about = (
        given.get("class"),
        given.get("dtype"),
        given.get("accelerator") or given.get("device"),
        given.get("started"),
    )
    ran, records = (
        quantities.counted(len(report.outcomes), "diagnostic"),
        quantities.counted(len(report.run.kinds), "record"),
    )
    return Overview(
        f"What holds {report.model} back",
        ran,
        tuple(str(each) for each in about if each),
        six_numbers(report),
        f"Nothing found above the limits. {ran} ran on {records}",
        facts(report),
    )


def six_numbers(report: Report) -> list[tuple[str, str]]:
    """Label and value of the six numbers that say most about this run; what the run does not know is left out.

    The first six of: parameters, layers by heads or experts, tokens a step, time, findings, largest saving, steps, size.
    """
    facts = report.run.provenance
    sizes = _sizes(report)
    found = report.findings
    above = sum(f.severity != "note" for f in found)
    largest = max(map(share_of, found), default=0.0)
    candidates: list[tuple[str, str | None]] = [
        ("findings above their limits", quantities.count(above)),
        ("saved by the largest finding", quantities.share(largest) if largest else None),
        ("parameters", _count(facts.get("parameters"))),
        _shape(sizes),
        (
            f"{_rows(facts)} in a step",
            _count(max((sizes.get(d, 0) for d in ("token", "query", "key")), default=0) or None),
        ),
        ("of the model watched", _time(facts.get("seconds"))),
        ("steps", _count(sizes.get("step") if sizes.get("step", 0) > 1 else None)),
        ("records kept", quantities.size(sum(report.run[kind].nbytes for kind in report.run.kinds))),
        ("diagnostics ran", quantities.count(len(report.outcomes))),
        ("records", quantities.count(len(report.run.kinds))),
    ]
    return [(label, value) for label, value in candidates if value][:6]


def facts(report: Report) -> list[tuple[str, str]]:
    """Provenance as label and value, nested ones flattened, in the order the run wrote it; notes and sites are shown apart."""
    return _flat({k: v for k, v in report.run.provenance.items() if k not in ("notes", "sites")})


def _flat(mapping: Mapping[str, Any], parent: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in mapping.items():
        words = str(name).replace("_", " ")
        if value is None or (isinstance(value, (str, list, tuple, dict)) and not value):
            continue
        if isinstance(value, Mapping):
            rows += _flat(value, words)
        else:
            rows.append((f"{parent}: {words}" if parent else words, _fact(str(name), value)))
    return rows


def _fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if not isinstance(value, (int, float)):
        return str(value)
    unit = next(
        (unit for unit, endings in _UNITS.items() if name.endswith(endings)), "id" if isinstance(value, int) else "1"
    )
    return quantities.written(value, unit)


def _sizes(report: Report) -> dict[str, int]:
    """The largest size of each dimension over all records."""
    sizes: dict[str, int] = {}
    for kind in report.run.kinds:
        for dim, size in report.run[kind].sizes.items():
            sizes[str(dim)] = max(sizes.get(str(dim), 0), int(size))
    return sizes


def _shape(sizes: Mapping[str, int]) -> tuple[str, str | None]:
    if not sizes.get("layer"):
        return "layers", None
    for dim, word in (("head", "heads"), ("expert", "experts")):
        if sizes.get(dim):
            return f"layers × {word}", f"{sizes['layer']} × {sizes[dim]}"
    return "layers", str(sizes["layer"])


def _rows(facts: Mapping[str, Any]) -> str:
    """What the token axis holds: rows of a batch where the model has no attention."""
    return "rows" if dict(facts.get("found") or {}).get("attention") == 0 else "tokens"


def _count(value: Any) -> str | None:
    return quantities.count(value) if isinstance(value, (int, float)) and value else None


def _time(value: Any) -> str | None:
    return quantities.duration(value) if isinstance(value, (int, float)) else None
