"""From a run to a ranked report: what runs, what is refused, and how it is said."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from bnviz.errors import BnvizError, NotCaptured, StoreError, UnknownName
from bnviz.report import Report, diagnose
from bnviz.run import Run

pytestmark = pytest.mark.usefixtures("toys")


def test_runs_what_the_records_allow_in_order(report: Report) -> None:
    assert report.names == ("head_share", "layer_size", "dense_map")
    assert report.failures == {"broken_toy": "ZeroDivisionError: no <mass> here"}
    assert report.absent == {
        "expert_toy": 'Not captured: routing.expert. Add probes=["routing"] and run again',
        "label_toy": "Not captured: labels. Pass labels=[...] to diagnose, one for each captured sample",
    }


def test_the_numbers_are_the_diagnostic_s(report: Report) -> None:
    assert float(report["head_share"]["share"].sel(layer=3, head=5)) == 1.0
    assert float(report["head_share"]["share"].sel(layer=0, head=1)) == pytest.approx(1 / 23)
    assert "head_share" in report
    assert "broken_toy" not in report
    assert list(report) == list(report.names)


def test_findings_by_saving_then_severity(report: Report) -> None:
    assert [f.code for f in report.findings] == ["head_share/least", "head_share/most", "layer_size/several"]


def test_options_reach_the_diagnostic_and_its_judge(run: Run) -> None:
    report = diagnose(run, "head_share", options={"head_share": {"scale": 0.25, "least": 0.9}})
    assert float(report["head_share"]["share"].max()) == 0.25
    assert next(f for f in report.findings if f.code.endswith("most")).limit == 0.9


def test_unknown_names_are_refused(run: Run) -> None:
    with pytest.raises(UnknownName, match=r"Unknown diagnostic 'head_shar'; did you mean 'head_share'"):
        diagnose(run, "head_shar")
    with pytest.raises(UnknownName, match="Unknown diagnostic 'layer'"):
        diagnose(run, options={"layer": {}})
    with pytest.raises(UnknownName, match=r"option of diagnostic 'head_share': 'leest'; did you mean 'least'"):
        diagnose(run, options={"head_share": {"leest": 1}})


def test_a_named_diagnostic_without_its_record_says_what_to_add(run: Run) -> None:
    with pytest.raises(
        NotCaptured, match=r'expert_toy: Not captured: routing.expert. Add probes=\["routing"\] and run again'
    ):
        diagnose(run, "expert_toy")
    bare = Run({"attention": run["attention"], "activations": run["activations"].drop_vars("norm_out")}, {})
    with pytest.raises(NotCaptured, match=r'activations.norm_out. Capture again with probes=\["activations"\]\.'):
        diagnose(bare, "layer_size")


def test_an_empty_run_is_refused() -> None:
    with pytest.raises(NotCaptured, match="This run is empty"):
        diagnose(Run({}, {}))


def test_strict_raises_what_the_diagnostic_raised(run: Run) -> None:
    with pytest.raises(ZeroDivisionError, match="no <mass> here"):
        diagnose(run, strict=True)


@pytest.mark.parametrize(
    ("labels", "classes", "table"), [([0, 1, 2, 0, 1], 3, []), (np.array(["b", "a", "b", "a", "a"]), 2, ["a", "b"])]
)
def test_labels_become_a_record(run: Run, labels: Any, classes: int, table: list[str]) -> None:
    result = diagnose(run, "label_toy", labels=labels)["label_toy"]
    assert result.attrs == {"classes": classes, "table": table}


def test_labels_that_do_not_fit_are_refused(run: Run) -> None:
    with pytest.raises(
        BnvizError, match="labels has 3 entries, expected 5: one for each sample of the record 'activations'"
    ):
        diagnose(run, labels=[0, 1, 2])
    with pytest.raises(BnvizError, match=r"labels has shape \(1, 5\)"):
        diagnose(run, labels=[[0, 1, 2, 0, 1]])


def test_progress_is_told_before_each_and_at_the_end(run: Run) -> None:
    told: list[tuple[int, int, str]] = []
    diagnose(run, "head_share", "layer_size", progress=lambda *given: told.append(given))
    assert told == [(0, 2, "head_share"), (1, 2, "layer_size"), (2, 2, "")]


def test_what_is_not_in_the_report_says_why(report: Report, run: Run) -> None:
    with pytest.raises(BnvizError, match="broken_toy did not finish: ZeroDivisionError"):
        report["broken_toy"]
    with pytest.raises(NotCaptured, match="expert_toy: Not captured"):
        report.judgement("expert_toy")
    with pytest.raises(NotCaptured, match=r"layer_size is not in this report; run diagnose\(run, 'layer_size'\)"):
        diagnose(run, "head_share")["layer_size"]
    with pytest.raises(UnknownName, match="did you mean 'head_share'"):
        report["head_sharee"]


def test_repr_names_findings_and_what_is_missing(report: Report) -> None:
    text = repr(report)
    assert "3 diagnostics · 3 findings" in text
    assert "● low    Head 0 of layer 0 holds nothing · layer 0, head 0" in text
    assert "saves 410 KiB (15 %)" in text
    assert "broken_toy did not finish: ZeroDivisionError" in text
    assert "not captured for: expert_toy, label_toy" in text


def test_repr_without_findings(run: Run) -> None:
    assert "Nothing found above the limits. 1 diagnostic ran on 2 records" in repr(diagnose(run, "dense_map"))


def test_to_frame(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = report.to_frame()
    assert list(frame["code"]) == [f.code for f in report.findings]
    assert frame.loc[0, "saving_share"] == 0.15
    assert frame["place"].tolist()[2] == "layers 0, 1"
    assert list(diagnose(report.run, "dense_map").to_frame().columns) == list(frame.columns)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_frame()


def test_save_refuses_to_replace(report: Report, tmp_path: Path) -> None:
    path = report.save(tmp_path / "deep" / "x.html")
    assert path.read_text().startswith("<!doctype html>")
    with pytest.raises(StoreError, match=r"x.html exists; choose another path or pass overwrite=True"):
        report.save(path)
    assert report.save(path, overwrite=True) == path
    with pytest.raises(StoreError, match=r"name it 'x.html'"):
        report.save(tmp_path / "x.pdf")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="could not be written"):
        report.save(tmp_path / "file" / "y.html")


def test_view_has_title_and_caveats_around_it(report: Report) -> None:
    from bokeh.models import Div, Plot

    column = report.view("head_share")
    words = [div.text for div in column.select({"type": Div})]
    assert any("Layer and head are known" in text for text in words)
    assert any("○ One seed." in text for text in words)
    assert [plot.name for plot in column.select({"type": Plot})] == ["atlas"]
    with pytest.raises(UnknownName, match="Unknown view 'head_atla'"):
        report.view("head_atla")


def test_records_stay_as_they_were() -> None:
    from .conftest import make_run

    run = make_run()
    before = {kind: run[kind].copy(deep=True) for kind in run.kinds}
    diagnose(run, labels=[0, 1, 2, 3, 4])
    for kind, record in before.items():
        xr.testing.assert_identical(record, run[kind])
    assert run.kinds == ("activations", "attention")
