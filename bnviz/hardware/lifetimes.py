"""What each block of memory is for, from when it was made and when it was freed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from bnviz.profile import Holding, Profile

CATEGORIES = ("parameter", "buffer", "gradient", "optimizer", "activation", "output", "temporary", "other")
_FORWARD, _BACKWARD, _OPTIMIZER = range(3)
_ALWAYS, _NEVER = np.iinfo(np.int64).min, np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of memory on one device.

    Parameters
    ----------
    born, died : arrays (block,) int
        ns since the first operator; the least and the largest integer for "was there before" and "was not freed".
    nbytes, category, module, event : arrays (block,) int
        `category` indexes `CATEGORIES`, `module` the paths (-1: none), `event` the profile's operators (-1: none).
    paths : tuple of str
    device : int
        -1 the host.
    """

    born: np.ndarray
    died: np.ndarray
    nbytes: np.ndarray
    category: np.ndarray
    module: np.ndarray
    event: np.ndarray
    paths: tuple[str, ...]
    device: int

    def alive(self, moment: int) -> np.ndarray:
        """Which blocks are held at a moment (block,)."""
        return (self.born <= moment) & (self.died > moment)


def blocks(profile: Profile, device: int | None = None) -> Blocks:
    """Pair allocations with frees and name what each block is for.

    Parameters
    ----------
    profile : Profile
    device : int, optional
        None: the accelerator that saw most allocations, else the host (-1).

    Returns
    -------
    Blocks

    Notes
    -----
    parameter, buffer, gradient, optimizer: what the model and its optimizers hold, and what was made in the backward pass
    (in the optimizer) and outlives it. activation: made in a forward and kept for the backward pass; in inference, where
    there is none, handed from one operator to the next. output: made in a forward and held after it, through the backward
    pass if there is one (outputs, key-value caches). temporary: gone before the pass that made it ends (in inference: before
    its operator does). other: made outside of all passes, and what was there before and belongs to none of the model's
    tensors, counted from the start if it was seen to be freed (a CPU's allocator doesn't tell).

    Cost: 1 us a block.
    """
    chosen = _busiest(profile) if device is None else device
    paths = {path: i for i, path in enumerate(profile.paths)}
    for holding in (*profile.before, *profile.after):
        paths.setdefault(holding.path, len(paths))
    held = [h for h in profile.before if h.device == chosen]
    made = _pair(profile, chosen, held)
    _dropped(profile, held, made.static_died)
    category = _categories(profile, made, [h for h in profile.after if h.device == chosen])
    static = _static(held, made.static_died, paths)
    event = made.event
    module = np.where(event >= 0, profile.module[event], -1) if len(profile.module) else np.full(len(event), -1)
    module = _after_paths(module, made, profile.after, paths, chosen)
    parts = (
        (static[0], made.born),
        (made.static_died, made.died),
        (static[1], made.nbytes),
        (static[2], category),
        (static[3], module),
        (np.full(len(held), -1), event),
    )
    born, died, nbytes, category, module, event = (
        np.concatenate([np.asarray(a, np.int64), np.asarray(b, np.int64)]) for a, b in parts
    )
    return Blocks(born, died, nbytes, category, module, event, tuple(paths), chosen)


def _busiest(profile: Profile) -> int:
    made = profile.memory_device[(profile.memory_device >= 0) & (profile.memory_bytes > 0)]
    return int(np.bincount(made).argmax()) if len(made) else -1


@dataclass(frozen=True, slots=True)
class _Made:
    """Blocks seen in the session, and when what was held before was freed."""

    born: np.ndarray
    died: np.ndarray
    nbytes: np.ndarray
    event: np.ndarray
    address: np.ndarray
    static_died: np.ndarray


def _pair(profile: Profile, device: int, held: list[Holding]) -> _Made:
    """Allocation and free of one address belong together; a free of an unknown address is of something older."""
    mine = np.flatnonzero(profile.memory_device == device)
    times, sizes = profile.memory_time[mine].tolist(), profile.memory_bytes[mine].tolist()
    places, events = profile.memory_address[mine].tolist(), profile.memory_event[mine].tolist()
    static = {h.address: i for i, h in enumerate(held)}
    static_died = [_NEVER] * len(held)
    born: list[int] = []
    died: list[int] = []
    nbytes: list[int] = []
    event: list[int] = []
    address: list[int] = []
    living: dict[int, int] = {}
    for time, size, place, where in zip(times, sizes, places, events, strict=True):
        if size > 0:
            if place in static and static_died[static[place]] == _NEVER:
                static_died[static[place]] = time  # its place is used again: it is gone since some time
            living[place] = len(born)
            columns = (time, _NEVER, size, where, place)
        elif place in living:
            died[living.pop(place)] = time
            continue
        elif place in static and static_died[static[place]] == _NEVER:
            static_died[static[place]] = time
            continue
        else:
            columns = (_ALWAYS, time, -size, -1, place)
        for into, value in zip((born, died, nbytes, event, address), columns, strict=True):
            into.append(value)
    return _Made(*(np.array(a, np.int64) for a in (born, died, nbytes, event, address, static_died)))


