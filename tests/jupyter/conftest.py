"""What tests of this folder ask for: one real Jupyter server with its own folders, one real browser, a shell's desk."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import nbformat
import pytest

import bnviz

from .shown import LONG, MODEL, SHOTS, Shown

CHROMIUM = os.environ.get("BNVIZ_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
]
PANEL = Path(bnviz.__file__).parent / "labextension"  # as it was built last
MISSING = [
    name for name in ("jupyterlab", "notebook", "ipykernel", "playwright") if importlib.util.find_spec(name) is None
]
if not CHROMIUM:
    MISSING.append("chromium")


class Server:
    """A running Jupyter server with JupyterLab and Notebook 7 on it."""

    def __init__(self, base: Path) -> None:
        self.root = base / "work"
        self.root.mkdir()
        settings = base / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        quiet = '{"fetchNews": "false", "checkForUpdates": false}'
        (settings / "notification.jupyterlab-settings").write_text(quiet)
        foreign = base / "data" / "kernels" / "foreign"  # a kernel that says it runs another language
        foreign.mkdir(parents=True)
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        (foreign / "kernel.json").write_text(json.dumps({"argv": command, "display_name": "Foreign", "language": "R"}))
        if PANEL.exists():
            (base / "labextensions").mkdir()
            (base / "labextensions" / "bnviz").symlink_to(PANEL)
        self.token = secrets.token_hex(16)
        self.log = (base / "server.log").open("w")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self.process = subprocess.Popen(
            [*self._command(), f"--LabServerApp.extra_labextensions_path={base / 'labextensions'}"],
            env=self._environment(base),
            stdout=self.log,
            stderr=subprocess.STDOUT,
        )
        self._wait()

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
            f"--port={self.url.rpartition(':')[2]}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={self.root}",
            "--LabApp.news_url=None",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--LabApp.extension_manager=readonly",
            "--LabApp.expose_app_in_browser=True",
            "--JupyterNotebookApp.expose_app_in_browser=True",
        ]

    def _environment(self, base: Path) -> dict[str, str]:
        own = {
            "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_RUNTIME_DIR": "runtime",
            "JUPYTER_DATA_DIR": "data",
            "IPYTHONDIR": "ipython",
            "JUPYTERLAB_SETTINGS_DIR": "settings",
            "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        }
        same = {"PYTHONPATH": str(Path(bnviz.__file__).parents[1])}  # kernels see the bnviz under test
        quiet = {"OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        return {**os.environ, **same, **quiet, **{name: str(base / folder) for name, folder in own.items()}}

    def _wait(self) -> None:
        end = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/api/status?token={self.token}", timeout=2).read()
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None or time.monotonic() > end:
                    self.stop()
                    raise RuntimeError(
                        f"JupyterLab did not start:\n{Path(self.log.name).read_text()[-2000:]}"
                    ) from None
                time.sleep(0.1)  # between polls of a port: nothing to wait on yet
            else:
                return

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def write(self, name: str, *cells: str, kernel: str = "python3") -> Path:
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        book.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
        nbformat.write(book, self.root / name)
        return self.root / name


class Tab:
    """A browser tab with a notebook, and the few verbs the tests need."""

    NOISE = re.compile(r"favicon|ResizeObserver|\[JupyterFrontEnd\]|preload|debugger state|reading 'schema'")

    def __init__(self, page: Any, server: Server) -> None:
        self.page, self.server = page, server
        self.errors: list[str] = []
        self.outside: list[str] = []
        page.on("console", lambda m: m.type == "error" and self._error(m.text))
        page.on("pageerror", lambda e: self._error(str(e)))
        page.on("request", lambda r: self._request(r.url))

    def _error(self, text: str) -> None:
        if not self.NOISE.search(text):
            self.errors.append(text)

    def _request(self, url: str) -> None:
        if not url.startswith((self.server.url, self.server.url.replace("http", "ws"), "data:", "blob:", "about:")):
            self.outside.append(url)

    def open(self, name: str, *, app: str = "lab/tree", kernel: bool = True) -> None:
        reset = "&reset" if app.startswith("lab") else ""
        self.page.goto(f"{self.server.url}/{app}/{name}?token={self.server.token}{reset}")
        self.page.wait_for_function("window.jupyterapp && document.querySelector('.jp-Notebook')")
        self.page.evaluate(
            """() => { window.book = () => [...jupyterapp.shell.widgets('main')].find(w => w.content?.widgets); }"""
        )
        if kernel:
            self.page.wait_for_function("book()?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000)

    def command(self, name: str, **arguments: Any) -> None:
        self.page.evaluate("([n, a]) => jupyterapp.commands.execute(n, a).then(() => null)", [name, arguments])

    def run(self, cell: int) -> list[dict[str, Any]]:
        """Run a cell and wait for its end; its outputs."""
        self.page.evaluate(
            """i => {
                book().content.activeCellIndex = i;
                return jupyterapp.commands.execute('notebook:run-cell').then(() => null);
            }""",
            cell,
        )
        return self.outputs(cell)

    def outputs(self, cell: int) -> list[dict[str, Any]]:
        return self.page.evaluate("i => book().content.widgets[i].model.outputs?.toJSON() ?? []", cell)

    def shut_down_kernel(self) -> None:
        self.page.evaluate("() => book().sessionContext.shutdown()")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}")
    running = Server(tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser(server: Server) -> Iterator[Any]:
    """Closed with its file: while Playwright is open, no other file of the same worker can open one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def new_tab(browser: Any, server: Server) -> Callable[[], AbstractContextManager[Tab]]:
    """Opens a tab with cookies and storage of its own, for the length of a `with` block."""

    @contextmanager
    def opened() -> Iterator[Tab]:
        context = browser.new_context(viewport={"width": 1400, "height": 1000}, reduced_motion="reduce")
        context.set_default_timeout(30_000)
        yield Tab(context.new_page(), server)
        context.close()

    return opened


