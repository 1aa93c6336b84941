"""The roofline of synthetic operators on a synthetic machine, solved by hand, and of real ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import xarray as xr

from bnviz.diagnostics.roofline import judge, roofline
from bnviz.errors import NotCaptured
from bnviz.hardware.roof import BOUNDS

MACHINE: dict[str, Any] = {
    "device": "cpu", "name": "paper", "threads": 1, "flops": {"float32": 1e11, "bfloat16": 4e11, "float16": 1e9},
    "special": 1e9, "bandwidth": [[1.0, 1e10]], "levels": [["L2", 1 << 20]], "dispatch": 1e-6, "fault": 1e-9,
    "contention": 0.0, "spread": 0.01, "measured": 1000.0, "seconds": 0.3, "notes": [],
}  # fmt: skip
KINDS = ["none", "matmul", "vector", "special", "move"]
PHASES = ["forward", "backward", "optimizer", "other"]
DTYPES = ["float32", "bfloat16", "float16"]


def machine(rows: list[dict[str, Any]], **attrs: Any) -> xr.Dataset:
    """Each row is repeated `calls` times (5)."""
    every = [row for row in rows for _ in range(row.get("calls", 5))]
    tables: dict[str, list[str]] = {"op": [], "path": [], "shapes": []}

    def number(table: str, name: str) -> int:
        if name not in tables[table]:
            tables[table].append(name)
        return tables[table].index(name)

    columns = {
        "op": [number("op", r.get("op", "aten::mm")) for r in every],
        "path": [number("path", r["path"]) if "path" in r else -1 for r in every],
        "shapes": [number("shapes", r.get("shapes", "8×8")) for r in every],
        "phase": [PHASES.index(r.get("phase", "forward")) for r in every],
        "work": [KINDS.index(r.get("work", "matmul")) for r in every],
        "dtype": [DTYPES.index(r.get("dtype", "float32")) for r in every],
    }
    tables |= {"phase": PHASES, "work": KINDS, "dtype": DTYPES}
    data = {n: xr.DataArray(v, dims="event", attrs={"table": tables[n]}) for n, v in columns.items()}
    for name, standard in (("time", 0.02), ("flops", 1e9), ("bytes", 1e6), ("allocated", 0.0)):
        values = np.array([r.get(name, standard) for r in every], float)
        data["self_time" if name == "time" else name] = xr.DataArray(values, dims="event")
    settings = {
        "ceilings": [MACHINE],
        "model": "paper",
        "calls": 1,
        "threads": 1,
        "recorded": 1000.0,
        "contention": 0.0,
    }
    return xr.Dataset(data, attrs=settings | attrs)


def bounds(result: xr.Dataset) -> dict[str, str]:
    names = result["name"].attrs["table"]
    return {names[n]: BOUNDS[b] for n, b in zip(result["name"].values, result["bound"].values, strict=True)}


FOUR = [
    {"op": "on the roof", "flops": 1e9, "bytes": 1e6, "time": 0.01, "path": "a"},
    {"op": "on the slope", "flops": 1e6, "bytes": 1e8, "time": 0.01, "path": "a"},
    {"op": "a third of it", "flops": 1e9, "bytes": 1e6, "time": 0.03, "path": "b"},
    {"op": "wrapper", "flops": 0.0, "bytes": 0.0, "time": 0.01, "work": "none"},
]


def test_closed_form() -> None:
    result = roofline(machine(FOUR))
    assert bounds(result) == {
        "on the roof": "compute",
        "on the slope": "memory",
        "a third of it": "below_roof",
        "wrapper": "overhead",
    }
    names = [result["name"].attrs["table"][n] for n in result["name"].values]
    at = {n: i for i, n in enumerate(names)}
    assert names[0] == "a third of it"  # longest first
    np.testing.assert_allclose(result["time"].values[at["on the roof"]], 0.05)
    np.testing.assert_allclose(result["intensity"].values[at["on the roof"]], 1000.0)
    np.testing.assert_allclose(result["rate"].values[at["on the roof"]], 1e11)
    np.testing.assert_allclose(result["roof"].values[at["on the slope"]], 1e8)
    np.testing.assert_allclose(result["above_roof"].values[at["a third of it"]], 5 * 0.02)
    np.testing.assert_allclose(result["above_roof"].values[at["on the roof"]], 0.0, atol=1e-12)
    spent = dict(zip(result["category"].values, result["bound_time"].values, strict=True))
    assert {k: round(v, 9) for k, v in spent.items() if v} == {
        "compute": 0.05, "memory": 0.05, "below_roof": 0.15, "overhead": 0.05
    }  # fmt: skip
    assert float(result["coverage"]) == 1.0
    modules = result["module"].values.tolist()
    assert modules == ["a", "b", "outside"]
    np.testing.assert_allclose(result["module_time"].sum("category"), [0.1, 0.15, 0.05])
    np.testing.assert_allclose(result["module_flops"], [5 * (1e9 + 1e6), 5e9, 0])


def test_time_is_conserved_over_every_grouping() -> None:
    source = np.random.default_rng(0)
    rows = [
        {"op": f"op{i % 7}", "shapes": f"{i}", "time": float(source.uniform(1e-6, 1e-2)), "path": f"m{i % 5}"}
        for i in range(60)
    ]
    ops = machine(rows)
    for limit in (400, 20, 1):
        result = roofline(ops, rows=limit)
        whole = float(ops["self_time"].sum())
        for name, dims in (("time", "op"), ("bound_time", "category"), ("module_time", ("module", "category"))):
            assert float(result[name].sum(dims)) == pytest.approx(whole)
        assert int(result["calls"].sum()) == 300
        assert float(result["flops"].sum()) == pytest.approx(300e9)
        assert result.sizes["op"] <= limit + 7
        kept = (result["shapes"].values >= 0).sum()
        assert kept == min(limit, 60)
        assert np.isnan(result["each"].values).sum() == result.sizes["op"] - kept


def test_the_median_is_judged_and_one_slow_call_is_no_gap() -> None:
    rows = [{"time": 0.01, "calls": 4}, {"time": 1.0, "calls": 1}]
    result = roofline(machine(rows))
    assert BOUNDS[int(result["bound"][0])] == "compute"
    assert float(result["time"][0]) == pytest.approx(1.04)
    assert float(result["above_roof"][0]) == pytest.approx(0.0, abs=1e-12)


def test_phase_can_be_chosen() -> None:
    ops = machine([{"phase": "forward"}, {"phase": "backward", "op": "aten::bmm"}])
    assert list(bounds(roofline(ops, phase="backward"))) == ["aten::mm", "aten::bmm"][1:]
    assert roofline(ops).sizes["op"] == 2
    with pytest.raises(NotCaptured, match="no operator of phase 'optimizer'"):
        roofline(ops, phase="optimizer")


def test_kernels_are_judged_on_an_accelerator() -> None:
    ops = machine(FOUR)
    ops["device_time"] = ops["self_time"] * np.where(ops["flops"] > 0, 1.0, 0.0)
    ops["self_time"] = ops["self_time"] * 100
    result = roofline(ops)
    assert "wrapper" not in bounds(result)
    assert float(result["time"].sum()) == pytest.approx(0.25)


def test_no_ceilings_is_refused() -> None:
    with pytest.raises(NotCaptured, match="holds no ceilings"):
        roofline(machine(FOUR).assign_attrs(ceilings=[]))


def test_unknown_work_is_said_with_its_share() -> None:
    rows = [*FOUR, {"op": "aten::topk", "flops": np.nan, "bytes": np.nan, "time": 0.04, "work": "none"}]
    result = roofline(machine(rows))
    assert bounds(result)["aten::topk"] == "unknown"
    assert float(result["coverage"]) == pytest.approx(0.3 / 0.5)
    said = judge(result)
    assert any("40 % of operator time" in c and "no rule" in c for c in said.caveats)


def test_findings_name_what_a_perfect_kernel_would_save() -> None:
    said = judge(roofline(machine(FOUR)))
    below = next(f for f in said.findings if f.code == "roofline/below_roof")
    assert "takes 3.00 times what its work needs" in below.sentence and below.where == {"path": "b"}
    assert below.saving is not None
    assert below.saving.amount == pytest.approx(0.1) and below.saving.share == pytest.approx(1 / 3)
    assert said.title == "50 % of operator time is below the roof, most of it a third of it"
    assert [f.saving.share for f in said.findings if f.saving] == sorted(
        (f.saving.share for f in said.findings if f.saving), reverse=True
    )


@pytest.mark.parametrize(
    ("row", "end", "advice"),
    [
        ({"shapes": "", "op": "aten::mul", "work": "vector"}, "operator time, most on single numbers", "Fuse it"),
        ({}, "operator time, most at 8×8", "Give it more rows"),
        ({"op": "aten::_scaled_dot_product_flash_attention_for_cpu"}, "most at 8×8", "Attend to more at once"),
        ({"op": "aten::convolution"}, "most at 8×8", "more images"),
    ],
)
def test_what_is_below_its_roof_is_said_in_its_own_words(row: dict[str, Any], end: str, advice: str) -> None:
    said = judge(roofline(machine([{"time": 1.0} | row])))
    below = next(f for f in said.findings if f.code == "roofline/below_roof")
    assert below.sentence.endswith(end) and advice in below.advice


def test_a_pool_of_shapes_names_none() -> None:
    rows = [{"time": 1.0, "shapes": str(i)} for i in range(3)]
    below = [f for f in judge(roofline(machine(rows), rows=0)).findings if f.code == "roofline/below_roof"]
    assert [f.sentence.rpartition(": ")[2] for f in below] == ["100 % of operator time"]


def test_a_narrower_dtype_is_a_finding_only_where_it_is_faster() -> None:
    found = [f for f in judge(roofline(machine(FOUR))).findings if f.code == "roofline/dtype"]
    assert len(found) == 1 and "torch.bfloat16" in found[0].advice
    # 10 ms of 1 GFLOP at 100 GFLOP/s become 2.5 ms at 400: for both products that are at or below the roof
    assert found[0].saving is not None and found[0].saving.amount == pytest.approx(5 * (0.0075 + 0.0075), rel=1e-6)
    slow = MACHINE | {"flops": {"float32": 1e11, "bfloat16": 1.2e11}}
    assert not [f for f in judge(roofline(machine(FOUR, ceilings=[slow]))).findings if f.code == "roofline/dtype"]


def test_emulated_half_precision_is_a_finding() -> None:
    result = roofline(machine([{"dtype": "float16", "time": 1.0}]))
    found = [f for f in judge(result).findings if f.code == "roofline/dtype"]
    assert found and found[0].severity == "high" and "1.00 GFLOP/s" in found[0].sentence


def test_dispatch_first_touch_and_python_are_findings() -> None:
    small = {"op": "aten::add", "work": "vector", "flops": 8.0, "bytes": 96.0, "time": 1.5e-6, "calls": 1000}
    codes = {f.code for f in judge(roofline(machine([small]))).findings}
    assert codes == {"roofline/overhead"}  # how long the forwards took is not known
    inside = roofline(machine([small | {"path": "a"}], call_time=0.003))
    assert float(inside["host_time"]) == pytest.approx(0.0015)
    python = next(f for f in judge(inside).findings if f.code == "roofline/host")
    assert python.value == pytest.approx(0.5)
    touched = {"flops": 1e7, "bytes": 1e8, "time": 0.1, "allocated": 64 << 20}
    first = next(f for f in judge(roofline(machine([touched]))).findings if f.code == "roofline/first_touch")
    assert "4.10 µs a page" in first.sentence


def test_caveats() -> None:
    result = roofline(machine(FOUR, contention=0.4, run_length=0.05, recorded=9000.0, notes=["Cut off."]))
    said = " | ".join(judge(result).caveats)
    assert "waited for a core 40 % of the time" in said
    assert "2 h 13 min apart" in said
    assert "Cut off" in said
    assert "fewer than 3 times" in " ".join(judge(roofline(machine([{"calls": 2}, *FOUR]))).caveats)
    assert judge(result).title.startswith("No verdict for 50 % of operator time") is False


def test_nothing_is_claimed_when_the_machine_was_busy() -> None:
    said = judge(roofline(machine(FOUR, contention=0.4, run_length=1e-3)))
    assert said.title == "No verdict for 83 % of operator time: the machine was busy"
    assert not [f for f in said.findings if f.code == "roofline/below_roof"]


def test_real_run_is_consistent(load_model: Any) -> None:
    import torch

    import bnviz

    model = load_model("llama-bard")
    ids = torch.arange(128).reshape(2, 64) % 1000
    with torch.no_grad(), bnviz.capture(model, probes=["ops"], strict=True) as recorder:
        for _ in range(3):
            model(ids)
    ops = recorder.run["ops"]
    result = roofline(ops)
    assert float(result["time"].sum()) == pytest.approx(float(ops["self_time"].sum()))
    assert float(result["coverage"]) > 0.95
    with np.errstate(invalid="ignore"):
        assert not (result["rate"].values > 1.2 * max(ops.attrs["ceilings"][0]["flops"].values())).any()
    judged = judge(result)
    assert len(judged.title) <= 90
    json.dumps(result.attrs, allow_nan=False)


def test_survives_the_store(tmp_path: Any) -> None:
    result = roofline(machine(FOUR))
    result.to_zarr(tmp_path / "x.zarr", zarr_format=3, consolidated=False)
    again = xr.open_zarr(tmp_path / "x.zarr", consolidated=False).load()
    assert judge(again) == judge(result)
