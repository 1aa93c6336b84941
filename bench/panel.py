"""How fast the side panel is, in a real JupyterLab: `python -m bench.panel`.

Printed beside the aim of each: `%load_ext bnviz` after torch; the panel's first paint; what lies between the kernel's sending of
a live message and its being drawn, while a cell runs; how long the model waits for findings meanwhile; a report on 32 layers,
from its cell's start to its first and its last figure; the bytes a browser loads for the panel.
"""

from __future__ import annotations

import gzip
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.jupyter.conftest import CHROMIUM, FLAGS, MISSING, PANEL, Server, Tab

LOAD = """
import time, torch
began = time.perf_counter()
get_ipython().run_line_magic("load_ext", "bnviz")
print(time.perf_counter() - began)
"""
MODEL = """
import bnviz
from transformers import LlamaConfig, LlamaForCausalLM
size = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=4, vocab_size=512)
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=32, **size)).eval()
ids = torch.arange(256)[None]
"""
NOTED = """
from bnviz.jupyter.link import Link
from bnviz.jupyter import protocol
sent, plain = [], protocol.live
def noting(facts):
    sent.append((facts["words"], time.time()))
    return plain(facts)
protocol.live = noting
from bnviz.jupyter.sofar import SoFar
took, judge = [], SoFar._judge
def timing(self, recorder):
    began = time.perf_counter()
    judge(self, recorder)
    took.append(time.perf_counter() - began)
SoFar._judge = timing
"""
RUN = """
end = time.time() + 20
while time.time() < end:
    model(ids)
"""
DRAWN = """() => {
    window.drawn = [];
    const words = document.querySelector('#bnviz-panel .bnviz-words');
    new MutationObserver(() => requestAnimationFrame(() => drawn.push([words.textContent, Date.now() / 1000])))
        .observe(words, { childList: true, characterData: true, subtree: true });
}"""
PAINT = """async () => {
    const frame = () => new Promise(resolve => requestAnimationFrame(() => resolve(performance.now())));
    await jupyterapp.commands.execute('application:toggle-right-area');
    await frame();
    const began = performance.now();
    await jupyterapp.commands.execute('bnviz:show-panel');
    return (await frame()) - began;
}"""
REPORT = """async () => {
    const began = performance.now();
    const seen = {};
    void jupyterapp.commands.execute('notebook:run-cell');
    while (!seen.last) {
        await new Promise(resolve => setTimeout(resolve, 10));
        const inner = document.querySelector('iframe.bnviz-frame')?.contentDocument;
        const now = performance.now() - began;
        if (inner?.querySelector('[data-state=drawn]')) seen.first ??= now;
        if (inner?.documentElement?.dataset.ready === '1') seen.last = now;
    }
    return [seen.first, seen.last];
}"""


def line(what: str, seconds: float, aim: float) -> None:
    """One row."""
    print(
        f"{what:58s} {1e3 * seconds:8.0f} ms   aim {1e3 * aim:6.0f} ms   {'' if seconds <= aim else 'missed'}",
        flush=True,
    )


def measure(tab: Tab) -> None:
    """All rows of one tab."""
    tab.server.write(
        "bench.ipynb", LOAD, MODEL, NOTED, RUN, "print((sent, took))", "report = bnviz.diagnose(run)", "report"
    )
    tab.open("bench.ipynb")
    line("%load_ext bnviz, torch imported", float(tab.run(0)[0]["text"]), 0.5)
    tab.command("bnviz:show-panel")
    tab.page.wait_for_function("document.querySelector('#bnviz-panel').dataset.state === 'live'")
    line("the panel's first paint", statistics.median(tab.page.evaluate(PAINT) for _ in range(5)) / 1e3, 0.3)
    tab.run(1)
    tab.run(2)
    tab.page.locator("[data-key=watch]").click()
    tab.page.locator(".bnviz-badge").wait_for()
    tab.page.evaluate(DRAWN)
    tab.run(3)
    drawn = dict(tab.page.evaluate("() => drawn"))
    told, took = eval(tab.run(4)[0]["text"])  # what this file had the kernel print
    sent = dict(told)
    late = sorted(drawn[words] - at for words, at in sent.items() if words in drawn)
    line(f"live, from sent to drawn: median of {len(late)} in 20 s", statistics.median(late), 0.25)
    line("live, from sent to drawn: 90 %", late[-1 - len(late) // 10], 0.25)
    first, *others = took
    line("findings so far, the first of a kernel, with imports", first, 1.0)
    share, longest = sum(others) / 20, max(others, default=0.0)
    print(
        f"findings so far, {len(others)} times more: {share:5.1%} of the cell (aim 2 %), the longest {1e3 * longest:.0f} ms"
    )
    tab.page.locator("[data-key=stop]").click()
    tab.page.locator(".bnviz-Run").wait_for(timeout=120_000)
    tab.run(5)
    for when in ("the first of a kernel", "another"):
        tab.page.evaluate("() => { book().content.activeCellIndex = 6; }")
        tab.command("notebook:clear-cell-output")
        first, last = tab.page.evaluate(REPORT)
        line(f"a report on 32 layers, {when}: first figure", first / 1e3, 2.0)
        line(f"a report on 32 layers, {when}: last figure", last / 1e3, 2.0)


def main() -> None:
    from playwright.sync_api import sync_playwright

    if MISSING or not PANEL.exists():
        raise SystemExit(f"bench.panel needs {', '.join([*MISSING, *([] if PANEL.exists() else ['make panel'])])}.")
    scripts = [*(PANEL / "static").glob("*.js")]
    packed = sum(len(gzip.compress(script.read_bytes(), 9)) for script in scripts)
    version = json.loads((PANEL / "package.json").read_text())["version"]
    print(f"panel {version}: {len(scripts)} scripts, {packed / 1e3:.0f} kB compressed (aim 1,500 kB)")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        server = Server(Path(folder))
        try:
            browser: Any = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
            page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
            page.set_default_timeout(60_000)
            measure(Tab(page, server))
            browser.close()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
