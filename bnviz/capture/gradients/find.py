"""Which parameters are trained, and which layers and parts of a block each belongs to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from bnviz.observation import Site

if TYPE_CHECKING:
    from bnviz.capture.blocks.writers import Shares
    from bnviz.capture.plan import Plan

Place = tuple[int, str]  # layer, part


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the model; a shared one is one."""

    name: str
    value: Tensor
    blocks: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of a copy in float32, float64 where it is that."""
        return self.value.numel() * max(4, self.value.element_size())


class Places:
    """The parameters of a model, and where each belongs: to its block, and to the part whose modules hold it.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
    shares : callable
        Tells whose the modules of each block are, as far as its residual writers are known: after its first forward.
    """

    def __init__(self, model: nn.Module, plan: Plan, shares: Callable[[], list[Shares | None]]) -> None:
        self._plan, self._shares = plan, shares
        self._owner: dict[
            tuple[int, int], str
        ] = {}  # by block and parameter: the module that holds it, within the block
        within: dict[int, list[int]] = {}
        for number, (_, block) in enumerate(plan.blocks):
            for path, module in block.first.named_modules():
                for value in module.parameters(recurse=False):
                    if self._owner.setdefault((number, id(value)), path) == path:
                        within.setdefault(id(value), []).append(number)
        self.parameters = [
            Parameter(n, p, tuple(dict.fromkeys(within.get(id(p), ())))) for n, p in model.named_parameters()
        ]
        self._model = model
        self._index = {id(p.value): at for at, p in enumerate(self.parameters)}
        self._others: dict[int, Tensor | weakref.ref[Tensor]] = {}  # seen later: the model's own, held, and others'
        self._known: tuple[Shares | None, ...] = ()
        self._places: dict[int, tuple[Place, ...]] = {}

    def index_of(self, value: Tensor) -> int | None:
        """Which parameter this is; also one that has stood in its place since (sharding swaps them). None: not the model's."""
        known = self._others.get(id(value))
        if id(value) not in self._index and (
            known is None or (isinstance(known, weakref.ref) and known() is not value)
        ):
            names = {parameter.name: at for at, parameter in enumerate(self.parameters)}
            self._others[id(value)] = weakref.ref(value)
            for name, now in self._model.named_parameters():
                if name in names and id(now) not in self._index:
                    self._index[id(now)], self._others[id(now)] = names[name], now
        return self._index.get(id(value))

    def of(self, index: int) -> tuple[Place, ...]:
        """Layers and parts that a parameter belongs to; none when it lies outside every block."""
        known = tuple(self._shares())
        if known != self._known or not self._places:
            self._known = known
            self._places = {at: tuple(self._all(at)) for at in range(len(self.parameters))}
        return self._places[index]

    def _all(self, index: int) -> Iterator[Place]:
        for number in self.parameters[index].blocks:
            layer = self._plan.blocks[number][0].layer
            yield layer, "block"
            part = self._part(number, self._owner[number, id(self.parameters[index].value)])
            if part is not None:
                yield layer, part

    def _part(self, number: int, path: str) -> str | None:
        """The part whose modules hold a module of a block; of what did not run (an expert), that of the module around it."""
        found = self._known[number] if number < len(self._known) else None
        if found is None:
            return None
        parts = {held: part for part, paths in zip(found.parts, found.modules, strict=True) for held in paths}
        while path and path not in parts:
            path = path.rpartition(".")[0]
        return parts.get(path)

    def sites(self) -> dict[Place, Site]:
        """A site for every layer and part that holds a trained parameter."""
        paths = {site.layer: site.path for site, _ in self._plan.blocks}
        return {
            (layer, part): Site("gradient", paths[layer], layer, part, "parameters that are trained")
            for at, parameter in enumerate(self.parameters)
            if parameter.value.requires_grad
            for layer, part in self.of(at)
        }
