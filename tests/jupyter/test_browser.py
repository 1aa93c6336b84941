"""A real JupyterLab and a real Notebook 7, a real kernel, a real browser: what is shown live, saved, reopened, distrusted."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bnviz

pytestmark = pytest.mark.browser

QUICKSTART = Path(bnviz.__file__).parents[1] / "notebooks" / "quickstart.ipynb"
FRAME = "iframe.bnviz-frame"
READY = "html[data-ready='1']"
MODEL = """
%load_ext bnviz
import torch, bnviz
from bnviz.demo.models import load
from bnviz.jupyter import View
model, _ = load("mixtral-bard")
ids = torch.arange(96)[None]
"""
WATCH = "%%bnviz model -p attention,routing\nmodel(ids);"
PAINTED = """body => {
    const canvases = [];
    const walk = node => {
        for (const el of node.querySelectorAll('*')) {
            if (el.shadowRoot) walk(el.shadowRoot);
            if (el.tagName === 'CANVAS' && el.width > 10 && el.height > 10) canvases.push(el);
        }
    };
    walk(body);
    const colours = c => new Set(new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)).size;
    return canvases.filter(c => colours(c) > 2).length;
}"""
SOURCES = """() => Bokeh.documents.map(d => [...d._all_models.values()]
    .filter(m => m.type === 'ColumnDataSource').map(s => s.get_length()))"""


def report(tab: Any, number: int = 0) -> Any:
    """The page of a report among the notebook's, when all its figures are drawn."""
    tab.page.locator(FRAME).nth(number).scroll_into_view_if_needed()
    frame = tab.page.frame_locator(f"{FRAME} >> nth={number}")
    frame.locator(READY).wait_for(state="attached", timeout=60_000)
    return frame


def figures(frame: Any) -> int:
    """Drawings of a report that have been painted, each checked to be one."""
    holders = frame.locator("[data-doc]")
    count = int(holders.count())
    assert [holders.nth(i).get_attribute("data-state") for i in range(count)] == ["drawn"] * count
    assert frame.locator("body").evaluate(PAINTED) >= count
    return count


def quiet(tab: Any) -> None:
    """Nothing went wrong in the page, and nothing was asked of any other machine."""
    assert tab.errors == []
    assert tab.outside == []


@pytest.fixture(scope="module")
def made(new_tab: Any, server: Any) -> str:
    """A notebook with a report in its second cell, run, saved, its kernel alive."""
    name = "watched.ipynb"
    server.write(name, MODEL, WATCH, "View(bnviz.diagnose(run).view('expert_load'))")
    with new_tab() as tab:
        tab.open(name)
        tab.run(0)
        outputs = tab.run(1)
        assert [one["output_type"] for one in outputs] == ["display_data"]
        tab.command("docmanager:save")
    return name


@pytest.fixture
def watched(tab: Any, made: str) -> Any:
    """A tab of JupyterLab with that notebook."""
    tab.open(made)
    return tab


def test_quickstart_runs_is_saved_and_reopens_without_its_kernel(tab: Any, server: Any) -> None:
    shutil.copy(QUICKSTART, server.root / "quickstart.ipynb")
    tab.open("quickstart.ipynb")
    cells = json.loads(QUICKSTART.read_text())["cells"]
    for number in range(len(cells)):
        assert not any(one["output_type"] == "error" for one in tab.run(number))
    assert tab.page.locator(FRAME).count() == 2
    drawn = [figures(report(tab, 0)), figures(report(tab, 1))]
    assert drawn[0] >= 4
    assert drawn[1] >= 1
    assert tab.page.locator(".bnviz-still:visible").count() == 0
    tab.command("docmanager:save")
    quiet(tab)
    assert (server.root / "quickstart.ipynb").stat().st_size < 4_000_000

    tab.shut_down_kernel()
    tab.open("quickstart.ipynb", kernel=False)
    assert [figures(report(tab, 0)), figures(report(tab, 1))] == drawn
    quiet(tab)

    tab.open("quickstart.ipynb", app="notebooks", kernel=False)
    assert [figures(report(tab, 0)), figures(report(tab, 1))] == drawn
    assert tab.outside == []


