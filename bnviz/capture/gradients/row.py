"""What the backward passes of one step gave, as small tensors on their devices, until it is read between forwards."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from bnviz.capture import arrival
from bnviz.capture.arrival import Arrival
from bnviz.observation import Context, GradientSeen, Site
from bnviz.reduce.gradient_stats import gradient_stats

from .find import Place, Places

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(slots=True)
class Row:
    """One step.

    Parameters
    ----------
    context : Context
        Of the forward that its backward passes belong to.
    scale : Tensor or float, optional
        What its loss was multiplied by; None: not known yet.
    late : bool
        It was not known when the gradients were made.
    means : dict, optional
        By layer whose window of steps ends here, its steps and the norms of the means; None: its passes are not over.
    scaled_means : bool
        They are multiplied by `scale` too: it was not known when they were taken.
    """

    context: Context
    scale: Tensor | float | None = None
    late: bool = False
    added: dict[int, Tensor] = field(default_factory=dict)
    lost: dict[int, Tensor] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)
    fresh: set[int] = field(default_factory=set)
    projections: dict[tuple[Place, torch.device], Tensor] = field(default_factory=dict)
    outputs: dict[Place, tuple[Site, Tensor]] = field(default_factory=dict)
    total: dict[int, Tensor] = field(default_factory=dict)
    changes: dict[int, Tensor] = field(default_factory=dict)
    means: dict[int, tuple[int, dict[int, Tensor]]] | None = None
    scaled_means: bool = False

    def add(self, index: int, gradient: Tensor, weight: Tensor, before: Tensor | None) -> None:
        """A backward pass adds `gradient` to parameter `index`, whose gradient was `before`.

        Of several passes the norm of the sum is known where the first found no gradient: `before` is what they added so far.
        """
        again = index in self.added
        if not again:
            self.weights[index] = gradient_stats(weight).norm
            self.fresh |= {index} if before is None else set()
        known = not again or (index in self.fresh and before is not None)
        found = gradient_stats(gradient, plus=before if again and known else None)
        self.added[index] = found.norm if known else torch.full_like(found.norm, math.nan)
        self.lost[index] = found.nonfinite if known else self.lost[index] + found.nonfinite
        self.fresh -= set() if known else {index}

    @property
    def nbytes(self) -> int:
        """What it holds besides single numbers."""
        some = (*self.projections.values(), *(norms for _, norms in self.outputs.values()))
        return sum(value.numel() * value.element_size() for value in some)

    def project(self, place: Place, projected: Tensor) -> None:
        """Add the projection of a parameter's gradient to that of a place."""
        at = (place, projected.device)
        self.projections[at] = self.projections[at] + projected if at in self.projections else projected


@dataclass(frozen=True, slots=True)
class Told:
    """Numbers of a row on the host, by index of the parameter, before `scale` is divided out."""

    added: dict[int, float]
    weights: dict[int, float]
    total: dict[int, float]
    changes: dict[int, float]
    means: dict[int, tuple[int, dict[int, float]]]
    lost: dict[int, int]
    scale: float


class Reading:
    """Steps that are over, whose numbers are on their way to the host: one copy from each device, which nobody waits for.

    Parameters
    ----------
    rows : list of Row
    """

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self._asked = rows, [_asked(row) for row in rows]
        values = [value for by in self._asked for value in by.values()]
        values += [value for row in rows for value in row.projections.values()]
        self._arrival = Arrival(values) if any(map(arrival.late, values)) else None

    def here(self) -> bool:
        """They can be read without waiting."""
        return self._arrival is None or self._arrival.here()

    @property
    def nbytes(self) -> int:
        """What the rows hold besides single numbers."""
        return sum(row.nbytes for row in self.rows)

    def told(self) -> list[Told]:
        """The numbers of each row; waits for them."""
        if self._arrival is not None:
            values = iter(self._arrival.values())
            self._asked = [{key: next(values) for key in by} for by in self._asked]
            for row in self.rows:
                row.projections = {at: next(values) for at in row.projections}
        return known_scales(
            self.rows, [_told(row, on_host(by)) for row, by in zip(self.rows, self._asked, strict=True)]
        )


