"""The side panel with other notebooks, windows, kernels and languages, with a console, from a file, and in Notebook 7."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import PANEL
from .shown import MODEL, Shown, watched

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not PANEL.exists(), reason="the panel is not built: make panel"),
]


def test_each_notebook_has_a_view_of_its_own(loaded: Shown, server: Any) -> None:
    server.write("other.ipynb", "import torch\nother = torch.nn.Linear(2, 3)\n%load_ext bnviz")
    first = loaded.page.evaluate("() => book().context.path")
    loaded.setting("autoConnect", False)
    try:
        loaded.tab.command("docmanager:open", path="other.ipynb")
        loaded.state("unasked")
    finally:
        loaded.setting("autoConnect", True)
    loaded.state("absent")  # asked at once
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
    loaded.page.evaluate("""() => book().sessionContext.session.kernel.requestExecute({code:
        "run.save('kept.zarr', overwrite=True); run.save('kept.zarr.zip', overwrite=True)"}).done.then(() => null)""")
    loaded.in_browser("kept.zarr").click(button="right")
    loaded.page.locator(".lm-Menu-itemLabel", has_text="Open as bnviz Run").click()
    row = loaded.see(".bnviz-Run[data-key='run-run_2']")
    captured, opened = (one.inner_text().split("\n")[1] for one in (loaded.see(".bnviz-Run"), row))
    assert opened.split(" · ")[:2] == captured.split(" · ")[:2]  # bytes in memory are counted from what was read again
    asked: list[str] = []
    loaded.page.on("request", lambda request: asked.append(f"{request.method} {request.url}"))
    loaded.in_browser("kept.zarr.zip").dblclick()
    row = loaded.see(".bnviz-Run[data-key='run-run_3'][aria-pressed=true]")
    loaded.page.locator(".bnviz-RunFile").wait_for(state="detached")
    of_file = [one for one in asked if "/api/contents/kept.zarr.zip" in one]
    assert of_file
    assert all(one.startswith("GET") and ("content=0" in one or "/checkpoints" in one) for one in of_file)
    icons = {
        loaded.in_browser(name).locator("[data-icon]").get_attribute("data-icon")
        for name in ("kept.zarr", "kept.zarr.zip")
    }
    assert icons == {"bnviz:logo"}
    loaded.in_browser("kept.zarr").dblclick()  # a folder is a folder
    loaded.page.locator(".jp-BreadCrumbs", has_text="kept.zarr").wait_for()
    assert (loaded.tab.errors, loaded.tab.outside) == ([], [])


def test_a_saved_run_says_what_to_do_where_no_kernel_has_bnviz(shown: Shown) -> None:
    file = shown.tab.server.root / "torn.bnviz.zip"
    file.write_bytes(b"torn")
    shown.state("absent")
    shown.in_browser(file.name).dblclick()
    told = shown.page.locator(".bnviz-RunFile")
    told.locator("text=no notebook in view has bnviz loaded").wait_for()
    shown.page.keyboard.press("Control+s")
    shown.page.locator(".Toastify__toast", has_text="is read-only").first.wait_for()
    assert file.read_bytes() == b"torn"
    shown.press("load")
    shown.state("live")
    told.locator("button", has_text="Open in the kernel of").click()
    assert file.name in told.locator("[role=alert]").inner_text()


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
    shown.tab.run(0)
    shown.page.evaluate("""() => book().sessionContext.session.kernel.requestExecute(
        {code: '%load_ext bnviz'}).done.then(() => null)""")
    shown.state("live")
    assert shown.page.locator("#bnviz-panel label.bnviz-Row").count() == 0  # hidden it draws nothing
    shown.page.evaluate("""() => book().sessionContext.session.kernel.requestExecute(
        {code: '%bnviz panel'}).done.then(() => null)""")
    shown.page.locator("#bnviz-panel").wait_for()
    assert shown.see("label.bnviz-Row code").inner_text() == "model"


def test_settings_say_what_is_watched(server: Any) -> None:
    schema = json.loads((PANEL / "schemas" / "bnviz" / "plugin.json").read_text())
    assert set(schema["properties"]) == {"side", "autoConnect", "probes"}
    for name, one in schema["properties"].items():
        assert one["title"], name
        assert one["description"], name
        assert "default" in one, name
