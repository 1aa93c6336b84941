"""`%bnviz compare` in a real IPython shell, on runs of a real small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("IPython")

from IPython.core.error import UsageError

import bnviz
from bnviz.jupyter import complete
from bnviz.jupyter.desk import Desk

from .desks import names, ran


@pytest.fixture
def two(desk: Desk) -> Desk:
    """Runs of one model before and after its weights were changed."""
    assert ran(desk, "%%bnviz net -q -p activations -o first\nnet(x)").success
    assert ran(desk, "for p in net.parameters():\n    p.data.mul_(1.5)").success
    assert ran(desk, "%%bnviz net -q -p activations -o second\nnet(x)").success
    return desk


def slip(desk: Desk, source: str) -> str:
    result = ran(desk, source)
    assert isinstance(result.error_in_exec, UsageError)
    text = str(result.error_in_exec)
    assert "\n" not in text
    return text


def test_it_displays_what_changed(two: Desk) -> None:
    report = ran(two, "%bnviz compare first second").result
    assert isinstance(report, bnviz.Report)
    model = names(two)["first"].model
    assert report.overview().title == f"What changed from {model} (first) to {model} (second)"
    assert float(report["comparison"]["distance"].max()) > 0.1
    same: Any = ran(two, "%bnviz compare first first").result
    assert same.findings == []


def test_no_run_is_diagnosed_twice(two: Desk) -> None:
    asked: Any = ran(two, "%bnviz report -r first").result
    report: Any = ran(two, "%bnviz compare first second").result
    again: Any = ran(two, "%bnviz compare second first").result
    assert report.before.outcomes["layer_redundancy"] is asked.outcomes["layer_redundancy"]
    assert report.after.outcomes["layer_redundancy"] is again.before.outcomes["layer_redundancy"]


def test_it_is_written_over_what_it_wrote_and_over_nothing_else(two: Desk, tmp_path: Path) -> None:
    target = tmp_path / "changed.html"
    for _ in range(2):
        assert ran(two, f"%bnviz compare first second {target}").success
        assert "What changed from" in target.read_text()
    target.write_text("as it was")
    assert "was not written by bnviz and is left alone" in slip(two, f"%bnviz compare first second {target}")
    assert target.read_text() == "as it was"


def test_slips_are_one_line_and_say_which_runs_there_are(two: Desk) -> None:
    assert (
        slip(two, "%bnviz compare first secnd") == "Unknown run 'secnd'; did you mean 'second'? Valid: first, second."
    )
    assert slip(two, "%bnviz compare first") == "The following arguments are required: RUN. See: %bnviz help"
    assert slip(two, "%bnviz compare net first").startswith("Unknown run 'net'. Valid: first, second")
    assert "required: RUN" in slip(two, "%bnviz compare")


def test_runs_are_completed(two: Desk) -> None:
    for text, expected in (
        ("%bnviz c", ["compare"]),
        ("%bnviz compare ", ["first", "second"]),
        ("%bnviz compare s", ["second"]),
        ("%bnviz compare first ", ["first", "second"]),
        ("%bnviz compare first second ", []),
        ("%bnviz report -r f", ["first"]),
    ):
        assert complete.choices(text, names(two)) == expected
