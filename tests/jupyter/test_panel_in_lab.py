"""The side panel in a real JupyterLab and a real Notebook 7: watched, live while a cell runs, reloaded, restarted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bnviz

from .conftest import PANEL

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not PANEL.exists(), reason="the panel is not built: npm run build:prod in labextension/"),
]

SHOTS = Path(bnviz.__file__).parents[1] / "build" / "screenshots"  # of every test as it ended, to look at
MODEL = """
import torch
from bnviz.demo.models import load
model, _ = load("mixtral-bard")
ids = torch.arange(96)[None]
"""
LONG = """
import pathlib, time
while not pathlib.Path("enough").exists():
    model(ids)
    time.sleep(0.02)
"""
ENOUGH = "import pathlib; pathlib.Path('enough').unlink(missing_ok=True)"
PAINTED = """body => [...body.querySelectorAll('*')].flatMap(function all(el) {
    const inner = el.shadowRoot ? [...el.shadowRoot.querySelectorAll('*')].flatMap(all) : [];
    return el.tagName === 'CANVAS' && el.width > 10 ? [el, ...inner] : inner;
}).filter(c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size > 2).length"""


class Shown:
    """The panel of a tab, and the few verbs the tests need."""

    def __init__(self, tab: Any) -> None:
        self.tab, self.page = tab, tab.page

    def state(self, wanted: str) -> None:
        self.page.wait_for_function(
            "wanted => document.querySelector('#bnviz-panel')?.dataset.state === wanted", arg=wanted
        )

    def press(self, key: str) -> None:
        self.page.locator(f"#bnviz-panel [data-key='{key}']").click()

    def see(self, selector: str) -> Any:
        found = self.page.locator(f"#bnviz-panel {selector}").first
        found.wait_for(timeout=60_000)
        return found

    def start(self, cell: int) -> None:
        """Run a cell and do not wait for it."""
        self.page.evaluate(
            """i => {
                book().content.activeCellIndex = i;
                window.ended = jupyterapp.commands.execute('notebook:run-cell').then(() => null);
            }""",
            cell,
        )

    def ended(self) -> None:
        self.page.evaluate("() => window.ended")

    def enough(self) -> None:
        """Have the long cell end."""
        (self.tab.server.root / "enough").touch()

    def calls(self) -> int:
        return int(self.see(".bnviz-words").inner_text().split()[0].replace(",", ""))

    def more_calls(self) -> None:
        """The live numbers go on, while the kernel is busy."""
        self.page.wait_for_function(
            """before => {
                const words = document.querySelector('#bnviz-panel .bnviz-words').textContent;
                return parseInt(words.replace(',', '')) > before;
            }""",
            arg=self.calls(),
        )

    def view(self) -> Any:
        """The page of the newest tab, when its figures are drawn."""
        frame = self.page.frame_locator(".bnviz-View iframe >> nth=-1")
        frame.locator("html[data-ready='1']").wait_for(state="attached", timeout=60_000)
        return frame


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


def watched(shown: Shown) -> None:
    """Watch the long cell for a while, and stop."""
    shown.press("watch")
    shown.see(".bnviz-badge")
    shown.start(1)
    shown.see(".bnviz-Strip")
    shown.enough()
    shown.ended()
    shown.press("stop")
    shown.see(".bnviz-Finding")


def test_a_kernel_without_bnviz_is_told_so_and_mended_by_a_button(shown: Shown) -> None:
    shown.state("absent")
    shown.page.evaluate("() => book().sessionContext.session.kernel.restart()")
    shown.state("absent")
    assert "is not loaded in" in shown.see(".bnviz-Status").inner_text()
    shown.press("load")
    shown.state("live")
    assert "no variable of this kernel is a torch.nn.Module" in shown.see(".bnviz-Section").inner_text()
    shown.tab.run(0)
    row = shown.see("label.bnviz-Row").inner_text()
    assert row.split("\n")[0] == "model"
    assert "MixtralForCausalLM · 2.41 M parameters" in row
    assert (shown.tab.errors, shown.tab.outside) == ([], [])


def test_numbers_are_live_while_a_cell_runs_and_findings_come_after_it(loaded: Shown) -> None:
    loaded.press("watch")
    loaded.page.locator("#bnviz-panel .bnviz-badge", has_text="watched").wait_for()
    loaded.start(1)
    loaded.see(".bnviz-Strip")
    for _ in range(3):
        loaded.more_calls()
    assert loaded.page.evaluate("book().content.widgets[1].model.executionState ?? 'running'") == "running"
    strips = loaded.page.locator("#bnviz-panel .bnviz-Strip")
    assert [strips.nth(i).locator("rect").count() for i in range(strips.count())] == [4, 4, 4]  # layers
    assert "bnviz: model · " in loaded.page.locator(".bnviz-StatusItem").inner_text()
    loaded.press("stop")  # answered while the cell runs
    loaded.page.locator("#bnviz-panel .bnviz-badge", has_text="stopping").wait_for()
    loaded.enough()
    loaded.ended()
    assert loaded.see(".bnviz-Run").inner_text().startswith("run\n")
    assert loaded.see(".bnviz-Finding .bnviz-mark").inner_text().split()[1] in ("high", "medium", "low", "note")
    assert loaded.page.locator("#bnviz-panel .bnviz-Live").is_hidden()
    assert (loaded.tab.errors, loaded.tab.outside) == ([], [])


def test_a_running_cell_is_watched_from_its_next_forward_on(loaded: Shown) -> None:
    loaded.start(1)
    loaded.page.wait_for_function(
        "() => document.querySelector('#bnviz-panel .bnviz-Status').textContent.includes('cell runs')"
    )
    loaded.press("watch")
    loaded.see(".bnviz-Strip")
    loaded.more_calls()
    loaded.enough()
    loaded.ended()


def test_the_next_cell_is_watched_and_no_other(loaded: Shown) -> None:
    loaded.press("watch-next")
    loaded.see("[data-key=stop]")
    loaded.tab.run(2)
    assert " · 1 forward · " in loaded.see(".bnviz-Run").inner_text()
    loaded.see("[data-key=watch]")


def test_a_finding_opens_its_view_and_chooses_its_place(loaded: Shown) -> None:
    watched(loaded)
    loaded.press("view-layer_redundancy")
    page = loaded.view()
    assert page.locator("body").evaluate(PAINTED) >= 1
    assert page.locator("body").evaluate("() => Bokeh.documents.length") >= 1
    finding = loaded.page.locator(".bnviz-Finding", has_text="layer 1, model.layers.1").first
    finding.click()
    page.locator("#status", has_text="Selected: layer 1").wait_for()
    loaded.page.evaluate("() => window[Symbol.for('bnviz')].dispatchEvent(new CustomEvent('select', {detail: {chosen: "
                         "[{layer: 3}], from: null}}))")  # fmt: skip
    assert loaded.see(".bnviz-Chosen span").inner_text() == "Selected: layer 3"
    loaded.tab.command("apputils:change-theme", theme="JupyterLab Dark")
    page.locator("html[data-bnviz-theme=dark]").wait_for(state="attached")
    loaded.tab.command("apputils:change-theme", theme="JupyterLab Light")
    assert (loaded.tab.errors, loaded.tab.outside) == ([], [])


def test_a_report_is_exported_beside_the_notebook(loaded: Shown) -> None:
    watched(loaded)
    loaded.press("export")
    loaded.page.locator(".jp-Dialog input").fill("told.html")
    loaded.page.locator(".jp-Dialog .jp-mod-accept").click()
    loaded.page.locator(".jp-toast-message, .Toastify__toast", has_text="told.html written").first.wait_for()
    assert '<meta name="generator" content="bnviz ' in (loaded.tab.server.root / "told.html").read_text()[:4096]


def test_a_page_that_is_reloaded_while_a_cell_runs_goes_on(loaded: Shown) -> None:
    watched(loaded)
    loaded.press("view-expert_load")
    loaded.view()
    (loaded.tab.server.root / "enough").unlink()
    loaded.press("watch")
    loaded.see(".bnviz-badge")
    loaded.start(1)
    loaded.more_calls()
    loaded.page.evaluate("() => jupyterapp.restored.then(() => jupyterapp.serviceManager.workspaces.list())")
    loaded.page.goto(f"{loaded.tab.server.url}/lab?token={loaded.tab.server.token}")
    loaded.page.wait_for_function("window.jupyterapp && document.querySelector('#bnviz-panel')")
    loaded.state("live")
    loaded.more_calls()
    assert loaded.see(".bnviz-Run").inner_text().startswith("run\n")
    loaded.enough()


def test_a_restarted_kernel_leaves_what_was_seen_and_is_loaded_again(loaded: Shown) -> None:
    watched(loaded)
    loaded.page.evaluate("() => book().sessionContext.session.kernel.restart()")
    loaded.state("stale")
    assert loaded.page.locator("#bnviz-panel .bnviz-Finding").count() > 0
    loaded.press("load")
    loaded.state("live")
    loaded.page.locator("#bnviz-panel .bnviz-RunList", has_text="No run yet").wait_for()


def test_each_notebook_has_a_view_of_its_own(loaded: Shown, server: Any) -> None:
    server.write("other.ipynb", "import torch\nother = torch.nn.Linear(2, 3)\n%load_ext bnviz")
    first = loaded.page.evaluate("() => book().context.path")
    loaded.tab.command("docmanager:open", path="other.ipynb")
    loaded.state("absent")
    loaded.page.evaluate("""() => {
        window.book = () => [...jupyterapp.shell.widgets('main')].find(w => w.context?.path === 'other.ipynb');
    }""")
    loaded.tab.run(0)
    loaded.state("live")
    assert loaded.see("label.bnviz-Row code").inner_text() == "other"
    loaded.tab.command("docmanager:open", path=first)
    loaded.page.wait_for_function(
        "() => document.querySelector('#bnviz-panel label.bnviz-Row code')?.textContent === 'model'"
    )


def test_the_panel_is_worked_with_keys(loaded: Shown) -> None:
    loaded.see("[data-key=watch]").focus()
    loaded.page.keyboard.press("Enter")
    loaded.see(".bnviz-badge")
    loaded.see("[data-key=stop]").focus()
    loaded.page.keyboard.press("Enter")
    loaded.see("[data-key=watch]")
    loaded.page.wait_for_function("() => document.querySelector('#bnviz-panel [role=alert]')?.textContent.length > 0")
    names = loaded.page.evaluate("""() => [...document.querySelectorAll('#bnviz-panel :is(button, input, section, progress)')]
        .filter(el => !(el.getAttribute('aria-label') ?? el.closest('label, section')?.textContent ?? el.textContent)).length""")
    assert names == 0


def test_notebook_7_has_the_panel(tab: Any, server: Any) -> None:
    name = server.write("seven.ipynb", f"%load_ext bnviz\n{MODEL}", "model(ids);").name
    tab.open(name, app="notebooks")
    tab.command("bnviz:show-panel")
    shown = Shown(tab)
    tab.run(0)
    shown.state("live")
    shown.press("watch-next")
    shown.see("[data-key=stop]")
    tab.run(1)
    shown.see(".bnviz-Run")
    shown.press("view-expert_load")  # below the notebook: its main area has one document
    assert shown.view().locator("body").bounding_box()["height"] > 200
    assert tab.outside == []


def test_two_windows_show_the_same_kernel(loaded: Shown, new_tab: Any) -> None:
    name = loaded.page.evaluate("() => book().context.path")
    loaded.tab.command("docmanager:save")
    with new_tab() as second:
        second.open(name)
        second.command("bnviz:show-panel")
        other = Shown(second)
        other.state("live")
        loaded.press("watch")
        other.see("[data-key=stop]")
        loaded.start(1)
        loaded.more_calls()
        other.more_calls()
        other.press("stop")
        loaded.page.locator("#bnviz-panel .bnviz-badge", has_text="stopping").wait_for()
        loaded.enough()
        loaded.ended()
        assert other.see(".bnviz-Run").inner_text() == loaded.see(".bnviz-Run").inner_text()


def test_a_kernel_that_died_leaves_what_was_seen(loaded: Shown) -> None:
    loaded.press("watch")
    loaded.see(".bnviz-badge")
    loaded.page.evaluate("""() => { void book().sessionContext.session.kernel.requestExecute(
        {code: 'import os; os._exit(1)'}); }""")
    loaded.page.wait_for_function(
        "() => ['stale', 'dead'].includes(document.querySelector('#bnviz-panel').dataset.state)"
    )
    assert loaded.see("label.bnviz-Row code").inner_text() == "model"


def test_a_kernel_with_another_protocol_is_told_so(shown: Shown) -> None:
    shown.page.evaluate("""() => book().sessionContext.session.kernel.requestExecute({code:
        'import bnviz.jupyter.protocol as p; p.VERSION = 99\\n%load_ext bnviz'}).done.then(() => null)""")
    shown.state("other")
    assert "speaks protocol 99" in shown.see(".bnviz-Note").inner_text()
    assert shown.page.locator("#bnviz-panel [data-key=watch]").count() == 0


def test_a_kernel_of_another_language_is_left_alone(tab: Any, server: Any) -> None:
    server.write("foreign.ipynb", "1", kernel="foreign")
    tab.open("foreign.ipynb")
    tab.command("bnviz:show-panel")
    shown = Shown(tab)
    shown.state("foreign")
    assert "does not run Python" in shown.see(".bnviz-Status").inner_text()


def test_a_saved_run_opens_from_the_file_browser(loaded: Shown) -> None:
    watched(loaded)
    loaded.page.evaluate("""() => book().sessionContext.session.kernel.requestExecute(
        {code: "run.save('kept.zarr', overwrite=True)"}).done.then(() => null)""")
    loaded.tab.command("filebrowser:refresh")
    loaded.page.locator(".jp-DirListing-item", has_text="kept.zarr").click(button="right")
    loaded.page.locator(".lm-Menu-itemLabel", has_text="Open as bnviz Run").click()
    row = loaded.page.locator("#bnviz-panel .bnviz-Run[data-key='run-run_2']")
    row.wait_for()
    assert row.inner_text().split("\n")[1] == loaded.see(".bnviz-Run").inner_text().split("\n")[1]


def test_a_console_of_the_notebook_shows_its_kernel_until_that_is_closed(loaded: Shown) -> None:
    loaded.tab.command("notebook:create-console")
    loaded.page.locator(".jp-CodeConsole").wait_for()
    loaded.state("live")
    assert loaded.see("label.bnviz-Row code").inner_text() == "model"
    loaded.page.evaluate("() => book().dispose()")
    loaded.state("held")
    assert "Reload this page" in loaded.see(".bnviz-Note").inner_text()


def test_a_renamed_notebook_keeps_its_tabs(loaded: Shown) -> None:
    watched(loaded)
    loaded.press("view-expert_load")
    loaded.view()
    loaded.page.evaluate("() => { window.page = document.querySelector('.bnviz-View iframe'); }")
    first = loaded.page.evaluate("() => book().context.path")
    loaded.tab.command("notebook:create-new", kernelName="python3")
    loaded.state("absent")
    loaded.tab.command("docmanager:open", path=first)
    loaded.state("live")
    assert loaded.page.evaluate("() => page.isConnected")  # in view again, it is as it was left
    loaded.page.evaluate("() => book().context.rename('renamed.ipynb')")
    loaded.page.wait_for_function("() => book().context.path === 'renamed.ipynb'")
    loaded.press("view-expert_load")
    loaded.page.wait_for_function(
        "() => document.querySelector('#bnviz-panel .bnviz-Status').textContent.startsWith('renamed')"
    )
    assert loaded.page.locator(".bnviz-View").count() == 1


def test_a_magic_brings_the_panel_to_the_front(shown: Shown) -> None:
    shown.tab.command("application:toggle-right-area")
    assert not shown.page.locator("#bnviz-panel").is_visible()
    shown.page.evaluate("""() => book().sessionContext.session.kernel.requestExecute(
        {code: '%load_ext bnviz\\n%bnviz panel'}).done.then(() => null)""")
    shown.page.locator("#bnviz-panel").wait_for()


def test_settings_say_what_is_watched(server: Any) -> None:
    schema = json.loads((PANEL / "schemas" / "bnviz" / "plugin.json").read_text())
    assert set(schema["properties"]) == {"side", "autoConnect", "probes"}
    for name, one in schema["properties"].items():
        assert one["title"], name
        assert one["description"], name
        assert "default" in one, name
