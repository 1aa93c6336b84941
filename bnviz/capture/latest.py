"""The newest value of each layer while a capture goes on, for a live display: read from any thread, and never from a device."""

from __future__ import annotations

from itertools import islice

import numpy as np
from torch import Tensor

from .shelf import Shelf, _Waiting, to_host

BACK = 4096  # rows that are looked through, from the newest on


def latest(shelf: Shelf, record: str, variable: str) -> dict[tuple[int, str], np.ndarray]:
    """The newest array of `variable` at each (layer, part), in the order of layers.

    What waits on a GPU is left alone until it has been brought to the host, for asking would make the model wait. Costs a few
    microseconds a layer; the capture may go on in another thread meanwhile.
    """
    found: dict[tuple[int, str], np.ndarray] = {}
    # Both copies are made at once, which another thread does not come between. What lies there is not always in the order of
    # forwards: decode steps that were read late, and texts of a joined batch, come layer by layer.
    for one in reversed(list(shelf._waiting)):
        if isinstance(one, _Waiting) and one.record == record and (one.site.layer, one.site.part) not in found:
            value = one.values.get(variable)
            if value is not None and here(value):
                found[one.site.layer, one.site.part] = to_host([value])[0]
    for (_, layer, part), row in list(islice(reversed(shelf.rows.get(record, {}).items()), BACK)):
        if (layer, part) not in found and variable in row.values:
            found[layer, part] = row.values[variable]
    return dict(sorted(found.items()))


def here(value: Tensor | np.ndarray) -> bool:
    """On the host."""
    return isinstance(value, np.ndarray) or value.is_cpu
