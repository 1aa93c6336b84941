"""Whatever goes wrong, the model is as it was found, and the run holds what was seen until then and says what happened."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.capture.options import Options
from bnviz.capture.recorder import Recorder
from bnviz.errors import CaptureError, StoreError
from bnviz.observation import BlockSeen
from bnviz.schema import Variable, probe
from tests.traces import traces

from .test_sites import Body, PreNorm


@contextmanager
def as_found(model: nn.Module) -> Iterator[None]:
    """The model is the same afterwards, with what a user had on it before."""
    handle = model.register_forward_hook(lambda *_: None)
    before = traces(model)
    yield
    assert traces(model) == before
    handle.remove()


def body(depth: int = 3) -> Body:
    return Body(PreNorm, depth).eval()


def fails_in(model: nn.Module, path: str, how: Callable[[], Any], call: int) -> Any:
    """Have the submodule at `path` fail in its `call`-th call; give what takes the failure off again."""
    left = [call]

    def hook(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            how()

    return model.get_submodule(path).register_forward_pre_hook(hook)


def raises(error: BaseException) -> Callable[[], Any]:
    def how() -> None:
        raise error

    return how


X = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
PLACES = ("stem", "blocks.1", "blocks.1.attn", "blocks.1.attn.out", "head")


# ------------------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("path", PLACES)
@pytest.mark.parametrize("error", [ZeroDivisionError("own"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_model_raises_and_the_run_holds_what_was_before(path: str, error: BaseException) -> None:
    model = body()
    with torch.no_grad(), as_found(model):
        handle = fails_in(model, path, raises(error), 2)
        with pytest.raises(type(error)) as raised, bnviz.capture(model) as recorder:
            [model(X) for _ in range(3)]
        handle.remove()
    assert raised.value is error
    run = recorder.run
    whole = bnviz.capture(model, probes=["activations"])
    with torch.no_grad(), whole:
        model(X)
    expected = whole.run["activations"]["cosine"].isel(step=0)
    found = run["activations"]["cosine"]
    for step in range(2):
        assert np.array_equal(found.isel(step=step), expected, equal_nan=True)
    before = {"stem": 0, "head": 3}.get(path, 1)  # blocks that ended before the fault
    assert run["activations"].sizes["step"] == (3 if before else 2)
    if before:
        torn = found.isel(step=2).sel(kind="block")
        assert np.isfinite(torn.values).all(-1).tolist() == [layer < before for layer in range(3)]
    said = "an interrupt" if isinstance(error, KeyboardInterrupt) else "ZeroDivisionError"
    assert f"Forward 2 ended early with {said}: of it only the places before that are here." in run.notes
    assert f"The block ended with {type(error).__name__}; what was seen until then is here." in run.notes


def test_an_error_the_user_catches_is_told_and_the_watching_goes_on() -> None:
    model = body()
    with torch.no_grad(), as_found(model), bnviz.capture(model, probes=["activations", "attention"]) as recorder:
        for _ in range(4):
            handle = fails_in(model, "blocks.2.attn", raises(ValueError("own")), 0)
            with pytest.raises(ValueError, match="own"):
                model(X)
            handle.remove()
            model(X)
    assert recorder.run["activations"].sizes["step"] == 8
    assert any(note.startswith("4 forwards ended early, the first of them forward 0") for note in recorder.run.notes)
    finite = np.isfinite(recorder.run["attention"]["entropy"]).all(("head", "query"))
    assert finite.sel(layer=2).values.tolist() == [False, True] * 4
    assert finite.sel(layer=1).values.all()


def test_a_forward_inside_an_except_block_is_whole() -> None:
    model = body()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"]) as recorder:
        try:
            raise ValueError
        except ValueError:
            model(X)
    assert not any("ended early" in note for note in recorder.run.notes)


def test_a_real_interrupt_from_outside() -> None:
    model = body()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with torch.no_grad(), as_found(model):
        handle = fails_in(model, "blocks.1.mlp", lambda: signal.raise_signal(signal.SIGINT), 1)
        try:
            with pytest.raises(KeyboardInterrupt), bnviz.capture(model) as recorder:
                [model(X) for _ in range(9)]
        finally:
            signal.signal(signal.SIGINT, before)
        handle.remove()
    assert recorder.run["attention"].sizes["step"] == 2


def test_a_second_interrupt_while_the_run_is_closed_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = body()
    recorder = bnviz.capture(model, probes=["activations"])
    with torch.no_grad(), as_found(model):
        recorder.attach()
        model(X)
        session = recorder._session
        close = session._closing.close
        monkeypatch.setattr(session._closing, "close", lambda *_: raises(KeyboardInterrupt())())
        with pytest.raises(KeyboardInterrupt):
            recorder.detach()
    monkeypatch.setattr(session._closing, "close", close)
    run = recorder.detach()
    assert run is not None
    assert run["activations"].sizes["step"] == 1


def test_a_module_that_is_replaced_is_seen_until_then() -> None:
    model = body()
    first = model.blocks[1]
    before = traces(first, rng=False)
    with torch.no_grad(), bnviz.capture(model, probes=["activations", "attention"]) as recorder:
        model(X)
        model.blocks[1] = PreNorm().eval()
        model(X)
        model(X)
    assert traces(first, rng=False) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    seen = {one.path: one.forwards for one in recorder.run.sites if one.kind == "block"}
    assert seen == {"blocks.0": 3, "blocks.1": 1, "blocks.2": 3}
    assert any("blocks.1 was seen in 1 of 3 forwards" in note for note in recorder.run.notes)


def test_a_model_that_is_deleted_leaves_its_run() -> None:
    model = body()
    alive = weakref.ref(model)
    with torch.no_grad(), bnviz.capture(model) as recorder:
        model(X)
        del model
        gc.collect()
    gc.collect()
    assert alive() is None, "the recorder keeps the model"
    assert recorder.run["activations"].sizes["layer"] == 3


# ------------------------------------------------------------------------------------------------------------------- the probe


@probe(
    sites=("block",),
    variables=(Variable("peak", ("step", "layer", "token"), "1", "largest value of a token", "append"),),
    memory="4 B a token",
)
class Broken:
    """Works twice, then fails."""

    def __init__(self, error: BaseException) -> None:
        self.left, self.error = 2, error

    def observe(self, seen: BlockSeen) -> dict[str, Tensor]:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return {"peak": seen.output.amax(-1)}


def broken(model: nn.Module, error: BaseException, **options: Any) -> Recorder:
    return Recorder(model, Options(**options), {"broken": Broken(error)}, named=("broken",))


def test_a_probe_raises_and_only_the_probe_ends() -> None:
    model = body()
    with torch.no_grad(), as_found(model):
        expected = model(X)
        with broken(model, RuntimeError("the probe's own")) as recorder:
            assert torch.equal(model(X), expected)
            assert torch.equal(model(X), expected)
    assert recorder.run["broken"]["peak"].sizes["layer"] == 2
    assert "broken stopped at call 0: RuntimeError: the probe's own. The model was not affected." in recorder.run.notes


def test_a_probe_raises_and_strict_says_so_at_once() -> None:
    model = body()
    with torch.no_grad(), as_found(model):
        recorder = broken(model, RuntimeError("the probe's own"), strict=True)
        with pytest.raises(CaptureError, match="Probe 'broken' failed: RuntimeError: the probe's own"), recorder:
            model(X)
    assert recorder.run["broken"]["peak"].sizes["layer"] == 2


def test_an_interrupt_inside_a_probe_is_the_users() -> None:
    model = body()
    with torch.no_grad(), as_found(model), pytest.raises(KeyboardInterrupt):
        with broken(model, KeyboardInterrupt()) as recorder:
            model(X)
    assert recorder.run["broken"]["peak"].sizes["layer"] == 2


# -------------------------------------------------------------------------------------------------------------- the recorder


def test_entered_twice_is_refused_and_the_first_goes_on() -> None:
    model = body()
    with torch.no_grad(), as_found(model):
        with bnviz.capture(model, probes=["activations"]) as recorder:
            with pytest.raises(CaptureError, match="attached before; make a new one"):
                recorder.attach()
            model(X)
    assert recorder.run["activations"].sizes["step"] == 1
    assert recorder.detach() is recorder.run


@contextmanager
def no_collection() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_recorder_that_is_dropped_lets_its_model_go(tmp_path: Path, streamed: bool) -> None:
    """Also where nothing collects cycles: a recorder is in none."""
    model, path = body(), tmp_path / "run.zarr"
    with torch.no_grad(), as_found(model), no_collection():
        kept = [bnviz.capture(model, path=path if streamed else None).attach()]
        model(X)
        model(X)
        said = "is in .*run.zarr.partial, for bnviz.open" if streamed else "what it saw is lost"
        with pytest.warns(ResourceWarning, match=f"dropped without detach.*{said}"):
            kept.clear()
    if streamed:
        assert bnviz.open(path)["activations"].sizes["step"] == 2
    else:
        assert list(tmp_path.iterdir()) == []


def test_a_capture_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    model = body()
    (tmp_path / "file").write_text("")
    with as_found(model):
        with pytest.raises(StoreError, match=r"cannot be written .*give capture\(path=\.\.\.\) another place"):
            bnviz.capture(model, path=tmp_path / "file" / "run.zarr").attach()
        with pytest.raises(CaptureError, match="no router found"):
            bnviz.capture(model, probes=["routing"], path=tmp_path / "run.zarr").attach()
        with pytest.raises(CaptureError, match="labels"):
            bnviz.capture(model, labels=["a"], path=tmp_path / "run.zarr").attach()
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


# ------------------------------------------------------------------------------------------------------------------- the disk


def streamed(model: nn.Module, path: Path, count: int, **options: Any) -> Any:
    """A streamed run of `count` forwards with different inputs, and the same run in memory."""
    xs = torch.randn(count, 1, 40, 8, generator=torch.Generator().manual_seed(1))
    runs = []
    for where in (path, None):
        with torch.no_grad(), bnviz.capture(model, probes=["activations"], path=where, **options) as recorder:
            for x in xs:
                model(x)
                if where is not None:
                    recorder._session._drain()
        runs.append(recorder.run)
    return runs


def test_a_file_that_may_not_grow_ends_the_streaming_only(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    model, path = body(1), tmp_path / "run.zarr"
    with torch.no_grad(), bnviz.capture(model, probes=["activations"]):
        model(X)  # what is imported by a first capture is not limited
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with as_found(model):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (96 << 10, hard))
            run, whole = streamed(model, path, 80)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run["activations"].equals(whole["activations"])
    assert any(note.startswith(f"Writing to {path} failed (") and "kept in memory" in note for note in run.notes)
    again = bnviz.open(path)["activations"]
    steps = again.sizes["step"]
    assert steps > 1
    assert again.equals(whole["activations"].isel(step=slice(steps)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_keeps_the_run_in_memory(small_disk: Path) -> None:
    model, path = body(1), small_disk / "run.zarr"
    with as_found(model):
        run, whole = streamed(model, path, 80)
    assert run["activations"].equals(whole["activations"])
    assert run.path is None
    assert any("No space left on device" in note and "kept in memory" in note for note in run.notes)
    assert run.notes[-1].startswith(f"{path} could not be written")
    cut = bnviz.open(path)["activations"]
    assert 1 < cut.sizes["step"] < 80
    assert cut.equals(whole["activations"].isel(step=slice(cut.sizes["step"])))
    assert sorted(each.name for each in small_disk.iterdir()) == ["run.zarr.partial"]


def test_on_a_full_disk_the_ceiling_still_holds(small_disk: Path) -> None:
    model, path = body(1), small_disk / "run.zarr"
    run, whole = streamed(model, path, 150, budget="100 KB")
    assert any("budget of 100 KB reached" in note for note in run.notes)
    assert run.nbytes <= 100e3
    steps = run["activations"].sizes["step"]
    assert run["activations"].equals(whole["activations"].isel(step=slice(steps)))


# ------------------------------------------------------------------------------------------------------------------- the process


def opened(path: Path) -> tuple[Any, str]:
    """What is at a path, or why it cannot be read."""
    try:
        return bnviz.open(path), ""
    except StoreError as error:
        return None, str(error)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_a_hundred_times_while_it_writes(tmp_path: Path) -> None:
    code = Path(__file__).with_name("killed.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(code.parents[2])}
    done = subprocess.run(
        [sys.executable, str(code), str(tmp_path), "100", "7"],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    fates = [line.split()[1] for line in done.stdout.splitlines()]
    outcomes = dict.fromkeys(("nothing", "part", "whole"), 0)
    for at, fate in enumerate(fates):
        run, why = opened(tmp_path / f"{at}.zarr")
        if run is None:
            assert fate == "killed", done.stderr
            assert "cut short before its first step" in why or "does not exist" in why
            outcomes["nothing"] += 1
            continue
        norms = run["activations"]["norm_out"].sel(kind="block").isel(token=0)
        steps = norms.sizes["step"]
        assert norms.step.values.tolist() == list(range(steps))
        assert np.array_equal(norms.sel(layer=0), 4.0 * np.arange(1, steps + 1))
        assert np.array_equal(norms.sel(layer=1), 12.0 * np.arange(1, steps + 1))
        cut = any("cut short" in note for note in run.notes)
        assert cut or steps == 12
        outcomes["part" if cut else "whole"] += 1
    assert len(fates) == 100
    assert fates.count("killed") > 50
    assert outcomes["part"] > 10, outcomes  # else the moments hit nothing
