"""Which module and which phase each operator belongs to, forward and backward.

Forward: the innermost mark around it. Backward: an autograd node carries the sequence number that the forward operator which
made it had, in the thread it had it; so the node belongs to that operator's module. The map from number to module is filled by
forward operators only: an operator that makes no node reads the number the next node will get, and the operator that does make
it writes last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MODULE_MARK = "bnviz|"
OWN_MARK = "bnviz!"
BACKWARD_SCOPE, USER_SCOPE = 1, 7  # torch.profiler's RecordScope, as it stands in raw events
FORWARD, BACKWARD, OPTIMIZER, OTHER = range(4)

_ENGINE = "autograd::engine::evaluate_function: "
_ACCUMULATE = "torch::autograd::AccumulateGrad"
ZEROING = "Optimizer.zero_grad#"
_OPTIMIZER = ("Optimizer.step#", ZEROING)


@dataclass(frozen=True, slots=True)
class Nesting:
    """One entry a row, in the rows' order.

    `operator` marks rows that stay in the profile, `call` marks module calls, `own` what bnviz ran itself (outermost), and
    `within_own` what lies inside of that. `parent` skips marks, `parent_all` does not. `own_inside` is the time inside a row
    that was bnviz's own.
    """

    paths: tuple[str, ...]
    module: np.ndarray
    phase: np.ndarray
    parent: np.ndarray
    parent_all: np.ndarray
    depth: np.ndarray
    operator: np.ndarray
    call: np.ndarray
    own: np.ndarray
    within_own: np.ndarray
    own_inside: np.ndarray


class _Place:
    """What a row hands down to the rows inside it."""

    __slots__ = ("call_depth", "end", "marked", "module", "operator", "own", "phase", "row")

    def __init__(self, row: int, end: int, above: _Place | None) -> None:
        self.row, self.end = row, end
        self.module: int = above.module if above else -1
        self.phase: int = above.phase if above else OTHER
        self.operator: int = above.operator if above else -1  # nearest enclosing operator
        self.call_depth: int = above.call_depth if above else 0
        self.own: int = above.own if above else -1
        self.marked: bool = above.marked if above else False  # inside a module's mark, inside the backward pass or not


def nest(
    names: Sequence[str],
    thread: np.ndarray,
    start: np.ndarray,
    duration: np.ndarray,
    scope: np.ndarray,
    sequence: np.ndarray,
    forward_thread: np.ndarray,
) -> Nesting:
    """Module, phase and parent of rows that are sorted by thread, start and nesting.

    Parameters
    ----------
    names : sequence of str (row,)
    thread, start, duration, scope, sequence, forward_thread : arrays (row,)
        As kineto gives them.

    Returns
    -------
    Nesting
    """
    walk = _Walk(names, thread, start, duration, scope)
    walk.forward(sequence)
    walk.backward(sequence, forward_thread)
    walk.loss(sequence, forward_thread)
    return walk.result()


class _Walk:
    def __init__(
        self, names: Sequence[str], thread: np.ndarray, start: np.ndarray, duration: np.ndarray, scope: np.ndarray
    ) -> None:
        count = len(names)
        self.names, self.threads = names, thread.tolist()
        self.starts, self.ends = start.tolist(), (start + duration).tolist()
        self.scopes = scope.tolist()
        self.table: dict[str, int] = {}
        self.maker: dict[tuple[int, int], int] = {}  # (thread, sequence) -> row, filled outside backward
        self.module, self.phase = [-1] * count, [OTHER] * count
        self.parent, self.parent_all = [-1] * count, [-1] * count
        self.depth, self.own = [0] * count, [-1] * count
        self.marked = [False] * count
        self.node = [False] * count  # a row that runs an autograd node
        self.mark = [self._is_mark(row) for row in range(count)]

    def _is_mark(self, row: int) -> bool:
        name = self.names[row]
        return name.startswith(MODULE_MARK) or name == OWN_MARK or self.scopes[row] == USER_SCOPE

    def forward(self, sequence: np.ndarray) -> None:
        """Nesting, marks, phases; and which module made which node."""
        numbers = sequence.tolist()
        stack: list[_Place] = []
        previous = None
        for row, name in enumerate(self.names):
            if self.threads[row] != previous:
                stack, previous = [], self.threads[row]
            while stack and self.ends[row] > stack[-1].end:
                stack.pop()
            above = stack[-1] if stack else None
            place = self._place(row, name, above)
            self.parent_all[row] = above.row if above else -1
            self.parent[row] = above.operator if above else -1
            self.module[row], self.phase[row] = place.module, place.phase
            self.own[row], self.marked[row] = place.own, place.marked
            if numbers[row] >= 0 and not self.node[row] and (place.phase != BACKWARD or place.marked):
                self.maker[self.threads[row], numbers[row]] = row
            if not self.mark[row]:
                place.operator = row
            stack.append(place)

    def _place(self, row: int, name: str, above: _Place | None) -> _Place:
        place = _Place(row, self.ends[row], above)
        if name.startswith(MODULE_MARK):
            place.module = self.table.setdefault(name.removeprefix(MODULE_MARK), len(self.table))
            self.depth[row] = place.call_depth
            place.call_depth += 1
            place.marked = True
            if place.phase == OTHER:
                place.phase = FORWARD
        elif name == OWN_MARK:
            place.own = row if place.own < 0 else place.own
        elif name.startswith(_OPTIMIZER):
            place.phase, place.module = OPTIMIZER, -1
        elif self.scopes[row] == BACKWARD_SCOPE or name.startswith(_ENGINE):
            place.phase, place.marked = BACKWARD, False
            self.node[row] = True
        return place

    def backward(self, sequence: np.ndarray, forward_thread: np.ndarray) -> None:
        """Nodes to the modules that made them, and what runs inside a node with it."""
        numbers, origins = sequence.tolist(), forward_thread.tolist()
        again: dict[tuple[int, int], int] = {}  # nodes made during backward: double backward
        last: dict[int, int] = {}
        for row, name in enumerate(self.names):
            if self.phase[row] != BACKWARD or self.marked[row]:
                continue
            where = self.threads[row]
            if not self.node[row]:
                above = self.parent_all[row]
                self.module[row] = self.module[above] if above >= 0 else -1
                if numbers[row] >= 0:
                    again[where, numbers[row]] = self.module[row]
            elif _ACCUMULATE in name:  # the engine runs it right after the node that made the gradient
                self.module[row] = last.get(where, -1)
            else:
                key = (origins[row], numbers[row])
                maker = self.maker.get(key, -1)
                self.module[row] = last[where] = self.module[maker] if maker >= 0 else again.get(key, -1)

    def loss(self, sequence: np.ndarray, forward_thread: np.ndarray) -> None:
        """Operators outside the model that made a node which was run are forward, e.g. the loss."""
        numbers, origins = sequence.tolist(), forward_thread.tolist()
        for row in np.flatnonzero(self.node).tolist():
            made = self.maker.get((origins[row], numbers[row]), -1)
            while made >= 0 and self.phase[made] == OTHER:
                self.phase[made] = FORWARD
                made = self.parent_all[made]
        for row, above in enumerate(self.parent_all):
            if self.phase[row] == OTHER and above >= 0:
                self.phase[row] = self.phase[above]

    def result(self) -> Nesting:
        count = len(self.names)
        mark = np.array(self.mark, bool)
        own_row = np.array(self.own, np.int64)
        own = own_row == np.arange(count)
        within = (own_row >= 0) & ~own
        inside = np.zeros(count, np.int64)
        for row in np.flatnonzero(own):
            above, spent = self.parent_all[row], self.ends[row] - self.starts[row]
            while above >= 0:
                inside[above] += spent
                above = self.parent_all[above]
        call = np.array([n.startswith(MODULE_MARK) for n in self.names], bool) & ~within
        return Nesting(
            tuple(self.table),
            np.array(self.module, np.int64),
            np.array(self.phase, np.int64),
            np.array(self.parent, np.int64),
            np.array(self.parent_all, np.int64),
            np.array(self.depth, np.int64),
            ~mark & ~within,
            call,
            own,
            within,
            inside,
        )
