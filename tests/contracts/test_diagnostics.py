"""What every diagnostic keeps: its needs are met by probes, its result is as declared, its judge speaks."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import xarray as xr

from bnviz import catalog
from bnviz.run import Run
from bnviz.schema import DIMENSIONS, UNITS, Judgement


def test_the_declaration_is_whole(diagnostic_name: str) -> None:
    diagnostic = catalog.load("diagnostics", diagnostic_name)
    spec = diagnostic.spec
    assert spec.name == diagnostic_name
    assert spec.question.endswith("?")
    taken = list(inspect.signature(diagnostic).parameters)
    for need in (*spec.needs, *spec.wants):
        assert need.partition(".")[0] in taken
    for variable in spec.gives:
        assert set(variable.dims) <= set(DIMENSIONS)
        assert variable.unit in UNITS


def test_every_need_is_met_by_a_probe_or_an_experiment(diagnostic_name: str) -> None:
    sources = (*catalog.every("probes"), *catalog.every("experiments"))
    given = {f"{name}.{v.name}" for name, source in sources for v in source.spec.variables}
    given.add("labels.label")
    spec = catalog.load("diagnostics", diagnostic_name).spec
    assert {*spec.needs, *spec.wants} <= given


def test_the_result_is_as_declared(diagnostic_name: str, results: dict[str, Any]) -> None:
    result, spec = results[diagnostic_name], catalog.load("diagnostics", diagnostic_name).spec
    assert isinstance(result, xr.Dataset)
    declared = {v.name: v for v in spec.gives}
    assert set(map(str, result.data_vars)) <= set(declared)
    for name, variable in declared.items():
        if name not in result:
            assert variable.optional, f"{name} is declared and absent"
            continue
        assert tuple(result[name].dims) == variable.dims
        assert result[name].attrs["units"] == variable.unit
    json.dumps(result.attrs)


def test_inputs_are_not_changed(diagnostic_name: str, runs: Any) -> None:
    from .conftest import record_for

    diagnostic = catalog.load("diagnostics", diagnostic_name)
    needed = {n.partition(".")[0]: record_for(n, runs) for n in (*diagnostic.spec.needs, *diagnostic.spec.wants)}
    needed = {name: data for name, data in needed.items() if data is not None}
    before = {name: data.copy(deep=True) for name, data in needed.items()}
    diagnostic(**needed)
    for name, data in needed.items():
        xr.testing.assert_identical(data, before[name])


def test_a_run_that_was_saved_says_the_same(
    diagnostic_name: str, results: dict[str, Any], reopened: tuple[Run, Run]
) -> None:
    from .conftest import record_for

    diagnostic = catalog.load("diagnostics", diagnostic_name)
    needed = {n.partition(".")[0]: record_for(n, reopened) for n in (*diagnostic.spec.needs, *diagnostic.spec.wants)}
    again = diagnostic(**{name: data for name, data in needed.items() if data is not None})
    judge = catalog.judge_of(diagnostic)
    assert repr(judge(again)) == repr(judge(results[diagnostic_name]))


def test_the_judge_speaks(diagnostic_name: str, results: dict[str, Any]) -> None:
    judgement = catalog.judge_of(catalog.load("diagnostics", diagnostic_name))(results[diagnostic_name])
    assert isinstance(judgement, Judgement)
    assert judgement.title
    assert not judgement.title.endswith(".")
    assert judgement.subtitle
    for finding in judgement.findings:
        assert finding.code.startswith(f"{diagnostic_name}/")
        assert finding.advice
        assert not finding.sentence.endswith(".")
        json.dumps(dict(finding.where))


def test_nothing_in_the_result_is_lost_on_disk(diagnostic_name: str, results: dict[str, Any], tmp_path: Any) -> None:
    result = results[diagnostic_name]
    result.to_zarr(tmp_path / "result.zarr", consolidated=False)
    with xr.open_zarr(tmp_path / "result.zarr", consolidated=False) as again:
        judge = catalog.judge_of(catalog.load("diagnostics", diagnostic_name))
        assert judge(again.load()) == judge(result) or repr(judge(again.load())) == repr(judge(result))


@pytest.mark.parametrize("room", ["probes", "diagnostics", "views"])
def test_rooms_are_listed_without_importing(room: str) -> None:
    assert catalog.names(room)
