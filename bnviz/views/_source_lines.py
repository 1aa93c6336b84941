"""How a drawing names a Python function: its name, file and line, in the room there is."""

from __future__ import annotations

import xarray as xr

OWN = "bnviz"


def word(result: xr.Dataset, what: str, at: int) -> str:
    """Name or file of function `at` of a result of `host_time`."""
    array = result[f"function_{what}"]
    return str(array.attrs["table"][int(array.values[at])]).replace("<locals>.", "")


def line(result: xr.Dataset, at: int) -> str:
    """`file:line` of its busiest line; for what watches, what that is."""
    file = word(result, "file", at)
    number = int(result["function_line"].values[at])
    if file == OWN:
        return "hooks and probes of this capture"
    return f"{file}:{number}" if number >= 0 else file


def place(result: xr.Dataset, at: int, room: int) -> str:
    """`name  file.py:line` in about `room` characters; the name gives way first, in its middle."""
    name, where = word(result, "name", at), line(result, at).rpartition("/")[2]
    if word(result, "file", at) == OWN:
        return "bnviz itself"
    if len(name) + len(where) + 2 <= room:
        return f"{name}  {where}"
    return f"{clip(name, max(room - len(where) - 2, 9))}  {clip(where, max(room - 11, 9))}"


def clip(text: str, room: int) -> str:
    """`text`, its middle left out where it is longer than `room` characters; "" where there is room for none.

    Examples
    --------
    >>> clip("MixtralSparseMoeBlock.forward", 17), clip("spin", 17), clip("spin", 2)
    ('MixtralS….forward', 'spin', '')
    """
    if len(text) <= room:
        return text
    return f"{text[: room // 2]}…{text[len(text) - (room - 1 - room // 2) :]}" if room >= 5 else ""
