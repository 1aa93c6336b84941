"""Caches whose heads keep unlike numbers of tokens: padded to the longest head of a layer, with a mask that hides the padding."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnviz.errors import BnvizError

MASK = "attention_mask"
READ = ("sdpa", "eager")  # implementations of transformers that read a mask of every layer's own


@dataclass(frozen=True, slots=True)
class Kept:
    """The places that each head of a layer keeps.

    Parameters
    ----------
    index : Tensor (kv_heads, most) int64
        Ascending; 0 where a head keeps fewer.
    held : Tensor (kv_heads, most) bool
        Which of them are kept.
    """

    index: Tensor
    held: Tensor

    @property
    def tokens(self) -> int:
        """Over all heads."""
        return int(self.held.sum())


def kept_of(ranks: np.ndarray, tokens: np.ndarray) -> Kept:
    """The first `tokens` (kv_head,) of each head by their ranks (kv_head, key).

    Examples
    --------
    >>> kept = kept_of(np.array([[1, 0, 2], [0, 2, 1]]), np.array([2, 1]))
    >>> kept.index.tolist(), kept.held.tolist()
    ([[0, 1], [0, 0]], [[True, True], [True, False]])
    """
    most = int(tokens.max())
    index = np.zeros((len(ranks), most), np.int64)
    for head, (rank, many) in enumerate(zip(ranks, tokens.tolist(), strict=True)):
        index[head, :many] = np.flatnonzero(rank < many)
    return Kept(torch.from_numpy(index), torch.from_numpy(np.arange(most) < tokens[:, None]))


@contextlib.contextmanager
def hidden(modules: Sequence[nn.Module], kept: Sequence[Kept], heads: int, rest: int = 0) -> Iterator[None]:
    """Each attention module is given a mask under which its queries see what its heads keep, and every later token before them.

    Parameters
    ----------
    modules : sequence of nn.Module
    kept : sequence of Kept
        Of each module.
    heads : int
        Query heads.
    rest : int
        Tokens that the cache holds beside those.

    Raises
    ------
    BnvizError
        A module takes no mask.
    """
    handles = []
    try:
        for module, one in zip(modules, kept, strict=True):
            names = list(inspect.signature(module.forward).parameters)
            if MASK not in names:
                raise BnvizError(
                    f"kv_eviction: {type(module).__name__} takes no {MASK}, and unlike budgets need one for each layer; leave "
                    "allocations= out."
                )
            hook = _masking(one, heads, rest, names.index(MASK))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def readable(model: nn.Module) -> None:
    """Whether the model's attention reads a mask for each layer.

    Raises
    ------
    BnvizError
        It may not.
    """
    found = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if found not in READ:
        raise BnvizError(
            f"kv_eviction: the model's attention is {found!r}, and unlike budgets can be measured with {' or '.join(READ)}; load "
            f'it with attn_implementation="{READ[0]}", or leave allocations= out.'
        )


def _masking(kept: Kept, heads: int, rest: int, place: int) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        states = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor) and one.is_floating_point())
        mask = _mask(kept, heads, rest, states)
        if place < len(args):
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        return args, {**kwargs, MASK: mask}

    return hook


def _mask(kept: Kept, heads: int, rest: int, like: Tensor) -> Tensor:
    """(1, heads, queries, kept + rest + queries), 0 or the most negative number of the type of `like` (batch, queries, ...)."""
    queries, device = like.shape[1], like.device
    held = kept.held.to(device).repeat_interleave(heads // len(kept.held), 0)[:, None].expand(-1, queries, -1)
    later = torch.ones(queries, rest + queries, dtype=torch.bool, device=device).tril(rest)
    sees = torch.cat([held, later.expand(heads, -1, -1)], -1)
    return torch.zeros(sees.shape, dtype=like.dtype, device=device).masked_fill_(~sees, torch.finfo(like.dtype).min)[
        None
    ]
