"""From kineto's raw events to a `Profile`: who encloses whom, which module, which phase, which memory.

`torch.profiler`'s own `events()` takes 70 µs an operator and knows no modules; this takes 25 to 35.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnviz.profile import Holding, Profile, Signature

from .kineto_tree import Tree, read_tree
from .ownership import MODULE_MARK, OWN_MARK, ZEROING, Nesting, nest

__all__ = ["MODULE_MARK", "OWN_MARK", "Session", "read_profile"]

_MEMORY = "[memory]"
_KERNELS = ("kernel", "concurrent_kernel", "gpu_memcpy", "gpu_memset")
_OPERATORS = ("cpu_op", "user_annotation")
_RUNTIME = ("cuda", "hip", "cuLaunch", "cuMem", "cuStream", "Runtime Triggered", "Buffer Flush", "Activity Buffer")
_SKIPPED = ("profiler::_record_function_enter", "profiler::_record_function_exit", "ProfilerStep#")
_TYPES = {
    "float": "float32",
    "double": "float64",
    "c10::Half": "float16",
    "c10::BFloat16": "bfloat16",
    "long int": "int64",
    "long": "int64",
    "long long": "int64",
    "__int64": "int64",
    "int": "int32",
    "short int": "int16",
    "short": "int16",
    "signed char": "int8",
    "unsigned char": "uint8",
    "bool": "bool",
    "c10::complex<float>": "complex64",
    "c10::complex<double>": "complex128",
    "c10::Float8_e4m3fn": "float8_e4m3fn",
    "c10::Float8_e5m2": "float8_e5m2",
}


@dataclass(frozen=True, slots=True)
class Session:
    """A stopped profiler session, not yet worked out."""

    results: Any
    before: tuple[Holding, ...]
    after: tuple[Holding, ...]
    wall: int
    contention: float
    run_length: float
    max_events: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Rows:
    """Operators and annotations, sorted by thread, start and nesting; and the raw event of each."""

    events: list[Any]
    names: list[str]
    thread: np.ndarray
    start: np.ndarray
    duration: np.ndarray
    sequence: np.ndarray
    forward_thread: np.ndarray
    scope: np.ndarray
    correlation: np.ndarray


def read_profile(session: Session) -> Profile:
    """The columns of a `Profile` from a stopped session.

    Parameters
    ----------
    session : Session

    Returns
    -------
    Profile
    """
    events = list(session.results.events())
    notes = list(session.notes)
    if len(events) > session.max_events:
        notes.append(f"Of {len(events):,} profiler events the first {session.max_events:,} were kept.")
        events = sorted(events, key=lambda e: e.start_ns())[: session.max_events]
    operators, allocations, kernels = _sort_out(events)
    rows = _rows(operators)
    older = bool(rows.events) and not hasattr(rows.events[0], "structured_input_shapes")  # before torch 2.9 or so
    tree, trouble = read_tree(session.results, {int(c) for c, e in _with_lists(rows)}, layouts=older)
    notes.extend(trouble)
    origin = int(rows.start.min()) if len(rows.events) else 0
    nesting = nest(rows.names, rows.thread, rows.start, rows.duration, rows.scope, rows.sequence, rows.forward_thread)
    return _profile(session, rows, nesting, (tree, allocations, kernels), origin, tuple(notes))


def _sort_out(events: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    operators, allocations, kernels = [], [], []
    for event in events:
        kind = _kind(event)
        if event.name() == _MEMORY:
            allocations.append(event)
        elif kind in _OPERATORS and event.device_type().name == "CPU":
            if not event.name().startswith(_SKIPPED) and not event.is_async():
                operators.append(event)
        elif kind in _KERNELS:
            kernels.append(event)
    return operators, allocations, kernels


def _kind(event: Any) -> str:
    """What an event is; older torch does not say, and its name and device tell."""
    if hasattr(event, "activity_type"):
        return str(event.activity_type())
    if event.device_type().name == "CPU":
        return "runtime" if event.name().startswith(_RUNTIME) else "cpu_op"
    return "gpu_user_annotation" if event.is_user_annotation() else "kernel"


def _rows(operators: list[Any]) -> _Rows:
    raw = np.array(
        [
            (
                e.start_thread_id(),
                e.start_ns(),
                e.duration_ns(),
                e.sequence_nr(),
                e.fwd_thread_id(),
                e.scope(),
                e.correlation_id(),
            )
            for e in operators
        ],
        np.int64,
    ).reshape(-1, 7)
    order = np.lexsort((raw[:, 6], -raw[:, 2], raw[:, 1], raw[:, 0]))
    raw = raw[order]
    events = [operators[i] for i in order]
    return _Rows(events, [e.name() for e in events], *(raw[:, i] for i in range(7)))


def _with_lists(rows: _Rows) -> list[tuple[int, Any]]:
    """Operators that took lists of tensors: kineto gives no dtype for those, the tree does."""
    return [
        (c, e) for c, e, n in zip(rows.correlation, rows.events, rows.names, strict=True) if "TensorList" in e.dtypes()
    ]


def _signature(event: Any, tree: Tree) -> Signature:
    dtypes, values = event.dtypes(), event.concrete_inputs()
    if not dtypes:
        return Signature()
    listed = tree.list_dtypes.get(event.correlation_id(), {})
    shapes, strides = (_frozen(sizes) for sizes in _layout(event, tree))
    kinds = [listed.get(i, "float32") if d == "TensorList" else _TYPES.get(d, "") for i, d in enumerate(dtypes)]
    count = len(kinds)
    texts = ["" if v is None else str(v) for v in values][:count]
    return Signature(
        (*shapes, *((),) * (count - len(shapes)))[:count],
        (*strides, *((),) * (count - len(strides)))[:count],
        tuple(kinds),
        (*texts, *("",) * (count - len(texts))),
    )


def _layout(event: Any, tree: Tree) -> tuple[Any, Any]:
    if hasattr(event, "structured_input_shapes"):
        return event.structured_input_shapes(), event.structured_input_strides()
    return tree.layouts.get(event.correlation_id(), ((), ()))


def _frozen(sizes: Any) -> tuple[Any, ...]:
    return tuple(tuple(tuple(inner) if isinstance(inner, list) else inner for inner in one) for one in sizes)


def _profile(
    session: Session, rows: _Rows, nesting: Nesting, parts: tuple[Tree, list[Any], list[Any]], origin: int, notes: Any
) -> Profile:
    tree, allocations, kernels = parts
    keep = nesting.operator
    place = np.cumsum(keep) - 1  # row among all -> row among operators
    parent = np.where(nesting.parent >= 0, place[nesting.parent], -1)[keep]
    names, name = _interned([n for n, k in zip(rows.names, keep, strict=True) if k])
    kept = [e for e, k in zip(rows.events, keep, strict=True) if k]
    signatures, signature = _interned([_signature(e, tree) for e in kept])
    calls = np.flatnonzero(nesting.call)
    memory = _memory(allocations, rows, nesting, tree, place)
    return Profile(
        names=names,
        paths=nesting.paths,
        signatures=signatures,
        name=name,
        thread=rows.thread[keep].astype(np.int32),
        start=rows.start[keep] - origin,
        duration=rows.duration[keep] - nesting.own_inside[keep],
        sequence=rows.sequence[keep],
        signature=np.where([bool(e.dtypes()) for e in kept], signature, -1).astype(np.int32),
        module=nesting.module[keep].astype(np.int32),
        phase=nesting.phase[keep].astype(np.int8),
        parent=parent.astype(np.int64),
        kernel_time=_kernel_time(kernels, kept),
        call_module=nesting.module[calls].astype(np.int32),
        call_start=rows.start[calls] - origin,
        call_end=rows.start[calls] + rows.duration[calls] - origin,
        call_duration=rows.duration[calls] - nesting.own_inside[calls],
        call_depth=nesting.depth[calls].astype(np.int16),
        call_backward=nesting.phase[calls] == 1,
        memory_time=memory[0] - origin,
        memory_bytes=memory[1],
        memory_address=memory[2],
        memory_event=memory[3],
        memory_device=memory[4].astype(np.int16),
        before=session.before,
        after=session.after,
        zeroed=min(
            (int(rows.start[i]) - origin for i, n in enumerate(rows.names) if n.startswith(ZEROING)), default=-1
        ),
        wall=session.wall,
        overhead=int(rows.duration[nesting.own].sum()) if len(rows.events) else 0,
        contention=session.contention,
        run_length=session.run_length,
        notes=notes,
    )


def _interned(values: list[Any]) -> tuple[tuple[Any, ...], np.ndarray]:
    table: dict[Any, int] = {}
    index = np.array([table.setdefault(v, len(table)) for v in values], np.int32)
    return tuple(table), index


def _kernel_time(kernels: list[Any], kept: list[Any]) -> np.ndarray:
    by_operator: dict[int, int] = {}
    for kernel in kernels:
        linked = kernel.linked_correlation_id()
        by_operator[linked] = by_operator.get(linked, 0) + kernel.duration_ns()
    return np.array(
        [by_operator.get(e.correlation_id(), 0) for e in kept] if by_operator else [0] * len(kept), np.int64
    )


def _memory(
    allocations: list[Any], rows: _Rows, nesting: Nesting, tree: Tree, place: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Time, bytes, address, operator and device of each allocation that was not bnviz's own, by time."""
    raw = np.array(
        [
            (e.start_ns(), e.nbytes(), e.start_thread_id(), -1 if e.device_type().name == "CPU" else e.device_index())
            for e in allocations
        ],
        np.int64,
    ).reshape(-1, 4)
    raw = raw[np.argsort(raw[:, 0], kind="stable")]
    address = np.array([tree.address(int(t), int(b)) for t, b in raw[:, :2]], np.int64)
    inside = _innermost(raw[:, 0], raw[:, 2], rows, nesting.parent_all)
    ours = np.zeros(len(raw), bool)
    known = inside >= 0
    ours[known] = nesting.own[inside[known]] | nesting.within_own[inside[known]]
    ours = _ours(ours, raw[:, 1], address)
    event = np.where(known, np.where(nesting.operator[inside], place[inside], -1), -1) if len(rows.events) else inside
    event = _lifted(event, inside, nesting, place)
    keep = ~ours
    return raw[keep, 0], raw[keep, 1], address[keep], event[keep], raw[keep, 3]


