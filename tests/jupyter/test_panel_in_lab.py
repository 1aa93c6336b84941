"""The side panel in a real JupyterLab: watched, live while a cell runs, looked at, exported, reloaded, restarted."""

from __future__ import annotations

import pytest

from .conftest import PANEL
from .shown import Shown, watched

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not PANEL.exists(), reason="the panel is not built: make panel"),
]

PAINTED = """body => [...body.querySelectorAll('*')].flatMap(function all(el) {
    const inner = el.shadowRoot ? [...el.shadowRoot.querySelectorAll('*')].flatMap(all) : [];
    return el.tagName === 'CANVAS' && el.width > 10 ? [el, ...inner] : inner;
}).filter(c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size > 2).length"""


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
    chosen_by_keys(loaded)
    finding = loaded.see(".bnviz-Found .bnviz-Finding")
    assert loaded.see(".bnviz-Found h4").inner_text().startswith("So far, of step ")
    finding.focus()
    loaded.page.keyboard.press("Enter")
    assert loaded.see(".bnviz-Chosen span").inner_text().startswith("Selected: layer ")
    loaded.press("stop")  # answered while the cell runs
    loaded.page.locator("#bnviz-panel .bnviz-badge", has_text="stopping").wait_for()
    loaded.enough()
    loaded.ended()
    assert loaded.see(".bnviz-Run").inner_text().startswith("run\n")
    assert loaded.see(".bnviz-Finding .bnviz-mark").inner_text().split()[1] in ("high", "medium", "low", "note")
    assert loaded.page.locator("#bnviz-panel .bnviz-Live").is_hidden()
    assert (loaded.tab.errors, loaded.tab.outside) == ([], [])


def chosen_by_keys(loaded: Shown) -> None:
    """A layer of a strip, which keeps the focus while numbers come."""
    slider = loaded.see("[data-key=strip-entropy]")
    slider.focus()
    for key in ("End", "ArrowLeft", "Enter"):
        loaded.page.keyboard.press(key)
    loaded.more_calls()
    assert loaded.see(".bnviz-Chosen span").inner_text() == "Selected: layer 2"
    assert slider.get_attribute("aria-valuetext").startswith("layer 2: ")
    assert slider.evaluate("el => el === document.activeElement && getComputedStyle(el).outlineStyle") == "solid"
    loaded.page.keyboard.press("Escape")
    loaded.page.locator("#bnviz-panel .bnviz-Chosen").wait_for(state="hidden")


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
    loaded.page.locator("#bnviz-panel [data-key=watch-next]").dblclick()  # the second click does nothing
    loaded.see("[data-key=stop]")
    loaded.tab.run(2)
    assert " · 1 forward · " in loaded.see(".bnviz-Run").inner_text()
    loaded.see("[data-key=watch]")
    assert loaded.page.locator(".Toastify__toast").count() == 0


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
