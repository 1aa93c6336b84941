"""Several reports in one page: one list of findings, a chapter each, and places that do not mix."""

from __future__ import annotations

import json

from bnviz.page import page
from bnviz.report import Report

from .test_page import Reading


def test_ids_and_links_hold_together(two: tuple[Report, Report]) -> None:
    read = Reading(page(*two))
    assert read.open == []
    ids = [attrs["id"] for _, attrs in read.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    for _, attrs in read.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert (attrs.get(name) or ids[0]) in ids
        href = attrs.get("href") or "#"
        assert href[1:] in ids or href == "#"
    assert "What holds 2 models back" in read.text


def test_findings_of_both_stand_on_one_list_with_their_model(two: tuple[Report, Report]) -> None:
    read = Reading(page(*two))
    places = [json.loads(attrs["data-where"] or "{}") for _, attrs in read.elements if "data-where" in attrs]
    assert {at["run"] for at in places if at} == {"first", "second"}
    assert len(places) == sum(len(report.findings) for report in two)


def test_models_of_one_name_are_numbered(two: tuple[Report, Report]) -> None:
    read = Reading(page(two[0], two[0]))
    assert "first (1)" in read.text
    assert "first (2)" in read.text
