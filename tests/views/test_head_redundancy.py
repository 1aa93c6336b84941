"""The map of the most similar other head: which heads have a dot, and how many glyphs it takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.models import GlyphRenderer, Image, Rect, Scatter

from bnviz.diagnostics.head_redundancy import head_redundancy
from bnviz.views.head_redundancy import head_redundancy as draw
from tests.diagnostics.test_head_redundancy import record


def glyphs(drawn: Any, kind: type) -> list[Any]:
    return [r for r in drawn.select({"type": GlyphRenderer}) if type(r.glyph) is kind and "bnviz-outline" not in r.tags]


def test_the_spare_head_has_a_dot_and_the_first_has_none() -> None:
    same = np.array([[1.0, 0.1, 0.97], [0.1, 1.0, 0.1], [0.97, 0.1, 1.0]])
    drawn = draw(head_redundancy(record([[np.eye(3), same]])))
    (dots,) = glyphs(drawn, Scatter)
    assert [list(map(int, dots.data_source.data[axis])) for axis in ("x", "y")] == [[1], [2]]
    (cells,) = glyphs(drawn, Rect)
    np.testing.assert_allclose(cells.data_source.data["shown"], [0, 0, 0, 0.97, 0.1, 0.97], atol=1e-6)
    assert cells.data_source.data["size"].tolist() == [1, 1, 1, 2, 1, 2]


@pytest.mark.parametrize(("layers", "heads", "kind"), [(1, 2, Rect), (80, 8, Rect), (80, 64, Image)])
def test_any_size_takes_one_glyph(layers: int, heads: int, kind: type) -> None:
    drawn = draw(head_redundancy(record(np.broadcast_to(np.eye(heads), (1, layers, heads, heads)))))
    assert len(glyphs(drawn, kind)) == 1 and not glyphs(drawn, Scatter)


def test_too_many_to_mark_are_said() -> None:
    drawn = draw(head_redundancy(record(np.ones((1, 40, 16, 16)))))
    assert not glyphs(drawn, Scatter)
    assert any("600 heads do what another does" in str(getattr(one, "text", "")) for one in drawn.references())


def test_empty_states_are_worded() -> None:
    assert "head_outputs" in draw(xr.Dataset()).text
    assert "No two heads" in draw(head_redundancy(record([[[[1.0]]]]))).text
