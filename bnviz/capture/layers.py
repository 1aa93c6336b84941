"""Layers in order of execution, also where one module runs several times in a forward (shared weights, loops).

The first call of a block in a forward is its own layer. Every further call is a layer of its own too: a model that applies one
block twelve times has twelve layers. They get their numbers as they come; `order` puts all of them in order of execution at the
end.
"""

from __future__ import annotations

from dataclasses import replace

from bnviz.observation import Site

REPEATS = 256  # calls of one module in a forward: beyond it the module is a loop over time, not depth


class Layers:
    """Numbers of layers, for the length of a capture.

    Parameters
    ----------
    count : int
        Blocks that were found; their numbers are taken.

    Examples
    --------
    >>> layers = Layers(2)
    >>> block = Site("block", "shared", 0)
    >>> [layers.of(block, nth).layer for nth in (0, 1, 2, 0, 1)]
    [0, 2, 3, 0, 2]
    """

    def __init__(self, count: int) -> None:
        self._next = count
        self._known: dict[tuple[int, int], int] = {}
        self.lost = 0

    def of(self, site: Site, nth: int) -> Site | None:
        """`site` at its `nth` call in a forward, from 0; None beyond REPEATS calls."""
        if nth >= REPEATS:
            self.lost += 1
            return None
        at = (site.layer, nth)
        number = self._known.get(at)
        if number is None:
            number = site.layer if nth == 0 else self._new()
            self._known[at] = number
        return site if number == site.layer else replace(site, layer=number)

    def _new(self) -> int:
        number, self._next = self._next, self._next + 1
        return number

    @property
    def repeated(self) -> dict[int, tuple[int, int]]:
        """By number: the block, and which call of it in a forward, of layers that are further calls."""
        return {number: at for at, number in self._known.items() if at[1]}

    def order(self) -> dict[int, int]:
        """Final number of every layer that is not its own already: in order of execution where modules repeat."""
        if not self.repeated:
            return {}
        seen = [number for (layer, _), number in self._known.items() if layer >= 0]
        unseen = [n for n in range(self._next) if n not in set(self._known.values())]
        final = {number: place for place, number in enumerate([*seen, *unseen])}
        return {number: place for number, place in final.items() if number != place}
