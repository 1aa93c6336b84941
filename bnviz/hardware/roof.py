"""The roofline as arithmetic: what bounds an operator, from its work, its time and the machine's ceilings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BOUNDS = ("compute", "memory", "ridge", "allocation", "overhead", "below_roof", "unknown")
REASONS = ("", "no rule", "faster than its roof", "busy machine", "too few repeats", "no ceiling")
FRESH = 32 << 20  # glibc maps every block of this size anew (its largest M_MMAP_THRESHOLD)

RIDGE = 1.25  # compute and memory within this factor of each other
NEAR = 0.5  # at least this share of the time is explained by the roof
FAULTS = 0.3
EXCESS = 1.10
HIT = 0.25  # share of calls that may be interrupted before their median is in doubt

_COMPUTE, _MEMORY, _RIDGE, _ALLOCATION, _OVERHEAD, _BELOW, _UNKNOWN = range(7)


@dataclass(frozen=True, slots=True)
class Load:
    """Calls to be judged, one entry each.

    Parameters
    ----------
    flops, nbytes, time, allocated : arrays (call,)
        FLOP, B and s of one call (a median over repeats), host bytes allocated. NaN in the first two: no rule.
    kind, dtype : sequences of str (call,)
        "matmul", "vector", "special", "move", "none" (a wrapper); "float32", ...
    repeats : array (call,)
        How many calls the median is of.
    """

    flops: np.ndarray
    nbytes: np.ndarray
    time: np.ndarray
    allocated: np.ndarray
    kind: Sequence[str]
    dtype: Sequence[str]
    repeats: np.ndarray


@dataclass(frozen=True, slots=True)
class Verdict:
    """What bounds each call: indices into `BOUNDS` and `REASONS`, and the times that were compared [s].

    `roof` is the longer of `compute` and `memory`; NaN where there is no rule.
    """

    bound: np.ndarray
    reason: np.ndarray
    compute: np.ndarray
    memory: np.ndarray
    fault: np.ndarray
    roof: np.ndarray


def judge_calls(
    load: Load,
    ceilings: Mapping[str, Any],
    *,
    contention: float = 0.0,
    run_length: float = np.nan,
    contention_limit: float = 0.05,
    repeats: int = 3,
) -> Verdict:
    """What bounds each call.

    With F FLOPs, B bytes, t seconds, the peak P of the dtype, the copy bandwidth W at that working set, the dispatch floor o
    and the cost f of memory touched first: t_c = F / P, t_m = B / W(B), t_a = f.

    Rules in order: *unknown* without a rule, when max(t_c, t_m) > 1.1 t (a ceiling or a rule is wrong), when a busy machine
    may have reached the median (see `run_length`), with too few repeats; *allocation* t_a >= 0.3 t; *overhead* o >= 0.5 t,
    and all wrappers; then with max(t_c, t_m) >= 0.5 t *compute* or *memory* when one is 1.25 times the other, *ridge*
    between; else *below_roof*: the kernel uses less than half of what the machine can do.

    Parameters
    ----------
    load : Load
    ceilings : mapping
        `Ceilings.to_dict()`.
    contention : float
        Share of time in which the thread waited for a core; NaN: not known.
    run_length : float
        Seconds the thread ran between two interruptions. On a busy machine a call of t seconds is interrupted with
        probability t / run_length; up to a quarter the median of three and more is that of calls that were not. NaN: every
        call counts as interrupted.
    contention_limit, repeats : float, int
        Above the one or below the other: unknown.

    Examples
    --------
    >>> machine = {"flops": {"float32": 1e11}, "special": 1e9, "bandwidth": [[1, 1e10]], "dispatch": 1e-6, "fault": 0.0}
    >>> load = Load(np.array([1e9]), np.array([1e6]), np.array([0.012]), np.zeros(1), ["matmul"], ["float32"], np.array([5]))
    >>> BOUNDS[judge_calls(load, machine).bound[0]]
    'compute'
    """
    peak = _peak(load, ceilings)
    t = load.time
    with np.errstate(divide="ignore", invalid="ignore"):
        compute = np.where(load.flops > 0, load.flops / peak, np.where(np.isnan(load.flops), np.nan, 0.0))
        memory = np.where(
            load.nbytes > 0,
            load.nbytes / bandwidth_at(np.nan_to_num(load.nbytes), ceilings["bandwidth"]),
            np.where(np.isnan(load.nbytes), np.nan, 0.0),
        )
    busy = contention > contention_limit
    hit = np.full(len(t), busy) & ~(t <= HIT * run_length)
    fault = np.where(load.allocated >= FRESH, load.allocated, 0.0) * float(ceilings["fault"])
    roof = np.fmax(compute, memory)
    wrapper = np.array([k == "none" for k in load.kind], bool) & ~np.isnan(load.flops)
    bound = np.full(len(t), _BELOW)
    near = roof >= NEAR * t
    bound[near] = _RIDGE
    bound[near & (compute >= RIDGE * memory)] = _COMPUTE
    bound[near & (memory >= RIDGE * compute)] = _MEMORY
    bound[wrapper | (float(ceilings["dispatch"]) >= NEAR * t)] = _OVERHEAD
    bound[~wrapper & (fault >= FAULTS * t) & (fault > 0)] = _ALLOCATION
    reason = np.zeros(len(t), np.int64)
    for code, refused in (
        (4, load.repeats < repeats),
        (3, hit),
        (2, roof > EXCESS * t),
        (5, (load.flops > 0) & np.isnan(peak)),
        (1, np.isnan(load.flops) | np.isnan(load.nbytes)),
    ):
        reason[refused & ~wrapper] = code
    bound[reason > 0] = _UNKNOWN
    return Verdict(bound, reason, compute, memory, fault, roof)


def _peak(load: Load, ceilings: Mapping[str, Any]) -> np.ndarray:
    """FLOP/s (or evaluations a second) that each call could reach; NaN where none was measured."""
    flops = ceilings["flops"]
    wide = flops.get("float32", np.nan)
    found = [
        float(ceilings["special"])
        if kind == "special"
        # vector units work at the rate of their dtype at best; matrix units help products only
        else float(flops.get(dtype, np.nan) if kind == "matmul" else min(flops.get(dtype, wide), wide))
        for kind, dtype in zip(load.kind, load.dtype, strict=True)
    ]
    return np.array(found, float)


def level_of(nbytes: np.ndarray, ceilings: Mapping[str, Any]) -> list[str]:
    """The smallest cache a working set fits in, else the device's memory.

    Examples
    --------
    >>> level_of(np.array([1e3, 1e6, 1e9]), {"device": "cpu", "levels": [["L1", 32768], ["L2", 2 ** 21]]})
    ['L1', 'L2', 'DRAM']
    """
    names = [str(n) for n, _ in ceilings["levels"]]
    sizes = [float(s) for _, s in ceilings["levels"]]
    last = "DRAM" if str(ceilings.get("device", "cpu")).startswith("cpu") else "HBM"
    at = np.searchsorted(sizes, np.nan_to_num(nbytes))
    return [(*names, last)[i] for i in at]


def bandwidth_at(nbytes: np.ndarray, bandwidth: Iterable[Iterable[float]]) -> np.ndarray:
    """Copy bandwidth at working sets of `nbytes`, between the measured sizes on log-log axes, constant beyond them.

    Examples
    --------
    >>> bandwidth_at(np.array([1.0, 1e6, 1e8, 1e9]), [(1e6, 1e11), (1e8, 1e10)])
    array([1.e+11, 1.e+11, 1.e+10, 1.e+10])
    """
    sizes, rates = np.asarray(list(map(list, bandwidth)), float).T
    logs = np.log(np.maximum(np.asarray(nbytes, float), 1.0))
    shown: np.ndarray = np.exp(np.interp(logs, np.log(sizes), np.log(rates)))
    return shown
