"""Every operator the model ran: where, when, how long, how much it computed and moved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from bnviz.hardware.flops import FREE, Work, has_rule, is_engine, work
from bnviz.profile import PHASES, Profile, Signature
from bnviz.schema import Variable, probe

if TYPE_CHECKING:
    from bnviz.hardware.ceilings import Ceilings

_EVENT = ("event",)
KINDS = ("none", "matmul", "vector", "special", "move")
_DEFAULT_DTYPE = "float32"
_LOOK_UP = "aten::index"


@probe(
    variables=(
        Variable("op", _EVENT, "name", "operator as torch names it"),
        Variable("path", _EVENT, "name", "innermost module it ran in, forward or backward; -1: outside every module"),
        Variable("phase", _EVENT, "name", "forward, backward, optimizer or other"),
        Variable("call", _EVENT, "id", "forward of the model it belongs to, from 0; -1: before the first"),
        Variable("start", _EVENT, "s", "since the first operator"),
        Variable("duration", _EVENT, "s", "on the host, what it calls included"),
        Variable("self_time", _EVENT, "s", "on the host, without the operators listed inside it; adds up to the whole"),
        Variable("device_time", _EVENT, "s", "of the kernels it launched on an accelerator", optional=True),
        Variable("flops", _EVENT, "FLOP", "at least to be computed; NaN: no rule"),
        Variable("bytes", _EVENT, "B", "at least to be moved; NaN: no rule"),
        Variable("allocated", _EVENT, "B", "of host memory asked for inside it"),
        Variable(
            "work", _EVENT, "name", "whose ceiling holds: matmul, vector, special, move; none: a wrapper or a view"
        ),
        Variable("dtype", _EVENT, "name", "it computes in; -1: none"),
        Variable("shapes", _EVENT, "name", "sizes of its tensors; -1: not known"),
    ),
    uses=("profiler",),
    memory="90 B an operator; a transformer runs some 40 a layer and forward",
)
class Ops:
    """Every operator with its module, phase, times, FLOPs and compulsory bytes.

    A row is an operator whose work is counted (`aten::addmm`), or a wrapper around such (`aten::linear`,
    `AddmmBackward0`). Operators inside a counted one are part of it and have no row, so that nothing counts twice and
    `self_time` adds up to the time spent in operators.

    Parameters
    ----------
    ceilings : bool
        Measure what the machine can do, for the roofline: 0.3 to 1 s, once a process, after the capture.

    Notes
    -----
    * `flops`, `bytes`: lower bounds from shapes, see `bnviz.hardware.flops.work`. NaN: this operator has no rule.
    * Wrappers and autograd's engine have 0 of both: their `self_time` is overhead.
    * `attrs`: `ceilings` (a list: at the current number of threads, then at one), `coverage` (share of `self_time` with a
      rule), `recorded` (Unix time), `wall`, `overhead`, `call_time` (seconds of all forwards), `contention`, `calls`,
      `threads`, `run_length` (mean seconds between two interruptions), `device`, `notes`.
    """

    def __init__(self, *, ceilings: bool = True) -> None:
        self._ceilings = ceilings

    def profiled(self, profile: Profile) -> dict[str, Any] | None:
        """Columns of the record from what the profiler saw; None when it saw no operator."""
        if not len(profile.name):
            return None
        worked = _Worked(profile)
        keep = ~worked.inside
        columns, tables = _columns(profile, worked, keep)
        return columns | {"tables": tables, "attrs": self._attrs(profile, worked, columns, tables)}

    def _attrs(
        self, profile: Profile, worked: _Worked, columns: Mapping[str, Any], tables: Mapping[str, list[str]]
    ) -> dict[str, Any]:
        whole = float(columns["self_time"].sum())
        known = float(columns["self_time"][~np.isnan(columns["flops"])].sum())
        outer = (profile.call_depth == 0) & ~profile.call_backward
        device = "cuda:0" if "device_time" in columns else "cpu"
        found = list(_ceilings(device, worked, tables["dtype"])) if self._ceilings else []
        return {
            "ceilings": [c.to_dict() for c in found],
            "coverage": known / whole if whole else None,
            "recorded": time.time(),
            "wall": profile.wall / 1e9,
            "overhead": profile.overhead / 1e9,
            "contention": _known(profile.contention),
            "run_length": _known(profile.run_length / 1e9),
            "calls": int(outer.sum()),
            "call_time": float(profile.call_duration[outer].sum() / 1e9),
            "threads": _threads(),
            "device": device,
            "notes": list(profile.notes),
        }


def _known(value: float) -> float | None:
    """For attributes, which are JSON: there is no NaN in JSON."""
    return None if np.isnan(value) else float(value)


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


def _ceilings(device: str, worked: _Worked, dtypes: list[str]) -> Iterator[Ceilings]:
    from bnviz.hardware.ceilings import measure_ceilings

    used = {dtypes[i] for i in np.unique(worked.dtype[worked.kind == KINDS.index("matmul")]) if i >= 0}
    # bfloat16 too: whether it would be faster here is a finding
    wanted = {_DEFAULT_DTYPE, "bfloat16", *(d for d in used if d.startswith(("float", "bfloat")) and "8" not in d)}
    yield measure_ceilings(device, wanted)
    if device == "cpu" and _threads() > 1:
        yield measure_ceilings(device, wanted, threads=1)


class _Worked:
    """Work of every row of a profile, and which rows lie inside a counted one."""

    def __init__(self, profile: Profile) -> None:
        count = len(profile.name)
        self.flops, self.nbytes = np.full(count, np.nan), np.full(count, np.nan)
        self.kind, self.dtype = np.zeros(count, np.int8), np.full(count, -1, np.int32)
        self.inside, self.claims = np.zeros(count, bool), np.zeros(count, bool)
        self.dtypes: dict[str, int] = {}
        self._claim(profile)
        self._look_up(profile)
        self._wrap(profile)

    def _claim(self, profile: Profile) -> None:
        """The outermost operator that has a rule counts; parents stand before their children."""
        ruled = np.array([has_rule(n) for n in profile.names], bool)
        parents, names, signatures = profile.parent.tolist(), profile.name.tolist(), profile.signature.tolist()
        for row, name in enumerate(names):
            above = parents[row]
            if above >= 0 and (self.inside[above] or self.claims[above]):
                self.inside[row] = True
            elif ruled[name] and signatures[row] >= 0:
                found = work(profile.names[name], profile.signatures[signatures[row]])
                if found is not None:
                    self._put(row, found)
                    self.claims[row] = True

    def _look_up(self, profile: Profile) -> None:
        """`x[ids]`: the profiler doesn't see the ids, but the block made for the result, which is read and written.

        A look-up by mask counts first what it will take; its work is not known.
        """
        if _LOOK_UP not in profile.names:
            return
        name, masks = profile.names.index(_LOOK_UP), {"aten::nonzero", "aten::masked_select"}
        rows = np.flatnonzero((profile.name == name) & ~self.inside & ~self.claims)
        around = np.full(len(profile.name), -1)
        around[rows] = rows
        parents = profile.parent.tolist()
        for row, above in enumerate(parents):  # parents stand before their children
            if around[row] < 0 and above >= 0:
                around[row] = around[above]
        by_mask = {int(around[r]) for r, n in enumerate(profile.name) if profile.names[n] in masks}
        made = (profile.memory_bytes > 0) & (profile.memory_event >= 0)
        result = np.zeros(len(profile.name))
        where = around[profile.memory_event[made]]
        np.maximum.at(result, where[where >= 0], profile.memory_bytes[made][where >= 0])
        for row in rows.tolist():
            signature = _signature(profile, row)
            if signature and row not in by_mask and result[row]:
                self._put(row, Work(0.0, 2.0 * float(result[row]), "move", signature.dtypes[0]))
                self.claims[row] = True
        for row, above in enumerate(parents):
            self.inside[row] |= above >= 0 and bool(self.claims[above] or self.inside[above])

    def _wrap(self, profile: Profile) -> None:
        """What is left: wrappers and views do nothing of their own, others are not known."""
        holds = np.zeros(len(profile.name), bool)  # a counted operator lies inside
        parents = profile.parent
        for row in range(len(holds) - 1, -1, -1):  # children stand behind their parents
            above = parents[row]
            if above >= 0 and (self.claims[row] or holds[row]):
                holds[above] = True
        free = np.array([n.rpartition("::")[2] in FREE or is_engine(n) for n in profile.names], bool)
        torchs = np.array([n.startswith("aten::") for n in profile.names], bool)
        left = ~self.inside & ~self.claims
        wrapper = left & (free[profile.name] | (holds & torchs[profile.name]))
        self.flops[wrapper] = self.nbytes[wrapper] = 0.0
        for row in np.flatnonzero(left & ~wrapper).tolist():
            signature = _signature(profile, row)
            found = work(profile.names[profile.name[row]], signature, last_resort=True) if signature else None
            if found is not None:
                self._put(row, found)
                self.claims[row] = True

    def _put(self, row: int, found: Work) -> None:
        self.flops[row], self.nbytes[row] = found.flops, found.nbytes
        self.kind[row] = KINDS.index(found.kind)
        if found.dtype:
            self.dtype[row] = self.dtypes.setdefault(found.dtype, len(self.dtypes))


def _signature(profile: Profile, row: int) -> Signature | None:
    at = profile.signature[row]
    return profile.signatures[at] if at >= 0 else None


def _columns(profile: Profile, worked: _Worked, keep: np.ndarray) -> tuple[dict[str, Any], dict[str, list[str]]]:
    owner = _owner(profile, worked)
    count = len(profile.name)
    inner = np.zeros(count)
    rows = np.flatnonzero(keep & (profile.parent >= 0))
    np.add.at(inner, profile.parent[rows], profile.duration[rows])
    columns: dict[str, Any] = {
        "op": profile.name[keep],
        "path": profile.module[keep],
        "phase": profile.phase[keep],
        "call": _call(profile)[keep],
        "start": profile.start[keep] / 1e9,
        "duration": profile.duration[keep] / 1e9,
        "self_time": np.maximum(profile.duration - inner, 0)[keep] / 1e9,
        "flops": worked.flops[keep],
        "bytes": worked.nbytes[keep],
        "allocated": _allocated(profile, owner)[keep],
        "work": worked.kind[keep],
        "dtype": worked.dtype[keep],
    }
    if profile.kernel_time.any():
        columns["device_time"] = np.bincount(owner, profile.kernel_time, count)[keep] / 1e9
    texts: dict[str, int] = {}
    shown = np.array([texts.setdefault(s.text, len(texts)) for s in profile.signatures] or [0], np.int32)
    columns["shapes"] = np.where(profile.signature >= 0, shown[profile.signature], -1)[keep].astype(np.int32)
    tables = {
        "op": list(profile.names),
        "path": list(profile.paths),
        "phase": list(PHASES),
        "work": list(KINDS),
        "dtype": list(worked.dtypes),
        "shapes": list(texts),
    }
    return columns, tables


def _owner(profile: Profile, worked: _Worked) -> np.ndarray:
    """The row that stands for each operator: itself, or the counted one around it."""
    owner = np.arange(len(profile.name))
    for row in np.flatnonzero(worked.inside):
        owner[row] = owner[profile.parent[row]]
    return owner


def _allocated(profile: Profile, owner: np.ndarray) -> np.ndarray:
    made = (profile.memory_bytes > 0) & (profile.memory_event >= 0) & (profile.memory_device < 0)
    where = owner[profile.memory_event[made]]
    return np.bincount(where, profile.memory_bytes[made], len(owner))


def _call(profile: Profile) -> np.ndarray:
    """Number of the last forward of the model that began before an operator did."""
    starts = np.sort(profile.call_start[(profile.call_depth == 0) & ~profile.call_backward])
    return (np.searchsorted(starts, profile.start, side="right") - 1).astype(np.int32)
