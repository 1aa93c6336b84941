"""The script and the style sheet that stand beside drawings: in a saved report, and in a notebook's page."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from ._tokens import css, themes

_FOLDER = Path(__file__).parent / "static"


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


@cache
def page_script(*, report: bool = False) -> str:
    """The script that links drawings and dresses them for the theme, as one classic script; safe to run twice in a page.

    It puts a bus at `globalThis[Symbol.for("bnviz")]`. Whoever embeds a Bokeh document calls `bus.adopt(doc, element)`
    before drawing it, and the function it returns when the drawing goes away; after the kernel changed models of an adopted
    document, `bus.retheme()`.

    Parameters
    ----------
    report : bool
        Also what a saved report needs: figures that are drawn when they come near, findings, status line, address bar.
    """
    parts = [f"const THEMES = {themes()};", _read("theme.js"), _read("selection.js"), _read("start.js")]
    if report:
        parts += [_read("page.js"), "startReport(globalThis[BUS]);"]
    return "(() => {\n'use strict';\n" + "\n".join(parts) + "\n})();\n"


@cache
def page_css(*, report: bool = False) -> str:
    """The tokens of both themes as CSS variables; with `report` also the rules of a saved report."""
    return css() + (_read("page.css") if report else "")
