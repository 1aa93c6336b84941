"""Numbers in the cells of a matrix: in ink on pale cells, in the surface's colour on dark ones."""

from __future__ import annotations

from typing import Any

from bokeh.models import ColumnDataSource

from . import style


def cell_numbers(plot: Any, source: ColumnDataSource) -> None:
    """Write the columns `light` and `dark` at `x`, `y`; in each row one of them is empty."""
    for text, ink in (("light", "ink"), ("dark", "surface")):
        plot.text(
            "x",
            "y",
            text,
            source=source,
            text_align="center",
            text_baseline="middle",
            text_font={"value": style.FONT},
            text_font_size=style.SIZE["tick"],
            text_color=style.LIGHT[ink],
        )
