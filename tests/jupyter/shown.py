"""The panel of a browser's tab, and what its tests do with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import bnviz

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

    def setting(self, name: str, value: Any) -> None:
        """Set what the user may set."""
        self.page.evaluate(
            """([name, value]) => {
                const services = jupyterapp.pluginRegistry;
                const token = [...services._services.keys()].find(one => one.name.endsWith(':ISettingRegistry'));
                return services.resolveRequiredService(token).then(known => known.set('bnviz:plugin', name, value));
            }""",
            [name, value],
        )

    def in_browser(self, name: str) -> Any:
        """A file or folder in the file browser."""
        self.tab.command("filebrowser:refresh")
        return self.page.locator(".jp-DirListing-item").filter(
            has=self.page.locator(".jp-DirListing-itemText", has_text=re.compile(f"^{re.escape(name)}$"))
        )

    def view(self) -> Any:
        """The page of the newest tab, when its figures are drawn."""
        frame = self.page.frame_locator(".bnviz-View iframe >> nth=-1")
        frame.locator("html[data-ready='1']").wait_for(state="attached", timeout=60_000)
        return frame


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
