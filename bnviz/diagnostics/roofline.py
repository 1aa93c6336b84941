"""What bounds each operator: computing, memory, first touch, dispatch, or nothing the machine sets."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from bnviz.errors import NotCaptured
from bnviz.events import EventTable
from bnviz.hardware.roof import BOUNDS, REASONS, Load, Verdict, judge_calls, level_of
from bnviz.quantities import counted, duration, share
from bnviz.schema import Finding, Judgement, Variable, diagnostic, stamp

from ._roofline_findings import IN_WORDS, Rows, findings_of

_OP, _MODULE = ("op",), ("module", "category")
_KEPT = ("ceilings", "contention", "run_length", "calls", "threads", "device", "recorded", "notes", "alone")


@diagnostic(
    question="Which operators are bound by computing, by memory, by dispatch, and how far below the machine are they?",
    needs=("ops.op", "ops.self_time", "ops.flops", "ops.bytes"),
    gives=(
        Variable("flops", _OP, "FLOP", "computed in all calls, at least; NaN: no rule"),
        Variable("bytes", _OP, "B", "moved in all calls, at least; NaN: no rule"),
        Variable("time", _OP, "s", "of all calls"),
        Variable("each", _OP, "s", "median of one call; NaN where several shapes are pooled"),
        Variable("calls", _OP, "count", "calls"),
        Variable("intensity", _OP, "FLOP/B", "FLOPs over bytes; NaN where nothing moves"),
        Variable("rate", _OP, "FLOP/s", "FLOPs over calls times `each`, as reached by the median call"),
        Variable("roof", _OP, "FLOP/s", "rate the machine allows at this work; NaN: nothing is computed"),
        Variable(
            "above_roof", _OP, "s", "calls times `each`, beyond what computing and moving must take; NaN: no verdict"
        ),
        Variable("name", _OP, "name", "operator"),
        Variable("shapes", _OP, "name", "sizes of its tensors; -1: several"),
        Variable("phase", _OP, "name", "forward, backward, optimizer, other"),
        Variable("work", _OP, "name", "whose ceiling holds"),
        Variable("dtype", _OP, "name", "it computes in; -1: none"),
        Variable("bound", _OP, "name", "what bounds it"),
        Variable("reason", _OP, "name", "why the bound is unknown"),
        Variable("level", _OP, "name", "memory level its working set fits in"),
        Variable("op_path", _OP, "name", "module in which it takes most time; -1: outside every module"),
        Variable("module_time", _MODULE, "s", "in operators of this module itself, by what bounds them"),
        Variable("module_flops", ("module",), "FLOP", "computed in the module itself, at least"),
        Variable("module_bytes", ("module",), "B", "moved in the module itself, at least"),
        Variable("bound_time", ("category",), "s", "in operators that are bound so; adds up to all operators"),
        Variable("coverage", (), "1", "share of operator time whose work is known, 0 to 1"),
        Variable("host_time", (), "s", "of the forwards spent outside operators, in Python; NaN: not known"),
    ),
    order=60,
)
def roofline(
    ops: xr.Dataset, *, phase: str | None = None, contention_limit: float = 0.05, repeats: int = 3, rows: int = 400
) -> xr.Dataset:
    """Each operator's FLOPs, bytes and time against the ceilings that were measured on this machine.

    Read `bound_time` first: where the time goes. Then `above_roof`: what a perfect kernel would save. An operator at a low
    `intensity` is limited by memory however fast it computes; right of the ridge by the peak; at the dispatch floor by
    neither. `unknown` has its `reason` and is never guessed.

    Parameters
    ----------
    ops : Dataset
        Record `ops`, with `attrs["ceilings"]`.
    phase : {"forward", "backward", "optimizer", "other"}, optional
        Only these operators.
    contention_limit : float
        Share of time the thread waited for a core, beyond which calls long enough to be interrupted get no verdict.
    repeats : int
        Calls of one operator at one set of shapes needed for a verdict; its median is judged.
    rows : int
        Operators at one set of shapes kept apart, longest first; the others are pooled by operator.

    Returns
    -------
    Dataset
        Along `op` (an operator at one set of shapes in one phase), `module` (path) and `category` (what bounds).

    Raises
    ------
    NotCaptured
        No operator (of that phase), or the ceilings were not measured.

    Notes
    -----
    FLOPs and bytes are those of `bnviz.hardware.flops.work`, the rules of the verdict those of
    `bnviz.hardware.roof.judge_calls`: with t_c = F / P and t_m = B / W(B), `roof` = F / max(t_c, t_m)
    and `above_roof` = calls (t - max(t_c, t_m)) with t the median call.
    On an accelerator time is that of the kernels, and operators without one are left out.

    Cost: 1 us an operator.

    Source: Williams, Waterman, Patterson 2009 (doi 10.1145/1498765.1498785).

    Examples
    --------
    >>> machine = {"device": "cpu", "flops": {"float32": 1e11}, "special": 1e9, "bandwidth": [[1.0, 1e10]], "levels": [],
    ...            "dispatch": 1e-6, "fault": 0.0}
    >>> def names(values, table):
    ...     return xr.DataArray(values, dims="event", attrs={"table": table})
    >>> ops = xr.Dataset({"op": names([0, 0, 0], ["aten::mm"]), "path": names([0, 0, 0], ["head"]),
    ...     "phase": names([0, 0, 0], ["forward"]), "work": names([0, 0, 0], ["matmul"]),
    ...     "dtype": names([0, 0, 0], ["float32"]), "shapes": names([0, 0, 0], ["100×100 · 100×100"]),
    ...     "self_time": ("event", [0.02] * 3), "allocated": ("event", [0.0] * 3),
    ...     "flops": ("event", [2e9] * 3), "bytes": ("event", [1e6] * 3)}, attrs={"ceilings": [machine]})
    >>> result = roofline(ops)
    >>> result["bound"].attrs["table"][int(result["bound"][0])], float(result["intensity"][0])
    ('compute', 2000.0)
    """
    table, ceilings = _prepare(ops, phase)
    group, first = _groups(table)
    load, each = _load(table, group, first)
    busy, run = (ops.attrs.get(name) for name in ("contention", "run_length"))
    verdict = judge_calls(
        load,
        ceilings,
        contention=np.nan if busy is None else float(busy),
        run_length=np.nan if run is None else float(run),
        contention_limit=contention_limit,
        repeats=repeats,
    )
    row, kept = _pool(table, group, rows)
    result = _by_op(table, (group, row, kept), (verdict, each), ceilings)
    _by_module(result, table, verdict.bound[group])
    seconds = table["seconds"]
    known = ~np.isnan(table["flops"])
    result["coverage"] = ((), float(seconds[known].sum() / seconds.sum()) if seconds.sum() else np.nan)
    result["host_time"] = ((), _host_time(ops, phase))
    result.attrs = {
        "model": str(ops.attrs.get("model", "")),
        "phase": phase or "all",
        "contention_limit": contention_limit,
        "repeats": repeats,
        **{k: ops.attrs[k] for k in _KEPT if k in ops.attrs},
    }
    return stamp(result, roofline.spec.gives)  # type: ignore[attr-defined]


def _prepare(ops: xr.Dataset, phase: str | None) -> tuple[EventTable, dict[str, Any]]:
    """The operators that count, with their time in `seconds`; and the machine's ceilings."""
    ceilings = ops.attrs.get("ceilings") or []
    if not ceilings:
        raise NotCaptured("roofline: the record 'ops' holds no ceilings; capture with ceilings=True (the default).")
    table = EventTable.from_dataset(ops)
    on_device = "device_time" in table
    seconds = table["device_time" if on_device else "self_time"]
    table = EventTable(dict(table.columns) | {"seconds": seconds}, table.tables, table.attrs)
    if on_device:
        table = table.take(table["seconds"] > 0)
    if phase is not None:
        table = table.where(phase=phase)
    if not len(table):
        what = f"no operator of phase {phase!r}" if phase else "no operator"
        raise NotCaptured(f"roofline: {what} was recorded; run the model inside the capture.")
    return table, ceilings[0]


