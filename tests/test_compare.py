"""What changed between two runs: real captures of tiny models, with answers worked by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

import bnviz
from bnviz.aligned import Quantity, Unshared, aligned
from bnviz.compare import Comparison
from bnviz.comparison import comparison, same
from bnviz.errors import BnvizError, NotCaptured, StoreError, UnknownName
from bnviz.matching import matched
from bnviz.run import Run
from bnviz.schema import DiagnosticSpec, Finding, Variable

X = torch.ones(2, 3, 4) * torch.tensor([1.0, 0.0, 0.0, 0.0])


class Adds(nn.Module):
    """x + size * x turned by a quarter: what it adds is at right angles to x, and `size` times as long."""

    def __init__(self, size: float) -> None:
        super().__init__()
        turn = torch.zeros(4, 4)
        turn[0, 1], turn[1, 0], turn[2, 3], turn[3, 2] = -1.0, 1.0, -1.0, 1.0
        self.mlp = nn.Linear(4, 4, bias=False)
        self.mlp.weight = nn.Parameter(size * turn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Net(nn.Module):
    def __init__(self, *sizes: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Adds(size) for size in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def captured(*sizes: float, calls: int = 1, name: str = "net") -> Run:
    net = Net(*sizes)
    with torch.no_grad(), bnviz.capture(net, probes=["activations"], name=name, strict=True) as recorder:
        for _ in range(calls):
            net(X)
    return recorder.run


def row(report: Any, variable: str, of: str = "block") -> xr.Dataset:
    """One quantity of a comparison."""
    result = report["comparison"]
    return result.isel(quantity=int(np.flatnonzero((result["variable"] == variable) & (result["of"] == of))[0]))


# ------------------------------------------------------------------------------------------------------------ two captures
def test_a_block_that_adds_more_is_found_at_its_layer() -> None:
    report = bnviz.compare(captured(0.5, 0.5), captured(0.5, 1.5))
    change = row(report, "relative_change_median")
    assert float(change["before"]) == pytest.approx(0.5)
    assert float(change["after"]) == pytest.approx(1.0)
    assert float(change["change"]) == pytest.approx(0.5)
    assert float(change["relative"]) == pytest.approx(1.0)
    assert float(change["distance"]) == pytest.approx(1.0 / 2.0)  # |1.5 - 0.5| over 0.5 + 1.5
    assert (int(change["places"]), int(change["moved"]), int(change["alone"])) == (2, 1, 0)
    assert str(change["place"].values) == "layer 1"
    assert (float(change["place_before"]), float(change["place_after"])) == pytest.approx((0.5, 1.5))
    assert change["before_by_layer"].values == pytest.approx([0.5, 0.5])
    assert change["after_by_layer"].values == pytest.approx([0.5, 1.5])
    assert json.loads(str(change["where"].values)) == {"layer": 1, "path": "layers.1"}
    influence = row(
        report, "block_influence"
    )  # the cosine with something at right angles added is 1 / sqrt(1 + size^2)
    assert float(influence["place_after"]) == pytest.approx(1 - 1 / np.sqrt(1 + 1.5**2), abs=1e-6)
    told = next(f for f in report.findings if f.sentence.startswith("Relative change median of"))
    assert told.sentence.endswith("(layer redundancy) goes from 0.500 to 1.00 (+100 %); most in layer 1: 0.500 to 1.50")
    assert told.where == {"layer": 1, "path": "layers.1"}
    assert (told.severity, told.value, told.limit) == ("note", pytest.approx(1.0), pytest.approx(0.5))


def test_nothing_differs_between_two_captures_of_one_model() -> None:
    report = bnviz.compare(captured(0.1, 0.2), captured(0.1, 0.2))
    assert report.findings == []
    assert report.judgement("comparison").title.startswith("Nothing differs: ")
    assert same(report["comparison"])
    assert float(np.nanmax(report["comparison"]["distance"])) == 0
    assert "Nothing differs. 1 diagnostic compared in " in repr(report)
    assert len(report.to_frame()) == 0


def test_a_small_change_is_no_finding_and_not_called_nothing() -> None:
    report = bnviz.compare(captured(0.5, 0.5), captured(0.5, 0.51))
    assert report.findings == []
    assert report.judgement("comparison").title == "Nothing moved by more than 10 %"
    assert not same(report["comparison"])
    assert bnviz.compare(captured(0.5, 0.5), captured(0.5, 0.51), moved=0.005).findings


def test_turned_round_before_is_after() -> None:
    one, other = captured(0.5, 0.5, 0.2), captured(0.5, 1.5, 0.1)
    forth, back = bnviz.compare(one, other)["comparison"], bnviz.compare(other, one)["comparison"]
    back = back.sel(quantity=forth["quantity"])
    for here, there in (("before", "after"), ("place_before", "place_after"), ("before_by_layer", "after_by_layer")):
        np.testing.assert_array_equal(forth[here], back[there])
        np.testing.assert_array_equal(forth[there], back[here])
    np.testing.assert_array_equal(forth["change"], -back["change"])
    for alike in ("distance", "places", "moved", "alone", "place"):
        np.testing.assert_array_equal(forth[alike], back[alike])


def test_layers_that_only_one_has_are_said_and_in_no_number() -> None:
    report = bnviz.compare(captured(0.5, 0.2), captured(0.5, 0.2, 9.0, 9.0))
    change = row(report, "relative_change_median")
    assert float(change["distance"]) == pytest.approx(0, abs=1e-6)
    assert int(change["places"]) == 2
    assert report["comparison"]["layer"].values.tolist() == [0, 1]
    assert "Only in net (2): layers 2, 3; compared is where both have values" in report.judgement("comparison").caveats
    backwards = bnviz.compare(captured(0.5, 0.2, 9.0, 9.0), captured(0.5, 0.2))
    assert (
        "Only in net (1): layers 2, 3; compared is where both have values" in backwards.judgement("comparison").caveats
    )


def test_other_numbers_of_calls_are_one_of_the_facts() -> None:
    report = bnviz.compare(captured(0.5, 0.2), captured(0.5, 0.2, calls=3))
    assert report.judgement("comparison").caveats == ("The two captures differ in calls (1, then 3)",)
    assert ("calls", "1 → 3") in report.overview().facts
    assert float(row(report, "relative_change_median")["distance"]) == 0
    assert float(row(report, "tokens")["after"]) == 3 * float(row(report, "tokens")["before"]) == 18


def test_what_was_new_moved_and_gone() -> None:
    """Least influence: below 0.1 in layer 0 at first, then in layer 1; the finding of layer 0 is gone, that of 1 is new."""
    report = bnviz.compare(captured(0.1, 0.9), captured(0.9, 0.1))
    codes = {f.code: f for f in report.findings if "block" in f.sentence and f.code != "comparison/quantity"}
    assert set(codes) == {"comparison/new", "comparison/gone"}
    assert codes["comparison/new"].sentence.startswith("New: Block 1 turns the residual stream least")
    assert codes["comparison/new"].where == {"layer": 1, "path": "layers.1"}
    assert codes["comparison/gone"].sentence.startswith("No longer: Block 0 turns")
    assert (codes["comparison/gone"].severity, codes["comparison/gone"].saving) == ("note", None)
    assert report.findings[-1].code == "comparison/gone"
    moved = bnviz.compare(captured(0.1, 0.9), captured(0.2, 0.9))
    (one,) = [f for f in moved.findings if f.code == "comparison/moved" and "Block 0" in f.sentence]
    first, second = (1 - 1 / np.sqrt(1 + size**2) for size in (0.1, 0.2))
    assert (one.value, one.limit) == (pytest.approx(second, abs=1e-6), pytest.approx(first, abs=1e-6))
    assert one.sentence.startswith("Moved from 0.00496 to 0.0194: Block 0 turns")


# -------------------------------------------------------------------------------------------------------- what may be given
def test_runs_paths_and_reports_say_the_same(tmp_path: Path) -> None:
    one, other = captured(0.5, 0.5), captured(0.5, 1.5)
    paths = one.save(tmp_path / "first.zarr"), other.save(tmp_path / "second.zip")
    reports = bnviz.diagnose(one), bnviz.diagnose(other)
    whole = bnviz.compare(one, other)
    for given in (paths, reports, (one, reports[1])):
        again = bnviz.compare(*given)
        np.testing.assert_allclose(again["comparison"]["distance"], whole["comparison"]["distance"])
        assert len(again.findings) == len(whole.findings)
    assert bnviz.compare(*paths).overview().title == "What changed from net (first) to net (second)"
    assert whole.overview().title == "What changed from net (1) to net (2)"
    assert bnviz.compare(one, captured(0.1, 0.2, name="student")).overview().title == "What changed from net to student"
    given = bnviz.compare(*reports, called=("old", "new"))
    assert given.overview().title == "What changed from net (old) to net (new)"
    assert (given.before, given.after) == reports


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (
            lambda run: (3, run),
            BnvizError,
            r"compare takes a run, a report or the path of a saved run as a, got a int\.",
        ),
        (
            lambda run: (run, bnviz.compare(run, run)),
            BnvizError,
            r"got a comparison as b; give its \.before or \.after",
        ),
        (lambda run: (run, Run({}, {"model": "net"})), NotCaptured, r"^Of run b: This run is empty"),
        (lambda run: (run, run, "layer_redundncy"), UnknownName, r"did you mean 'layer_redundancy'"),
        (lambda run: (run, run, "roofline"), NotCaptured, r"^Of run a: roofline: Not captured: ops\.op"),
        (lambda run: (run, "no/such.zarr"), StoreError, r"no/such\.zarr does not exist"),
    ],
)
def test_what_cannot_be_compared(given: Callable[[Run], tuple[Any, ...]], error: type[Exception], message: str) -> None:
    run = captured(0.1, 0.2)
    with pytest.raises(error, match=message):
        bnviz.compare(*given(run))


def test_a_recorder_is_told_to_give_its_run_and_a_limit_must_be_one() -> None:
    run, net = captured(0.1, 0.2), Net(0.1, 0.2)
    with pytest.raises(BnvizError, match=r"as a, got a Recorder; give its \.run\."):
        bnviz.compare(bnviz.capture(net), run)  # type: ignore[arg-type]
    with pytest.raises(BnvizError, match=r"moved=0, expected a positive share"):
        bnviz.compare(run, run, moved=0)


def test_two_runs_without_a_question_in_common() -> None:
    labels = xr.Dataset({"label": ("sample", [0, 1])})
    with pytest.raises(
        NotCaptured, match=r"share no diagnostic: a answers layer_redundancy; b answers nothing\. Capture"
    ):
        bnviz.compare(captured(0.1, 0.2), Run({"labels": labels}, {"model": "net"}))


def test_progress_covers_both_and_never_falls() -> None:
    seen: list[tuple[int, int, str]] = []
    bnviz.compare(captured(0.1, 0.2), captured(0.1, 0.2), progress=lambda *told: seen.append(told))
    assert seen == [(0, 2, "layer_redundancy"), (1, 2, "layer_redundancy"), (2, 2, "")]


def test_options_reach_the_judge_of_both() -> None:
    one, other = captured(0.1, 0.9), captured(0.9, 0.1)
    strict = bnviz.compare(one, other, options={"layer_redundancy": {"influence": 1e-9}})
    assert not [f for f in strict.findings if f.code != "comparison/quantity"]


# ------------------------------------------------------------------------------------------------------------- as a report
def test_what_only_one_run_answers_is_said() -> None:
    net = Net(0.5, 0.2)
    with torch.no_grad(), bnviz.capture(net, probes=["activations", "ops"], ceilings=False, name="net") as recorder:
        net(X)
    with torch.no_grad(), bnviz.capture(net, probes=["memory", "activations"], name="net") as further:
        net(X)
    report = bnviz.compare(recorder.run, further.run)
    assert report.absent["memory_timeline"].startswith("Only net (2) answers. net (1): Not captured: memory.bytes")
    assert "not compared: " in repr(report)
    with pytest.raises(NotCaptured, match=r"write \.before\['memory_timeline'\] or \.after\['memory_timeline'\]"):
        report["memory_timeline"]
    assert "memory_timeline" in report.after
    differs = report.judgement("comparison").caveats[0]
    assert differs.startswith("The two captures differ in probes (activations, ops, then")


def test_it_is_a_report_with_one_outcome(tmp_path: Path) -> None:
    report = bnviz.compare(captured(0.5, 0.5), captured(0.5, 1.5))
    assert isinstance(report, bnviz.Report)
    assert isinstance(report, Comparison)
    assert report.names == ("comparison",)
    assert report.compared == ("layer_redundancy",)
    text = report.save(tmp_path / "changed.html").read_text()
    assert "<h1>What changed from net (1) to net (2)</h1>" in text
    assert "<h2>The two runs</h2>" in text
    assert "What holds" not in text
    assert repr(report).startswith("What changed from net (1) to net (2) · 1 diagnostic · ")
    assert "What changed from net (1) to net (2)" in report._repr_html_()
    assert next(iter(report.to_frame()["code"])).startswith("comparison/")
    assert report.view("comparison").name == "comparison"
    numbers = dict(report.overview().numbers)
    assert (numbers["findings new"], numbers["findings gone"], numbers["diagnostics"]) == ("0", "0", "1")


def test_a_comparison_is_kept_with_its_run(tmp_path: Path) -> None:
    report = bnviz.compare(captured(0.5, 0.5), captured(0.5, 1.5))
    again = bnviz.open(report.run.save(tmp_path / "changed.zarr"))["comparison"]
    for name in report["comparison"].data_vars:
        assert list(map(str, again[name].values)) == list(map(str, report["comparison"][name].values))


def test_an_ordinary_report_knows_nothing_of_it() -> None:
    report = bnviz.diagnose(captured(0.5, 0.5))
    assert "comparison" not in report.absent
    assert "comparison" not in bnviz.catalog.names("diagnostics")
    assert report.overview().title == "What holds net back"


def test_a_trained_model_with_one_block_scaled(load_model: Any) -> None:
    model = load_model("llama-bard")
    other, ids = copy.deepcopy(model), torch.arange(96).reshape(2, 48)
    runs = []
    with torch.no_grad():
        other.model.layers[2].mlp.down_proj.weight.mul_(2.0)
        for one in (model, other):
            with bnviz.capture(one, probes=["activations", "attention", "keys_values"], strict=True) as recorder:
                one(ids)
            runs.append(recorder.run)
    report = bnviz.compare(*runs)
    result = report["comparison"]
    change = row(report, "relative_change_median", "mlp")
    ratio = change["after_by_layer"].values / change["before_by_layer"].values
    assert ratio[:2] == pytest.approx([1, 1])  # what comes before it is as it was
    assert ratio[2] == pytest.approx(2)  # what it adds is doubled, to the bit
    for quantity in result["quantity"].values[result["diagnostic"].values == "attention_heads"]:
        early = result.sel(quantity=quantity)
        np.testing.assert_array_equal(early["before_by_layer"][:2], early["after_by_layer"][:2])


# ------------------------------------------------------------------------------------------------------------ place by place
def spec(*variables: Variable) -> DiagnosticSpec:
    return DiagnosticSpec("toy", "", "", (), (), variables, 1)


NORM = Variable("norm", ("layer", "head"), "norm", "")


def table(values: list[list[float]], layers: list[int], heads: list[int]) -> xr.Dataset:
    return xr.Dataset({"norm": (("layer", "head"), np.array(values, float))}, {"layer": layers, "head": heads})


def test_places_are_matched_by_their_coordinates_and_not_by_position() -> None:
    one = table([[1.0, 2.0], [3.0, 4.0]], [0, 1], [0, 1])
    other = table([[40.0, 30.0, 50.0], [20.0, 10.0, 60.0]], [1, 0], [1, 0, 7])
    unshared = Unshared()
    (found,) = aligned(spec(NORM), one, other, unshared)
    np.testing.assert_array_equal(found.after, 10 * found.before)
    assert found.labels == ([0, 1], [0, 1])
    assert [list(places.get("head", {})) for places in unshared.places] == [[], [7]]


def test_nan_never_becomes_a_number() -> None:
    nan = float("nan")
    one, other = table([[1.0, nan], [nan, nan]], [0, 1], [0, 1]), table([[2.0, 5.0], [nan, 7.0]], [0, 1], [0, 1])
    (found,) = aligned(spec(NORM), one, other, Unshared())
    assert found.alone == 2
    result = comparison([found])
    assert (float(result["before"][0]), float(result["after"][0]), int(result["places"][0])) == (1.0, 2.0, 1)
    assert np.isnan(result["before_by_layer"].values[0, 1:]).all()
    assert not same(result)
    nothing = table([[nan, nan]], [0], [0, 1])
    (empty,) = aligned(spec(NORM), nothing, nothing, Unshared())
    none = comparison([empty])
    for name in ("before", "after", "change", "relative", "distance", "place_before", "place_after"):
        assert np.isnan(none[name]).all()
    assert (int(none["places"][0]), str(none["place"].values[0])) == (0, "")


def test_without_coordinates_nothing_is_compared() -> None:
    one = xr.Dataset({"norm": (("layer", "head"), np.ones((1, 2)))}, {"layer": [0]})
    unshared = Unshared()
    assert aligned(spec(NORM), one, one, unshared) == []
    assert unshared.unlike == {"head": ["toy.norm"]}


def test_steps_are_averaged_where_they_differ_and_kept_where_they_do_not() -> None:
    loss = Variable("loss", ("step",), "nat", "")
    one, two, three = (xr.Dataset({"loss": ("step", np.arange(1.0, n + 1))}, {"step": np.arange(n)}) for n in (1, 2, 3))
    unshared = Unshared()
    (found,) = aligned(spec(loss), two, three, unshared)
    assert (float(found.before), float(found.after), found.dims) == (1.5, 2.0, ())
    assert unshared.averaged == {"step": ["toy.loss"]}
    (kept,) = aligned(spec(loss), two, two, Unshared())
    assert kept.dims == ("step",)
    (once,) = aligned(spec(loss), one, one, Unshared())
    assert once.labels == ([0],)


def test_tokens_of_other_texts_are_averaged() -> None:
    score = Variable("score", ("key",), "1", "")
    one, other = (
        xr.Dataset({"score": ("key", values)}, {"key": [0, 1]}, {"tokens_text": text})
        for values, text in (([0.0, 1.0], ["a", "b"]), ([1.0, 0.0], ["b", "a"]))
    )
    (found,) = aligned(spec(score), one, other, Unshared())
    assert (found.dims, float(found.before), float(found.after)) == ((), 0.5, 0.5)
    (same_text,) = aligned(spec(score), one, one, Unshared())
    assert same_text.dims == ("key",)


def test_methods_are_quantities_of_their_own_and_new_ones_are_said() -> None:
    score = Variable("score", ("method", "layer"), "1", "")
    one = xr.Dataset(
        {"score": (("method", "layer"), [[1.0, 2.0], [3.0, 4.0]])}, {"method": ["a", "b"], "layer": [0, 1]}
    )
    other = one.assign_coords(method=["b", "c"])
    unshared = Unshared()
    (found,) = aligned(spec(score), one, other, unshared)
    assert (found.of, found.before.tolist(), found.after.tolist()) == ("b", [3.0, 4.0], [1.0, 2.0])
    assert [list(places["method"]) for places in unshared.places] == [["a"], ["c"]]


def test_a_variable_of_one_run_is_said() -> None:
    further = Variable("further", ("layer",), "1", "", optional=True)
    one = xr.Dataset({"further": ("layer", [1.0])}, {"layer": [0]})
    unshared = Unshared()
    assert aligned(spec(further), one, one.drop_vars("further"), unshared) == []
    assert unshared.variables == ({"toy.further"}, set())


def test_names_are_compared_by_what_they_mean_and_not_by_their_number() -> None:
    role = Variable("role", ("layer",), "name", "")

    def named(table: list[str], *values: int) -> xr.Dataset:
        made = xr.Dataset({"role": ("layer", np.array(values, np.int32))}, {"layer": np.arange(len(values))})
        made["role"].attrs = {"units": "name", "table": table}
        return made

    (found,) = aligned(spec(role), named(["sink", "echo"], 0, 1, -1), named(["echo", "sink"], 1, 1, -1), Unshared())
    result = comparison([found])
    assert (int(result["moved"][0]), int(result["places"][0]), str(result["place"].values[0])) == (1, 3, "layer 1")
    assert float(result["distance"][0]) == pytest.approx(1 / 3)
    assert np.isnan(result["before"][0])


def quantity(before: list[float], after: list[float], unit: str = "1", name: str = "norm") -> Quantity:
    layers = list(range(len(before)))
    return Quantity("toy", name, "", unit, ("layer",), (layers,), np.array(before), np.array(after), 0, {})


def test_from_zero_is_infinite_and_cancelling_changes_still_count() -> None:
    result = comparison(
        [quantity([0.0], [2.0]), quantity([1.0, 3.0], [3.0, 1.0], name="swap"), quantity([0.0], [0.0], name="zero")]
    )
    by_name = {str(name): result.isel(quantity=i) for i, name in enumerate(result["variable"].values)}
    assert float(by_name["norm"]["relative"]) == float("inf")
    assert float(by_name["swap"]["relative"]) == 0
    assert float(by_name["swap"]["distance"]) == pytest.approx(4 / 6)
    assert float(by_name["zero"]["distance"]) == float(by_name["zero"]["relative"]) == 0
    assert list(result["variable"].values) == ["norm", "swap", "zero"]


def test_times_are_kept_but_not_drawn() -> None:
    result = comparison([quantity([1.0, 2.0], [2.0, 4.0], "s", "time"), quantity([1.0, 2.0], [1.0, 3.0])])
    assert result["clock"].values.tolist() == [True, False]
    assert result["panel"].values.tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------------------- findings
def finding(value: float = 1.0, sentence: str = "It is 1", code: str = "a/b", **where: Any) -> Finding:
    return Finding(code, sentence, "low", where, value)


def words(before: list[Finding], after: list[Finding], **options: Any) -> list[str]:
    return [f"{f.code.partition('/')[2]} {f.sentence}" for f in matched(before, after, **options)]


def test_findings_are_the_same_where_code_and_place_are() -> None:
    one = finding(1.0, layer=1, path="x")
    assert words([one], [finding(1.05, layer=1, path="y")]) == []
    assert words([one], [finding(1.2, layer=1)]) == ["moved Moved from 1.00 to 1.20: It is 1"]
    assert words([one], [finding(1.2, layer=1)], moved=0.5) == []
    assert words([one], [finding(1.0, layer=2)]) == ["new New: It is 1", "gone No longer: It is 1"]
    assert words([one], [finding(1.0, layer=1, code="a/c")]) == ["new New: It is 1", "gone No longer: It is 1"]
    assert words([one], [finding(1.4, layer=1)], timed=["a"]) == []
    assert words([one], [finding(1.6, layer=1)], timed=["a"]) == ["moved Moved from 1.00 to 1.60: It is 1"]
    assert words([finding(float("nan"))], [finding(2.0)]) == []


def test_findings_without_a_place_are_told_apart_by_their_words() -> None:
    before = [finding(2.4, "mm takes 2.4 times, most at 192×128"), finding(7.4, "mul takes 7.42 times, most at 2×96")]
    after = [finding(7.4, "mul takes 7.40 times, most at 4×4 · 96"), finding(9.0, "add takes 9 times, most at 8")]
    assert words(before, after) == [
        "new New: add takes 9 times, most at 8",
        "gone No longer: mm takes 2.4 times, most at 192×128",
    ]
    assert words([finding(1.0, "The peak is 1, in a")], [finding(1.0, "The peak is 1, in b")]) == []


def test_a_list_of_places_that_grew_is_one_finding() -> None:
    before, after = finding(layer=[0, 0], head=[1, 2]), finding(layer=[0, 0, 3], head=[2, 1, 5])
    assert words([before], [after]) == ["moved At 1 place more: It is 1"]
    assert words([after], [before]) == ["moved At 1 place fewer: It is 1"]
    assert words([before], [finding(layer=[0, 4], head=[1, 4])]) == ["moved At 1 place more and 1 place fewer: It is 1"]
    assert words([before], [finding(layer=[0, 0], head=[2, 1])]) == []  # the same places in another order