def _lifted(event: np.ndarray, inside: np.ndarray, nesting: Nesting, place: np.ndarray) -> np.ndarray:
    """An allocation right under a mark belongs to the operator around the mark."""
    lifted = event.copy()
    for i in np.flatnonzero((event < 0) & (inside >= 0)):
        above = nesting.parent[inside[i]]
        lifted[i] = place[above] if above >= 0 else -1
    return lifted


def _innermost(time: np.ndarray, thread: np.ndarray, rows: _Rows, parent: np.ndarray) -> np.ndarray:
    """The innermost row around each moment in its thread, -1 for none."""
    found = np.full(len(time), -1, np.int64)
    end = rows.start + rows.duration
    for one in np.unique(thread):
        mine = np.flatnonzero(rows.thread == one)
        if not len(mine):
            continue
        moments = np.flatnonzero(thread == one)
        before = np.searchsorted(rows.start[mine], time[moments], side="right") - 1
        for i, at in zip(moments, before, strict=True):
            row = int(mine[at]) if at >= 0 else -1
            while row >= 0 and end[row] < time[i]:
                row = int(parent[row])
            found[i] = row
    return found


def _ours(inside_own: np.ndarray, nbytes: np.ndarray, address: np.ndarray) -> np.ndarray:
    """What bnviz allocated, and its frees wherever they happen.

    A tensor of the model that is freed while bnviz works is the model's: the last reference went there by chance.
    """
    held: set[int] = set()
    ours = np.zeros(len(inside_own), bool)
    for i, (inside, size, place) in enumerate(zip(inside_own.tolist(), nbytes.tolist(), address.tolist(), strict=True)):
        if size > 0:
            ours[i] = inside
            (held.add if inside else held.discard)(place)
        elif place in held:
            held.discard(place)
            ours[i] = True
    return ours
