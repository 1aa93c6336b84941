"""A Bokeh layout in a cell, alive: what Python changes is drawn at once, what a person changes calls Python.

The document travels over ipywidgets by way of anywidget, and BokehJS over the same road from the kernel: no CDN, no
`output_notebook()`, the version of this kernel by construction. For what is looked at and kept, a run or a report displays
itself without a kernel; this is for what moves while it is watched.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import anywidget
import bokeh
import traitlets
from bokeh.core.json_encoder import serialize_json
from bokeh.core.serialization import Serialized
from bokeh.document import Document
from bokeh.protocol.messages.patch_doc import patch_doc

from bnviz.views import style

_SCRIPTS = Path(bokeh.__file__).parent / "server" / "static" / "js"
_PARTS = ("bokeh", "bokeh-gl", "bokeh-widgets", "bokeh-tables")
_STATIC = Path(__file__).parent / "static"


@cache
def library() -> bytes:
    """BokehJS with WebGL, widgets and tables: gzip, 0.6 MB."""
    return gzip.compress(b"\n;".join((_SCRIPTS / f"{part}.min.js").read_bytes() for part in _PARTS), 9, mtime=0)


def _tokens() -> str:
    """The colours of both themes for what is inside a view, and nothing else of the notebook's page."""
    dark = ":root[data-bnviz-theme=dark]"
    return style.page_css().replace(f"{dark}{{", f"{dark} .bnviz-view{{").replace(":root{", ".bnviz-view{")


class _Library(anywidget.AnyWidget):  # type: ignore[misc]
    """The hidden widget that brings BokehJS to every page that shows this kernel, ahead of any view."""

    _esm = _STATIC / "view.js"
    _bokeh = traitlets.Unicode(bokeh.__version__).tag(sync=True)
    _library = traitlets.Bytes().tag(sync=True)
    _page = traitlets.Unicode().tag(sync=True)  # the script that gives drawings their theme and one selection


@cache
def _shared() -> _Library:
    return _Library(_library=library(), _page=style.page_script())


class View(anywidget.AnyWidget):  # type: ignore[misc]
    """A Bokeh layout as a widget of this cell, mirrored between kernel and page.

    Shown several times it is one document: a change in one is a change in all. It comes back after a reload of the page,
    as it is now. Without its kernel it shows nothing (a saved notebook holds its name only); display a report, or
    `report.view(name)` as HTML, for what should last.

    Parameters
    ----------
    layout : bokeh.models.LayoutDOM
        A figure, a layout, what a view of bnviz returns.

    Examples
    --------
    >>> from bokeh.plotting import figure
    >>> plot = figure(width=300, height=200)
    >>> view = View(plot)  # in a notebook: the last line of a cell, or display(view)
    >>> plot.title.text = "drawn in the page at once"
    >>> view.close()

    Notes
    -----
    A page's answers (a slider moved) wait while a cell of this kernel runs, as with every widget. Each change of the document
    is one message; in a loop change what is drawn a few times a second, not at every turn.
    """

    _esm = _STATIC / "view.js"
    _css = _tokens()
    _bokeh = traitlets.Unicode(bokeh.__version__).tag(sync=True)
    _document = traitlets.Dict().tag(sync=True, to_json=lambda _value, widget: widget._snapshot())

    def __init__(self, layout: Any) -> None:
        _shared()
        self.root = layout
        self._mirrored = layout.document or Document()
        if layout.document is None:
            self._mirrored.add_root(layout)
        self._sent = 0
        super().__init__()
        self._mirrored.on_change_dispatch_to(self)
        self.on_msg(self._received)

    def close(self) -> None:
        """Stop mirroring and take the widget out of the page."""
        self._mirrored.remove_on_change(self)
        super().close()

    def _snapshot(self) -> dict[str, Any]:
        """The document as it is when a page asks, with the number of the last change it holds."""
        made = self._mirrored.to_json()
        buffers = list(made.buffers or [])
        return {
            "json": serialize_json(made.content),
            "ids": [buffer.id for buffer in buffers],
            "buffers": [buffer.to_bytes() for buffer in buffers],
            "sent": self._sent,
        }

    def _document_patched(self, event: Any) -> None:
        """Bokeh calls this at each change; `setter` names the page that made it."""
        patch = patch_doc.create([event])
        self._sent += 1
        content = {
            "kind": "patch",
            "json": patch.content_json,
            "ids": [buffer.id for buffer in patch.buffers],
            "sent": self._sent,
            "from": event.setter if isinstance(event.setter, str) else None,
        }
        self.send(content, [buffer.to_bytes() for buffer in patch.buffers])

    def _received(self, _: Any, content: dict[str, Any], __: list[Any]) -> None:
        if content["kind"] == "library":  # a page that the hidden widget does not reach: Colab's outputs are frames
            self.send({"kind": "library", "page": style.page_script()}, [library()])
        elif content["kind"] == "patch":
            patch = Serialized(content=json.loads(content["json"]), buffers=[])
            self._mirrored.apply_json_patch(patch, setter=content["from"])
        elif (
            content["kind"] == "snapshot"
        ):  # a page has gathered many patches: start them over from the document as it is
            self.send_state("_document")
