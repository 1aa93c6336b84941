"""The walls of the house: import direction, sizes, public names, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import bnviz

ROOT = Path(bnviz.__file__).parent
KERNELS = ROOT.parent / "kernels" / "bnviz_kernels"
FILES = sorted(p for p in ROOT.rglob("*.py"))

ROWS = (  # from the top; a file imports from rows below it, and from its own room
    ("__init__",),
    ("__main__",),
    ("cli",),
    ("demo",),
    ("jupyter",),
    ("report",),
    ("experiments",),
    ("capture", "probes", "diagnostics", "views"),
    ("run", "estimators", "scores"),
    ("events", "reduce", "hardware"),
    ("catalog",),
    ("observation", "quantities", "schema"),
    ("errors", "kinds"),
)
RANK = {room: row for row, rooms in enumerate(ROWS) for room in rooms}
PART_OF = (
    {"doctor": "cli", "profile": "observation", "experiment": "experiments", "vocabulary": "schema"}
    | dict.fromkeys(
        ("assemble", "counts", "gathered", "head_lists", "layered", "rows", "segments", "store", "streamed", "trace"),
        "run",
    )
    | dict.fromkeys(
        ("page", "figures", "overview", "tables", "findings", "needs", "compare", "comparison", "aligned", "matching"),
        "report",
    )
)
BANNED_NAMES = {"utils", "helpers", "common", "manager", "misc"}
LIGHT = {"diagnostics": {"torch", "bokeh", "zarr"}, "views": {"torch", "zarr"}, "schema": {"torch", "bokeh", "zarr"}}


def room_of(file: Path) -> str:
    first = file.relative_to(ROOT).parts[0].removesuffix(".py")
    return PART_OF.get(first, first)


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Absolute names of everything imported at run time, lazily too; not under TYPE_CHECKING."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield prefix, node.lineno
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def package_of(file: Path) -> str:
    return ".".join(["bnviz", *file.relative_to(ROOT).parent.parts])


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    room = room_of(file)
    assert room in RANK, f"{room} stands in no row; place it in ROWS"
    for name, line in imports(ast.parse(file.read_text()), package_of(file)):
        parts = name.split(".")
        assert not (parts[0] in LIGHT.get(room, ()) and parts[0] != room), f"{file.name}:{line} {room} imports {name}"
        if parts[0] != "bnviz" or len(parts) < 2:
            continue
        other = PART_OF.get(parts[1], parts[1])
        if other in RANK and other != room:
            assert RANK[other] > RANK[room], f"{file.name}:{line} {room} imports {other}, which is not below it"


@pytest.mark.parametrize("file", [*FILES, *KERNELS.glob("*.py")], ids=lambda f: f"{f.parent.name}/{f.name}")
def test_sizes(file: Path) -> None:
    text = file.read_text()
    assert file.stem not in BANNED_NAMES
    assert len(text.splitlines()) <= 400, f"{file.name} is longer than 400 lines: a concept is missing"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if body:
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1
            assert length <= 50, f"{file.name}:{node.lineno} {node.name} has a body of {length} lines"
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        records = {a.arg for a in every if a.annotation is not None and "Dataset" in ast.unparse(a.annotation)}
        taken = [
            a.arg for a in every if a.arg not in ("self", "cls", "_", *records)
        ]  # a diagnostic's records are its input
        kernel = any("jit" in ast.dump(d) for d in node.decorator_list)  # a kernel's pointers and strides are its shape
        assert len(taken) < 8 or kernel, f"{file.name}:{node.lineno} {node.name} takes {len(taken)} parameters"


def test_public_names_are_pinned() -> None:
    assert sorted(bnviz.__all__) == [
        "BnvizError", "Recorder", "Report", "Run", "__version__", "capture", "compare", "diagnose", "diagnostics",
        "estimators", "experiment", "experiments", "open", "probes", "reduce", "scores", "sites", "views",
    ]  # fmt: skip
    for name in bnviz.__all__:
        assert getattr(bnviz, name) is not None


def test_a_name_means_the_same_before_and_after_imports() -> None:
    import bnviz.capture.recorder
    import bnviz.reduce.block_stats

    assert callable(bnviz.capture)
    assert callable(bnviz.reduce.block_stats)
    assert bnviz.capture is sys.modules["bnviz.capture"].capture


def test_import_is_light() -> None:
    code = "import bnviz, sys; print([m for m in ('torch', 'bokeh', 'xarray', 'pandas', 'zarr', 'IPython') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_stored_run_opens_without_torch_and_bokeh(tmp_path: Path) -> None:
    import xarray as xr

    path = bnviz.Run({"labels": xr.Dataset({"label": ("sample", [0, 1])})}, {"model": "net"}).save(
        tmp_path / "run.zarr"
    )
    code = f"import bnviz, sys; bnviz.open({str(path)!r})['labels']; print([m for m in ('torch', 'bokeh') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kernels_stand_alone() -> None:
    for file in KERNELS.glob("*.py"):
        tree = ast.parse(file.read_text())
        roots = {name.split(".")[0] for name, _ in imports(tree, "bnviz_kernels")} - set(sys.stdlib_module_names)
        assert roots <= {"torch", "triton", "bnviz_kernels"}, f"{file.name} imports {roots}"
