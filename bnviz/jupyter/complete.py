"""Completion after `%bnviz` and `%%bnviz`: actions, models, runs, probes."""

from __future__ import annotations

from typing import Any

from bnviz import catalog

from . import arguments, models

_MAGICS = ("%bnviz", "%%bnviz")
_OPTIONS = {
    "attach": ("--budget", "--path", "--probes"),
    "detach": ("--output",),
    "report": ("--run",),
    "%%bnviz": ("--budget", "--output", "--path", "--probes", "--quiet"),
}


def choices(text: str, namespace: dict[str, Any]) -> list[str]:
    """What may stand where the cursor is.

    Parameters
    ----------
    text : str
        The line up to the cursor, with the magic.
    namespace : dict
        Names of the user.
    """
    magic, *words = text.split()
    done = words if text[-1:].isspace() else words[:-1]
    part = "" if text[-1:].isspace() or not words else words[-1]
    if magic == "%bnviz" and not done:
        return [name for name in arguments.ACTIONS if name.startswith(part)]
    if done and done[-1] in ("-p", "--probes"):
        before, comma, last = part.rpartition(",")
        return [f"{before}{comma}{name}" for name in catalog.names("probes") if name.startswith(last)]
    if (done[:1] == ["compare"] and len(done) < 3) or (done and done[-1] in ("-r", "--run")):
        return [name for name in sorted(models.runs(namespace)) if name.startswith(part)]
    if part.startswith("-"):
        context = magic if magic == "%%bnviz" else done[0]
        return [option for option in _OPTIONS.get(context, ()) if option.startswith(part)]
    if magic == "%%bnviz" or done in (["attach"], ["sites"]):
        return [name for name in sorted(models.candidates(namespace)) if name.startswith(part)]
    return []


def register(shell: Any) -> None:
    """Complete these magics in `shell`."""
    for magic in _MAGICS:
        shell.set_hook("complete_command", _complete, str_key=magic)


def withdraw(shell: Any) -> None:
    """Complete them no longer."""
    for magic in _MAGICS:
        shell.strdispatchers["complete_command"].strs.pop(magic, None)


def _complete(shell: Any, event: Any) -> list[str]:
    return choices(event.text_until_cursor.lstrip(), shell.user_ns)
