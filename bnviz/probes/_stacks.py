"""Sampled stacks to a calling-context tree: the samples of a speedscope file, counted, cleaned and interned."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from bnviz.errors import BnvizError

OWN = "bnviz"
_OWN_THREADS = "bnviz-"
UNKNOWN = -1  # a line that is not known
_LAST_LINE = 10**7
_THREAD = re.compile(r'^Thread (\w+)(?: "(.*)")?$')
_WATCHING = re.compile(r"(?:^|/)(?:bnviz/(?:capture|probes|reduce|scores|observation\.py)|bnviz_kernels)(?:/|$)")
_PASSING = ("__torch_function__", "watched", "get_interface")  # of ours, between the model and its own kernel
_LAUNCHING = re.compile(r"(?:^|/)(?:threading\.py|runpy\.py|<frozen runpy>)$")

Frame = tuple[str, str, int]  # function, file, line


@dataclass(slots=True)
class Tree:
    """A calling-context tree: one row for each distinct chain of frames of a thread, callers before callees.

    Parameters
    ----------
    frames : list of (function, file, line)
        Distinct frames; a line that is not known is -1.
    frame, parent, thread : lists (event,)
        Index into `frames`; row of the caller, -1 for a root; index into `threads`.
    samples, gil : lists (event,)
        Samples whose innermost frame this row is: of all, and of those that held the interpreter lock.
    threads : list of str
    """

    frames: list[Frame] = field(default_factory=list)
    frame: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    thread: list[int] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    gil: list[int] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)
    _rows: dict[tuple[int, int, int], int] = field(default_factory=dict)
    _frames: dict[Frame, int] = field(default_factory=dict)
    _threads: dict[str, int] = field(default_factory=dict)

    def add(self, thread: str, stack: Iterable[Frame], count: int, *, gil: bool) -> None:
        """Count `count` samples of `stack`, outermost frame first."""
        stack = list(stack)
        if not stack:
            return
        at = self._threads.setdefault(thread, len(self._threads))
        if at == len(self.threads):
            self.threads.append(thread)
        row = -1
        for one in stack:
            row = self._child(at, row, one)
        (self.gil if gil else self.samples)[row] += count

    def _child(self, thread: int, parent: int, one: Frame) -> int:
        frame = self._frames.setdefault(one, len(self._frames))
        if frame == len(self.frames):
            self.frames.append(one)
        row = self._rows.setdefault((thread, parent, frame), len(self._rows))
        if row == len(self.frame):
            self.frame.append(frame)
            self.parent.append(parent)
            self.thread.append(thread)
            self.samples.append(0)
            self.gil.append(0)
        return row


def grow(tree: Tree, text: str, *, gil: bool, cells: Mapping[str, int] | None = None) -> int:
    """Add the samples of one speedscope file to `tree`.

    py-spy reads a stack while it changes: of what it read a line may be any number and a name any text. A frame whose line
    can't be is kept without it; a sample with a frame that has no readable name, or none at all, is left out.

    Parameters
    ----------
    tree : Tree
    text : str
        The file: one profile a thread, each sample a list of frames, outermost first.
    gil : bool
        The samples are those that held the interpreter lock.
    cells : mapping of str to int, optional
        Number of the notebook cell by the name of the file its code was compiled under.

    Returns
    -------
    int
        Samples that were read wrong: left out, or kept with a frame without its line.

    Raises
    ------
    BnvizError
        It is no speedscope file.
    """
    try:
        data = json.loads(text, strict=False)
        frames = [_frame(f) for f in data["shared"]["frames"]]
        profiles = [p for p in data["profiles"] if isinstance(p["samples"], list)]
        names = _thread_names([str(p["name"]) for p in profiles])
    except (ValueError, KeyError, TypeError) as error:
        raise BnvizError(
            f"py-spy's samples could not be read ({type(error).__name__}: {error}); expected a speedscope file."
        ) from error
    wrong = 0
    for name, profile in zip(names, profiles, strict=True):
        for stack, count in Counter(map(_indices, profile["samples"])).items():
            found = [frames[i] if 0 <= i < len(frames) else None for i in stack]
            readable = [f.frame for f in found if f is not None and f.frame is not None]
            wrong += count * (len(readable) < len(found) or any(f.damaged for f in found if f is not None))
            if len(readable) < len(found):
                continue
            cleaned = clean(readable, cells or {})
            if name.startswith(
                _OWN_THREADS
            ):  # of a thread of ours what counts is when it works, not where it waits for work
                cleaned = [f for f in cleaned if f[0] == OWN]
            tree.add(name, cleaned, count, gil=gil)
    return wrong


@dataclass(frozen=True, slots=True)
class _Read:
    """A frame as it was read; None for one without a readable name. `damaged`: some of it can't be."""

    frame: Frame | None
    damaged: bool


