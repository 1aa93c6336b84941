"""What a roofline says to do: one finding a cause, with the time that a perfect remedy would save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from bnviz.hardware.roof import BOUNDS, REASONS, bandwidth_at
from bnviz.quantities import counted, duration, rate, share, significant
from bnviz.schema import Finding, Saving, Severity

IN_WORDS = {
    "compute": "compute-bound",
    "memory": "memory-bound",
    "ridge": "at the ridge",
    "allocation": "first touch of new memory",
    "overhead": "dispatch overhead",
    "below_roof": "below the roof",
    "unknown": "without a verdict",
}
_WHY = {
    "no rule": "their work has no rule",
    "faster than its roof": "they beat a ceiling",
    "busy machine": "the machine was busy",
    "too few repeats": "too few repeats",
    "no ceiling": "no ceiling for their dtype",
}
_ABOVE = "computed: time above the roof"


class Rows:
    """The operators of a roofline as columns, and what was spent on them."""

    def __init__(self, result: xr.Dataset) -> None:
        self.result = result
        self.time = result["time"].values
        self.whole = float(self.time.sum())
        self.bound = result["bound"].values
        self.names = self.words("name")

    def words(self, name: str) -> np.ndarray:
        """A column of interned names as text."""
        column = self.result[name]
        words: np.ndarray = np.array([*column.attrs.get("table", ()), ""], object)[column.values]
        return words

    def top_name(self, bound: int) -> str:
        """The operator that takes most of the time bound so, without its namespace."""
        rows = self.bound == bound
        if not rows.any():
            return "none"
        spent: dict[str, float] = {}
        for name, seconds in zip(self.names[rows], self.time[rows], strict=True):
            spent[name] = spent.get(name, 0.0) + float(seconds)
        return short(max(spent, key=lambda n: spent[n]))

    def reason_time(self) -> dict[str, float]:
        """Seconds without a verdict by why."""
        unknown = self.bound == BOUNDS.index("unknown")
        reason = self.result["reason"].values
        return {
            word: float(self.time[unknown & (reason == i)].sum())
            for i, word in enumerate(REASONS)
            if i and (unknown & (reason == i)).any()
        }

    def main_reason(self) -> str:
        """In words, why most of what is unknown is."""
        spent = self.reason_time()
        return _WHY[max(spent, key=lambda w: spent[w])] if spent else "operators differ too much"

    def reasons(self, whole: float) -> list[str]:
        """Caveats: what has no verdict and why, from 1 % of the time."""
        needed = int(self.result.attrs.get("repeats", 3))
        lines = {
            "no rule": "have no rule for their work",
            "faster than its roof": "were faster than their roof: a ceiling or a rule is wrong there",
            "busy machine": "run so long that a busy machine interrupted their median",
            "too few repeats": f"were called fewer than {counted(needed, 'time')} at these shapes",
            "no ceiling": "compute in a dtype whose peak was not measured",
        }
        return [
            f"No verdict for {share(seconds / whole)} of operator time: these operators {lines[word]}"
            for word, seconds in self.reason_time().items()
            if whole and seconds >= 0.01 * whole
        ]

    def where(self, rows: np.ndarray) -> dict[str, Any]:
        """Module paths of some rows, longest first."""
        order = np.flatnonzero(rows)[np.argsort(-self.time[rows], kind="stable")]
        paths = list(dict.fromkeys(p for p in self.words("op_path")[order] if p))
        return {"path": paths[0] if len(paths) == 1 else paths[:20]} if paths else {}


def short(name: str) -> str:
    """An operator without its namespace.

    Examples
    --------
    >>> short("aten::addmm")
    'addmm'
    """
    return name.removeprefix("aten::").removeprefix("autograd::engine::evaluate_function: ")


def findings_of(result: xr.Dataset, *, share_limit: float, overhead: float, host: float) -> list[Finding]:
    """All findings of a result, in no order."""
    rows = Rows(result)
    if not rows.whole:
        return []
    ceilings = (result.attrs.get("ceilings") or [{}])[0]
    found = [
        *_below(rows, share_limit),
        *_narrower(rows, ceilings, share_limit),
        _overhead(rows, overhead),
        _first_touch(rows, ceilings, share_limit),
        _host(rows, host),
    ]
    return [f for f in found if f is not None]


def _severity(part: float) -> Severity:
    return "high" if part >= 0.25 else "medium" if part >= 0.1 else "low"


def _below(rows: Rows, limit: float) -> list[Finding]:
    """Operators that use less than half of what the machine allows, by name."""
    result, found = rows.result, []
    for name in dict.fromkeys(rows.names):
        mine = (rows.names == name) & (rows.bound == BOUNDS.index("below_roof"))
        spent, gap = float(rows.time[mine].sum()), float(np.nansum(result["above_roof"].values[mine]))
        if spent < limit * rows.whole:
            continue
        longest = int(np.flatnonzero(mine)[rows.time[mine].argmax()])
        product = rows.words("work")[longest] == "matmul"
        most = _most_at(rows, longest)
        found.append(
            Finding(
                "roofline/below_roof",
                f"{short(name)} takes {significant(_times_roof(rows, mine))} times what its work needs here: "
                f"{share(spent / rows.whole)} of operator time{most}",
                _severity(gap / rows.whole),
                rows.where(mine),
                spent / rows.whole,
                limit,
                "1",
                _more_work(name)
                if product
                else "Fuse it with its neighbours: model = torch.compile(model), and time both without the profiler.",
                Saving(gap, "s", gap / rows.whole, _ABOVE),
            )
        )
    return found


def _most_at(rows: Rows, row: int) -> str:
    """At which shapes; nothing where they are not known."""
    if rows.result["shapes"].values[row] < 0:
        return ""
    return f", most at {rows.words('shapes')[row]}" if rows.words("shapes")[row] else ", most on single numbers"


def _more_work(name: str) -> str:
    """What fills a product: by what its kernel is split over threads."""
    if "attention" in name:
        return "Attend to more at once: raise the batch, or join short sequences to longer ones, and capture again."
    if "conv" in name:
        return "Give it more images or longer signals at once: raise the batch, and capture again."
    return "Give it more rows: raise the batch, and capture again."


def _times_roof(rows: Rows, mine: np.ndarray) -> float:
    """Time of the median calls over the least time of their work; rows that pool shapes count as they ran."""
    result = rows.result
    each, calls = result["each"].values[mine], result["calls"].values[mine]
    typical = float(np.where(np.isnan(each), rows.time[mine], each * calls).sum())
    least = typical - float(np.nansum(result["above_roof"].values[mine]))
    return typical / least if least > 0 else float("inf")


def _narrower(rows: Rows, ceilings: Mapping[str, Any], limit: float) -> list[Finding]:
    """Products whose dtype costs time here: float32 where bfloat16 is faster, float16 where it is emulated."""
    peaks = {k: v for k, v in ceilings.get("flops", {}).items() if v and np.isfinite(v)}
    products, dtypes = rows.words("work") == "matmul", rows.words("dtype")
    result = rows.result
    found: list[Finding] = []
    for dtype, to, size in (("float32", "bfloat16", 0.5), ("float16", "bfloat16", 1.0), ("float16", "float32", 2.0)):
        mine = products & (dtypes == dtype) & ~np.isnan(result["flops"].values)
        spent = float(rows.time[mine].sum())
        if spent < limit * rows.whole or to not in peaks or dtype not in peaks or peaks[to] < 1.5 * peaks[dtype]:
            continue
        flops, nbytes, calls = (result[v].values[mine] for v in ("flops", "bytes", "calls"))
        move = size * nbytes / bandwidth_at(size * nbytes / calls, ceilings["bandwidth"])
        now = flops / peaks[dtype]
        gain = float(np.clip(np.minimum(rows.time[mine], now) - np.maximum(flops / peaks[to], move), 0, None).sum())
        if gain < limit * rows.whole or any(f.where == rows.where(mine) for f in found):
            continue
        device = str(ceilings.get("device", "cpu")).partition(":")[0]
        found.append(
            Finding(
                "roofline/dtype",
                f"Products in {dtype} peak at {rate(peaks[dtype], 'FLOP/s')} here, in {to} at "
                f"{rate(peaks[to], 'FLOP/s')}: {share(spent / rows.whole)} of operator time",
                _severity(gain / rows.whole),
                rows.where(mine),
                peaks[dtype] / peaks[to],
                1 / 1.5,
                "1",
                f'Run the forward under torch.autocast("{device}", torch.{to}), and compare the loss.'
                if to != "float32"
                else "Run the model in float32: model.float().",
                Saving(gain, "s", gain / rows.whole, "computed from shapes and measured peaks, casts not counted"),
            )
        )
    return found


def _overhead(rows: Rows, limit: float) -> Finding | None:
    """Time of operators too small to fill the machine, and of the wrappers around operators."""
    mine = rows.bound == BOUNDS.index("overhead")
    spent = float(rows.time[mine].sum())
    if spent < limit * rows.whole:
        return None
    gap = float(np.nansum(rows.result["above_roof"].values[mine]))
    calls = int(rows.result["calls"].values[mine].sum())
    return Finding(
        "roofline/overhead",
        f"{share(spent / rows.whole)} of operator time is dispatch: {counted(calls, 'call')} too small to fill the machine "
        f"(limit {share(limit)})",
        _severity(gap / rows.whole),
        rows.where(mine),
        spent / rows.whole,
        limit,
        "1",
        'Join small operators: model = torch.compile(model, mode="reduce-overhead"), or raise the batch.',
        Saving(gap, "s", gap / rows.whole, _ABOVE + "; the profiler itself adds to these calls"),
    )


def _first_touch(rows: Rows, ceilings: Mapping[str, Any], limit: float) -> Finding | None:
    """Blocks from 32 MiB on are mapped anew at each allocation, and every page is touched first again."""
    mine = rows.bound == BOUNDS.index("allocation")
    spent = float(rows.time[mine].sum())
    if spent < limit * rows.whole:
        return None
    gap = float(np.nansum(rows.result["above_roof"].values[mine]))
    page = 4096 * float(ceilings.get("fault", 0.0))
    return Finding(
        "roofline/first_touch",
        f"{share(spent / rows.whole)} of operator time goes into results of 32 MiB and more that are mapped anew "
        f"({duration(page)} a page)",
        _severity(gap / rows.whole),
        rows.where(mine),
        spent / rows.whole,
        limit,
        "1",
        "Start Python with MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592, so that freed memory is kept.",
        Saving(gap, "s", gap / rows.whole, _ABOVE),
    )


def _host(rows: Rows, limit: float) -> Finding | None:
    """Python between the operators of the forward."""
    spent, result = float(rows.result["host_time"]), rows.result
    forward = rows.words("phase") == "forward"
    inside = float(rows.time[forward].sum())
    if not np.isfinite(spent) or str(result.attrs.get("device", "cpu")) != "cpu" or spent + inside <= 0:
        return None
    part = spent / (spent + inside)
    if part < limit:
        return None
    if not result.attrs.get("alone", True):
        return Finding(
            "roofline/host",
            f"{share(part)} of the forwards is Python between operators, other probes included (limit {share(limit)})",
            "note",
            {"path": ""},
            part,
            limit,
            "1",
            'Capture again with probes=["ops"] alone: then the number is the model\'s.',
        )
    return Finding(
        "roofline/host",
        f"{share(part)} of the forwards is Python between operators, not operators (limit {share(limit)})",
        _severity(part),
        {"path": ""},
        part,
        limit,
        "1",
        "Take Python out of the forward: model = torch.compile(model), or raise the batch.",
        Saving(spent, "s", spent / (spent + rows.whole), "measured between operators, with the profiler running"),
    )
