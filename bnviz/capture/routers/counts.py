"""Rows that each expert of a list computed: an independent count of what was dispatched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.capture.around import Before, around


class RowCounts:
    """Counts the rows that every expert is given, on the host, from shapes alone.

    Parameters
    ----------
    count : int
    experts : list of nn.Module
        Where each is a module of its own; else `given` says how many rows each has.
    """

    def __init__(self, count: int, experts: list[nn.Module]) -> None:
        self._experts, self._count = experts, count
        self._rows = [0] * count

    def attach(self, stack: contextlib.ExitStack, *, quiet: bool) -> None:
        """Look at every expert; the stack ends it."""
        for number, expert in enumerate(self._experts):
            stack.enter_context(around(expert, self._counter(number), None, quiet=quiet))

    def _counter(self, number: int) -> Before:
        def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim() > 0), None)
            if given is not None:
                self._rows[number] += given.numel() // max(given.shape[-1], 1)

        return count

    def begin(self) -> None:
        """A call of the block starts."""
        self._rows = [0] * self._count

    def given(self, values: Iterable[Any]) -> bool:
        """Take the rows of each expert from what their module was given: a list with a whole number for each."""
        for value in values:
            whole = isinstance(value, list | tuple) and all(type(n) is int and n >= 0 for n in value)
            if whole and len(value) == self._count:
                self._rows = list(value)
                return True
        return False

    def agree(self, ids: Tensor) -> Tensor | None:
        """Whether the experts were given as many rows as `ids` (rows, slots) says; None where their counts cannot tell.

        They cannot where every expert was given all rows, or a fixed number of places.
        """
        counted = self._rows
        if not any(counted) or (len(set(counted)) == 1 and counted[0] != ids.numel() / len(counted)):
            return None
        sent = ids.new_zeros(len(counted) + 1, dtype=torch.int64)
        named = torch.where((ids >= 0) & (ids < len(counted)), ids, len(counted)).long().flatten()
        sent = sent.scatter_add(0, named, torch.ones_like(named))[:-1]
        return (sent == torch.tensor(counted).to(sent.device, non_blocking=True)).all()
