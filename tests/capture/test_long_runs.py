"""Long runs: steps, budgets, streaming, progress, cancelling; and what a recorder counts."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks

import bnviz
from bnviz.capture import progress
from bnviz.capture.progress import Line, Progress, State
from bnviz.capture.shelf import Shelf
from bnviz.errors import CaptureError, NotCaptured, UnknownName
from bnviz.observation import Context, Site
from bnviz.page import page
from bnviz.rows import Row, merged
from bnviz.schema import Variable
from bnviz.segments import Segments, read_segments, write_header
from bnviz.streamed import Streamed, pieces_of

from .test_sites import Body, PlainAttention, PreNorm


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def memory() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# --------------------------------------------------------------------------------------------------------------------- steps


def test_a_step_ends_when_the_optimizer_of_the_model_steps() -> None:
    model, other = small(), nn.Linear(2, 2)
    mine = torch.optim.SGD(model.parameters(), 0.1)
    theirs = torch.optim.SGD(other.parameters(), 0.1)
    x, norms = torch.randn(4, 3), []
    with bnviz.capture(model, probes=["activations"], step="optimizer", strict=True) as recorder:
        for _ in range(3):
            norms.append(float(model[:2](x).detach().norm(dim=-1)[0]))
            for _ in range(2):  # two forwards accumulate; the first is the step's
                model(x).square().sum().backward()
                theirs.step()
            mine.step()
            mine.zero_grad()
    record = recorder.run["activations"]
    assert list(record.step.values) == [0, 1, 2]
    first = record["norm_out"].sel(layer=0, kind="block").isel(token=0).values
    assert np.allclose(first, norms, rtol=1e-5)
    assert len(set(norms)) == 3  # weights moved between the steps
    assert not _global_optimizer_post_hooks


@pytest.mark.parametrize("step", ["manual", "optimizer"])
def test_every_counts_steps_where_forwards_are_no_steps(step: str) -> None:
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with bnviz.capture(model, probes=["activations"], step=step, every=3) as recorder:
        for _ in range(7):
            model(torch.ones(2, 3)).sum().backward()
            if step == "manual":
                recorder.step()
            else:
                optimizer.step()
    assert list(recorder.run["activations"].step.values) == [0, 3, 6]


def test_a_policy_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UnknownName, match="Valid: forward, manual, optimizer"):
        bnviz.capture(small(), step="epoch")
    with pytest.raises(CaptureError, match="every=0: expected a whole number from 1"):
        bnviz.capture(small(), every=0)
    with pytest.raises(CaptureError, match=r"every=1\.5"):
        bnviz.capture(small(), every=1.5)


# ----------------------------------------------------------------------------------------------------------------- streaming


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
        xr.testing.assert_allclose(*(run[name] for run in runs), rtol=1e-6)  # sums are rounded where a segment ends
        assert runs[0][name].attrs == runs[1][name].attrs
    assert bnviz.open(tmp_path / "run.zarr")["routing"].equals(runs[0]["routing"])


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
    recorder._session._drain()
    cut = bnviz.open(path)["attention"]
    run = recorder.detach()
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


# -------------------------------------------------------------------------------------------------------------- rows and segments

MASS = Variable("mass", ("step", "layer", "head", "key"), "query", "", "add")
PEAK = Variable("peak", ("step", "layer", "head", "key"), "1", "", "max")
ROW = Variable("last_row", ("step", "layer", "head", "key"), "1", "", "last")
ENTROPY = Variable("entropy", ("step", "layer", "head", "query"), "nat", "", "append")
NAMED = {v.name: v for v in (MASS, PEAK, ROW, ENTROPY)}


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


# -------------------------------------------------------------------------------------------------------------------- budget


def test_what_waits_counts_and_is_drained_between_forwards() -> None:
    shelf = Shelf({"attention": (MASS, PEAK, ROW, ENTROPY)}, 4000)
    site = Site("attention", "a", 0, "attention")
    for call in range(200):
        shelf.crowded() and shelf.drain()
        values = {name: torch.ones(1, 2, 8) for name in ("mass", "peak", "last_row")}
        assert shelf.put("attention", site, Context(1, call, "decode", 7), values, {})
        assert shelf.held <= 4000
    shelf.drain()
    (row,) = shelf.rows["attention"].values()
    assert row.values["mass"][0, 0].tolist() == [200] * 8
    assert shelf.held == row.nbytes == 3 * 64 + 9 * 8


@pytest.mark.parametrize("budget", [3000, 20000])
def test_the_ceiling_holds_at_every_moment(budget: int) -> None:
    model, most = small(), 0
    with bnviz.capture(model, probes=["activations"], budget=budget) as recorder:
        for _ in range(100):
            model(torch.ones(4, 3))
            most = max(most, recorder.snapshot()["held_bytes"])
    assert 0 < most <= budget
    assert any(f"budget of {budget} reached" in note for note in recorder.run.notes)


# ------------------------------------------------------------------------------------------------------------------ progress


@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_log_file_stays_silent(wanted: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    model = small()
    with bnviz.capture(model, probes=["activations"], progress=wanted):
        model(torch.ones(2, 3))
    assert capsys.readouterr() == ("", "")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_one_line_that_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, model = Terminal(), small()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    with bnviz.capture(model, probes=["activations"], progress=True):
        for _ in range(3):
            model(torch.ones(2, 3))
    lines = shown.getvalue().split("\r\x1b[K")
    assert lines[0] == ""
    assert lines[-1] == ""
    assert lines[2].startswith("Sequential: 1 forward · 1 step · ")
    assert lines[3].startswith("Sequential: 2 forwards · 2 steps · ")
    assert "of 1.00 GiB" in lines[3]


def test_a_short_capture_shows_nothing_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, model = Terminal(), small()
    monkeypatch.setattr("sys.stderr", shown)
    with bnviz.capture(model, probes=["activations"]):
        model(torch.ones(2, 3))
    assert shown.getvalue() == ""


def test_an_error_of_the_drawing_is_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(Terminal):
        def write(self, _: str) -> int:
            raise ValueError("I/O operation on closed file")

    model = small()
    monkeypatch.setattr("sys.stderr", Closed())
    with bnviz.capture(model, probes=["activations"], progress=True) as recorder:
        for _ in range(2):
            model(torch.ones(2, 3))
    assert recorder.run["activations"].sizes["step"] == 2


def test_beside_the_users_own_bar_it_waits_to_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tqdm = pytest.importorskip("tqdm").tqdm
    shown = Terminal()
    monkeypatch.setattr("sys.stderr", shown)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    state = State("Net", 1, 1, 1, 0, 100, -1, 1.0)
    with tqdm(total=3, file=io.StringIO()):
        Progress(None, lambda: state).tick()
        assert shown.getvalue() == ""
        Progress(True, lambda: state).tick()
        assert "Net: 1 forward" in shown.getvalue()
    Line().end(state)


def test_a_notebook_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("IPython")
    from bnviz.jupyter import progress as drawn

    shown: list[str] = []

    class Handle:
        def update(self, what: Any) -> None:
            shown.append(what.data)

    def display(what: Any, display_id: bool) -> Handle:
        shown.append(what.data)
        return Handle()

    monkeypatch.setattr(drawn, "display", display)
    state = State("<Net>", 4, 2, 2, 25, 100, 2048, 1.0)
    bar = drawn.Bar()
    bar.draw(state)
    bar.end(state)
    assert 'value="0.2500"' in shown[0]
    assert "&lt;Net&gt;: 4 forwards, 2 watched · 2 steps · 25 B of 100 B · 2.00 KiB on disk" in shown[0]
    assert "<progress" not in shown[1]
    assert "2 steps" in shown[1]


# -------------------------------------------------------------------------------------------------------------------- cancel


def test_cancelled_from_another_thread_the_model_goes_on() -> None:
    model, x = small(), torch.randn(2, 3)
    expected = model(x)
    with bnviz.capture(model, probes=["activations"]) as recorder:
        for call in range(6):
            if call == 3:
                thread = threading.Thread(target=recorder.cancel)
                thread.start()
                thread.join()
            assert torch.equal(model(x), expected)
    assert recorder.run["activations"].sizes["step"] == 3
    assert any(note == "Cancelled in forward 2; nothing after it is here." for note in recorder.run.notes)
    assert recorder.run.provenance["calls"] == 6


def test_cancelled_inside_a_forward() -> None:
    model = Body(PreNorm, 3)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"]) as recorder:
        handle = model.blocks[1].register_forward_pre_hook(lambda *_: recorder.cancel())
        model(torch.randn(1, 4, 8))
        handle.remove()
        model(torch.randn(1, 4, 8))
    assert list(recorder.run["activations"].layer.values) == [0]
    assert recorder.run["activations"].sizes["step"] == 1


def test_a_recorder_says_what_it_is_doing() -> None:
    model = small()
    recorder = bnviz.capture(model, probes=["activations"])
    assert "not attached" in repr(recorder)
    with pytest.raises(CaptureError, match="not attached"):
        recorder.snapshot()
    with recorder:
        model(torch.ones(2, 3))
        assert "watching Sequential: 1 forward · 1 step" in repr(recorder)
        assert "activations  2 observations" in repr(recorder)
    assert repr(recorder).startswith("Recorder, closed. Run of Sequential")


# -------------------------------------------------------------------------------------------------------------------- counts


def test_each_place_says_how_often_it_was_seen(load_model: Any) -> None:
    model = load_model("mixtral-bard")
    with torch.no_grad(), bnviz.capture(model, probes=["activations", "attention", "routing"]) as recorder:
        for _ in range(3):
            model(torch.arange(5, 17)[None])
    counts = {(one.kind, one.path): one for one in recorder.run.sites}
    for layer in range(4):
        for kind, path in (("block", ""), ("attention", ".self_attn"), ("router", ".mlp.experts")):
            one = counts[kind, f"model.layers.{layer}{path}"]
            assert (one.layer, one.observations, one.forwards) == (layer, 3, 3)
            assert one.ran in (3, -1)
    assert sum(kind == "sublayer" for kind, _ in counts) == 8
    assert "4 attention × 3" in repr(recorder.run)
    assert "Where it was seen" in page(bnviz.diagnose(recorder.run, "expert_load"))


class Either(PlainAttention):
    """Attention by the kernel, or by a product that no mechanism takes for attention."""

    hidden = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = torch.sigmoid(q @ k.mT) @ v if Either.hidden else nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Sometimes(PreNorm):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Either()


def test_what_ran_unseen_is_refused() -> None:
    model, x = Body(Sometimes, 2).eval(), torch.randn(1, 6, 8)
    with torch.no_grad(), bnviz.capture(model, probes=["attention", "activations"]) as recorder:
        for Either.hidden in (False, True, False):
            model(x)
    Either.hidden = False
    one = next(site for site in recorder.run.sites if site.kind == "attention")
    assert (one.ran, one.observations) == (3, 2)
    with pytest.raises(NotCaptured, match=r"Not complete: blocks\.0\.attn ran 3 times .* was seen 2 times"):
        bnviz.diagnose(recorder.run, "attention_heads")
    report = bnviz.diagnose(recorder.run)
    assert report.absent["attention_heads"].startswith("Not complete")
    assert "layer_redundancy" in report.names  # its blocks were seen each time
    assert any(note.startswith("attention: Not complete: blocks.0.attn ran 3 times") for note in recorder.run.notes)


def test_a_place_that_is_never_seen_is_missing_and_said() -> None:
    model, x = Body(Sometimes, 2).eval(), torch.randn(1, 6, 8)
    model.blocks[0].attn = PlainAttention().eval()
    Either.hidden = True
    with torch.no_grad(), bnviz.capture(model, probes=["attention"]) as recorder:
        model(x)
    Either.hidden = False
    said = "blocks.1.attn ran and was never seen: how it computes is not read, and it is missing here."
    assert f"attention: {said}" in recorder.run.notes
    report = bnviz.diagnose(recorder.run, "attention_heads")
    assert said in report.judgement("attention_heads").caveats


def test_a_layer_that_is_skipped_is_no_error_and_is_said() -> None:
    class Exits(Body):
        depth = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for block in self.blocks[: self.depth]:
                x = block(x)
            return self.head(x)

    model = Exits(PreNorm, 3).eval()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"]) as recorder:
        for model.depth in (3, 2, 3, 1):
            model(torch.randn(1, 5, 8))
    counts = {one.path: one.forwards for one in recorder.run.sites if one.kind == "block"}
    assert counts == {"blocks.0": 4, "blocks.1": 3, "blocks.2": 2}
    report = bnviz.diagnose(recorder.run, "layer_redundancy")
    said = report.judgement("layer_redundancy").caveats
    assert any(line.startswith("blocks.2 was seen in 2 of 4 forwards") for line in said)
    assert any(line.startswith("blocks.1 was seen in 3 of 4 forwards") for line in said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_waits_on_a_device_comes_over_together() -> None:
    model, xs = Body(PreNorm, 2).eval().cuda(), torch.randn(20, 2, 7, 8, device="cuda")
    with torch.no_grad():
        with bnviz.capture(model, probes=["activations"], budget="64 KiB") as recorder:
            for x in xs:
                model(x)
                assert recorder.snapshot()["held_bytes"] <= 64 << 10
        with bnviz.capture(model.cpu(), probes=["activations"]) as other:
            for x in xs.cpu():
                model(x)
    steps = recorder.run["activations"].sizes["step"]
    assert steps > 1
    xr.testing.assert_allclose(
        recorder.run["activations"], other.run["activations"].isel(step=slice(steps)), rtol=1e-3, atol=1e-4
    )
