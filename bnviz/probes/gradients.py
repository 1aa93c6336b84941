"""How strong, how steady and how large a step the gradient of every layer is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bnviz.errors import CaptureError, unknown
from bnviz.observation import GradientSeen, GradientWants
from bnviz.schema import Variable, probe

if TYPE_CHECKING:
    from torch import Tensor

_LAYER = ("step", "kind", "layer")
_DRIFTS = ("projected", "exact", "off")


@probe(
    sites=("gradient",),
    variables=(
        Variable("gradient_norm", _LAYER, "norm", "L2 norm of what the step added to the gradient", "last", True),
        Variable("total_norm", _LAYER, "norm", "L2 norm of the gradient an optimizer was given", "last", True),
        Variable("parameter_norm", _LAYER, "norm", "L2 norm of the parameters that got one", "last", True),
        Variable(
            "update_ratio",
            _LAYER,
            "1",
            "norm of what an optimizer changed, over that of the parameters it changed",
            "last",
            True,
            "updates=True",
        ),
        Variable("reached", _LAYER, "1", "share of the trained values that got a gradient, 0 to 1", "last", True),
        Variable("nonfinite", _LAYER, "count", "values of the gradient that are NaN or infinite", "last"),
        Variable(
            "output_mean",
            _LAYER,
            "norm",
            "gradient with respect to what leaves the layer: mean over tokens",
            "last",
            True,
        ),
        Variable("output_max", _LAYER, "norm", "the same: largest of a token", "last", True),
        Variable("output_norm", (*_LAYER, "token"), "norm", "the same: of each token", "last", True, "per_token=True"),
        Variable("cosine", _LAYER, "1", "cosine of the gradient and that of the layer's step before", "last", True),
        Variable(
            "drift", _LAYER, "1", "norm of the mean gradient of a window, over that of the parameters", "last", True
        ),
        Variable("diffusion", _LAYER, "1", "norm of the deviation about it, over that of the parameters", "last", True),
        Variable(
            "loss_scale", ("step",), "1", "what the loss was multiplied by; NaN: not known, not divided out", "last"
        ),
        Variable(
            "model_norm", ("step",), "norm", "L2 norm of what the step added, all parameters of the model", "last", True
        ),
    ),
    memory="48 B for each block and sub-layer; 4 KiB while it runs; drift='exact': 4 B a trained parameter",
    default=False,
)
class Gradients:
    """Norms of gradients and parameters layer by layer, and how much of the gradient is signal.

    Watch training steps: `loss.backward()`, and `optimizer.step()` if there is one, inside the with block. A step of the record
    is one forward with the backward passes that belong to it (the last watched forward among those that a pass reaches), so that
    with accumulation every micro-batch is a step; `gradient_norm` is its own contribution, `total_norm` stands at the step after
    which an optimizer was called and is the sum it was given, after clipping, all-reduce and unscaling.

    Parameters
    ----------
    drift : {"projected", "exact", "off"}
        How `drift` and `diffusion` are taken: from random projections to 1,024 numbers (standard error of a norm 2 to 3 %, of a
        cosine 0.03 to 0.05), from the mean gradient itself (one float32 copy of the trained parameters of the blocks on their
        device, counted in the budget), or not at all, without `cosine` too.
    batches : int
        Steps of a window, at least 2. They should be of one state of training: the steps of an accumulation, or few enough that
        the weights hardly move.
    updates : bool
        Also `update_ratio`: costs a copy of the optimizer's parameters during its step.
    per_token : bool
        Also `output_norm`: 4 B a token for each block and sub-layer.

    Notes
    -----
    * `drift` = ||mean g|| / ||w||, `diffusion` = (mean ||g - mean g||^2)^(1/2) / ||w||, over the steps of a window, at its last
      step; NaN elsewhere. drift / diffusion is the signal to noise ratio of the layer: far above 1 the batches agree, and pure
      noise gives 1 / batches^(1/2), not 0. In exact mode a window counts the steps that gave the block a gradient.
    * `output_mean` is ||dL/dx|| of the stream after the block; for a sub-layer, after what it adds (both sub-layers of a
      parallel block: after the block). Padding is left out. A loss that is a mean over tokens makes it shrink with their number.
      Of several passes through one output it tells the last.
    * `gradient_norm` is NaN where several passes of one step added to a gradient that was not empty before: what they added
      together cannot be told without a copy. Norms of gradients with values that are not finite are NaN or inf.
    * Loss scaling: gradients are divided by the scale of the GradScaler that steps the optimizer. Until the first optimizer step
      within the capture nothing says whether there is one: `loss_scale` is NaN if 64 steps, or 8 MiB of them, pass without one,
      or the capture ends.
    * A parameter shared by several layers stands at each with the gradient of all its uses; a block that runs several times in
      a forward has its parameters at its first layer. Under DistributedDataParallel `gradient_norm` is this process's own; of
      sharded parameters (FSDP) only the shard of this process is seen, by `total_norm`. Inside torch.func nothing is seen. With
      reentrant checkpointing sub-layers have no `output_mean`, nor have blocks that run several times.
    * What `torch.autograd.grad` returns is no step's gradient: only what is added to `.grad` counts. Sparse gradients are
      coalesced and have no projection.
    * Cost: gradient and parameters are read twice a step. Nothing is read on the host inside forward or backward.

    Source: drift and diffusion of gradients as in Shwartz-Ziv and Tishby 2017 (arXiv 1703.00810, figure 4).

    Examples
    --------
    >>> import torch, bnviz
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False), torch.nn.Identity())
    >>> with bnviz.capture(net, probes=["gradients"]) as recorder:
    ...     net(torch.tensor([[3.0, 4.0]])).sum().backward()
    >>> recorder.run["gradients"]["gradient_norm"].values.tolist()  # (step, kind, layer)
    [[[5.0]]]
    """

    def __init__(
        self, *, drift: str = "projected", batches: int = 16, updates: bool = False, per_token: bool = False
    ) -> None:
        if drift not in _DRIFTS:
            raise unknown("value of drift=", drift, _DRIFTS)
        if batches < 2:
            raise CaptureError(f"batches={batches}: expected the steps of a window, 2 or more.")
        self.drift, self.batches, self.updates, self.per_token = drift, batches, updates, per_token
        self.wants = GradientWants(drift != "off", batches if drift == "exact" else 0, updates)
        self._before: dict[tuple[int, str], Tensor] = {}
        self._windows: dict[tuple[int, str], list[Any]] = {}

    def observe(self, seen: GradientSeen) -> dict[str, Tensor]:
        """The numbers of one layer or part in one step."""
        import torch

        kept = {"nonfinite": torch.tensor(seen.nonfinite), "loss_scale": torch.tensor(seen.scale, dtype=torch.float64)}
        if seen.whole is not None:
            kept["model_norm"] = torch.tensor(seen.whole, dtype=torch.float64)
        kept |= self._parameters(seen)
        if seen.output is not None:
            kept |= self._output(seen)
        return kept

    def _parameters(self, seen: GradientSeen) -> dict[str, Tensor]:
        weight = _norm(seen.weights)
        kept: dict[str, Tensor] = {}
        reached = ~seen.weights.isnan()
        if len(reached):
            kept["reached"] = (seen.sizes * reached).sum() / seen.sizes.sum()
        if reached.any():
            kept |= {"gradient_norm": _norm(seen.added, reached), "parameter_norm": weight}
            kept |= self._window(seen, weight)
        if seen.total is not None:
            kept["total_norm"] = _norm(seen.total)
        if seen.changes is not None:
            kept["update_ratio"] = _norm(seen.changes) / _norm(seen.weights, ~seen.changes.isnan())
        return kept

    def _window(self, seen: GradientSeen, weight: Tensor) -> dict[str, Tensor]:
        """Cosine with the step before, and drift and diffusion where a window ends."""
        place = seen.site.layer, seen.site.part
        kept: dict[str, Tensor] = {}
        if seen.projection is not None:
            now = seen.projection.double()
            before = self._before.get(place)
            if before is not None:
                kept["cosine"] = now @ before / (now.norm() * before.norm())
            self._before[place] = now
            if self.drift == "projected":
                kept |= self._projected(place, now, weight)
        if self.drift == "exact":
            square = self._windows.setdefault(place, [0.0])
            square[0] += float(_norm(seen.added)) ** 2
            if seen.window:
                mean = float(_norm(seen.mean)) if seen.mean is not None else math.nan
                kept |= _pair(mean, square[0] / seen.window, weight)
                del self._windows[place]
        return kept

    def _projected(self, place: tuple[int, str], now: Tensor, weight: Tensor) -> dict[str, Tensor]:
        window = self._windows.setdefault(place, [0, 0.0, 0.0])
        window[0], window[1], window[2] = window[0] + 1, window[1] + now, window[2] + float(now @ now)
        if window[0] < self.batches:
            return {}
        del self._windows[place]
        return _pair(float(window[1].norm()) / window[0], window[2] / window[0], weight)

    def _output(self, seen: GradientSeen) -> dict[str, Tensor]:
        assert seen.output is not None
        valid = seen.context.valid
        norms = seen.output
        if valid is not None and valid.shape == norms.shape:
            real = norms.masked_fill(~valid.to(norms.device), 0.0)
            kept = {"output_mean": real.sum() / valid.sum(), "output_max": real.max()}
        else:
            kept = {"output_mean": norms.mean(), "output_max": norms.max()}
        return kept | ({"output_norm": norms} if self.per_token else {})


def _norm(norms: Tensor, among: Tensor | None = None) -> Tensor:
    """Norm of a whole from those of its parts; of all that are known, or of those among which all must be."""
    return (norms[~norms.isnan()] if among is None else norms[among]).square().sum().sqrt()


def _pair(mean: float, square: float, weight: Tensor) -> dict[str, Tensor]:
    return {"drift": mean / weight, "diffusion": max(square - mean**2, 0.0) ** 0.5 / weight}