def _groups(table: EventTable) -> tuple[np.ndarray, np.ndarray]:
    """Group of each row (one operator at one set of shapes in one phase), and a row of each group."""
    key = np.stack([table[c].astype(np.int64) for c in ("op", "shapes", "phase", "work", "dtype")], 1)
    _, first, group = np.unique(key, axis=0, return_index=True, return_inverse=True)
    return group.ravel(), first


def _load(table: EventTable, group: np.ndarray, first: np.ndarray) -> tuple[Load, np.ndarray]:
    each = table.medians(group, "seconds")
    kinds, dtypes = table.names("work")[first], table.names("dtype")[first]
    load = Load(
        table["flops"][first],
        table["bytes"][first],
        each,
        table.medians(group, "allocated"),
        list(kinds),
        list(dtypes),
        np.bincount(group),
    )
    return load, each


def _pool(table: EventTable, group: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Row of the result for each operator, and which rows are one group (its number) or a pool (-1)."""
    spent = np.bincount(group, table["seconds"])
    order = np.argsort(-spent, kind="stable")
    if len(order) <= rows:
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return place[group], order
    place = np.full(len(order), -1)
    place[order[:rows]] = np.arange(rows)
    row = place[group]
    left = row < 0
    names, pooled = np.unique(table["op"][left], return_inverse=True)
    row[left] = rows + pooled
    return row, np.concatenate([order[:rows], np.full(len(names), -1)])


def _by_op(
    table: EventTable,
    places: tuple[np.ndarray, np.ndarray, np.ndarray],
    judged: tuple[Verdict, np.ndarray],
    ceilings: dict[str, Any],
) -> xr.Dataset:
    group, row, kept = places
    verdict, each = judged
    size, single = len(kept), kept >= 0
    seconds = table["seconds"]
    flops, nbytes = (np.bincount(row, table[c], size) for c in ("flops", "bytes"))  # one call without a rule: NaN
    spent, least = np.bincount(row, seconds, size), np.bincount(row, verdict.roof[group], size)
    typical = np.bincount(row, each[group], size)  # without the calls that something else held up
    calls = np.bincount(row, minlength=size)
    bound = _longest(row, verdict.bound[group], seconds, size)
    above = np.where(bound == BOUNDS.index("unknown"), np.nan, np.maximum(typical - least, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        numbers = {
            "flops": flops,
            "bytes": nbytes,
            "time": spent,
            "each": np.where(single, each[kept], np.nan),
            "calls": calls,
            "intensity": np.where(nbytes > 0, flops / nbytes, np.nan),
            "rate": np.where(typical > 0, flops / typical, np.nan),
            "roof": np.where((flops > 0) & (least > 0), flops / least, np.nan),
            "above_roof": above,
        }
    result = xr.Dataset({name: ("op", values) for name, values in numbers.items()})
    levels = level_of(nbytes / calls, ceilings)
    order = sorted(set(levels))
    named = _named(table, row, single) | {
        "bound": (bound, BOUNDS),
        "reason": (_longest(row, verdict.reason[group], seconds, size), REASONS),
        "op_path": (_longest(row, table["path"], seconds, size), table.tables["path"]),
        "level": (np.array([order.index(x) for x in levels]), tuple(order)),
    }
    for name, (values, words) in named.items():
        result[name] = xr.DataArray(np.asarray(values, np.int32), dims="op", attrs={"table": list(words)})
    return result


def _named(table: EventTable, row: np.ndarray, single: np.ndarray) -> dict[str, tuple[np.ndarray, tuple[str, ...]]]:
    """What an operator of each row is called with; all of a row share it, but for the shapes of a pool."""
    example = np.full(len(single), -1)
    example[row[::-1]] = np.arange(len(row))[::-1]
    found = {c: (table[c][example], table.tables[c]) for c in ("op", "shapes", "phase", "work", "dtype")}
    found["name"] = found.pop("op")
    found["shapes"] = (np.where(single, found["shapes"][0], -1), found["shapes"][1])
    return found


def _longest(row: np.ndarray, label: np.ndarray, seconds: np.ndarray, size: int) -> np.ndarray:
    """The label under which each row spent most time; labels start at -1."""
    width = int(label.max()) + 2
    spent = np.bincount(row * width + label + 1, seconds, size * width).reshape(size, width)
    seen = np.bincount(row * width + label + 1, minlength=size * width).reshape(size, width) > 0
    found: np.ndarray = np.where(seen, spent, -1.0).argmax(1) - 1
    return found


def _by_module(result: xr.Dataset, table: EventTable, bound: np.ndarray) -> None:
    """Sums by module and bound; operators outside of all modules come last, as "outside"."""
    paths = [*table.tables["path"], "outside"]
    module = np.where(table["path"] >= 0, table["path"], len(paths) - 1)
    spent = np.bincount(module * len(BOUNDS) + bound, table["seconds"], len(paths) * len(BOUNDS))
    spent = spent.reshape(len(paths), len(BOUNDS))
    keep = np.bincount(module, minlength=len(paths)) > 0
    result["module_time"] = (_MODULE, spent[keep])
    for name in ("flops", "bytes"):
        result[f"module_{name}"] = ("module", np.bincount(module, np.nan_to_num(table[name]), len(paths))[keep])
    result["bound_time"] = ("category", spent.sum(0))
    result.coords["module"] = ("module", np.array([p for p, k in zip(paths, keep, strict=True) if k], object))
    result.coords["category"] = ("category", np.array(BOUNDS, object))


def _host_time(ops: xr.Dataset, phase: str | None) -> float:
    """Time of the forwards outside of their operators; the host's, also where an accelerator computes."""
    whole = ops.attrs.get("call_time")
    if whole is None or "self_time" not in ops or phase not in (None, "forward"):
        return np.nan
    table = EventTable.from_dataset(ops)
    inside = (table["path"] >= 0) & (table["phase"] == list(table.tables["phase"]).index("forward"))
    return max(0.0, float(whole) - float(table["self_time"][inside].sum()))


def judge(
    result: xr.Dataset,
    *,
    share_limit: float = 0.05,
    overhead: float = 0.2,
    host: float = 0.3,
    age: float = 3600.0,
    coverage: float = 0.95,
) -> Judgement:
    """Names what most time is bound by, and what would save time.

    Parameters
    ----------
    result : Dataset
        From `roofline`.
    share_limit : float
        Share of operator time from which on an operator is worth a finding.
    overhead, host : float
        Share of operator time in dispatch, and of the forwards in Python, from which on they are.
    age : float
        Seconds between measuring ceilings and operators from which on the ceilings count as old.
    coverage : float
        Share of operator time whose work must be known.
    """
    whole = float(result["time"].sum())
    found = findings_of(result, share_limit=share_limit, overhead=overhead, host=host)
    caveats = _caveats(result, whole, age, coverage)
    title = _title(result, whole)
    ceilings = (result.attrs.get("ceilings") or [{}])[0]
    threads = int(result.attrs.get("threads", 1))
    subtitle = (
        f"FLOP/s against FLOP/B, circles by share of time · {result.attrs.get('model') or 'model'} · "
        f"{ceilings.get('name', 'this machine')}, {counted(threads, 'thread')} · "
        f"{duration(whole)} in operators of {counted(result.attrs.get('calls', 0), 'forward')}"
    )
    return Judgement(title, subtitle, _summary(result, whole, title, caveats), caveats, _ranked(found))


def _ranked(found: list[Finding]) -> tuple[Finding, ...]:
    return tuple(sorted(found, key=lambda f: -(f.saving.share if f.saving else 0.0)))


def _title(result: xr.Dataset, whole: float) -> str:
    spent = result["bound_time"].values
    if not whole:
        return "No operator took measurable time"
    known = spent.copy()
    unknown = BOUNDS.index("unknown")
    known[unknown] = 0.0
    if spent[unknown] > 0.5 * whole:
        why = Rows(result).main_reason()
        return f"No verdict for {share(spent[unknown] / whole)} of operator time: {why}"[:90]
    at = int(known.argmax())
    rows = Rows(result)
    top = rows.top_name(at)
    return f"{share(known[at] / whole)} of operator time is {IN_WORDS[BOUNDS[at]]}, most of it {top}"[:90]


def _summary(result: xr.Dataset, whole: float, title: str, caveats: tuple[str, ...]) -> str:
    spent = result["bound_time"].values
    parts = (
        [f"{IN_WORDS[name]} {share(seconds / whole)}" for name, seconds in zip(BOUNDS, spent, strict=True) if seconds]
        if whole
        else []
    )
    return f"Roofline: {title}. {', '.join(parts)}. {' '.join(f'{c}.' for c in caveats)}".strip()


def _caveats(result: xr.Dataset, whole: float, age: float, coverage: float) -> tuple[str, ...]:
    attrs = result.attrs
    ceilings = (attrs.get("ceilings") or [{}])[0]
    ahead = share(float(ceilings.get("spread", 0.0)))
    found = [
        f"Ceilings are the best of several runs in this process, at most {ahead} ahead of the next",
        *Rows(result).reasons(whole),
    ]
    recorded = float(attrs.get("recorded", 0.0))
    apart = abs(recorded - float(ceilings.get("measured", recorded)))
    if apart > age:
        found.append(f"Ceilings and operators were measured {duration(apart)} apart; capture again in a new process")
    busy = attrs.get("contention")
    if busy is not None and float(busy) > float(attrs["contention_limit"]):
        found.append(
            f"The machine was busy: the thread waited for a core {share(float(busy))} of the time "
            f"(limit {share(float(attrs['contention_limit']))}), which is in the times; verdicts are of the median call"
        )
    known = float(result["coverage"])
    if known < coverage:
        found.append(f"The work of {share(1 - known)} of operator time is not known: those operators have no rule")
    found.extend(str(n) for n in (*attrs.get("notes", ()), *ceilings.get("notes", ())))
    return tuple(f.rstrip(".") for f in found)
