"""Where the hidden state is in what a block takes and gives: by shape, and by what the next block is given, never by position.

A block may take its stream second or by keyword, and give it in a tuple, a dict or a dataclass. Of all pairs of an input and an
output of one shape the pair is taken whose output the next block gets where this one got its input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from bnviz.capture.arrival import Pending

DEPTH = 3  # of nested tuples and dicts that are looked into

Place = tuple[Any, ...]

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _Turned:
    """Stands in a place for "and then its last two axes change places": (batch, features, tokens) as the stream has them."""

    def __repr__(self) -> str:
        return "TURNED"


TURNED = _Turned()


@dataclasses.dataclass(frozen=True, slots=True)
class Route:
    """Where a block's stream goes in and comes out.

    Parameters
    ----------
    given, made : tuple
        Keys and positions, from the outside in: `(0,)` the first argument, `("hidden_states",)` a keyword,
        `(1, 0)` the first of a tuple that is the second; () when the output is the stream itself.
    """

    given: Place
    made: Place


def floats(value: object, place: Place = ()) -> Iterator[tuple[Place, Tensor]]:
    """Floating tensors of two dimensions or more, with their places, the outermost first."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.dim() >= 2:
            yield place, value
        return
    if len(place) >= DEPTH:
        return
    held = _members(value)
    for key, member in held:
        if isinstance(member, Tensor):
            yield from floats(member, (*place, key))
    for key, member in held:
        if not isinstance(member, Tensor):
            yield from floats(member, (*place, key))


def _members(value: object) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, tuple | list):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    return []


def called_with(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Place, Tensor]:
    """Floating tensors a module was called with: positions before keywords."""
    return dict([*floats(args), *floats(kwargs)])


def to_copy(given: Mapping[Place, Tensor]) -> list[Place]:
    """What a block whose streams are not known may write into and would be lost: what is like its first input, which may have
    other tokens, and all where torch does not count what is written.
    """
    first = next(iter(given.values()))
    ends = (first.dim(), first.shape[0], first.shape[-1])
    alike = {
        place for place, x in given.items() if x.shape == first.shape or (x.dim(), x.shape[0], x.shape[-1]) == ends
    }
    return [place for place, x in given.items() if place in alike or x.is_inference()]


def fetch(value: Any, place: Place) -> Tensor | None:
    """The tensor at a place, None when there is no floating one."""
    if not place and type(value) is Tensor:  # most often, and asked at every block
        return value if value.is_floating_point() and value.dim() >= 2 else None
    for key in place:
        if key is TURNED:
            value = value.transpose(1, 2) if isinstance(value, Tensor) and value.dim() == 3 else None
            continue
        try:
            value = (
                getattr(value, key)
                if dataclasses.is_dataclass(value) and not isinstance(value, Mapping)
                else value[key]
            )
        except (AttributeError, IndexError, KeyError, TypeError):
            return None
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 else None


def fetch_given(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: Place) -> Tensor | None:
    """The tensor at a place among arguments."""
    if not place:
        return None
    first: Any = place[0]
    if isinstance(first, str):
        return fetch(kwargs[first], place[1:]) if first in kwargs else None
    return fetch(args[first], place[1:]) if first < len(args) else None


def argument(module: nn.Module, place: Place) -> str:
    """The name of the argument that a place among arguments is in; its position where it has none.

    Examples
    --------
    >>> argument(nn.Linear(2, 2), (0,)), argument(nn.Linear(2, 2), ("input",)), argument(nn.Linear(2, 2), (4,))
    ('input', 'input', 'argument 4')
    """
    if isinstance(place[0], str):
        return place[0]
    with contextlib.suppress(TypeError, ValueError):
        names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in _BY_POSITION]
        if place[0] < len(names):
            return names[place[0]]
    return f"argument {place[0]}"


def routes(given: Mapping[Place, Tensor], made: Mapping[Place, Tensor]) -> list[Route]:
    """Pairs the stream may take, the likeliest first.

    Pairs of one shape in the order of the arguments, an output of the same name before others. Where none has the first output's
    shape (a block that changes width or resolution): what has its shape but for the features, else what has its batch, else the
    first.
    """
    if not given or not made:
        return []
    pairs = [
        Route(i, o)
        for i, x in given.items()
        for o in sorted(made, key=lambda o: o[-1:] != i[-1:] or not isinstance(i[-1], str))
        if x.shape == made[o].shape
    ]
    output = next(iter(made))
    if any(route.made == output for route in pairs):
        return pairs
    shape = made[output].shape
    near = (i for i, x in given.items() if x.dim() == len(shape) and x.shape[:-1] == shape[:-1] and x.dim() > 2)
    found = next(near, None)
    if found is not None:
        return [Route(found, output)]
    alike = (i for i, x in given.items() if x.dim() == len(shape) and x.shape[0] == shape[0])
    return pairs or [Route(next(alike, next(iter(given))), output)]


def continued(
    found: list[Route], given: Mapping[Place, Tensor], made: Mapping[Place, Tensor], then: Mapping[Place, Tensor]
) -> list[Route]:
    """Of several routes those that the next block goes on with: it is given `made` where this block was given its input.

    The first is the block's stream. Further ones are streams beside it (image and text in MMDiT): each leaves where it came in,
    as another tensor than it came.
    """
    linked = [r for r in found if r.given in then and same(made[r.made], then[r.given])]
    if not linked:
        linked = [r for r in found if any(same(made[r.made], x) for x in then.values())][:1]
    chosen = (linked or found)[:1]
    for route in linked[1:]:
        new = all(route.given != r.given and route.made != r.made for r in chosen)
        if new and not same(given[route.given], made[route.made]):
            chosen.append(route)
    return chosen


_Waiting = tuple[list[Route], Mapping[Place, Tensor], Mapping[Place, Tensor], Callable[[list[Route]], None]]


class Links:
    """Blocks that could not yet say which way their stream goes: the next block that begins tells.

    Parameters
    ----------
    lend, own : callable
        As `Pending` has them.
    """

    def __init__(self, lend: Callable[[int], bool], own: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        self._waiting: list[_Waiting] = []
        self._told: list[Callable[[], None]] = []
        self.cells = 0  # calls of recurrent cells so far
        self.known: dict[type, list[Route]] = {}  # of blocks of a class, once one of them was told
        self.late = Pending(lend, own)  # what a device has not told yet

    def wait(
        self,
        found: list[Route],
        given: Mapping[Place, Tensor],
        made: Mapping[Place, Tensor],
        decide: Callable[[list[Route]], None],
    ) -> None:
        """Call `decide` with some of the routes when the next block begins, or the forward ends."""
        self._waiting.append((found, given, made, decide))

    def at_end(self, told: Callable[[], None]) -> None:
        """Call `told` when this forward and every later one ends."""
        if told not in self._told:
            self._told.append(told)

    def begins(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """A block begins."""
        if self._waiting:
            self._decide(called_with(args, kwargs))
        if self.late:
            self.late.poll()

    def ends(self) -> None:
        """The forward ends."""
        self._decide({})
        for told in self._told:
            told()
        self.late.finish()

    def _decide(self, then: Mapping[Place, Tensor]) -> None:
        waiting, self._waiting = self._waiting, []
        for found, given, made, decide in waiting:
            decide(continued(found, given, made, then))


def same(one: Tensor, other: Tensor) -> bool:
    """Both are one tensor, or equal views of one memory."""
    return one is other or (
        one.shape == other.shape and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    )
