"""The page of a report as the output of a cell, without a browser: what is in it, what it may run, what hostile names become."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

from bnviz.jupyter import display
from bnviz.jupyter.frame import framed
from bnviz.report import diagnose
from bnviz.run import Run

PAGE = (
    '<!doctype html><html><head><meta http-equiv="Content-Security-Policy" '
    "content=\"default-src 'none'; script-src 'sha256-x'\">"
    '</head><body class="a"><p>&lt;one&gt; & "two"</p></body></html>'
)


class Seen(HTMLParser):
    """Tags and attributes as a browser finds them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def inside(output: str) -> str:
    """The document in the frame, as the browser reads it from the attribute."""
    (frame,) = [attrs for tag, attrs in Seen(output).tags if tag == "iframe"]
    document = frame["srcdoc"]
    assert document is not None
    return document


def hostile_run() -> Run:
    name = '"><script>alert(1)</script>'
    record = xr.Dataset({"mass": (("layer", "key"), np.ones((2, 3)), {"units": "query"})}, attrs={"model": name})
    return Run({"attention": record}, {"model": name, "class": name, "notes": [f"{name} stopped"], "device": name})


def test_the_document_survives_the_attribute() -> None:
    output = framed(PAGE, title="t", still="<p>still</p>")
    document = inside(output)
    script = re.search(r"<script>(.*?)</script>", document, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}' 'sha256-x'" in document
    without = document.replace(f"'sha256-{digest}' ", "").replace(script[0], "")
    assert re.sub(r"<style>.*?</style>", "", without) == PAGE
    assert output.endswith('<div class="bnviz-still"><p>still</p></div>')


def test_title_cannot_leave_its_attribute() -> None:
    (frame, *_rest) = Seen(framed(PAGE, title='"><b onload="x">', still="")).tags
    assert frame[1]["title"] == '"><b onload="x">'
    assert [tag for tag, _ in _rest] == ["div"]


def test_half_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match="no <body>, so it cannot be told about the notebook"):
        framed("<p>text</p>", title="t", still="")


def test_report_is_a_frame_and_its_findings() -> None:
    report = diagnose(hostile_run())
    output = display.report_html(report)
    assert report._repr_html_() == output
    assert [tag for tag, _ in Seen(output).tags if tag in ("iframe", "script")] == ["iframe"]
    assert "What holds" in inside(output)
    assert html.escape(report.model) in output.partition("bnviz-still")[2]


def test_run_names_what_it_holds() -> None:
    record = xr.Dataset({f"v{i}": (("layer", "key"), np.ones((2, 30_000))) for i in range(10)})
    facts = {"model": "net", "class": "Net", "parameters": 1234, "watched": 1, "calls": 2, "seconds": 0.034}
    text = display.run_html(Run({"some": record}, {**facts, "notes": ["a note"]}))
    assert "Net · 1,234 parameters · 1 of 2 forwards watched · 34.0 ms · 4.58 MiB of records" in text
    assert "layer 2 × key 30.0 k" in text
    assert "v7 and 2 more" in text
    assert "<li>a note</li>" in text
    assert "bnviz.diagnose(run)" in text


def test_run_writes_names_as_text() -> None:
    text = display.run_html(hostile_run())
    assert "script" not in {tag for tag, _ in Seen(text).tags}
    assert text.count("&lt;script&gt;") == 3  # the model, its device, the note


def test_empty_run() -> None:
    assert "No records." in display.run_html(Run({}, {"model": "net"}))
