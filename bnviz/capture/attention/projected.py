"""The matrix that the output of attention is multiplied by: what a module inside it was given, compared with that output.

Nothing is known by name. Of the modules inside an attention that multiply by a matrix, the last one whose input has a channel for
each channel of every head is taken, and only where that input is the output of the heads, made again for a few queries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from bnviz.capture.clock import Clock
from bnviz.observation import Projection

from .explained import OUTPUTS, mixed
from .find import AttentionSite
from .inside import Inside
from .turns import moved

if TYPE_CHECKING:
    from .call import Call


FLOAT32 = 1e-3  # of the largest value: sums in another order differ by less


class _Given(NamedTuple):
    """What a module was given and gave in this call, the version of both then (-1: copies), and its matrix (in, out)."""

    value: Tensor
    output: Tensor
    versions: tuple[int, int]
    matrix: Tensor
    bias: Tensor | None

    @property
    def whole(self) -> bool:
        """Neither was written to since."""
        now = (self.value._version, self.output._version) if self.versions[0] >= 0 else self.versions
        return now == self.versions


class Outputs(Inside[_Given]):
    """What modules with a matrix inside attention are given, while it runs, and the one that the heads' output goes through."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._width: dict[nn.Module, int] = {}

    def attach(self, places: Sequence[AttentionSite], stack: contextlib.ExitStack) -> None:
        """Listen to the modules in every place until the stack ends."""
        self._listen(places, stack, lambda owner, _, child: None if _matrix(child) is None else self._hearing(owner))

    def _end(self) -> None:
        super()._end()
        self._width.clear()

    def _clear(self, module: nn.Module, *given: Any) -> None:
        """Also how wide the stream is that the attention reads: as wide is what it writes."""
        super()._clear(module)
        if len(given) != 2:  # after the call
            return
        for one in (*given[0], *given[1].values()):
            if isinstance(one, Tensor) and one.is_floating_point() and one.dim() > 1:
                self._width[module] = one.shape[-1]
                return

    def _hearing(self, owner: nn.Module) -> Any:
        def hear(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            now, found = self._clock.now, _matrix(module)
            value = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
            if now is None or now.phase == "decode" or found is None or value is None or type(output) is not Tensor:
                return
            if value.dim() < 2 or value.shape[-1] != found.shape[0] or not value.is_floating_point():
                return
            value, output = value.detach(), output.detach()
            copied = value.is_inference() or output.is_inference()  # torch counts no writes into it
            if copied:
                value, output = value.clone(), output.clone()
            versions = (-1, -1) if copied else (value._version, output._version)
            bias = getattr(module, "bias", None)
            made = self._made.setdefault(owner, [])
            made.append(_Given(value, output, versions, found, bias if isinstance(bias, Tensor) else None))

        return hear

    def of(self, place: AttentionSite, call: Call) -> Projection | None:
        """The output projection of a call, head by head; None where no module may be it."""
        heads, dim = call.query.shape[1], call.value.shape[-1]
        if not self.on or not dim or not call.query.shape[2] or not call.query.shape[0]:
            return None
        if type(place.module).forward is nn.MultiheadAttention.forward:  # it multiplies by it without a call
            known = _matrix(place.module.out_proj)  # type: ignore[arg-type]
            holds = torch.ones((), dtype=torch.bool, device=call.value.device)
            return None if known is None else Projection(known.view(heads, dim, -1), holds)
        made = self._made.get(place.module, [])
        rows = _rows(call)
        again = mixed(call, rows)
        shape = (heads * dim, self._width.get(place.module))
        able = [
            one
            for one in made
            if one.whole and one.matrix.shape[0] == shape[0] and shape[1] in (None, one.matrix.shape[1])
        ]
        found = list[Projection]()
        for given in reversed(able):
            for value, output in _laid(given, call.query.shape[0], call.query.shape[2]):
                holds = _holds(again, value[:, rows], output[:, rows], given, call)
                if not holds.is_cpu or bool(holds):  # another device is not waited for: the last that may be it
                    found.append(Projection(given.matrix.view(heads, dim, -1), holds))
                    break
        alone = len(found) == 1 or (bool(found) and not found[0].holds.is_cpu)  # of two that add up neither is all
        return found[0] if alone else None


def _matrix(module: nn.Module) -> Tensor | None:
    """(in, out) of a module that multiplies by one, in plain numbers."""
    weight = module._parameters.get("weight")  # never a property: a parametrization draws or steps when it is read
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        return None
    if isinstance(weight, nn.parameter.UninitializedParameter) or weight.is_meta:
        return None
    if isinstance(module, nn.Linear):
        return weight.detach().mT
    return weight.detach() if type(module).__name__ == "Conv1D" else None


def _rows(call: Call) -> Tensor:
    """The first, the middle and the last query."""
    count = call.query.shape[2]
    return moved(torch.tensor(sorted({0, count // 2, count - 1})), call.query.device)


def _laid(given: _Given, batch: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Input and output (1, tokens, channels) of the first sequence, by how the axes of the input may be meant."""
    pair, shape = (given.value, given.output), given.value.shape
    if shape[:-1] == given.output.shape[:-1]:
        if shape[:-1] == (batch, tokens):
            yield pair[0][:1], pair[1][:1]
        if shape[:-1] == (tokens, batch):
            yield pair[0][:, :1].transpose(0, 1), pair[1][:, :1].transpose(0, 1)
        if shape[:-1] == (batch * tokens,):
            yield pair[0][None, :tokens], pair[1][None, :tokens]


def _holds(again: Tensor, value: Tensor, output: Tensor, given: _Given, call: Call) -> Tensor:
    """() bool: the input is the output of the heads, and the output is its product with the matrix."""
    flat = again.transpose(1, 2).flatten(2)  # (1, rows, heads x dim)
    eps = torch.finfo(value.dtype).eps
    near_by = max(OUTPUTS * eps, FLOAT32)
    seen = ~flat.isnan().any(-1)
    near = (flat - value.float()).abs().amax(-1) <= near_by * call.value.detach().abs().amax().float()
    product = value.float() @ given.matrix.float()
    product = product if given.bias is None else product + given.bias.detach().float()
    like = (product - output.float()).abs().amax(-1) <= near_by * output.float().abs().amax()
    return ((near & like) | ~seen).all() & seen.any()