def _dropped(profile: Profile, held: list[Holding], died: np.ndarray) -> None:
    """Gradients of before that are not there any more: a CPU's allocator doesn't tell when it frees what is older.

    They went when the optimizer first dropped gradients, else before the first forward, as most training loops do.
    """
    outer = profile.call_start[profile.call_depth == 0]
    since = profile.zeroed if profile.zeroed >= 0 else int(outer.min()) if len(outer) else 0
    left = {h.address for h in profile.after if h.category == "gradient"}
    for i, holding in enumerate(held):
        if holding.category != "gradient":
            continue
        gone = died[i] == _NEVER and holding.address not in left
        if gone or (profile.zeroed >= 0 and died[i] != _NEVER):  # a place is used again later than it is free
            died[i] = min(max(since, 1), died[i])  # held at moment 0


def _static(held: list[Holding], died: np.ndarray, paths: dict[str, int]) -> tuple[np.ndarray, ...]:
    born = np.full(len(held), _ALWAYS)
    nbytes = np.array([h.nbytes for h in held], np.int64)
    category = np.array([CATEGORIES.index(h.category) for h in held], np.int64)
    module = np.array([paths[h.path] for h in held], np.int64)
    return born, nbytes, category, module


def _categories(profile: Profile, made: _Made, after: list[Holding]) -> np.ndarray:
    """Category of each block that was made in the session."""
    name = {c: i for i, c in enumerate(CATEGORIES)}
    found = np.full(len(made.born), name["other"])
    seen = made.event >= 0
    phase = np.full(len(made.born), 3)
    phase[seen] = profile.phase[made.event[seen]]
    for which, kept in ((_BACKWARD, "gradient"), (_OPTIMIZER, "optimizer")):
        starts, ends = _episodes(profile, which)
        rows = np.flatnonzero(phase == which)
        found[rows] = np.where(made.died[rows] > _end_of(made.born[rows], starts, ends), name[kept], name["temporary"])
    rows = np.flatnonzero(phase == _FORWARD)
    found[rows] = _forward_categories(profile, made, rows, name)
    final = {h.address: name[h.category] for h in after}
    for row in np.flatnonzero((made.died == _NEVER) & (made.born != _ALWAYS)):
        found[row] = final.get(int(made.address[row]), found[row])
    return found


def _forward_categories(profile: Profile, made: _Made, rows: np.ndarray, name: dict[str, int]) -> np.ndarray:
    born, died = made.born[rows], made.died[rows]
    outer = (profile.call_depth == 0) & ~profile.call_backward
    starts = profile.call_start[outer]
    call_end = _end_of(born, starts, profile.call_end[outer])
    next_call = _next(born, starts)
    back_starts, back_ends = _episodes(profile, _BACKWARD)
    begins = _next(born, back_starts)  # the backward pass that may need it, if it begins before the next forward
    trained = begins < next_call
    at = np.searchsorted(back_starts, born, side="right")
    ends = np.append(back_ends, _NEVER - 1)[np.minimum(at, len(back_ends))]
    needed = np.where(died > ends, name["output"], name["activation"])
    over = np.where(call_end > born, np.minimum(call_end, begins), begins)  # a loss is computed after the forward
    training = np.where(died > over, needed, name["temporary"])
    handed = np.where(died > _root_end(profile)[made.event[rows]], name["activation"], name["temporary"])
    inference = np.where(died > call_end, name["output"], handed)
    return np.where(trained, training, inference)


def _episodes(profile: Profile, phase: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of the times one phase runs without another between."""
    roots = np.flatnonzero(profile.parent < 0)
    roots = roots[np.argsort(profile.start[roots], kind="stable")]
    # what happens outside of all phases (other) doesn't split one
    roots = roots[profile.phase[roots] != 3]
    mine = profile.phase[roots] == phase
    first = mine & ~np.concatenate([[False], mine[:-1]])
    if not mine.any():
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    group = np.cumsum(first)[mine] - 1
    ends = np.full(int(first.sum()), _ALWAYS)
    np.maximum.at(ends, group, (profile.start + profile.duration)[roots][mine])
    return profile.start[roots][first], ends


def _end_of(moment: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """End of the last window that began before each moment; the moment itself when there is none."""
    at = np.searchsorted(starts, moment, side="right") - 1
    return np.where(at >= 0, ends[np.maximum(at, 0)], moment) if len(starts) else moment


def _next(moment: np.ndarray, starts: np.ndarray) -> np.ndarray:
    at = np.searchsorted(starts, moment, side="right")
    found: np.ndarray = np.append(starts, _NEVER)[at]
    return found


def _root_end(profile: Profile) -> np.ndarray:
    """End of the outermost operator around each; parents stand before their children."""
    end: np.ndarray = profile.start + profile.duration
    for row in np.flatnonzero(profile.parent >= 0):
        end[row] = end[profile.parent[row]]
    return end


def _after_paths(
    module: np.ndarray, made: _Made, after: Iterable[Holding], paths: dict[str, int], device: int
) -> np.ndarray:
    """Gradients and optimizer state belong to the module of their parameter."""
    owner = {h.address: paths[h.path] for h in after if h.device == device}
    for row in np.flatnonzero(made.died == _NEVER):
        module[row] = owner.get(int(made.address[row]), module[row])
    return module