def _asked(row: Row) -> dict[tuple[str, int], Tensor]:
    by: dict[tuple[str, int], Tensor] = {}
    for name, some in (
        ("added", row.added), ("weights", row.weights), ("total", row.total), ("changes", row.changes), ("lost", row.lost),
    ):  # fmt: skip
        by |= {(name, index): value for index, value in some.items()}
    means = row.means or {}
    for layer, (_, some) in means.items():
        by |= {(f"mean {layer}", index): value for index, value in some.items()}
    if isinstance(row.scale, Tensor):
        by["scale", 0] = row.scale
    return by


def _told(row: Row, host: Mapping[tuple[str, int], float]) -> Told:
    means = row.means or {}
    scale = host["scale", 0] if isinstance(row.scale, Tensor) else math.nan if row.scale is None else float(row.scale)

    def of(name: str, some: Iterable[int]) -> dict[int, float]:
        return {index: host[name, index] for index in some}

    return Told(
        of("added", row.added),
        of("weights", row.weights),
        of("total", row.total),
        of("changes", row.changes),
        {layer: (window, of(f"mean {layer}", some)) for layer, (window, some) in means.items()},
        {index: int(host["lost", index]) for index in row.lost},
        scale,
    )


def known_scales(rows: list[Row], told: list[Told]) -> list[Told]:
    """The same, without scales that were learnt later and that a step in between has changed.

    A GradScaler leaves out the step of a gradient that is not finite and lowers its scale: of what came before, and was not told
    then, the scale is not known.
    """
    lost = [at for at, (row, one) in enumerate(zip(rows, told, strict=True)) if row.late and any(one.lost.values())]
    return [
        replace(one, scale=math.nan) if row.late and one.scale != 1 and lost and at <= lost[-1] else one
        for at, (row, one) in enumerate(zip(rows, told, strict=True))
    ]


def on_host(values: Mapping[_Key, Tensor]) -> dict[_Key, float]:
    """Scalars as numbers, one copy for all of a device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[_Key]] = {}
    for key, value in values.items():
        groups.setdefault((value.device, value.dtype), []).append(key)
    found: dict[_Key, float] = {}
    for keys in groups.values():
        found |= zip(keys, torch.stack([values[key].reshape(()) for key in keys]).tolist(), strict=True)
    return found


def show(row: Row, told: Told, places: Places, sites: Mapping[Place, Site]) -> Iterable[GradientSeen]:
    """What is seen of a row: one observation a place, the first of them with the norm over the whole model."""
    factor = 1.0 if math.isnan(told.scale) else told.scale
    trained: dict[Place, list[int]] = {}
    for index in range(len(places.parameters)):
        if places.parameters[index].value.requires_grad or index in told.added:
            for place in places.of(index):
                trained.setdefault(place, []).append(index)
    added = {index: norm / factor for index, norm in told.added.items()}
    whole: float | None = math.hypot(*added.values()) if added else None
    touched = set(told.added) | set(told.total)
    for place in sorted({*(p for p, some in trained.items() if touched & set(some)), *row.outputs}, key=_order):
        indices = trained.get(place, [])
        site, output = row.outputs.get(place, (sites.get(place), None))
        if site is None:
            continue
        window, means = told.means.get(place[0], (0, {}))
        means = {index: norm / factor for index, norm in means.items()} if row.scaled_means else means
        yield GradientSeen(
            Site("gradient", site.path, site.layer, site.part, site.evidence),
            row.context,
            torch.tensor([places.parameters[i].value.numel() for i in indices], dtype=torch.int64),
            _column(indices, told.weights),
            _column(indices, added),
            sum(told.lost.get(i, 0) for i in indices),
            told.scale,
            _column(indices, told.total) if touched & set(indices) & set(told.total) else None,
            _column(indices, told.changes) if set(indices) & set(told.changes) else None,
            None if output is None else output / factor,
            _projection(row, place, factor),
            _column([i for i in indices if i in means], means) if window else None,
            window,
            whole,
        )
        whole = None


def _order(place: Place) -> tuple[int, int]:
    return place[0], {"block": 0, "attention": 1}.get(place[1], 2)


def _column(indices: list[int], values: Mapping[int, float]) -> Tensor:
    return torch.tensor([values.get(index, math.nan) for index in indices], dtype=torch.float64)


def _projection(row: Row, place: Place, factor: float) -> Tensor | None:
    some = [value.cpu() for (where, _), value in row.projections.items() if where == place]
    return sum(some[1:], some[0]) / factor if some else None
