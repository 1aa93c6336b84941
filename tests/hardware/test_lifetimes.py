"""What memory is for, on profiles written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bnviz.hardware.lifetimes import CATEGORIES, blocks
from bnviz.profile import PHASES, Holding, Profile

OPS = [  # name, phase, start, duration, parent, module
    ("forward", "forward", 10, 10, -1, 0),
    ("inner", "forward", 12, 4, 0, 0),
    ("forward", "forward", 25, 5, -1, 1),
    ("backward", "backward", 40, 20, -1, 1),
    ("backward", "backward", 60, 20, -1, 0),
    ("step", "optimizer", 90, 10, -1, -1),
    ("load", "other", 110, 5, -1, -1),
]


def profile(memory: list[tuple[int, int, int, int]], ops: list[Any] | None = None, **more: Any) -> Profile:
    """`memory` has (time, bytes, address, operator); one forward from 5 to 35."""
    rows = OPS if ops is None else ops
    times, sizes, places, events = (np.array(c, np.int64) for c in zip(*memory, strict=True))
    count = len(rows)
    calls = more.pop("calls", [(5, 30)])
    return Profile(
        names=tuple(r[0] for r in rows),
        paths=("up", "down"),
        signatures=(),
        name=np.arange(count),
        thread=np.ones(count, np.int32),
        start=np.array([r[2] for r in rows]),
        duration=np.array([r[3] for r in rows]),
        sequence=np.full(count, -1),
        signature=np.full(count, -1),
        module=np.array([r[5] for r in rows]),
        phase=np.array([PHASES.index(r[1]) for r in rows]),
        parent=np.array([r[4] for r in rows]),
        kernel_time=np.zeros(count, np.int64),
        call_module=np.zeros(len(calls), np.int32),
        call_start=np.array([c[0] for c in calls]),
        call_end=np.array([a + b for a, b in calls]),
        call_duration=np.array([c[1] for c in calls]),
        call_depth=np.zeros(len(calls), np.int16),
        call_backward=np.zeros(len(calls), bool),
        memory_time=times,
        memory_bytes=sizes,
        memory_address=places,
        memory_event=events,
        memory_device=more.pop("device", np.full(len(times), -1)),
        **more,
    )


def categories(found: Any) -> list[str]:
    return [CATEGORIES[c] for c in found.category]


@pytest.mark.parametrize(
    ("born", "event", "died", "expected"),
    [
        (12, 1, 30, "temporary"),  # gone before the forward ends
        (12, 1, 65, "activation"),  # freed by the backward pass
        (12, 1, 95, "output"),  # survives it: somebody holds it
        (12, 1, None, "output"),
        (45, 3, 55, "temporary"),
        (45, 3, 75, "temporary"),  # from one node to the next
        (45, 3, 95, "gradient"),
        (45, 3, None, "gradient"),
        (92, 5, 95, "temporary"),
        (92, 5, None, "optimizer"),
        (112, 6, None, "other"),
    ],
)
def test_training(born: int, event: int, died: int | None, expected: str) -> None:
    memory = [(born, 100, 7, event)] + ([(died, -100, 7, -1)] if died else [])
    found = blocks(profile(memory))
    assert categories(found) == [expected]
    assert found.module.tolist() == [OPS[event][5]]


@pytest.mark.parametrize(
    ("died", "expected"), [(15, "temporary"), (22, "activation"), (34, "activation"), (36, "output"), (None, "output")]
)
def test_inference(died: int | None, expected: str) -> None:
    memory = [(13, 100, 7, 1)] + ([(died, -100, 7, -1)] if died else [])
    assert categories(blocks(profile(memory, OPS[:3]))) == [expected]


def test_a_backward_pass_after_the_next_forward_is_not_of_this_one() -> None:
    found = blocks(profile([(13, 100, 7, 1), (37, -100, 7, -1)], calls=[(5, 30), (36, 2)]))
    assert categories(found) == ["output"]  # inference first, e.g. a validation batch


def test_addresses_are_used_again() -> None:
    memory = [(12, 100, 7, 1), (14, -100, 7, 1), (26, 40, 7, 2), (65, -40, 7, 4)]
    found = blocks(profile(memory))
    assert found.nbytes.tolist() == [100, 40]
    assert categories(found) == ["temporary", "activation"]
    assert found.died.tolist() == [14, 65]


def test_what_was_there_before_counts_from_the_start() -> None:
    memory = [(91, -8, 3, 5), (70, -64, 9, 4)]
    before = (Holding("parameter", "up", 16, 1), Holding("gradient", "up", 8, 3))
    found = blocks(profile(memory, before=before))
    assert categories(found) == ["parameter", "gradient", "other"]
    assert found.alive(0).tolist() == [True, True, True]
    assert found.alive(80).tolist() == [True, True, False]
    assert found.alive(95).tolist() == [True, False, False]


def test_gradients_that_went_unseen() -> None:
    """On a CPU nothing says when what was there before is freed."""
    before = (Holding("gradient", "up", 8, 3), Holding("gradient", "down", 8, 4), Holding("parameter", "up", 8, 5))
    after = (Holding("gradient", "down", 8, 4),)
    memory = [(12, 100, 7, 1)]
    assert blocks(profile(memory, before=before, after=after)).died[:2].tolist() == [5, np.iinfo(np.int64).max]
    assert blocks(profile(memory, before=before, after=after, zeroed=9)).died[0] == 9
    again = blocks(profile([(12, 100, 3, 1)], before=before[:1], after=(Holding("gradient", "up", 100, 3),)))
    assert again.died[0] == 12  # its place is used again
    late = blocks(profile([(45, 100, 3, 3)], before=before[:1], after=(Holding("gradient", "up", 100, 3),), zeroed=9))
    assert late.died[0] == 9  # though its place is used again only in the backward pass
    freed = blocks(profile([(7, -8, 3, -1)], before=before[:1], zeroed=9))
    assert freed.died[0] == 7


def test_a_loss_is_computed_after_the_forward_and_keeps_what_the_backward_pass_needs() -> None:
    ops = [*OPS[:3], ("loss", "forward", 36, 3, -1, -1), *OPS[3:]]
    memory = [(36, 100, 7, 3), (38, -100, 7, -1), (37, 100, 8, 3), (65, -100, 8, -1)]
    found = blocks(profile(memory, ops))
    assert categories(found) == ["temporary", "activation"]


def test_what_is_held_after_has_its_owner() -> None:
    memory = [(45, 8, 3, 3), (92, 16, 4, 5)]
    after = (Holding("gradient", "down", 8, 3), Holding("optimizer", "elsewhere", 16, 4))
    found = blocks(profile(memory, after=after))
    assert categories(found) == ["gradient", "optimizer"]
    assert [found.paths[m] for m in found.module] == ["down", "elsewhere"]


def test_the_accelerator_is_looked_at_when_there_is_one() -> None:
    memory = [(12, 100, 7, 1), (13, 50, 8, 1)]
    both = profile(memory, device=np.array([-1, 0]))
    assert blocks(both).nbytes.tolist() == [50] and blocks(both).device == 0
    assert blocks(both, -1).nbytes.tolist() == [100]
