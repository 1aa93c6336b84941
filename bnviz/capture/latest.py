"""The newest value of each layer while a capture goes on, for a live display: read from any thread, and never from a device."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .shelf import Shelf, _Waiting


def latest(shelf: Shelf, record: str, variable: str) -> dict[tuple[int, str], np.ndarray]:
    """The newest array of `variable` at each (layer, part), in the order of layers.

    What waits on a GPU is left alone until it has been brought to the host, for asking would make the model wait. Costs a few
    microseconds a layer; the capture may go on in another thread meanwhile.
    """
    found: dict[tuple[int, str], np.ndarray] = {}
    for at, values in _newest_first(shelf, record):
        if at in found:  # a step further back
            break
        if variable in values:
            found[at] = values[variable]
    return dict(sorted(found.items()))


def _newest_first(shelf: Shelf, record: str) -> Iterator[tuple[tuple[int, str], dict[str, np.ndarray]]]:
    """Copies of the lists are made at once, which another thread does not come between."""
    for one in reversed(list(shelf._waiting)):
        if isinstance(one, _Waiting) and one.record == record:
            values = one.values
            here = {
                name: v if isinstance(v, np.ndarray) else v.numpy(force=True) for name, v in values.items() if _here(v)
            }
            if here:
                yield (one.site.layer, one.site.part), here
    for (_, layer, part), row in reversed(list(shelf.rows.get(record, {}).items())):
        yield (layer, part), row.values


def _here(value: object) -> bool:
    return isinstance(value, np.ndarray) or bool(getattr(value, "is_cpu", False))
