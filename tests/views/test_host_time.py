"""The drawing of host time: what it shows, what it leaves out and says so, and how much it weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from bokeh.embed import json_item
from bokeh.models import Div, Quad

from bnviz.diagnostics.host_time import host_time as measure
from bnviz.probes._stacks import Tree
from bnviz.probes.host import Host, columns
from bnviz.views._icicle import DEEPEST, RECTANGLES, boxes_of
from bnviz.views._source_lines import clip
from bnviz.views.host_time import SHOWN, host_time


def result(
    stacks: list[tuple[str, list[tuple[str, str, int]], int]], gil: float = 0.5, wall: float = 2.0
) -> xr.Dataset:
    tree = Tree()
    for thread, stack, samples in stacks:
        tree.add(thread, stack, samples, gil=False)
        tree.add(thread, stack, int(gil * samples), gil=True)
    values = columns(tree, 0.01, wall, 0)
    data = xr.Dataset()
    for variable in Host.spec.variables:  # type: ignore[attr-defined]
        data[variable.name] = (variable.dims, np.asarray(values[variable.name]))
        if variable.name in values["tables"]:
            data[variable.name].attrs["table"] = values["tables"][variable.name]
    return measure(data)


TOP = ("<module>", "run.py", 3)
SMALL = [
    ("MainThread", [TOP, ("Net.step", "net.py", 10)], 80),
    ("MainThread", [TOP], 20),
    ("b", [("load", "d.py", 1)], 10),
]
LARGE = [
    ("MainThread", [TOP, *[(f"f{n % 7}_{d}", f"torch/nn/m{n}.py", d) for d in range(1 + n % 40)]], 1 + n % 5)
    for n in range(900)
]


def sources(drawing: Any, column: str) -> list[Any]:
    return [s for s in drawing.references() if column in getattr(s, "column_names", ())]


def words(drawing: Any) -> str:
    return " ".join(d.text for d in drawing.references() if isinstance(d, Div))


def test_bars_hold_own_time_in_its_two_parts_and_time_with_callees() -> None:
    (source,) = sources(host_time(result(SMALL)), "held")
    data = source.data
    assert list(data["name"]) == ["Net.step", "<module>", "load"]
    np.testing.assert_allclose(data["own"], [0.8, 0.2, 0.1], rtol=1e-6)
    np.testing.assert_allclose(data["held"], [0.4, 0.1, 0.05], rtol=1e-6)
    np.testing.assert_allclose(data["whole"], [0.8, 1.0, 0.1], rtol=1e-6)
    titles = ["800 ms · Net.step  net.py:10", "200 ms of 1.0 s · <module>  run.py:3", "100 ms · load  d.py:1"]
    assert list(data["title"]) == titles
    assert data["threads"][2] == "b 100 ms"


def test_what_watches_has_no_bar_and_its_helper_no_place_in_the_tree() -> None:
    own = ("bnviz", "bnviz", 0)
    seen = result([*SMALL, ("MainThread", [TOP, own], 300), ("bnviz-reduce_0", [own], 200)], wall=8.0)
    drawing = host_time(seen)
    assert list(sources(drawing, "held")[0].data["name"]) == ["Net.step", "<module>", "load"]
    assert "bnviz itself took 5.00 s: it has no bar, and is in no share." in words(drawing)
    names = [n for s in sources(drawing, "bottom") for n in s.data["name"]]
    assert "MainThread" in names and "bnviz" in names and "bnviz-reduce_0" not in names


def test_a_record_of_watching_alone_is_drawn() -> None:
    drawing = host_time(result([("MainThread", [("bnviz", "bnviz", 0)], 90)]))
    assert not sources(drawing, "held")
    assert "bnviz itself took 900 ms" in words(drawing)


def test_a_line_that_is_not_known_is_not_written() -> None:
    drawing = host_time(result([("MainThread", [("f", "a/net.py", -1)], 60)]))
    assert list(sources(drawing, "held")[0].data["title"]) == ["600 ms · f  net.py"]


def test_a_callee_lies_under_its_caller_and_threads_side_by_side() -> None:
    boxes = [(b.depth, b.left, b.time) for b in boxes_of(result(SMALL))]
    expected = [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 0.8), (0, 1.0, 0.1), (1, 1.0, 0.1)]
    np.testing.assert_allclose(boxes, expected)


def test_rectangles_nest() -> None:
    boxes = list(boxes_of(result(LARGE[:120])))
    for box in boxes:
        over = [b for b in boxes if b.depth == box.depth - 1 and b.left <= box.left + 1e-9]
        assert box.depth == 0 or any(b.left + b.time >= box.left + box.time - 1e-9 for b in over)


def test_a_large_tree_is_cut_and_says_so() -> None:
    drawing = host_time(result(LARGE))
    boxes = sources(drawing, "bottom")
    assert sum(len(s.data["left"]) for s in boxes) == RECTANGLES
    assert max(float(s.data["middle"].max()) for s in boxes) < DEEPEST
    assert "chains of calls, the longest, down to 24 calls deep" in words(drawing)
    assert f"{len(LARGE) - SHOWN} more functions took" in words(drawing)
    assert len(str(json_item(drawing))) < 300_000


def test_a_narrow_place_has_no_tree() -> None:
    drawing = host_time(result(LARGE), compact=True)
    assert not [g for g in drawing.references() if isinstance(g, Quad)]
    assert len(sources(drawing, "held")[0].data["own"]) == 8


def test_too_few_samples_are_hollow() -> None:
    few = host_time(result([("MainThread", [TOP], 12)]))
    fills = {g.fill_color for g in few.references() if type(g).__name__ == "HBar" and g.right == "own"}
    assert fills == {None}


def test_nothing_seen_is_said_in_words() -> None:
    assert "No Python was seen running in 150 ms of sampling." in host_time(result([], wall=0.15)).text


def test_names_are_escaped_and_cut_in_their_middle() -> None:
    assert clip("abcdefgh", 5) == "ab…gh"
    drawing = host_time(result([("MainThread", [("<img src=x>", "<b>.py", 1)], 60)]))
    assert "<img" not in words(drawing)


def test_it_draws_what_was_saved(tmp_path: Path) -> None:
    result(SMALL).to_zarr(tmp_path / "r.zarr", consolidated=False)
    with xr.open_zarr(tmp_path / "r.zarr", consolidated=False) as again:
        (source,) = sources(host_time(again.load()), "held")
    np.testing.assert_allclose(source.data["own"], [0.8, 0.2, 0.1], rtol=1e-6)
