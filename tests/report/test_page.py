"""The saved page: whole without a script, closed to the network, and nothing from a model runs in it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from bnviz import figures
from bnviz.page import page, summary
from bnviz.report import Report, diagnose
from bnviz.run import Run
from bnviz.views import style


class Reading(HTMLParser):
    """Elements with their attributes, the text a reader sees, and tags that were left open."""

    void = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return page(report)


@pytest.fixture(scope="module")
def read(text: str) -> Reading:
    return Reading(text)


def test_is_well_formed_with_ids_that_are_there_once(read: Reading) -> None:
    assert read.open == []
    ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in read.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert (attrs.get(name) or ids[0]) in ids
        href = attrs.get("href") or "#"
        assert href.startswith("#")
        assert href[1:] in ids or href == "#"


def test_findings_and_numbers_are_there_without_a_script(read: Reading) -> None:
    for words in (
        "Figures need JavaScript. The findings and tables below do not",
        "What holds toy <b>model</b> back",
        "One head holds <i>everything</i>",
        "layer 3, head 5",
        "model.layers.3.self_attn",
        "saves 410 KiB (15 %)",
        "computed from shapes",
        "saving not estimated",
        "What does each head do?",
        "Layer and head are known",
        "Show as table",
        "The probe x stopped at step 3.",
        "broken_toy did not finish: ZeroDivisionError: no <mass> here",
        'Not captured: routing.expert. Add probes=["routing"] and run again',
        "One seed.",
        "budget 1.00 GiB",
    ):
        assert words in read.text


def test_figures_say_what_they_are(read: Reading) -> None:
    figures = [attrs for tag, attrs in read.elements if tag == "figure"]
    assert len(figures) == 3
    assert all(
        attrs["role"] == "figure" and attrs["aria-labelledby"] and attrs["aria-describedby"] for attrs in figures
    )


def test_names_from_a_model_stay_text(text: str) -> None:
    for harmful in ("<b>model</b>", "<i>everything</i>", "<mass>"):
        assert harmful not in text


def test_policy_allows_two_scripts_and_no_network(text: str) -> None:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy.group(1).split(";"))
    assert rules["default-src"] == "'none'"
    assert "unsafe-inline" not in rules["script-src"]
    assert "unsafe-eval" not in rules["script-src"]
    run = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(run) == 1
    for script in (run[0], stored(text)["bokeh"]):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in rules["script-src"]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    assert not re.search(r"\son[a-z]+=", re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL))


def stored(text: str) -> dict[str, str]:
    found = re.findall(r'<script type="application/octet-stream" id="([^"]+)">([^<]+)</script>', text)
    return {at: gzip.decompress(base64.b64decode(packed)).decode() for at, packed in found}


def test_documents_are_light_and_hold_no_colour_in_their_data(text: str) -> None:
    documents = {at: body for at, body in stored(text).items() if at.startswith("doc-")}
    assert list(documents) == ["doc-head_share-0", "doc-layer_size-0", "doc-dense_map-0"]
    for body in documents.values():
        assert len(body) < 300_000
        json.loads(body)
        for data in re.findall(r'"name":"data","value":\{.*?\}\}', body):
            assert not re.search(r"#[0-9a-fA-F]{6}", data)


def test_two_small_figures_in_a_row_share_it(read: Reading) -> None:
    kinds = {
        attrs["id"]: attrs.get("class") for tag, attrs in read.elements if tag == "section" and "data-record" in attrs
    }
    assert kinds == {"head_share": "half", "layer_size": "half", "dense_map": "full"}


def test_places_of_findings_are_data(read: Reading) -> None:
    places = [json.loads(attrs["data-where"] or "") for tag, attrs in read.elements if "data-where" in attrs]
    assert places == [
        {"layer": 0, "head": 0},
        {"layer": 3, "head": 5, "path": "model.layers.3.self_attn"},
        {"layer": [0, 1]},
    ]


def test_a_view_that_fails_costs_its_own_figure(run: Run, toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def torn(result: Any, *, compact: bool = False) -> Any:
        raise KeyError("<share>")

    torn.spec = style_spec("torn")  # type: ignore[attr-defined]
    whole = figures.views_of("layer_size")
    monkeypatch.setattr(figures, "views_of", lambda name: (torn,) if name == "head_share" else whole)
    read = Reading(page(diagnose(run, "head_share", "layer_size")))
    assert "torn could not be drawn: KeyError: '<share>'. The numbers are in the table below" in read.text
    assert sum("data-doc" in attrs for _, attrs in read.elements) == 1


def style_spec(name: str) -> Any:
    from bnviz.schema import ViewSpec

    return ViewSpec(name, "Torn.", "head_share", 1)


def test_no_findings_and_no_figures(run: Run, toys: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "views_of", lambda name: ())
    report = diagnose(run, "dense_map")
    text = page(report)
    assert "Nothing found above the limits. 1 diagnostic ran on 2 records" in Reading(text).text
    assert stored(text) == {}
    assert len(text) < 100_000
    assert "Nothing found above the limits" in summary(report)


def test_past_seven_findings_the_rest_is_folded(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [finding for finding in report.findings for _ in range(4)]
    monkeypatch.setattr(Report, "findings", property(lambda self: many))
    assert "Show 5 more" in page(report)
    assert "5 more in <code>report.findings</code>" in summary(report)


def test_summary_is_plain_and_escaped(report: Report) -> None:
    text = summary(report)
    assert Reading(text).open == []
    assert "<script" not in text
    assert "One head holds &lt;i&gt;everything&lt;/i&gt;" in text


def test_page_is_the_same_twice(report: Report) -> None:
    def without_ids(text: str) -> str:
        return re.sub(r"p\d+|[0-9a-f]{8}-[0-9a-f-]{27}", "", "".join(stored(text).values()))

    assert len(without_ids(page(report))) == len(without_ids(page(report)))


def test_a_large_model_stays_small(of_size: Callable[[int, int], Report]) -> None:
    assert len(page(of_size(80, 128))) < 2_000_000


def test_tokens_of_the_page_are_those_of_the_figures(text: str) -> None:
    assert style.css() in text
