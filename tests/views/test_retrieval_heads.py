"""The maps of echo and induction: what is marked, what the hover holds, and how many glyphs it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.models import GlyphRenderer, Image, Rect, Scatter

from bnviz.diagnostics.retrieval_heads import retrieval_heads
from bnviz.views.retrieval_heads import retrieval_heads as draw
from tests.diagnostics.test_retrieval_heads import record


def glyphs(drawn: Any, kind: type) -> list[Any]:
    return [r for r in drawn.select({"type": GlyphRenderer}) if type(r.glyph) is kind and "bnviz-outline" not in r.tags]


def result_of(layers: int, heads: int, prompts: int = 2) -> xr.Dataset:
    rng = np.random.default_rng(layers)
    induction = 0.02 * rng.random((prompts, layers, heads))
    induction[:, -1, -1] = 0.8
    return retrieval_heads(record(induction / 2, induction, kv_heads=heads // 2 or 1))


def test_a_dot_marks_the_heads_that_a_share_names() -> None:
    drawn = draw(result_of(3, 4))
    rects = glyphs(drawn, Rect)
    assert sorted(r.glyph.fill_color.field for r in rects) == ["echo", "induction"]
    assert rects[0].data_source is rects[1].data_source
    columns = rects[0].data_source.data
    assert {"layer", "head", "path", "role"} <= set(columns) and len(columns["layer"]) == 12
    assert columns["role"][-1] == "echo and induction" and set(columns["role"][:-1]) == {"none"}
    dots = glyphs(drawn, Scatter)
    assert [[list(map(int, dot.data_source.data[axis])) for axis in ("x", "y")] for dot in dots] == [[[2], [3]]] * 2


@pytest.mark.parametrize(("layers", "heads", "kind"), [(1, 2, Rect), (80, 8, Rect), (80, 64, Image)])
def test_any_size_takes_two_glyphs(layers: int, heads: int, kind: type) -> None:
    assert len(glyphs(draw(result_of(layers, heads)), kind)) == 2


def test_without_retrieval_heads_nothing_is_marked() -> None:
    none = retrieval_heads(record(np.zeros((1, 2, 4)), np.zeros((1, 2, 4))))
    assert not glyphs(draw(none), Scatter) and len(glyphs(draw(none), Rect)) == 2


def test_empty_states_are_worded() -> None:
    nan = np.full((1, 2, 4), np.nan)
    assert "not known" in draw(retrieval_heads(record(nan, nan))).text
    assert "retrieval_heads" in draw(xr.Dataset()).text
