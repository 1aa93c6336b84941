"""Random tokens that stand in no text: which ids of a model may be drawn, and a block of them told several times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from bnviz.errors import BnvizError

_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def told_again(ids: Tensor, tokens: int, seed: int, *, repeats: int, first: int | None) -> tuple[Tensor, Tensor]:
    """Two texts (1, tokens x repeats): different ids told `repeats` times, and the same with every further block shuffled.

    Drawn by a generator of their own; both begin with `first` if it is given.

    Examples
    --------
    >>> told, shuffled = told_again(torch.arange(3, 9), 3, 0, repeats=2, first=1)
    >>> told.tolist(), shuffled.tolist()
    ([[1, 5, 8, 6, 5, 8, 6]], [[1, 5, 8, 6, 5, 6, 8]])
    """
    made = torch.Generator().manual_seed(seed)
    drawn = ids[torch.randperm(len(ids), generator=made)[:tokens]]
    others = [drawn[torch.randperm(tokens, generator=made)] for _ in range(repeats - 1)]
    begin = [] if first is None else [torch.tensor([first])]
    return torch.cat([*begin, drawn.repeat(repeats)])[None], torch.cat([*begin, drawn, *others])[None]


def context_of(model: nn.Module) -> int | None:
    """Tokens that the model says it reads at most; None: it does not say."""
    config = _config(model)
    found = (getattr(config, name, None) for name in _LENGTHS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def ids_of(model: nn.Module, tokenizer: Any, vocabulary: int | Iterable[int] | None) -> Tensor:
    """Ids that may be drawn: those named, or below the size of the vocabulary; without special ones as far as they are known.

    Raises
    ------
    BnvizError
        The size of the vocabulary is not known.
    """
    config = _config(model)
    named, size = list[int](), 0
    if isinstance(vocabulary, Iterable):
        named = sorted({int(at) for at in vocabulary})
        size = max(named, default=-1) + 1
    else:
        size = int(vocabulary or getattr(config, "vocab_size", None) or _rows(model))
    if not size:
        raise BnvizError(
            f"retrieval_heads: {type(model).__name__} does not say how many tokens it knows; give vocabulary=."
        )
    special = set[Any]()
    for of in (config, getattr(model, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
            value = getattr(of, name, None)
            special |= set(value) if isinstance(value, list | tuple) else {value}
    if tokenizer is not None:
        size = min(size, len(tokenizer))
        special |= set(_special(tokenizer))
    return torch.tensor([at for at in named or range(size) if at not in special and at < size], dtype=torch.int64)


def _special(tokenizer: Any) -> Iterable[int]:
    added = getattr(tokenizer, "added_tokens_decoder", None) or {}
    return [*getattr(tokenizer, "all_special_ids", ()), *(at for at, one in added.items() if one.special)]


def _config(model: nn.Module) -> Any:
    """Of the text a model reads."""
    config = getattr(model, "config", None)
    of_text = getattr(config, "get_text_config", None)
    return of_text() if callable(of_text) else config


def _rows(model: nn.Module) -> int:
    """Of its first table of embeddings."""
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)
