"""Runs that stream to disk: the run they would have been in memory, whole segments after a cut, memory that stays flat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import bnviz
from bnviz.rows import Row, merged
from bnviz.segments import Segments, read_segments, write_header
from bnviz.streamed import Streamed, pieces_of

from .rows import ENTROPY, MASS, NAMED, PEAK, ROW
from .test_sites import Body, PreNorm, small


def memory() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_a_streamed_run_is_the_run(load_model: Any, tmp_path: Path) -> None:
    model = load_model("mixtral-bard")
    ids = [torch.arange(5, 17)[None], torch.arange(9, 29).reshape(2, 10)]
    runs = []
    for path in (None, tmp_path / "run.zarr"):
        with torch.no_grad(), bnviz.capture(model, path=path, strict=True, probes=RECORDS) as recorder:
            for each in ids:
                model.generate(each, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        runs.append(recorder.run)
    for name in RECORDS:
        # sums are rounded where a segment ends, and a busy machine gives products to fewer threads, which rounds them otherwise
        xr.testing.assert_allclose(*(run[name] for run in runs), rtol=1e-5, atol=1e-6)
        assert runs[0][name].attrs == runs[1][name].attrs
    assert bnviz.open(tmp_path / "run.zarr")["routing"].equals(runs[1]["routing"])


RECORDS = ["activations", "attention", "keys_values", "routing"]


def test_what_was_cut_short_has_its_positions(load_model: Any, tmp_path: Path) -> None:
    model, path = load_model("llama-bard"), tmp_path / "run.zarr"
    recorder = bnviz.capture(model, probes=["attention"], path=path).attach()
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        model.generate(
            torch.arange(3, 19).reshape(2, 8),
            attention_mask=mask,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
        )
    recorder._session.shelf.complete(False)
    recorder._session._drain()
    cut_short = bnviz.open(path)
    cut = cut_short["attention"]
    run = recorder.detach()
    assert cut_short.sites == run.sites  # how often each place was seen
    assert cut.query_position.isel(step=1).values[:8].tolist() == [5, 6, 7, 8, 8, 9, 10, 11]
    assert cut.equals(run["attention"])


def test_memory_stays_flat_while_a_run_is_streamed(tmp_path: Path) -> None:
    model, x = Body(PreNorm, 1).eval(), torch.randn(1, 400, 8)
    at = []
    with (
        torch.no_grad(),
        bnviz.capture(
            model, probes=["activations"], sample=400, path=tmp_path / "run.zarr", budget="8 MiB"
        ) as recorder,
    ):
        for call in range(500):
            model(x)
            if call in (120, 499):
                at.append((memory(), recorder.snapshot()["held_bytes"]))
    assert recorder.run["activations"].sizes["step"] == 500
    assert not any("budget" in note for note in recorder.run.notes)
    assert recorder.run.nbytes > 20 << 20
    assert max(held for _, held in at) < 3 << 20
    assert at[1][0] - at[0][0] < 4 << 20, at


def test_a_run_beyond_its_budget_stays_on_disk(tmp_path: Path) -> None:
    model, xs = Body(PreNorm, 2).eval(), torch.randn(60, 2, 7, 8)
    whole = []
    for path in (None, tmp_path / "run.zarr"):
        budget = "1 GiB" if path is None else "100 KB"
        with torch.no_grad(), bnviz.capture(model, probes=["activations"], path=path, budget=budget) as recorder:
            for x in xs:
                model(x)
        whole.append(recorder.run)
    assert whole[1].nbytes > 200e3
    assert whole[1]["activations"]["cosine"].variable._in_memory is False
    assert whole[1]["activations"].attrs == whole[0]["activations"].attrs
    xr.testing.assert_equal(*(run["activations"] for run in whole))
    assert bnviz.diagnose(whole[1], "layer_redundancy").names == ("layer_redundancy",)


def test_labels_and_whole_run_records_are_in_a_run_on_disk(tmp_path: Path) -> None:
    model = small()
    with bnviz.capture(
        model,
        probes=["activations", "ops"],
        path=tmp_path / "run.zarr",
        budget="300 KB",
        sample=5,
        labels=[0, 1, 0, 1, 2],
    ) as recorder:
        for _ in range(300):
            model(torch.ones(5, 3))
    assert recorder.run["labels"]["label"].values.tolist() == [0, 1, 0, 1, 2]
    assert recorder.run["activations"].sizes["step"] == 300
    assert set(bnviz.open(tmp_path / "run.zarr")) == set(recorder.run)


def test_labels_that_do_not_fit_are_told(tmp_path: Path) -> None:
    with bnviz.capture(small(), probes=["activations"], sample=5, labels=[0, 1, 2]) as recorder:
        recorder._model(torch.ones(5, 3))
    assert "labels" not in recorder.run
    (note,) = [n for n in recorder.run.notes if n.startswith("labels")]
    assert "3 were given and 5 samples are in activations" in note


def decode(call: int, keys: int) -> Row:
    """One decode step of two heads, of values that are known."""
    over = np.full((1, 2, keys), call + 1.0, np.float32)
    values = {"mass": over, "peak": over, "last_row": over, "entropy": np.full((1, 2, 1), call, np.float32)}
    valid = {"key": np.ones((1, keys), bool), "query": np.ones((1, 1), bool)}
    return Row(1, 0, "attention", "decode", values, valid, np.array([4 + call]))


def test_decode_steps_merge_by_their_rules() -> None:
    row = merged([decode(call, 5 + call) for call in range(3)], NAMED)
    assert row.values["mass"][0, 0].tolist() == [6, 6, 6, 6, 6, 5, 3]
    assert row.values["peak"][0, 1].tolist() == [3] * 7
    assert row.values["last_row"][0, 0].tolist() == [3] * 7
    assert row.values["entropy"][0, 0].tolist() == [0, 1, 2]
    assert row.valid["query"].shape == (1, 3)
    assert row.valid["key"].shape == (1, 7)
    assert row.past.tolist() == [4]


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 5)])
def test_however_a_generation_is_cut_into_segments_it_is_the_same(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    calls = [decode(call, 5 + call) for call in range(7)]
    write_header(tmp_path, {})
    segments = Segments(tmp_path)
    for some in np.split(np.arange(7), cuts):
        segments.append({"attention": [merged([calls[i] for i in some], NAMED)]})
    segments.close()
    declared = {"attention": (MASS, PEAK, ROW, ENTROPY)}
    (record,) = Streamed(pieces_of(tmp_path, {}), declared, {}).whole({}).values()
    expected = Streamed(lambda: [[("attention", row) for row in calls]], declared, {}).whole({})["attention"]
    xr.testing.assert_identical(record, expected)
    assert record["mass"].values[0, 0, 0].tolist() == [28, 28, 28, 28, 28, 27, 25, 22, 18, 13, 7]
    assert record.query_position.values.tolist() == [list(range(4, 11))]


def test_a_torn_or_damaged_segment_ends_nothing_but_itself(tmp_path: Path) -> None:
    write_header(tmp_path, {})
    segments, ends = Segments(tmp_path), []
    for call in range(4):
        segments.append({"attention": [decode(call, 5 + call)]})
        ends.append(segments.size)
    segments.close()
    held = (tmp_path / "rows.bin").read_bytes()

    def phases(data: bytes) -> list[float]:
        (tmp_path / "rows.bin").write_bytes(data)
        return [float(row.values["entropy"][0, 0, 0]) for piece in read_segments(tmp_path) for _, row in piece]

    assert phases(held) == [0, 1, 2, 3]
    for torn in range(ends[1], ends[2]):
        assert phases(held[:torn]) == [0, 1]
    flipped = bytearray(held)
    flipped[ends[1] - 9] ^= 1  # one bit of the second segment's arrays
    assert phases(bytes(flipped)) == [0, 2, 3]
    assert phases(b"") == []