@pytest.fixture
def tab(new_tab: Callable[[], AbstractContextManager[Tab]]) -> Iterator[Tab]:
    with new_tab() as one:
        yield one


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The desk of a real IPython shell with a small model in it; it notices cells as in a kernel."""
    monkeypatch.delattr(builtins, "_", raising=False)  # a doctest leaves one, and IPython then keeps none of its own
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    from tests.capture.test_sites import Body, PreNorm

    from .desks import Later, X

    shell = interactiveshell.InteractiveShell.instance(colors="nocolor")
    shell.run_line_magic("load_ext", "bnviz")
    made = shell._bnviz_magics.desk
    shell.push({"x": X, "net": Body(PreNorm).eval(), "desk": made, "later": Later()})
    for name, notice in (("pre_run_cell", made.cell_begins), ("post_run_cell", made.cell_ends)):
        shell.events.register(name, notice)
    yield made
    for name, notice in (("pre_run_cell", made.cell_begins), ("post_run_cell", made.cell_ends)):
        shell.events.unregister(name, notice)
    shell.run_line_magic("unload_ext", "bnviz")
    shell.history_manager.end_session()
    interactiveshell.InteractiveShell.clear_instance()


@pytest.fixture
def shown(tab: Any, server: Any, request: pytest.FixtureRequest) -> Iterator[Shown]:
    """A notebook of its own with a model, the panel in front, bnviz not loaded yet."""
    (server.root / "enough").unlink(missing_ok=True)
    name = f"{request.node.name}.ipynb"
    server.write(name, MODEL, LONG, "model(ids);")
    tab.open(name)
    tab.command("bnviz:show-panel")
    yield Shown(tab)
    SHOTS.mkdir(parents=True, exist_ok=True)
    tab.page.screenshot(path=SHOTS / f"{request.node.name}.png")


@pytest.fixture
def loaded(shown: Shown) -> Shown:
    shown.tab.run(0)
    shown.state("absent")
    shown.press("load")
    shown.state("live")
    return shown
