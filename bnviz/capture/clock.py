"""Steps, calls and phases: which forward this is, how many tokens came before it, and which of its tokens are padding.

Positions are counted here: a static cache would answer with a live tensor, and reading it would synchronise the device.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.observation import Context


class Clock:
    """Turns calls of the watched model into contexts.

    Parameters
    ----------
    model : nn.Module
    step : {"forward", "manual"}
        "forward": every forward is a step, and the decode steps of one generation share one. "manual": `advance` alone.
    when : {"always", "eval", "train"} or callable
        Which forwards are watched; a callable is given the model.
    every : int
        Watch one forward in `every` (decode steps follow their prefill).
    """

    def __init__(self, model: nn.Module, step: str, when: str | Callable[[nn.Module], bool], every: int) -> None:
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self._manual, self._when, self._every = step == "manual", when, every
        self._step, self._seen, self._row_calls = -1, -1, 0
        self._past: tuple[Any, int, Tensor | None] = (None, 0, None)
        self.calls = 0
        self.forwards_watched = 0
        self.seconds = self._started = 0.0
        self._masks: list[Tensor] = []
        self._times: Counter[Any] = Counter()
        self._shape: tuple[int, int] | None = None
        self._in_decode_row = False
        self._first: tuple[Tensor, Tensor | None] | None = None
        self.first_ids: tuple[Any, Any] | None = None
        self.now: Context | None = None
        self.token_ids: Tensor | None = None
        self.valid_keys: Tensor | None = None

    def advance(self) -> None:
        """End a manual step."""
        self._step, self._row_calls = self._step + 1, 0

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context | None:
        """The context of the forward that starts now; None when it is not to be watched."""
        call, self.calls = self.calls, self.calls + 1
        self._times.clear()
        given = dict(zip(self._names, args, strict=False)) | kwargs
        ids, tokens, mask = self._inputs(given)
        cache = next(
            (v for v in given.values() if hasattr(v, "get_seq_length")), None
        )  # its name changes with releases
        past = self._history(cache, ids, tokens)
        decode = past > 0
        self.now = None
        if not self._watches(model, decode):
            return None
        phase = "decode" if decode else "prefill" if cache is not None else "forward"
        length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() >= 2 else None
        mask = self.valid_keys = self._real(mask, cache is not None, past, length)
        sides = (m for name, m in given.items() if name.endswith("attention_mask"))
        self._masks = [m.bool() for m in sides if isinstance(m, Tensor) and m.dim() == 2]
        self._shape = (tokens.shape[0], length) if isinstance(tokens, Tensor) and length is not None else None
        valid = mask[:, -length:] if mask is not None and length is not None else None
        self.now = Context(self._number(phase), call, phase, past, valid)
        self.forwards_watched += 1
        self._started = time.perf_counter()
        if self._first is None and ids is not None:
            self._first = (ids.detach(), valid)
        return self.now

    def seen(self, tokens: int) -> Context | None:
        """This moment for a site of so many tokens; a side of the model that reads another text has that text's mask."""
        now = self.now
        if now is None or (now.valid is not None and now.valid.shape[1] == tokens):
            return now
        own = next((m for m in self._masks if m.shape[1] == tokens), None)
        return now if own is now.valid else replace(now, valid=own)

    def nth(self, place: Any) -> int:
        """Which call of `place` in this forward this is, from 0."""
        self._times[place] += 1
        return self._times[place] - 1

    def _inputs(self, given: dict[str, Any]) -> tuple[Tensor | None, Any, Any]:
        """(ids, tokens, mask) of the side that is generated: the decoder where there are two."""
        two = "decoder_input_ids" in self._names
        side = "decoder_" if two else ""
        ids = given.get(f"{side}input_ids")
        ids = given.get("labels") if ids is None and two else ids
        ids = ids if isinstance(ids, Tensor) and ids.dim() == 2 else None
        tokens = ids if ids is not None else given.get(f"{side}inputs_embeds")
        return ids, tokens, given.get(f"{side}attention_mask")

    def rows(self, count: int) -> tuple[int, int]:
        """(batch, tokens) that `count` flat rows stand for; one sequence when they are not this call's tokens."""
        return self._shape if self._shape is not None and self._shape[0] * self._shape[1] == count else (1, count)

    @property
    def cache(self) -> Any:
        """The cache of this call, None when it has none."""
        return self._past[0]

    def end(self) -> None:
        """The forward is over."""
        if self.now is not None:
            self.seconds += time.perf_counter() - self._started
        self.now = None

    def _watches(self, model: nn.Module, decode: bool) -> bool:
        if callable(self._when):
            wanted = bool(self._when(model))
        else:
            wanted = self._when == "always" or (self._when == "train") == model.training
        if not wanted:
            return False
        if decode:
            return self._row_calls > 0  # decode steps go with the prefill they belong to
        self._seen += 1
        if not self._manual and self._seen % self._every:
            self._row_calls = 0
            return False
        return not (self._manual and self._row_calls > 0)  # of several forwards in one manual step the first is kept

    def _real(self, mask: Any, cached: bool, past: int, length: int | None) -> Tensor | None:
        """(batch, keys) bool: which tokens so far are not padding; a static cache comes with a mask of pairs instead."""
        if isinstance(mask, dict):  # one for each kind of attention
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask.to(torch.bool, copy=True)  # it is read after the forward, when the caller may have changed it
        if not (isinstance(mask, Tensor) and mask.dim() == 4 and cached and length):
            return None
        if past == 0:
            return padding_of(mask, length)
        before = self.valid_keys
        if before is None or before.shape[1] != past:
            return None
        return torch.cat([before, before.new_ones(before.shape[0], length)], 1)

    def _number(self, phase: str) -> int:
        if self._manual:
            self._step = max(self._step, 0)
        elif phase != "decode" or not self._in_decode_row:
            self._step += 1
        self._in_decode_row = phase == "decode"
        self._row_calls += 1
        return self._step

    def _history(self, cache: Any, ids: Tensor | None, tokens: Any) -> int:
        """Tokens in `cache` before this call, counted; and the ids of all tokens so far."""
        length = tokens.shape[1] if isinstance(tokens, Tensor) and tokens.dim() >= 2 else 0
        if cache is None:
            self._past, self.token_ids = (None, 0, None), ids
            return 0
        known, count, before = self._past
        if known is not cache:
            held = cache.get_seq_length()
            count, before = held if isinstance(held, int) else 0, None
        together = ids if count == 0 else None if before is None or ids is None else torch.cat([before, ids], 1)
        self._past, self.token_ids = (cache, count + length, together), together
        return count

    def release(self) -> None:
        """Let the cache and the ids go; the ids of the first watched forward stay, on the host."""
        if self._first is not None:
            self.first_ids = tuple(None if t is None else t.cpu().numpy() for t in self._first)  # type: ignore[assignment]
        self._first = None
        self._past, self.token_ids, self.valid_keys, self.now = (None, 0, None), None, None, None
        self._masks.clear()


def padding_of(mask: Tensor, length: int) -> Tensor | None:
    """(batch, length) bool, False for padding, from a mask (batch, 1, length, keys) of pairs of a whole prompt.

    Padding on the left: a row that sees nothing, or everything (so that no kernel makes NaN of it), and is not seen by the last.

    Examples
    --------
    >>> padding_of(torch.tensor([[1, 1, 1], [0, 1, 0], [0, 1, 1]]).bool()[None, None], 3)
    tensor([[False,  True,  True]])
    """
    sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    sees = sees[:, 0, :, :length]
    if sees.shape[1:] != (length, length):
        return None
    odd = sees.all(-1) | ~sees.any(-1)
    return ~(odd & ~sees[:, -1])
