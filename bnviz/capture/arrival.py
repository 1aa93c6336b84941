"""Small values of a device on their way to the host, and what waits for them: inside a forward nobody waits for the device.

What numbers decide (which modules write to a block's stream, whether that still holds) asks for them when the block ends and is
decided when they have come: as a later block begins, or when the forward ends, which waits for the copies still under way.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .modes import without_modes

CEILING = 512 << 20  # bytes that are held for what is not decided; beyond it the oldest copy is waited for
_Kind = tuple[torch.device, torch.dtype]


def late(value: Tensor) -> bool:
    """Whether the numbers of a tensor are put off. On accelerators without CUDA's pinned memory and events they are awaited."""
    return value.is_cuda


class Arrival:
    """Copies of some tensors, made side by side and without waiting.

    Parameters
    ----------
    values : sequence of Tensor
        Small ones, on any devices; a tensor that is there twice is copied once.

    Examples
    --------
    >>> arrival = Arrival([torch.tensor([[1.0, 2.0]]), torch.tensor(True)])
    >>> arrival.here(), [one.tolist() for one in arrival.values()]
    (True, [[[1.0, 2.0]], True])
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._order = [id(value) for value in values]
        self._copies: list[tuple[list[tuple[int, torch.Size]], Tensor]] = []
        self._events: list[Any] = []
        self._stream: Any = None
        alike: dict[_Kind, dict[int, Tensor]] = {}
        for value in values:
            alike.setdefault((value.device, value.dtype), {})[id(value)] = value
        for (device, _), some in alike.items():
            flat = torch.cat([value.detach().reshape(-1) for value in some.values()])
            places = [(name, value.shape) for name, value in some.items()]
            self._copies.append((places, self._sent(flat, device) if device.type == "cuda" else flat))
        self.nbytes = sum(copy.nbytes for _, copy in self._copies)

    def _sent(self, flat: Tensor, device: torch.device) -> Tensor:
        stream = torch.cuda.current_stream(device)
        with torch.cuda.stream(stream):  # an event is of the device that is set
            host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
            host.copy_(flat, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(stream)
        self._stream = self._stream or stream
        self._events.append(event)
        return host

    def here(self) -> bool:
        """Whether all have come; waits for nothing."""
        return all(event.query() for event in self._events)

    def values(self) -> list[Tensor]:
        """The copies, in the order of what was given; waits for them."""
        for event in self._events:
            event.synchronize()
        found: dict[int, Tensor] = {}
        for places, copy in self._copies:
            parts = torch.split(copy, [shape.numel() for _, shape in places])
            found |= {name: part.view(shape) for (name, shape), part in zip(places, parts, strict=True)}
        return [found[name] for name in self._order]

    def stream(self) -> contextlib.AbstractContextManager[Any]:
        """Work goes to the stream on which the values were made: what was held beside them is in order there only."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Pending:
    """What is decided when its values have come, in the order in which they were asked for.

    Parameters
    ----------
    lend : callable, optional
        Counts so many bytes, below zero fewer, to what the capture may hold; False where there is no room: then all is decided.
    own : callable, optional
        A context in which operators stay out of the profile.
    """

    def __init__(
        self,
        lend: Callable[[int], bool] = lambda size: True,
        own: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self._jobs: deque[tuple[Arrival, Callable[[list[Tensor]], None], int, int]] = deque()
        self._bytes, self._lend, self._own = 0, lend, own

    def __bool__(self) -> bool:
        return bool(self._jobs)

    def put(self, asked: Sequence[Tensor], held: int, decide: Callable[[list[Tensor]], None]) -> None:
        """Call `decide` with what is asked, on the host, later.

        Parameters
        ----------
        asked : sequence of Tensor
        held : int
            Bytes that `decide` holds until then.
        decide : callable
        """
        arrival = Arrival(asked)
        size = held + 2 * arrival.nbytes
        lent = size if self._lend(size) else 0
        self._jobs.append((arrival, decide, size, lent))
        self._bytes += size
        while self._jobs and (self._bytes > CEILING or not lent):
            self._next()

    def poll(self) -> None:
        """Decide what has come."""
        while self._jobs and self._jobs[0][0].here():
            self._next()

    def finish(self) -> None:
        """Decide all, and wait for that: between forwards, or where one ends."""
        while self._jobs:
            self._next()

    def clear(self) -> None:
        """Let all go undecided."""
        self._lend(-sum(lent for *_, lent in self._jobs))
        self._jobs.clear()
        self._bytes = 0

    def leave(self) -> None:
        """The capture is over: decide what an interrupt has left, if that can be, and hold nothing."""
        with contextlib.suppress(Exception), contextlib.ExitStack() as stack:
            stack.callback(self.clear)
            self.finish()

    def _next(self) -> None:
        arrival, decide, size, lent = self._jobs.popleft()
        self._bytes -= size
        self._lend(-lent)
        with self._own(), without_modes(), torch.no_grad(), arrival.stream():
            decide(arrival.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of some tensors, of several that lie at one place once."""
    return sum({value.data_ptr(): value.nbytes for value in tensors}.values())
