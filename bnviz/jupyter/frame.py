"""A self-contained page as the output of a cell."""

from __future__ import annotations

import html
from functools import cache
from pathlib import Path

_SCRIPT = Path(__file__).parent / "static" / "frame.js"


@cache
def _script() -> str:
    return f"<script>{_SCRIPT.read_text('utf-8')}</script>"


def framed(page: str, *, title: str, still: str) -> str:
    """HTML that shows `page` in a frame, and `still` where frames or scripts are taken away.

    The whole page is in the output: it opens again in a saved notebook, in one converted to HTML, without a kernel and without
    a network. Readers that strip frames (an untrusted notebook, a repository's preview) find `still` in its place.

    Parameters
    ----------
    page : str
        A complete HTML document without references to anything outside it.
    title : str
        What a screen reader says the frame is.
    still : str
        HTML without script or style.

    Raises
    ------
    ValueError
        `page` has no `<head>`.
    """
    head, tag, rest = page.partition("<head>")
    if not tag:
        raise ValueError("The page has no <head>, so it cannot be told that it is in a notebook; give a complete document.")
    document = html.escape(f"{head}{tag}{_script()}{rest}", quote=True)
    style = "width:100%;height:480px;border:0;display:block;resize:vertical;color-scheme:normal"
    return (
        f'<iframe class="bnviz-frame" title="{html.escape(title, quote=True)}" style="{style}" srcdoc="{document}"></iframe>'
        f'<div class="bnviz-still">{still}</div>'
    )
