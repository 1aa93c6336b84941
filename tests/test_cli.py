"""The command line: each command does its one call, and what goes wrong is one sentence and exit status 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bnviz
from bnviz import doctor
from bnviz.cli import main
from bnviz.doctor import Check, lines, look
from bnviz.page import written_here


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    with bnviz.capture(net, probes=["activations", "ops"], ceilings=False, strict=True) as recorder:
        net(torch.ones(16, 8))
    return recorder.run.save(tmp_path_factory.mktemp("run") / "net.zarr")


def test_report(stored: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "out.html"
    assert main(["report", str(stored), "-o", str(target)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(target)
    assert said.err.startswith("Report on ")
    assert target.read_text().lstrip().lower().startswith("<!doctype html>")
    assert main(["report", str(stored), "-o", str(target)]) == 2
    assert capsys.readouterr().err == f"bnviz: {target} exists; name another file with -o, or add -f to replace it.\n"
    assert main(["report", str(stored), "-o", str(target), "--force"]) == 0


def test_a_report_lands_beside_its_run(stored: Path) -> None:
    assert main(["report", str(stored)]) == 0
    assert stored.with_suffix(".html").exists()


def test_compare(stored: Path, tmp_path: Path, capsys: Any) -> None:
    target = tmp_path / "changed.html"
    assert main(["compare", str(stored), str(stored), "-o", str(target)]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(target)
    assert said.err.startswith("What changed from Sequential (1) to Sequential (2) · ")
    assert "What changed from" in target.read_text()
    assert main(["compare", str(stored), str(stored), "-o", str(target)]) == 2
    assert capsys.readouterr().err == f"bnviz: {target} exists; name another file with -o, or add -f to replace it.\n"
    assert main(["compare", str(stored), str(stored), "-o", str(target), "-f"]) == 0
    assert main(["compare", str(stored), "no.zarr"]) == 2
    assert capsys.readouterr().err.rpartition("bnviz: ")[2].startswith("no.zarr does not exist; give the folder")
    assert main(["compare", str(stored), str(stored)]) == 0
    assert (stored.parent / "net-net.html").exists()


def test_view_opens_a_browser(stored: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert main(["view", str(stored)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert opened == [path.as_uri()]
    assert path.exists()
    monkeypatch.setattr("webbrowser.open", lambda _: False)
    assert main(["view", str(stored)]) == 0
    assert "No browser was found here" in capsys.readouterr().err


def test_trace(stored: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["trace", str(stored), str(tmp_path / "tb"), "--worker", "net"]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path.exists()
    assert path.name.startswith("net.")


def test_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("bnviz.demo.main", asked.append)
    assert main(["demo", "there"]) == 0
    assert main(["demo"]) == 0
    assert asked == ["there", "demo"]


def test_the_demo_leaves_what_is_not_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("bnviz.demo.tour.STOPS", ())  # nothing may be run before it is refused
    file, folder = tmp_path / "afile", tmp_path / "mine"
    file.write_text("x")
    assert main(["demo", str(file)]) == 2
    assert "afile is a file, and the demo writes a folder" in capsys.readouterr().err
    folder.mkdir()
    (folder / "report.html").write_text("<!doctype html><title>my thesis</title>")
    assert main(["demo", str(folder)]) == 2
    said = capsys.readouterr()
    assert "was not written by bnviz and is left alone" in said.err
    assert said.out == ""
    assert "my thesis" in (folder / "report.html").read_text()


def test_a_report_of_ours_is_known(stored: Path, tmp_path: Path) -> None:
    ours = bnviz.diagnose(stored).save(tmp_path / "ours.html")
    assert written_here(ours)
    assert not written_here(tmp_path / "no.html")


def test_what_goes_wrong_is_one_sentence(tmp_path: Path, capsys: Any) -> None:
    for command in (["report", "no.zarr"], ["view", "no.zarr"], ["trace", "no.zarr", str(tmp_path)]):
        assert main(command) == 2
        said = capsys.readouterr()
        assert said.err.startswith("bnviz: no.zarr does not exist; give the folder or .zip")
        assert said.err.count("\n") == 1
        assert said.out == ""


def test_an_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bnviz.demo.main", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "bnviz: interrupted\n"


@pytest.mark.parametrize("words", [[], ["nonsense"], ["report"], ["trace", "a"]])
def test_words_it_does_not_know(words: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "usage: bnviz" in capsys.readouterr().err


def test_as_a_module_and_into_a_pipe_that_closes() -> None:
    done = subprocess.run([sys.executable, "-m", "bnviz", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"bnviz {bnviz.__version__}"


# ------------------------------------------------------------------------------------------------------------- doctor
def test_doctor_says_what_works(capsys: Any) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert f"ok      torch              {torch.__version__}" in said
    assert "py-spy" in said


def test_doctor_says_how_to_mend(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = {one.name: one for one in look()}
    for package, extra in (("py-spy", "host"), ("transformers", "transformers"), ("jupyterlab", "jupyter")):
        assert not found[package].works
        assert found[package].said.endswith(f"run: pip install 'bnviz[{extra}]'")
    assert found["torch"].said == "not installed; run: pip install torch"
    assert main(["doctor"]) == 1
    assert "MISSING torch" in capsys.readouterr().out


def test_doctor_says_that_py_spy_is_not_permitted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise bnviz.BnvizError("Host sampling is not permitted: run: sudo")

    monkeypatch.setattr("bnviz.probes._spy.trial", refused)
    (check,) = [one for one in look() if one.name == "py-spy"]
    assert (check.works, check.needed, check.said) == (False, False, "Host sampling is not permitted: run: sudo")


def test_a_broken_package_does_not_break_the_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    def _broken_thing() -> Check:
        raise RuntimeError("half installed")

    monkeypatch.setattr(doctor, "_CHECKS", (_broken_thing,))
    assert look() == [Check("broken thing", False, "RuntimeError: half installed")]


def test_lines_stand_in_columns() -> None:
    shown = list(lines([Check("a", True, "x"), Check("long", False, "y"), Check("b", False, "z", needed=True)]))
    assert shown == ["ok      a     x", "off     long  y", "MISSING b     z"]
