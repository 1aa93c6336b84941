"""A text whose prompt is read once: what follows is read behind one cache after another and compared with the whole one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.errors import BnvizError

from ._cut import Reader, cut, layers_of, nbytes
from ._subject import Subject

TOGETHER = 16  # tokens whose predictions are compared at once


def plainly(_: int) -> contextlib.AbstractContextManager[None]:
    """Queries see all that is in the cache."""
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Behind:
    """A cache that the rest of the text is read behind.

    Parameters
    ----------
    made : function of nothing
        Gives it; anew each time, as reading makes it grow.
    seen : function of int
        Under which queries see it once it holds so many tokens beside those of the prompt.
    """

    made: Callable[[], Any]
    seen: Callable[[int], contextlib.AbstractContextManager[None]] = plainly


class Continued:
    """A text, the cache of its prompt, and what the model says after it behind the whole cache.

    What inherits calls `_watch`, then `_begin`; then `_compared` gives the numbers of any other cache.

    Parameters
    ----------
    of : Subject
    sample : int
        Which text.
    split : tuple of int
        Where the prompt ends, and where what is measured does.
    greedy : int
        Tokens of the greedy continuation that are compared.
    """

    places: list[tuple[int, str]]

    def __init__(self, of: Subject, sample: int, split: tuple[int, int], greedy: int) -> None:
        self.sample = sample
        self._end, last = split
        text = of.texts[sample]
        self._model, self._steps = of.model, greedy
        self._prompt, self._rest, self._read = text[:, : self._end], text[:, self._end : last], Reader(of.model)

    def _watch(self, probes: Sequence[str], options: Mapping[str, Any]) -> Any:
        """Read the prompt, watched by probes; the run."""
        from bnviz.capture import capture

        with capture(self._model, probes=list(probes), progress=False, **options) as recorder:
            logits, self._cache = self._read(self._prompt)
        if not bool(torch.isfinite(logits).all()):
            raise BnvizError(
                f"experiment: {type(self._model).__name__} gives values that are not finite on text {self.sample}, so nothing "
                "can be compared; capture it, and the findings name the first layer that does."
            )
        self._next = int(logits[-1].argmax())
        self._layers = layers_of(self._cache)
        return recorder.run

    def _begin(self, places: list[tuple[int, str]]) -> None:
        """What the model says behind the whole cache; `places` are layers and paths of its attention modules."""
        self.places = places
        self._modules = [self._model.get_submodule(path) for _, path in places]
        whole = Behind(lambda: cut(self._cache, self._layers, None))
        self._whole, self._outputs = self._continued(whole)
        self._greedy = self._greedily(whole)

    def _compared(self, behind: Behind) -> dict[str, Any]:
        """What the model says behind another cache, against the whole one; numbers, JSON-able."""
        logits, outputs = self._continued(behind)
        apart, losses = _predictions(self._whole, logits, self._rest[0])
        same = (self._whole.argmax(-1) == logits.argmax(-1)).float().mean()
        return {
            "divergence": float(apart.mean()),
            "divergence_most": float(apart.max()),
            "loss_change": losses[1] - losses[0],
            "same_token": float(same),
            "greedy_kept": self._same_greedy(behind),
            "output_error": [_apart(one, other) for one, other in zip(outputs, self._outputs, strict=True)],
            "loss": losses[0],
            "bytes_whole": nbytes(self._layers),
            "tokens": self._end,
            "measured": self._rest.shape[1],
            "layers": self.places,
        }

    def _continued(self, behind: Behind) -> tuple[Tensor, list[Tensor]]:
        """Logits (tokens, vocabulary) of the rest of the text behind a cache, and each layer's attention output."""
        with behind.seen(0), _outputs_of(self._modules) as outputs:
            logits, _ = self._read(self._rest, behind.made(), self._end)
        return logits, outputs

    def _greedily(self, behind: Behind, until: list[int] | None = None) -> list[int]:
        """Tokens that greedy decoding gives after the prompt; it ends where they differ from `until`."""
        found, cache, device = [self._next], behind.made(), self._rest.device
        for step in range(self._steps):
            with behind.seen(step):
                logits, cache = self._read(torch.tensor([[found[-1]]], device=device), cache, self._end + step)
            found.append(int(logits[-1].argmax()))
            if until is not None and found[-1] != until[len(found) - 1]:
                break
        return found[1:]

    def _same_greedy(self, behind: Behind) -> float:
        if not self._steps:
            return float("nan")
        found = self._greedily(behind, [self._next, *self._greedy])
        return float(sum(one == other for one, other in zip(found, self._greedy, strict=False)))


def _predictions(whole: Tensor, found: Tensor, ids: Tensor) -> tuple[Tensor, list[float]]:
    """KL of each prediction, and the mean loss of the next tokens behind both caches; in float64, some tokens at a time."""
    apart, losses = [], [0.0, 0.0]
    for at in range(0, len(whole), TOGETHER):
        log_p, log_q = (one[at : at + TOGETHER].double().log_softmax(-1) for one in (whole, found))
        apart.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0))
        next_ids = ids[at + 1 : at + 1 + TOGETHER, None]
        for which, log in enumerate((log_p, log_q)):
            losses[which] -= float(log[: len(next_ids)].gather(-1, next_ids).sum())
    return torch.cat(apart), [loss / (len(ids) - 1) for loss in losses]


def _apart(found: Tensor, whole: Tensor) -> float:
    return float((found - whole).norm() / whole.norm())


@contextlib.contextmanager
def _outputs_of(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """What each module gives, (tokens, features) in float32, in their order; nothing stays on them."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            found[number] = tensor.detach()[0].float()

        return hook

    outputs: list[Tensor] = []
    handles = [module.register_forward_hook(keep(number)) for number, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
    outputs += [found[number] for number in range(len(modules))]
