"""CONTRIBUTING.md shows a probe, a diagnostic, a view and a score, whole: they run as the package they say they are."""

from __future__ import annotations

import doctest
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(?:python|toml)\n# (?P<path>\S+)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
ROOMS = ("probes", "diagnostics", "views", "scores")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, laid out as pip would: the modules, and the metadata with the entry points."""
    folder = tmp_path_factory.mktemp("contributed")
    blocks = {found["path"]: found["body"] for found in BLOCK.finditer(TEXT)}
    for path, body in blocks.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(body, encoding="utf-8")
    (folder / "massive" / "__init__.py").touch()
    project = tomllib.loads(blocks["pyproject.toml"])["project"]
    metadata = folder / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (metadata / "METADATA").write_text(head, encoding="utf-8")
    groups = project["entry-points"]
    lines = [
        line for group, names in groups.items() for line in (f"[{group}]", *(f"{k} = {v}" for k, v in names.items()))
    ]
    (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def python(package: Path, *arguments: str) -> str:
    """Output of a fresh interpreter that has the package installed."""
    paths = os.pathsep.join([str(package), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_there_is_one_of_each(package: Path) -> None:
    names = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    assert names >= {f"massive/{part}.py" for part in ("probe", "diagnostic", "view", "score")} | {
        "tests/test_massive.py"
    }


def test_its_own_test_passes_with_its_entry_points(package: Path) -> None:
    said = python(package, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_massive.py")
    assert re.search(r"\b4 passed\b", said)


def test_it_keeps_the_contracts_of_its_rooms(package: Path) -> None:
    chosen = [f"{ROOT}/tests/contracts/test_{room}.py" for room in ("probes", "diagnostics", "views")]
    options = ["-c", f"{ROOT}/pyproject.toml", "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q", "-rA"]
    said = python(package, "-m", "pytest", *options, "-k", "massive", *chosen)
    for kept in (
        "test_probes.py::test_outputs_gradients_and_state_are_bit_identical[massive]",
        "test_diagnostics.py::test_the_result_is_as_declared[massive_tokens]",
        "test_views.py::test_an_empty_result_draws_words[massive_tokens]",
    ):
        assert re.search(rf"PASSED \S*{re.escape(kept)}", said), said[-3000:]


def test_every_room_finds_it(package: Path) -> None:
    code = f"""
from bnviz import catalog
own = {{'massive', 'massive_tokens', 'even_spacing'}}
print(*(name for room in {ROOMS} for name in catalog.names(room) if name in own))
"""
    assert python(package, "-c", code).split() == ["massive", "massive_tokens", "massive_tokens", "even_spacing"]


def test_a_real_model_goes_through_all_of_it(package: Path) -> None:
    pytest.importorskip("transformers")
    code = """
import bnviz, torch
from bnviz.demo.models import load
model, _ = load("llama-fixture")
with bnviz.capture(model, probes=["massive", "attention"], strict=True) as recorder, torch.no_grad():
    model(torch.arange(96)[None] % 64)
report = bnviz.diagnose(recorder.run, "massive_tokens", "kv_importance", strict=True)
excess = report["massive_tokens"]["excess"]
assert excess.dims == ("layer",) and bool((excess >= 1).all()), excess
assert "even_spacing" in report["kv_importance"]["method"].values
report.save("report.html")
print(report.judgement("massive_tokens").title)
"""
    title = python(package, "-c", code).strip()
    assert re.fullmatch(r"No value is massive: at most ×[\d.]+ the median, in layer [01]", title)
    page = (package / "report.html").read_text(encoding="utf-8")
    assert title.split(":")[0] in page
    assert 'data-state="failed"' not in page


def test_docstrings_run(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(package))
    for part in ("diagnostic", "score"):
        module = importlib.import_module(f"massive.{part}")
        result = doctest.testmod(module)
        assert result.attempted >= 1
        assert result.failed == 0
    for name in [name for name in sys.modules if name.split(".")[0] == "massive"]:
        monkeypatch.delitem(sys.modules, name)


def test_it_keeps_the_house_style(package: Path) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    if subprocess.run([*ruff, "--version"], capture_output=True, check=False).returncode:
        pytest.skip("needs ruff")
    config = ["--config", str(ROOT / "pyproject.toml"), "--config", 'lint.isort.known-first-party=["bnviz"]']
    done = subprocess.run(
        [*ruff, "check", *config, "massive"], cwd=package, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [*ruff, "format", "--diff", *config, "massive"], cwd=package, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
