"""Layers in order of execution, also where one module runs several times in a forward (shared weights, loops).

The first call of a block in a forward is its own layer. Every further call is a layer of its own too: a model that applies one
block twelve times has twelve layers. They get their numbers as they come; `order` puts all of them in order of execution at the
end, by the longest forward that was seen, so that a block that one forward skipped keeps its place.
"""

from __future__ import annotations

from dataclasses import replace

from bnviz.observation import Site

REPEATS = 256  # calls of one module in a forward: beyond it the module is a loop over time, not depth

Place = tuple[int, int, int]  # block, which call of it in a forward, which call of a site inside that call


class Layers:
    """Numbers of layers, for the length of a capture.

    Parameters
    ----------
    count : int
        Blocks that were found; their numbers are taken.

    Examples
    --------
    >>> layers = Layers(2)
    >>> layers.begin()
    >>> [layers.enter(block) for block in (1, 0, 1)]
    [1, 0, 2]
    >>> layers.order()
    {1: 0, 0: 1}
    """

    def __init__(self, count: int) -> None:
        self._count = self._next = count
        self._known: dict[Place, int] = {}
        self._times: dict[int, int] = {}
        self._run: list[int] = []
        self._longest: list[int] = []
        self._visit = 0
        self._visits: dict[int, int] = {}
        self._inside: dict[int, tuple[int, int]] = {}
        self.lost = 0

    def begin(self) -> None:
        """A forward begins."""
        self._keep()
        self._run = []
        self._times.clear()
        self._visits.clear()

    def enter(self, block: int) -> int | None:
        """A block begins: the number of this call of it; None beyond REPEATS calls."""
        nth = self._times.get(block, 0)
        self._times[block] = nth + 1
        self._visit += 1
        self._visits[block] = self._visit
        number = self._number((block, nth, 0))
        if number is not None:
            self._run.append(number)
        return number

    def of(self, site: Site, nth: int) -> Site | None:
        """`site` in the call of its block that runs now, at its `nth` call in a forward; None beyond REPEATS calls.

        A site that runs twice in one call of its block has two layers.
        """
        visit = self._visits.get(site.layer)
        if visit is None:
            place = (site.layer, nth, 0)
        else:
            last, again = self._inside.get(id(site), (0, 0))
            again = again + 1 if last == visit else 0
            self._inside[id(site)] = (visit, again)
            place = (site.layer, self._times[site.layer] - 1, again)
        number = self._number(place)
        return site if number == site.layer else None if number is None else replace(site, layer=number)

    def _number(self, place: Place) -> int | None:
        if max(place[1:]) >= REPEATS:
            self.lost += 1
            return None
        number = self._known.get(place)
        if number is None:
            number = place[0] if place[1:] == (0, 0) else self._new()
            self._known[place] = number
        return number

    def _new(self) -> int:
        number, self._next = self._next, self._next + 1
        return number

    def _keep(self) -> None:
        if len(self._run) > len(self._longest):
            self._longest = self._run

    @property
    def calls(self) -> dict[int, tuple[int, int]]:
        """By number: the block, and which call of it in a forward, from 0; blocks that never ran are there with 0."""
        known = {number: (block, max(nth, again)) for (block, nth, again), number in self._known.items()}
        return {block: (block, 0) for block in range(self._count)} | known

    def order(self) -> dict[int, int]:
        """Final number of every layer that is not its own already: in order of execution.

        A layer that the longest forward did not run comes after the block before it in the model's own order.
        """
        self._keep()
        final = list(dict.fromkeys(self._longest))
        known = {place: number for place, number in self._known.items() if place[0] >= 0}
        blocks = {(block, 0, 0): block for block in range(self._count)}
        for (block, nth, again), number in sorted((blocks | known).items()):
            if number not in final:
                before = known.get((block, nth, again - 1), known.get((block, nth - 1, 0), block - 1))
                final.insert(final.index(before) + 1 if before in final else 0, number)
        outside = sorted(number for place, number in self._known.items() if place[0] < 0 <= number)
        return {number: place for place, number in enumerate([*final, *outside]) if number != place}

    def paths(self, known: dict[int, str]) -> dict[int, str]:
        """Paths by final number, from those of blocks or sites by the number of their block."""
        final = self.order()
        found: dict[int, str] = {}
        for number, (block, nth) in self.calls.items():
            if block in known:
                found[final.get(number, number)] = known[block] + (f" (call {nth + 1})" if nth else "")
        return found
