"""The wheel as a user gets it: the side panel is in it, once, and JupyterLab finds it where pip puts it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import bnviz

ROOT = Path(bnviz.__file__).parents[1]
SHARE = f"bnviz-{bnviz.__version__}.data/data/share/jupyter/labextensions/bnviz/"
NEEDED = ("hatchling", "hatch_jupyter_builder", "jupyter_builder", "jupyterlab")
LACKING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

pytestmark = [
    pytest.mark.skipif(bool(LACKING), reason=f"needs {', '.join(LACKING)}"),
    pytest.mark.skipif(not (ROOT / "bnviz" / "labextension").exists(), reason="the panel is not built: make panel"),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (made,) = folder.glob("*.whl")
    assert made.name == f"bnviz-{bnviz.__version__}-py3-none-any.whl"
    return zipfile.ZipFile(made)


def test_what_runs_is_in_it(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {"bnviz/__init__.py", "bnviz/reduce/native/vector.h", "bnviz/views/static/page.js"} <= names
    assert {"bnviz/jupyter/static/frame.js", "bnviz_kernels/attention_stats.py"} <= names
    assert not [name for name in names if name.startswith("bnviz/labextension") or "node_modules" in name]


def test_jupyterlab_finds_the_panel(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    for name in wheel.namelist():
        if name.startswith(SHARE):
            target = tmp_path / "labextensions" / "bnviz" / name.removeprefix(SHARE)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(wheel.read(name))
    package = json.loads((tmp_path / "labextensions" / "bnviz" / "package.json").read_text())
    assert package["version"] == bnviz.__version__
    assert (tmp_path / "labextensions" / "bnviz" / package["jupyterlab"]["_build"]["load"]).exists()
    command = [sys.executable, "-m", "jupyter", "labextension", "list"]
    environment = os.environ | {"JUPYTER_PATH": str(tmp_path), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    (line,) = [one for one in (done.stdout + done.stderr).splitlines() if one.strip().startswith("bnviz ")][:1]
    assert f"bnviz v{bnviz.__version__}" in line
    assert "enabled" in line
    assert "OK" in line
