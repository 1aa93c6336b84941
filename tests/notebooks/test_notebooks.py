"""Every notebook of the gallery runs in a real kernel, from top to bottom, and shows what its text promises."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("transformers")

GALLERY = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(GALLERY.glob("*.ipynb"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The notebooks by name, each executed once, in an empty folder."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join([str(GALLERY.parent), os.environ.get("PYTHONPATH", "")]))
        environment.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        environment.setenv("IPYTHONDIR", str(tmp_path_factory.mktemp("ipython")))
        environment.setenv("HF_HUB_OFFLINE", "1")
        done = {}
        for path in NOTEBOOKS:
            book = nbformat.read(path, as_version=4)
            folder = tmp_path_factory.mktemp(path.stem)
            nbclient.NotebookClient(book, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
            done[path.stem] = book
    return done


def outputs(book: Any, source: str) -> list[Any]:
    """Outputs of the one code cell that contains `source`."""
    (cell,) = [cell for cell in book.cells if cell.cell_type == "code" and source in cell.source]
    return list(cell.outputs)


def shown(outputs: list[Any], mime: str = "text/plain") -> str:
    """What the cell displayed in `mime`, and what it printed."""
    texts = [one.text if one.output_type == "stream" else one.get("data", {}).get(mime, "") for one in outputs]
    return "\n".join(texts)


def test_there_are_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"quickstart", "kv-cache"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_without_outputs(path: Path) -> None:
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    for cell in book.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_runs_without_warning_or_error(executed: dict[str, Any], name: str) -> None:
    every = [output for cell in executed[name].cells for output in cell.get("outputs", [])]
    assert [output for output in every if output.output_type == "error"] == []
    assert [output.text for output in every if output.get("name") == "stderr"] == []


def test_quickstart_shows_the_report(executed: dict[str, Any]) -> None:
    page = shown(outputs(executed["quickstart"], "%%bnviz model"), "text/html")
    assert page.count("<iframe") == 1
    assert "https://" not in re.sub(r"srcdoc=\"[^\"]*\"", "", page)
    frame = re.search(r'srcdoc="([^"]*)"', page)
    assert frame is not None
    assert frame[1].count("data-doc=") >= 4
    assert page.partition("bnviz-still")[2].count("<tr>") >= 3


def test_quickstart_shows_the_run(executed: dict[str, Any]) -> None:
    (cell,) = [cell for cell in executed["quickstart"].cells if cell.source == "run"]
    table = shown(cell.outputs, "text/html")
    for kind in ("activations", "attention", "keys_values", "routing"):
        assert f">{kind}</td>" in table
    assert "query 256" in table


def test_quickstart_finds_the_idle_experts(executed: dict[str, Any]) -> None:
    said = shown(outputs(executed["quickstart"], "report.findings[:5]"))
    assert re.search(r"^(high|medium|low|note) ", said, re.MULTILINE)
    loads = shown(outputs(executed["quickstart"], 'report["expert_load"]'))
    assert len(loads.splitlines()) == 6  # two lines of heads, four layers


def test_quickstart_writes_what_it_says(executed: dict[str, Any]) -> None:
    said = shown(outputs(executed["quickstart"], "bnviz.open(store)"))
    size = re.search(r"report.html: ([\d.]+) MiB", said)
    assert size is not None
    assert 0.4 < float(size[1]) < 3
    assert "'attention'" in said


def test_kv_cache_measures_what_it_ranks(executed: dict[str, Any]) -> None:
    said = shown(outputs(executed["kv-cache"], "rank correlation"))
    found = re.search(r"rank correlation (-?[\d.]+)", said)
    assert found is not None and -1 <= float(found[1]) <= 1
    assert len(re.findall(r"^\w+ +[\d.]+ +[\d.]+$", said, re.MULTILINE)) == 14  # scores, none left out
    cost = shown(outputs(executed["kv-cache"], "bnviz.diagnose(measured)"), "text/html")
    assert "What does a smaller KV cache cost the output, measured?" in cost


def test_kv_cache_finds_the_heads_that_look_back_and_what_stays_important(executed: dict[str, Any]) -> None:
    said = shown(outputs(executed["kv-cache"], '"retrieval_heads"'))
    assert "llama-bard: No head finds earlier copies" in said
    assert "llama-induction-byte: 1 of 8 heads finds earlier copies, most layer 1 head 3" in said
    shared = shown(outputs(executed["kv-cache"], "streaming_llm+duoattention"))
    assert len(re.findall(r"^(?:snapkv|streaming_llm)\S* +[\d.]+ +[\d.]+$", shared, re.MULTILINE)) == 7
    recall = shown(outputs(executed["kv-cache"], 'over_time["recall_mean"]'))
    assert len(re.findall(r"^\d +0\.\d\d", recall, re.MULTILINE)) == 4
