"""The saved page in a real browser: offline, quiet, one selection, both themes, the keyboard."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bnviz.report import Report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")]
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
]

# the screen position of a data point of the figure called `name`
WHERE = """([name, x, y]) => {
  const bus = globalThis[Symbol.for('bnviz')];
  const plot = [...bus.documents].flatMap(d => [...d._all_models.values()]).find(m => m.type === 'Figure' && m.name === name);
  const view = Bokeh.index.find_one(plot);
  const box = view.canvas_view.el.getBoundingClientRect();
  return [box.left + view.frame.x_scale.compute(x), box.top + view.frame.y_scale.compute(y)];
}"""
CHOSEN = """name => { const bus = globalThis[Symbol.for('bnviz')];
  const all = [...bus.documents].flatMap(d => [...d._all_models.values()]);
  return all.find(m => m.name === name && m.selected).selected.indices }"""
CURSOR = """() => { const bus = globalThis[Symbol.for('bnviz')];
  const data = [...bus.documents].flatMap(d => [...d._all_models.values()]).find(m => m.name === 'bnviz-cursor').data;
  return Object.fromEntries(data instanceof Map ? data : Object.entries(data)) }"""
COLOURS = """() => { const bus = globalThis[Symbol.for('bnviz')];
  const all = [...bus.documents].flatMap(d => [...d._all_models.values()]);
  return { axis: all.find(m => m.type === 'LinearAxis').axis_label_text_color,
           map: all.find(m => m.type === 'LinearColorMapper').palette[0],
           page: getComputedStyle(document.body).backgroundColor } }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def saved(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.save(tmp_path_factory.mktemp("report") / "report.html")


@pytest.fixture
def open_page(browser: Any, saved: Path) -> Iterator[Callable[..., Any]]:
    """`open_page(query)`: the report from the disk, offline, drawn; at the end it must have been quiet."""
    contexts, complaints = [], []

    def opened(query: str = "", path: Path = saved, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": 1100, "height": 900}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on(
            "request", lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else complaints.append(r.url)
        )
        page.goto(path.as_uri() + query)
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]", timeout=20_000)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


def click(page: Any, figure: str, x: float, y: float, **options: Any) -> None:
    page.locator(f"#{figure[0]} .holder").scroll_into_view_if_needed()
    at = page.evaluate(WHERE, [figure[1], x, y])
    if options.get("shift"):
        page.keyboard.down("Shift")
    page.mouse.click(*at)
    if options.get("shift"):
        page.keyboard.up("Shift")


ATLAS, STRIP, DENSE = ("head_share", "atlas"), ("layer_size", "strip"), ("dense_map", "dense")


def status(page: Any) -> str:
    return str(page.locator("#status").inner_text())


def test_is_drawn_within_two_seconds_of_opening(open_page: Callable[..., Any]) -> None:
    page = open_page()
    assert page.locator('.holder[data-state="drawn"]').count() == 3
    assert page.evaluate("performance.now()") < 10_000


def test_a_mark_selects_its_place_everywhere(open_page: Callable[..., Any]) -> None:
    page = open_page()
    click(page, ATLAS, 1, 3)
    assert status(page) == "Selected: layer 1, head 3 · model.layers.1.self_attn · Esc clears"
    assert page.evaluate(CHOSEN, "atlas") == [9]
    assert page.evaluate(CHOSEN, "strip") == [1]
    assert page.evaluate(CURSOR) == {"cx": [1], "cy": [3], "width": [1], "height": [1]}
    assert page.url.endswith("#layer=1&head=3")
    page.keyboard.press("Escape")
    assert page.evaluate(CHOSEN, "atlas") == page.evaluate(CHOSEN, "strip") == []
    assert page.evaluate(CURSOR)["cx"] == []
    assert status(page).startswith("Select a mark")
    assert "#" not in page.url


def test_a_click_on_what_is_selected_clears(open_page: Callable[..., Any]) -> None:
    page = open_page("#layer=1&head=3")
    assert page.evaluate(CHOSEN, "atlas") == [9]
    click(page, ATLAS, 1, 3)
    sync_api.expect(page.locator("#status")).to_contain_text("Select a mark")
    assert page.evaluate(CHOSEN, "atlas") == []


def test_shift_adds_to_what_is_selected(open_page: Callable[..., Any]) -> None:
    page = open_page("#layer=1&head=3")
    click(page, ATLAS, 2, 0, shift=True)
    assert page.evaluate(CHOSEN, "atlas") == [9, 12]
    assert page.evaluate(CHOSEN, "strip") == [1, 2]
    assert "and 1 more" in status(page)


def test_a_plain_click_replaces_what_is_selected(open_page: Callable[..., Any]) -> None:
    page = open_page("#layer=1&head=3")
    click(page, ATLAS, 0, 0)
    assert page.evaluate(CHOSEN, "atlas") == [0]


def test_a_layer_marks_its_whole_column(open_page: Callable[..., Any]) -> None:
    page = open_page()
    click(page, STRIP, 2, 0.5)
    assert status(page).startswith("Selected: layer 2 · Esc")
    assert page.evaluate(CHOSEN, "atlas") == [12, 13, 14, 15, 16, 17]
    assert page.evaluate(CURSOR) == {"cx": [2], "cy": [2.5], "width": [1], "height": [6]}