def _frame(entry: Mapping[str, Any]) -> _Read:
    name, file, line = entry["name"], entry.get("file"), entry.get("line")
    if not _readable(name) or not (file is None or file == "" or _readable(file)):
        return _Read(None, True)
    if line is None:  # py-spy knows none: of native frames, and where a function begins
        return _Read((name, file or "", UNKNOWN), False)
    known = isinstance(line, int) and not isinstance(line, bool) and 0 <= line <= _LAST_LINE
    return _Read((name, file or "", line if known else UNKNOWN), not known)


def _readable(text: object) -> bool:
    """Whether it is a name: some text, and none of the characters that wrong bytes decode to."""
    return isinstance(text, str) and bool(text) and text.isprintable() and "\ufffd" not in text


def _indices(sample: object) -> tuple[int, ...]:
    """Rows of a sample's frames; -1 for what is no row."""
    return tuple(i if isinstance(i, int) else -1 for i in sample) if isinstance(sample, list) else (-1,)


def clean(stack: list[Frame], cells: Mapping[str, int]) -> list[Frame]:
    """A stack as a reader knows it: from the notebook cell on, short file names, and what watches as one frame.

    Examples
    --------
    >>> stack = [("run", "/x/ipykernel/app.py", 9), ("<module>", "/tmp/ipykernel_7/42.py", 3), ("f", "/home/me/net.py", 5)]
    >>> clean(stack, {"/tmp/ipykernel_7/42.py": 4})
    [('<module>', 'cell [4]', 3), ('f', '/home/me/net.py', 5)]
    """
    first = next((i for i, (_, file, _) in enumerate(stack) if file in cells), None)
    if first is None:
        first = next((i for i, (_, file, _) in enumerate(stack) if not _LAUNCHING.search(file)), 0)
    kept: list[Frame] = []
    for function, file, line in stack[first:]:
        if _WATCHING.search(file.replace("\\", "/")):
            if function.rpartition(".")[2] in _PASSING:
                continue
            kept.append((OWN, OWN, 0))
            break
        kept.append((function, f"cell [{cells[file]}]" if file in cells else short(file), line))
    return kept


@cache
def short(file: str) -> str:
    """A file's name below the folder it is imported from; as it is when it lies below none.

    Examples
    --------
    >>> import collections
    >>> short(collections.__file__), short("<string>")
    ('collections/__init__.py', '<string>')
    """
    folders = sorted({p for p in sys.path if p}, key=len, reverse=True)
    for folder in folders:
        if file.startswith(folder.rstrip("/") + "/"):
            return file[len(folder.rstrip("/")) + 1 :]
    return file


def cells_of_notebook() -> dict[str, int]:
    """Number of each cell by the name of the file IPython compiled it under; nothing outside of IPython."""
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    known = getattr(getattr(shell, "compile", None), "_filename_map", None)
    if not isinstance(known, Mapping):
        return {}
    found = {str(name): int(number) for name, number in known.items()}
    return found | {str(Path(name).resolve()): number for name, number in found.items()}


def _thread_names(labels: list[str]) -> list[str]:
    """`Thread 12 "MainThread"` to `MainThread`; those that share a name keep their number."""
    parts = [_THREAD.match(label) for label in labels]
    names = [(m[2] or f"thread {m[1]}") if m else label for m, label in zip(parts, labels, strict=True)]
    twice = {name for name, count in Counter(names).items() if count > 1}
    return [f"{name} ({m[1]})" if m and name in twice else name for m, name in zip(parts, names, strict=True)]
