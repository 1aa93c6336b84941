"""What has been observed so far: small tensors waiting on their device, then rows on the host, under one ceiling of bytes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnviz.errors import CaptureError, SchemaError
from bnviz.observation import Context, Site
from bnviz.rows import GROWING, Row, axes, documents_of, merged, shortened, taken
from bnviz.schema import Variable

from .kept import Kept

SHARE, MOST, MANY = (
    8,
    64 << 20,
    4096,
)  # part of the ceiling, bytes, observations: what waits beyond is brought to the host
FEW = 64  # decode steps on disk whose length is remembered
HELD, POSITIONS = "held", "positions"
_EXACT = (torch.float32, torch.float64, torch.int64, torch.int32, torch.bool)
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def budget_bytes(budget: str | int) -> int:
    """A budget in bytes.

    Examples
    --------
    >>> budget_bytes("1 GiB"), budget_bytes(4096)
    (1073741824, 4096)
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(budget))
    if not found or found[2].upper() not in _UNITS:
        raise CaptureError(
            f"budget={budget!r}: expected bytes or a text like '512 MiB'; units: B, KB, MB, GB, KiB, MiB, GiB."
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(slots=True)
class _Waiting:
    record: str
    site: Site
    context: Context
    kept: Kept | dict[str, Tensor]
    valid: dict[str, Tensor | None]
    size: int
    limit: int | None = None

    @property
    def values(self) -> Mapping[str, Tensor | np.ndarray]:
        return self.kept.arrays() if isinstance(self.kept, Kept) else self.kept


@dataclass(slots=True)
class _Move:
    """The sequences of some steps changed places, or number."""

    steps: frozenset[int]
    batch: int
    index: Tensor


_Order = tuple[np.ndarray, int]  # an index of sequences, and how many it chooses from


class Shelf:
    """Rows by record, step, layer and kind, under one ceiling of bytes.

    Parameters
    ----------
    declared : mapping of str to tuple of Variable
        By record.
    ceiling : int
        Bytes that may be kept, host and device together. What would pass it is not kept, and nothing after it.
    """

    def __init__(self, declared: Mapping[str, tuple[Variable, ...]], ceiling: int) -> None:
        self.declared = {record: {v.name: v for v in some} for record, some in declared.items()}
        self._axes = {r: {n: axes(v) for n, v in some.items()} for r, some in self.declared.items()}
        self._waiting: list[_Waiting | _Move] = []
        self._live: set[int] = set()  # steps whose tokens may still be taken back, or change places
        self._written: dict[int, int] = {}  # of the last decode steps on disk: the tokens in their cache
        self._waiting_bytes = 0
        self._on_host = True
        self._of_forward, self._largest = 0, 0
        self.rows: dict[str, dict[tuple[int, int, str], Row]] = {}
        self.ceiling, self.held = ceiling, 0
        self.full_at: int | None = None
        self.given: Counter[str] = Counter()
        self.inexact = 0
        self.make_room: Callable[[], None] = self.drain
        self.complete: Callable[[bool], None] = lambda apart: None  # brings what was seen and is not here yet

    def put(
        self,
        record: str,
        site: Site,
        context: Context,
        values: Mapping[str, Tensor],
        valid: Mapping[str, Tensor | None],
    ) -> bool:
        """Keep an observation; False when the ceiling leaves no room. Nothing is copied from a GPU here."""
        if self.full_at is not None:
            return False
        size, on_host = self._weighed(record, values)
        if self.held + size > self.ceiling and self._waiting and self._on_host and on_host:
            self.make_room()  # what waits on the host can be merged now; a GPU is not asked inside a forward
        if self.held + size > self.ceiling:
            self.full_at = context.step
            return False
        if self._live and context.step > max(self._live):
            self._live.clear()  # another text has begun
        self.held += size
        self._waiting_bytes += size
        self._of_forward += size
        self.given[record] += 1
        self._on_host = self._on_host and on_host
        self._waiting.append(_Waiting(record, site, context, _own(values), dict(valid), size))
        return True

    def lend(self, size: int) -> bool:
        """Count so many bytes, below zero fewer, that are held elsewhere.

        False where that leaves less than half the ceiling: what is made of them needs room too, or some layers would end early.
        """
        if size > 0 and self.held + size > self.ceiling // 2:
            return False
        self.held += size
        return True

    def _weighed(self, record: str, values: Mapping[str, Tensor]) -> tuple[int, bool]:
        """Bytes, with those of the mask, `sequence` and `position` that come with each token-like axis; whether all lie here."""
        known, tokens, size, on_host = self._axes[record], dict[str, int](), 0, True
        for name, value in values.items():
            of = known.get(name)
            if of is None:
                raise SchemaError(
                    f"Probe {record!r} gave {name!r}, which it does not declare; declared: {', '.join(known)}."
                )
            size, on_host = size + value.nbytes, on_host and value.is_cpu
            if of.token is not None:
                tokens[of.token] = value.shape[0] * value.shape[1 + of.at]
        return size + 9 * sum(tokens.values()), on_host

    def crowded(self) -> bool:
        """Asked between forwards: so much waits that it should be brought to the host, or another forward may not fit."""
        self._largest, self._of_forward = max(self._largest, self._of_forward), 0
        share = min(self.ceiling // SHARE, MOST)
        tight = self.held + self._largest > self.ceiling
        return bool(self._waiting) and (tight or self._waiting_bytes > share or len(self._waiting) > MANY)

    def hold(self, steps: Set[int]) -> None:
        """Keep the rows of some steps in memory: their tokens may be taken back, or change places."""
        self.complete(True)
        self._live |= steps

    def cut(self, steps: Set[int], length: int) -> None:
        """Leave out the tokens of some steps from `length` on in their cache: they were taken back.

        What waits is left out exactly. What is in a row already is cut off its end, but stays in sums over queries.
        """
        self.hold(steps)
        kept: list[_Waiting | _Move] = []
        for one in self._waiting:
            if isinstance(one, _Waiting) and one.context.step in steps:
                if one.context.past >= length:
                    self.held -= one.size
                    self._waiting_bytes -= one.size
                    continue
                if one.context.phase == "decode" and one.context.past + self._tokens(one) > length:
                    one.limit = length
                    self.inexact += 1
            kept.append(one)
        self._waiting = kept
        for record, rows in self.rows.items():
            for at, row in rows.items():
                if row.step in steps and row.phase == "decode" and row.end > length:
                    rows[at] = shortened(row, self.declared[record], length)
                    self.held += rows[at].nbytes - row.nbytes
                    self.inexact += 1
        self.inexact += sum(self._written.get(step, 0) > length for step in steps)

    def move(self, steps: Set[int], batch: int, index: Tensor) -> None:
        """The sequences of some steps (batch of them) are taken anew by `index` (batch after,)."""
        self.hold(steps)
        self._waiting.append(_Move(frozenset(steps), batch, index))

    def drain(self) -> None:
        """Bring what waits to the host and merge what one site gave in one step.

        Called between forwards: copying waits for the device. An interrupt leaves all as it was, or all done.
        """
        made: dict[tuple[str, tuple[int, int, str]], list[Row]] = {}
        orders, last = self._orders()
        waiting = [one for one in self._waiting if isinstance(one, _Waiting)]
        for (one, values, valid), order in zip(self.on_the_host(waiting), orders, strict=True):
            row = self.row(one, values, valid)
            row = row if one.limit is None else shortened(row, self.declared[one.record], one.limit)
            row = row if order is None else taken(row, self.declared[one.record], *order)
            made.setdefault((one.record, (row.step, row.layer, row.kind)), []).append(row)
        for record, rows in self.rows.items():
            for at in rows:
                if at[0] in last:
                    made.setdefault((record, at), [])
        change = -self._waiting_bytes
        fresh: dict[str, dict[tuple[int, int, str], Row]] = {}
        for (record, at), some in made.items():
            before = self.rows.get(record, {}).get(at)
            change -= 0 if before is None else before.nbytes
            if before is not None:
                order = last.get(at[0])
                some.insert(0, before if order is None else taken(before, self.declared[record], *order))
            row = merged(some, self.declared[record])
            change += row.nbytes
            fresh.setdefault(record, {})[at] = row
        self._waiting, self._waiting_bytes, self._on_host = [], 0, True
        self.held += change
        for record, rows in fresh.items():
            self.rows.setdefault(record, {}).update(rows)

    def _orders(self) -> tuple[list[_Order | None], dict[int, _Order]]:
        """How the sequences of each observation that waits stand in the end; and those of rows, by step."""
        moves = [one for one in self._waiting if isinstance(one, _Move)]
        indices = dict(zip(map(id, moves), to_host([move.index for move in moves]), strict=True))
        later: dict[int, _Order] = {}
        found: list[_Order | None] = []
        for one in reversed(self._waiting):
            if isinstance(one, _Waiting):
                found.append(later.get(one.context.step))
                continue
            for step in one.steps:
                index = indices[id(one)]
                later[step] = (index[later[step][0]] if step in later else index, one.batch)
        return found[::-1], later

    def finished(self) -> dict[str, list[Row]]:
        """Rows that no later token changes the past of, by record."""
        found = {record: [r for r in some.values() if r.step not in self._live] for record, some in self.rows.items()}
        return {record: some for record, some in found.items() if some}

    def forget(self) -> None:
        """Let the finished rows go: they are on disk."""
        for record, some in self.finished().items():
            for row in some:
                self.held -= row.nbytes
                del self.rows[record][row.step, row.layer, row.kind]
                if row.phase == "decode":
                    self._written[row.step] = max(row.end, self._written.get(row.step, 0))
        self._written = dict(list(self._written.items())[-FEW:])

    def on_the_host(
        self, waiting: Sequence[_Waiting]
    ) -> Iterator[tuple[_Waiting, dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Each of these observations that wait, with its values and the masks it needs, copied together."""
        tensors = [value for one in waiting for value in one.values.values()]
        masks = {id(m): m for one in waiting for m in self.masks(one).values()}
        arrays = iter(to_host([*tensors, *masks.values()]))
        values = [{name: next(arrays) for name in one.values} for one in waiting]
        known = dict(zip(masks, arrays, strict=True))
        for one, held in zip(waiting, values, strict=True):
            yield one, held, {dim: known[id(m)] for dim, m in self.masks(one).items()}

    def _tokens(self, one: _Waiting) -> int:
        """Tokens of its call that an observation shows."""
        for name, value in one.values.items():
            of = axes(self.declared[one.record][name])
            batch = of.batch(value.shape)
            if batch is not None and of.token in GROWING:
                return batch[1]
        return 1

    def masks(self, one: _Waiting) -> dict[str, Tensor]:
        """By dim; and what is held and where tokens stand, where that was told."""
        dims = {axes(self.declared[one.record][name]).token for name in one.values}
        found = {dim: m for dim, m in one.valid.items() if m is not None and dim in dims}
        beside = {HELD: one.context.held, POSITIONS: one.context.positions}
        return found | {name: m for name, m in beside.items() if m is not None}

    def row(self, one: _Waiting, values: dict[str, np.ndarray], masks: dict[str, np.ndarray]) -> Row:
        """A row with an all-true mask where the model gave none, so that later masks of the same step can join it."""
        valid: dict[str, np.ndarray] = {}
        for name, value in values.items():
            of = axes(self.declared[one.record][name])
            batch, dim = of.batch(value.shape), of.token
            if batch is None or dim is None:
                continue
            mask = masks.get(dim)
            valid[dim] = mask if mask is not None and mask.shape == batch else np.ones(batch, bool)
        past = _past(one.context, valid, masks.get(HELD))
        now, positions = one.context, masks.get(POSITIONS)
        row = Row(now.step, one.site.layer, one.site.part, now.phase, values, valid, past, now.past)
        if positions is not None:
            own = next((m for m in valid.values() if m.shape[1] == positions.shape[1]), None)
            row.documents = None if own is None else documents_of(positions, own)
        return row

    @property
    def waiting(self) -> bool:
        """Something has not been drained."""
        return bool(self._waiting)

    def shortfalls(self, budget: str | int) -> Iterator[str]:
        """What was not kept, or not exactly, a sentence each."""
        if self.inexact:
            yield (
                f"{self.inexact} observations of tokens that were taken back again could not be left out of sums over "
                "queries: they had been added up before."
            )
        if self.full_at is not None:
            yield (
                f"budget of {budget} reached at step {self.full_at}: later observations were not kept. "
                "Raise budget= or every=, or give path= to stream to disk."
            )


def _past(context: Context, valid: Mapping[str, np.ndarray], held: np.ndarray | None) -> np.ndarray | None:
    """Tokens each sequence had before this call, padding left out."""
    if context.past == 0 or not valid:
        return None
    batch = len(next(iter(valid.values())))
    return held.sum(1) if held is not None and len(held) == batch else np.full(batch, context.past)


def to_host(given: Sequence[Tensor | np.ndarray]) -> list[np.ndarray]:
    """Tensors as NumPy, those of one device and type in one copy; bf16, fp16 and fp8 become float32, which holds each value."""
    values = [torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in given]
    for device in {value.device for value in values if value.is_cuda}:  # also what was made on another stream
        torch.cuda.synchronize(device)
    floats = [
        v.float() if v.is_floating_point() and v.dtype not in (torch.float32, torch.float64) else v for v in values
    ]
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    found: dict[int, np.ndarray] = {}
    for at, value in enumerate(floats):
        if value.device.type == "cpu":
            found[at] = value.numpy(force=True)
        else:
            alike.setdefault((value.device, value.dtype), []).append(at)
    for places in alike.values():
        whole = torch.cat([floats[at].reshape(-1) for at in places]).numpy(force=True)
        ends = np.cumsum([floats[at].numel() for at in places])
        for at, part in zip(places, np.split(whole, ends[:-1]), strict=True):
            found[at] = part.reshape(floats[at].shape)
    return [found[at] for at in range(len(floats))]


def _own(values: Mapping[str, Tensor]) -> Kept | dict[str, Tensor]:
    """What shares no memory with the model, so that a later in-place operation cannot change it."""
    for value in values.values():
        if type(value) is not Tensor or not value.is_cpu or value.dtype not in _EXACT:
            break
    else:
        return Kept({name: value.numpy(force=True) for name, value in values.items()})
    return {name: _copied(value) for name, value in values.items()}


def _copied(value: Tensor) -> Tensor:
    value = value.detach() if value.requires_grad else value
    whole = value._base is None and value.untyped_storage().nbytes() == value.nbytes
    return value if whole else value.clone()