def test_cells_of_an_image_are_chosen_by_arithmetic(open_page: Callable[..., Any]) -> None:
    page = open_page()
    click(page, DENSE, 3, 4)
    assert status(page) == "Selected: layer 3, head 4 · model.layers.3.self_attn · Esc clears"
    assert page.evaluate(CHOSEN, "atlas") == [22]


def test_a_finding_selects_its_places(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator(".finding", has_text="One head holds").click()
    assert page.evaluate(CHOSEN, "atlas") == [23]
    pressed = page.locator('.finding .what[aria-pressed="true"]')
    assert pressed.inner_text() == "One head holds <i>everything</i>"
    page.locator(".finding .what", has_text="Two layers are alike").focus()
    page.keyboard.press("Enter")
    assert page.evaluate(CHOSEN, "strip") == [0, 1]
    assert page.locator(".finding.on").count() == 1


def test_the_keyboard_steps_through_marks(open_page: Callable[..., Any]) -> None:
    page = open_page()
    page.locator("#head_share .holder").focus()
    steps = {"Home": 0, "ArrowRight": 6, "ArrowUp": 7, "ArrowLeft": 1, "ArrowDown": 0, "PageUp": 5, "End": 23}
    for key, row in steps.items():
        page.keyboard.press(key)
        assert page.evaluate(CHOSEN, "atlas") == [row], key
    page.locator("#layer_size .holder").focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(CHOSEN, "strip") == [2]


def test_c_copies_the_address_as_python(open_page: Callable[..., Any]) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    page.locator("#head_share .holder").focus()
    page.keyboard.press("Home")
    page.keyboard.press("c")
    sync_api.expect(page.locator("#status")).to_contain_text('run["attention"].sel(layer=0, head=0)')


def test_the_address_bar_opens_what_was_seen(open_page: Callable[..., Any]) -> None:
    page = open_page("#layer=2&head=1")
    assert status(page).startswith("Selected: layer 2, head 1")
    assert page.evaluate(CHOSEN, "atlas") == [13]
    page = open_page("#layer=evil&head=1e9&x=<b>")
    assert page.evaluate(CHOSEN, "atlas") == []


@pytest.mark.parametrize(("query", "scheme"), [("?theme=dark", "light"), ("", "dark")])
def test_the_theme_goes_there_and_back(open_page: Callable[..., Any], query: str, scheme: str) -> None:
    page = open_page(query, color_scheme=scheme)
    dark = {"axis": "#e4e4e4", "map": "#272b31", "page": "rgb(33, 33, 33)"}
    light = {"axis": "#212121", "map": "#f4f7fb", "page": "rgb(255, 255, 255)"}
    assert page.evaluate(COLOURS) == dark
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(COLOURS) == light
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(COLOURS) == dark


def test_print_is_light(open_page: Callable[..., Any]) -> None:
    page = open_page("?theme=dark")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.evaluate(COLOURS)["axis"] == "#212121"
    assert page.evaluate(COLOURS)["page"] == "rgb(255, 255, 255)"
    assert not page.locator(".bar").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(COLOURS)["axis"] == "#e4e4e4"


@pytest.mark.parametrize("width", [360, 760, 1100])
def test_nothing_scrolls_sideways(open_page: Callable[..., Any], width: int) -> None:
    page = open_page()
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("() => new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert (
        page.evaluate(
            "Math.max(...[...document.querySelectorAll('.holder > *')].map(e => e.getBoundingClientRect().right))"
        )
        <= width
    )


def test_without_a_script_the_findings_are_there(open_page: Callable[..., Any]) -> None:
    page = open_page(java_script_enabled=False)
    assert page.locator(".finding").count() == 3
    assert page.get_by_text("Figures need JavaScript. The findings and tables below do not").first.is_visible()
    assert not page.locator("#theme").is_visible()


def test_eighty_layers_answer_a_click_at_once(
    open_page: Callable[..., Any], of_size: Callable[[int, int], Report], tmp_path: Path
) -> None:
    page = open_page(path=of_size(80, 32).save(tmp_path / "large.html"))
    start = time.perf_counter()
    click(page, DENSE, 79, 31)
    assert page.evaluate(CHOSEN, "atlas") == [80 * 32 - 1]
    assert page.evaluate(CHOSEN, "strip") == [79]
    assert time.perf_counter() - start < 5


OF_EACH = """name => { const bus = globalThis[Symbol.for('bnviz')];
  const docs = [...bus.documents].filter(d => [...d._all_models.values()].some(m => m.name === name));
  return docs.map(d => [...d._all_models.values()].find(m => m.name === name && m.selected).selected.indices) }"""


@pytest.mark.parametrize("which", ["first", "second"])
def test_a_selection_stays_in_its_run(
    two: tuple[Report, Report],
    tmp_path: Path,
    open_page: Callable[..., Any],
    which: str,
) -> None:
    path = two[0].save(tmp_path / "both.html", beside=two[1:])
    shown = open_page(f"#run={which}&layer=1", path)
    assert status(shown).startswith(f"Selected: {which} · layer 1")
    found = shown.evaluate(OF_EACH, "strip")
    assert sorted(map(tuple, found)) == [(), (1,)]
    shown.keyboard.press("Escape")
    assert shown.evaluate(OF_EACH, "strip") == [[], []]