def test_frame_fits_follows_the_theme_and_keeps_its_links(watched: Any) -> None:
    frame, page = report(watched), watched.page
    page.locator(FRAME).evaluate("frame => frame.scrollIntoView()")
    box = page.locator(FRAME).bounding_box()
    assert 480 <= box["height"] <= 0.8 * page.viewport_size["height"] + 1
    assert frame.locator("#theme").is_hidden()
    assert frame.locator("html").get_attribute("data-bnviz-theme") == "light"
    light = frame.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    watched.command("apputils:change-theme", theme="JupyterLab Dark")
    frame.locator("html[data-bnviz-theme=dark]").wait_for(state="attached")
    dark = frame.locator("body").evaluate("body => getComputedStyle(body).backgroundColor")
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(33, 33, 33)")
    watched.command("apputils:change-theme", theme="JupyterLab Light")
    frame.locator("html[data-bnviz-theme=light]").wait_for(state="attached")

    frame.locator("nav a[href='#expert_load']").click()
    page.wait_for_function(
        f"""() => {{ const d = document.querySelector('{FRAME}').contentDocument;
             return Math.abs(d.getElementById('expert_load').getBoundingClientRect().top) < 120; }}"""
    )
    assert page.locator(FRAME).evaluate("frame => frame.contentWindow.scrollY") > 100  # the page moved,
    assert page.locator(FRAME).bounding_box()["y"] == pytest.approx(box["y"], abs=40)  # the notebook did not
    assert frame.locator(READY).count() == 1  # still the report: the link has not loaded the notebook into the frame
    quiet(watched)


def test_selection_is_one_for_report_and_live_view(watched: Any) -> None:
    watched.run(2)
    page = watched.page
    page.wait_for_selector(".bnviz-view .bk-Figure")
    frame = report(watched)
    frame.locator(".finding[data-where*=expert] .sev").first.click()
    frame.locator("#status", has_text="Selected: layer").wait_for()
    chosen = page.evaluate("() => globalThis[Symbol.for('bnviz')].chosen")
    assert {"layer", "expert", "path"} <= set(chosen[0])
    selected = page.evaluate(
        """() => Bokeh.documents.flatMap(d => [...d._all_models.values()])
            .filter(m => m.type === 'ColumnDataSource' && m.selected.indices.length).length"""
    )
    assert selected >= 1
    page.evaluate("() => globalThis[Symbol.for('bnviz')].clear()")
    frame.locator("#status", has_text="Select a mark").wait_for()
    quiet(watched)


def test_distrusted_notebook_and_converted_one(watched: Any, server: Any) -> None:
    drawn = figures(report(watched))
    book = json.loads((server.root / "watched.ipynb").read_text())
    book["cells"][1]["source"] = "# somebody else's notebook"
    (server.root / "distrusted.ipynb").write_text(json.dumps(book))
    watched.open("distrusted.ipynb", kernel=False)
    still = watched.page.locator(".bnviz-still")
    still.wait_for()
    assert watched.page.locator(FRAME).count() == 0
    assert re.search(r"expert", still.inner_text())
    quiet(watched)

    convert = [sys.executable, "-m", "nbconvert", "--to", "html", "--template", "basic", "watched.ipynb"]
    subprocess.run(convert, cwd=server.root, check=True, capture_output=True)
    watched.page.goto((server.root / "watched.html").as_uri())
    assert figures(report(watched)) == drawn
    assert watched.page.locator(".bnviz-still:visible").count() == 0


def test_live_view_mirrors_both_ways_and_comes_back(tab: Any, server: Any) -> None:
    live = """
from bokeh.layouts import column
from bokeh.models import Slider
from bokeh.plotting import figure
from bnviz.jupyter import View
plot, slider, got = figure(width=300, height=200), Slider(start=0, end=9, value=1), []
line = plot.line([1, 2, 3], [1, 2, 3])
def moved(attr, old, new):
    got.append((old, new))
    line.data_source.data = {"x": [1, 2], "y": [new, new]}
slider.on_change("value", moved)
view = View(column(slider, plot))
view
"""
    stream = 'for i in range(5): line.data_source.stream({"x": [i], "y": [i]})'
    server.write("live.ipynb", live, stream, "view", "got")
    tab.open("live.ipynb")
    tab.run(0)
    tab.page.wait_for_selector(".bnviz-view .bk-Figure")
    tab.run(1)
    tab.page.wait_for_function(f"() => String(({SOURCES})()) === '8'")
    tab.run(2)  # a second showing starts where the first one is
    tab.page.wait_for_function(f"() => String(({SOURCES})()) === '8,8'")
    assert tab.page.locator(".bnviz-view").first.evaluate(PAINTED) == 1

    tab.page.evaluate(
        "() => { [...Bokeh.documents.at(-1)._all_models.values()].find(m => m.type === 'Slider').value = 5; }"
    )
    tab.page.wait_for_function(f"() => String(({SOURCES})()) === '2,2'")
    assert tab.run(3)[0]["data"]["text/plain"] == "[(1, 5)]"
    tab.command("docmanager:save")
    assert (server.root / "live.ipynb").stat().st_size < 10_000

    tab.open("live.ipynb")  # the page anew, the kernel as it was
    tab.page.wait_for_function(f"() => window.Bokeh && String(({SOURCES})()) === '2,2'")
    quiet(tab)
