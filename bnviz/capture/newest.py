"""The newest whole step of a capture that goes on, as rows: for a first judgement while the model runs."""

from __future__ import annotations

from itertools import islice

from bnviz.rows import Row, merged

from .latest import BACK, here
from .shelf import Shelf, _Waiting

MOST = 32 << 20
"""Bytes of a step's rows: judging more would keep the model waiting for long."""


def newest(shelf: Shelf) -> dict[str, list[Row]] | None:
    """Rows of the last step that another one follows, by record; called between forwards, changes nothing.

    None where there is none yet, where it is larger than `MOST`, where it lies on a GPU, which is not asked, and where the
    sequences of a text that waits still change places (beam search) or are taken back (assisted decoding).
    """
    waiting = list(shelf._waiting)
    if not all(isinstance(one, _Waiting) and one.limit is None for one in waiting):
        return None
    kept = [
        (record, row)
        for record, some in shelf.rows.items()
        for row in list(islice(reversed(some.values()), BACK))[::-1]
    ]
    steps = {one.context.step for one in waiting if isinstance(one, _Waiting)} | {row.step for _, row in kept}
    if len(steps) < 2:
        return None
    step = sorted(steps)[-2]
    mine = [one for one in waiting if isinstance(one, _Waiting) and one.context.step == step]
    before = [(record, row) for record, row in kept if row.step == step]
    if sum(one.size for one in mine) + sum(row.nbytes for _, row in before) > MOST:
        return None
    if not all(here(value) for one in mine for value in (*one.values.values(), *shelf.masks(one).values())):
        return None
    made: dict[tuple[str, int, str], list[Row]] = {}
    for record, row in before:
        made.setdefault((record, row.layer, row.kind), []).append(row)
    for one, values, valid in shelf.on_the_host(mine):
        row = shelf.row(one, values, valid)
        made.setdefault((one.record, row.layer, row.kind), []).append(row)
    found: dict[str, list[Row]] = {}
    for (record, _, _), some in made.items():
        found.setdefault(record, []).append(merged(some, shelf.declared[record]))
    return found
