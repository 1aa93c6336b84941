"""What memory is spent on, moment by moment, and who holds it at the peak."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnviz.errors import SchemaError
from bnviz.hardware.lifetimes import CATEGORIES, Blocks, blocks
from bnviz.profile import PHASES, Profile
from bnviz.schema import Variable, probe

MODULES = 200
LARGEST = 10
CALLS = 64


@probe(
    variables=(
        Variable("bytes", ("time", "category"), "B", "held from this moment to the next, by what for"),
        Variable("module_bytes", ("module", "category"), "B", "held at the peak, by the module that made or owns it"),
        Variable("activation_bytes", ("module",), "B", "activations held at the moment there are most of them"),
    ),
    uses=("profiler",),
    memory="at most 2,000 moments x 8 categories x 8 B",
)
class Memory:
    """Bytes held over time by category, and the peak by module.

    Parameters
    ----------
    points : int
        Moments kept; beyond them the least, the largest and the last total of each slice of time, so that no peak is lost.

    Notes
    -----
    * Categories and the rules behind them: `bnviz.hardware.lifetimes.blocks`. What torch's allocator handed out is seen;
      memory that libraries ask for themselves is not.
    * `attrs`: `peak` (`bytes`, `time`, `phase`, `op`, `path`), `largest` blocks at the peak, `after_calls` (bytes held at
      the end of each forward, the first 64), `device`, `allocated` (sum of all allocations), `notes`.
    * Coordinates: `time` [s] since the first operator, `category`, `module` (path; "outside" for no module).
    """

    def __init__(self, *, points: int = 2000) -> None:
        if points < 3:
            raise SchemaError(f"memory: points={points}, expected at least 3.")
        self._points = points

    def profiled(self, profile: Profile) -> dict[str, Any] | None:
        """Columns of the record from what the profiler saw; None when it saw no allocation."""
        if not len(profile.memory_time):
            return None
        held = blocks(profile)
        moments, levels = timeline(held)
        total = levels.sum(1)
        at = int(total.argmax())
        keep = thin(moments, total, self._points)
        order = np.argsort(-_by_module(held, moments[at]).sum(1), kind="stable")[:MODULES]
        most = int(levels[:, CATEGORIES.index("activation")].argmax())
        names = [*held.paths, "outside"]
        return {
            "bytes": levels[keep].astype(np.float64),
            "module_bytes": _by_module(held, moments[at])[order].astype(np.float64),
            "activation_bytes": _by_module(held, moments[most])[order, CATEGORIES.index("activation")].astype(float),
            "coords": {
                "time": moments[keep] / 1e9,
                "category": list(CATEGORIES),
                "module": [names[i] for i in order],
            },
            "attrs": self._attrs(profile, held, int(moments[at]), (moments, total)),
        }

    def _attrs(
        self, profile: Profile, held: Blocks, moment: int, series: tuple[np.ndarray, np.ndarray]
    ) -> dict[str, Any]:
        moments, total = series
        outer = (profile.call_depth == 0) & ~profile.call_backward
        ends = profile.call_end[outer][:CALLS]
        after = total[np.maximum(np.searchsorted(moments, ends, side="right") - 1, 0)]
        return {
            "peak": _describe_peak(profile, held, moment) | {"bytes": int(total.max())},
            "largest": _largest(profile, held, moment),
            "after_calls": [int(b) for b in after],
            "device": "cpu" if held.device < 0 else f"cuda:{held.device}",
            "allocated": int(profile.memory_bytes[profile.memory_bytes > 0].sum()),
            "calls": int(outer.sum()),
            "trained": bool((profile.phase == 1).any()),
            "wall": profile.wall / 1e9,
            "notes": list(profile.notes),
        }


def timeline(held: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Moments at which something changes (time,), and bytes by category from each on (time, category).

    The first moment is 0; what was there before is in its row.
    """
    sign = np.concatenate([held.nbytes, -held.nbytes])
    when = np.concatenate([held.born, held.died])
    which = np.concatenate([held.category, held.category])
    seen = when < np.iinfo(np.int64).max
    sign, which = sign[seen], which[seen]
    # row 0 is before the first event, also one at 0 ns, or a little before the first operator, from where time counts
    when = np.where(when[seen] == np.iinfo(np.int64).min, 0, np.maximum(when[seen], 1))
    moments, slot = np.unique(np.concatenate([[0], when]), return_inverse=True)
    change = np.zeros((len(moments), len(CATEGORIES)), np.int64)
    np.add.at(change, (slot[1:], which), sign)
    return moments, change.cumsum(0)


def thin(moments: np.ndarray, total: np.ndarray, points: int) -> np.ndarray:
    """Rows to keep: all, or the least, the largest and the last of each slice of time, and the first and last of all."""
    count = len(moments)
    if count <= points:
        return np.arange(count)
    slices = max(1, (points - 2) // 3)
    span = max(int(moments[-1] - moments[0]), 1)
    slot = np.minimum((moments - moments[0]) * slices // span, slices - 1)
    order = np.lexsort((total, slot))
    first = np.flatnonzero(np.diff(slot[order], prepend=-1))
    last = np.append(first[1:], count) - 1
    ends = np.flatnonzero(np.diff(slot, append=slices))
    kept: np.ndarray = np.unique(np.concatenate([[0, count - 1], order[first], order[last], ends]))
    return kept


def _by_module(held: Blocks, moment: int) -> np.ndarray:
    """(module, category) bytes alive at a moment; the last row is outside every module."""
    alive = held.alive(moment)
    rows = len(held.paths) + 1
    module = np.where(held.module[alive] >= 0, held.module[alive], rows - 1)
    flat = module * len(CATEGORIES) + held.category[alive]
    found: np.ndarray = np.bincount(flat, held.nbytes[alive], rows * len(CATEGORIES)).reshape(rows, -1)
    return found


def _describe_peak(profile: Profile, held: Blocks, moment: int) -> dict[str, Any]:
    """Which operator asked for the memory that made the peak."""
    born = np.flatnonzero(held.born == moment)
    event = int(held.event[born[-1]]) if len(born) else -1
    if event < 0:
        return {"time": moment / 1e9, "phase": "other", "op": "", "path": ""}
    outer = event
    while profile.parent[outer] >= 0 and profile.phase[profile.parent[outer]] == profile.phase[event]:
        outer = int(profile.parent[outer])
    module = int(profile.module[event])
    return {
        "time": moment / 1e9,
        "phase": PHASES[int(profile.phase[event])],
        "op": profile.names[int(profile.name[outer])].removeprefix("autograd::engine::evaluate_function: "),
        "path": profile.paths[module] if module >= 0 else "outside",
    }


def _largest(profile: Profile, held: Blocks, moment: int) -> list[dict[str, Any]]:
    alive = np.flatnonzero(held.alive(moment))
    order = alive[np.argsort(-held.nbytes[alive], kind="stable")][:LARGEST]
    names = [*held.paths, "outside"]
    return [
        {
            "bytes": int(held.nbytes[i]),
            "category": CATEGORIES[int(held.category[i])],
            "path": names[int(held.module[i])],
            "op": profile.names[int(profile.name[held.event[i]])] if held.event[i] >= 0 else "",
        }
        for i in order.tolist()
    ]
