"""Where a label has room: pixels on paper, and that what is said to be free is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnviz.views._room import Room


def room() -> Room:
    return Room((1.0, 100.0), (1.0, 100.0), 200.0, 100.0)


def test_pixels_on_paper() -> None:
    assert room().pixel(10.0, 100.0) == pytest.approx((100.0, 100.0))
    assert room().value(150.0) == pytest.approx(10**1.5)


def test_the_first_free_side_is_taken() -> None:
    made = room()
    assert made.beside((100.0, 50.0), "abc", 10.0)["text_align"] == "left"
    assert made.beside((100.0, 50.0), "abc", 10.0)["text_align"] == "right"  # the right is taken by the first
    assert made.beside((100.0, 50.0), "abc", 10.0)["text_baseline"] == "bottom"
    assert made.beside((100.0, 50.0), "abc", 10.0)["text_baseline"] == "top"
    assert made.beside((100.0, 50.0), "abc", 10.0) == {}


def test_a_label_that_would_leave_the_frame_goes_to_the_other_side() -> None:
    assert room().beside((190.0, 50.0), "abcdef", 5.0)["text_align"] == "right"
    assert room().beside((100.0, 50.0), "a" * 60, 5.0) == {}


def test_a_mark_beside_it_moves_it() -> None:
    made = room()
    made.take((120.0, 50.0), 10.0)
    assert made.beside((100.0, 50.0), "abc", 10.0)["text_align"] == "right"


def test_the_name_of_a_line_does_not_lie_on_it() -> None:
    made = Room((1.0, 100.0), (1.0, 100.0), 300.0, 200.0)
    start, end = (0.0, 0.0), (300.0, 200.0)
    made.stroke(start, end)
    (across, up), options = made.along(start, end, "memory")
    assert up == pytest.approx(across * 200 / 300)
    assert options["text_align"] in ("left", "right")
    wide = 6.6 * len("memory")
    if options["text_align"] == "right":  # above: its lower right corner is the nearest
        box = (across - wide, up + 5, across, up + 20)
        assert all(y > x * 200 / 300 for x, y in ((box[0], box[1]), (box[2], box[1])))
    else:
        box = (across, up - 20, across + wide, up - 5)
        assert all(y < x * 200 / 300 for x, y in ((box[0], box[3]), (box[2], box[3])))
    assert 0 <= box[0] < box[2] <= 300
    assert 0 <= box[1] < box[3] <= 200


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(0, 100)), max_size=30))
def test_names_never_meet_marks_or_one_another(points: list[tuple[float, float]]) -> None:
    made = room()
    for at in points:
        made.take(at, 3.0)
    boxes = []
    for at in points:
        how = made.beside(at, "mm", 4.0)
        if how:
            boxes.append(made._words[-1])
    for i, (left, bottom, right, top) in enumerate(boxes):
        assert 0 <= left < right <= 200 and 0 <= bottom < top <= 100
        assert not any(left < x + 3 and right > x - 3 and bottom < y + 3 and top > y - 3 for x, y in points)
        for x, y, r, t in boxes[:i]:
            assert not (left < r and right > x and bottom < t and top > y)
