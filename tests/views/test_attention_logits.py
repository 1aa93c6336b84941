"""Lines over steps and the map of heads: what is drawn, in how many glyphs, and from how many points."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.models import Div, GlyphRenderer, Image, MultiLine, Rect

from bnviz.diagnostics.attention_logits import attention_logits
from bnviz.views.attention_logits import attention_logits as draw
from tests.diagnostics.test_attention_logits import record


def glyphs(drawn: Any, kind: type) -> list[Any]:
    return [r for r in drawn.select({"type": GlyphRenderer}) if type(r.glyph) is kind and "bnviz-outline" not in r.tags]


def result_of(steps: int, layers: int, heads: int) -> xr.Dataset:
    rng = np.random.default_rng(steps)
    return attention_logits(record(5 + rng.random((steps, layers, heads)) + np.arange(layers)[:, None], lse_total=30.0))


@pytest.mark.parametrize(("steps", "layers", "heads"), [(1, 3, 4), (2, 1, 1), (20, 3, 4), (700, 80, 64)])
def test_four_lines_at_most_and_one_map(steps: int, layers: int, heads: int) -> None:
    drawn = draw(result_of(steps, layers, heads))
    assert len(glyphs(drawn, Image if layers * heads > 4096 else Rect)) == 1
    lines = glyphs(drawn, MultiLine)
    assert len(lines) == (0 if steps == 1 else min(layers, 3) + (layers > 3))
    assert sum(len(xs) for line in lines for xs in line.data_source.data["xs"]) <= 12_288


def test_the_layers_that_end_highest_are_named() -> None:
    drawn = draw(result_of(12, 6, 2))
    plot = drawn.children[0].children[0]
    lines = [r for r in plot.renderers if type(r.glyph) is MultiLine and "bnviz-outline" not in r.tags]
    names = [one.data_source.data["layer"].tolist() for one in lines]
    assert names == [[0, 1, 2], [3], [4], [5]]  # the highest lies on top
    text = " ".join(one.text for one in drawn.select({"type": Div}))
    assert "layer 5, ends at" in text and "3 further layers" in text


def test_of_many_steps_the_largest_is_drawn() -> None:
    values = np.full((3000, 1, 2), 4.0)
    values[1234, 0, 1] = 50.0
    (line,) = glyphs(draw(attention_logits(record(values))), MultiLine)
    assert len(line.data_source.data["xs"][0]) <= 512
    assert max(line.data_source.data["ys"][0]) == 50
    assert line.data_source.data["ends"] == ["4.00 to 4.00; most 50.0, of head 1 in step 1234"]


def test_empty_states_are_worded() -> None:
    assert "attention_logits" in draw(xr.Dataset()).text
    assert "No attention logit is known" in draw(attention_logits(record([[[1.0]]], queries=0.0))).text
