"""The mean gradient over a window of steps, exactly: one copy of the trained parameters, in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bnviz.reduce.gradient_stats import gradient_stats


class Means:
    """Sums of gradients since the window began, of each parameter, on its device.

    Parameters
    ----------
    window : int
        Steps with a gradient after which a layer's mean is told and its sum begins anew.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._sums: dict[int, Tensor] = {}
        self._steps: Counter[int] = Counter()

    def add(self, index: int, gradient: Tensor, scale: Tensor | float | None) -> None:
        """A gradient is added, multiplied by `scale`."""
        if index not in self._sums:
            wide = gradient.dtype if gradient.dtype.itemsize >= 4 else torch.float32
            self._sums[index] = torch.zeros(gradient.shape, dtype=wide, device=gradient.device)
        value = gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
        if isinstance(scale, Tensor):
            self._sums[index].addcdiv_(value.to(self._sums[index].dtype), scale.to(gradient.device))
        else:
            self._sums[index].add_(value)

    def divide(self, scale: Tensor | float) -> None:
        """What was added so far was multiplied by `scale`: it was not known then."""
        for value in self._sums.values():
            value.div_(scale.to(value.device) if isinstance(scale, Tensor) else scale)

    def step(self, layers: Mapping[int, Iterable[int]]) -> dict[int, tuple[int, dict[int, Tensor]]]:
        """A step gave these layers a gradient: by layer whose window ends here, its steps and the norms of the means."""
        self._steps.update(layers.keys())
        ended = {layer: self._steps.pop(layer) for layer in layers if self._steps[layer] >= self._window}
        told = {
            layer: (count, {i: gradient_stats(self._sums[i]).norm / count for i in layers[layer] if i in self._sums})
            for layer, count in ended.items()
        }
        for _, norms in told.values():  # only now: two layers may share a parameter
            for index in norms:
                self._sums[index].zero_()
        return told
