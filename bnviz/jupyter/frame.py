"""A self-contained page as the output of a cell."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from functools import cache
from pathlib import Path

_SCRIPT = Path(__file__).parent / "static" / "frame.js"
_BODY = re.compile(r"<body\b[^>]*>")
_POLICY = re.compile(r"(Content-Security-Policy[^>]*?script-src )")
_FRAME = "width:100%;height:480px;border:0;display:block;resize:vertical"
_INSIDE = "<style>#theme{display:none}</style>"  # the notebook has the switch


@cache
def _script() -> str:
    return _SCRIPT.read_text("utf-8")


def _allowed(page: str) -> str:
    """`page` with the script of this file among those its policy lets run."""
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    return _POLICY.sub(rf"\1'sha256-{digest}' ", page, count=1)


def embedded(page: str) -> str:
    """`page` as a document for a frame: in the theme of the page around it, with its selection.

    Raises
    ------
    ValueError
        `page` has no `<body>`.
    """
    page = _allowed(page)
    body = _BODY.search(page)
    if body is None:
        raise ValueError("The page has no <body>, so it cannot be told about the notebook; give a complete document.")
    return f"{page[: body.end()]}{_INSIDE}<script>{_script()}</script>{page[body.end() :]}"


def framed(page: str, *, title: str, still: str) -> str:
    """HTML that shows `page` in a frame, and `still` where frames or scripts are taken away.

    The whole page is in the output: it opens again in a saved notebook, in one converted to HTML, without a kernel and without
    a network. Readers that strip frames (an untrusted notebook, a repository's preview) find `still` in its place.

    Parameters
    ----------
    page : str
        A complete HTML document that asks for nothing outside it.
    title : str
        What a screen reader says the frame is.
    still : str
        HTML without script.

    Raises
    ------
    ValueError
        `page` has no `<body>`.
    """
    document = embedded(page).replace("&", "&amp;").replace('"', "&quot;")  # all an attribute needs
    return (
        f'<iframe class="bnviz-frame" title="{html.escape(title, quote=True)}" style="{_FRAME}" srcdoc="{document}"></iframe>'
        f'<div class="bnviz-still">{still}</div>'
    )
