"""Parts of one call that are shown each on its own: tokens that are tried at once, and may be taken back one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from bnviz.observation import AttentionSeen, BlockSeen, Context


@dataclass(frozen=True, slots=True)
class Portion:
    """Tokens `start` to `stop` of a call, and their moment."""

    start: int
    stop: int
    context: Context


def apart(seen: Any, portions: tuple[Portion, ...]) -> Iterator[Any]:
    """`seen`, once for each portion; whole where it does not show the tokens of the call one by one.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import BlockSeen, Site
    >>> x = torch.zeros(2, 3, 8)
    >>> seen = BlockSeen(Site("block", "layers.0", 0), Context(0, 0, "decode", 7), x, x)
    >>> parts = (Portion(0, 2, Context(0, 0, "decode", 7)), Portion(2, 3, Context(0, 0, "decode", 9)))
    >>> [(part.output.shape[1], part.context.past) for part in apart(seen, parts)]
    [(2, 7), (1, 9)]
    """
    if not portions or _tokens(seen) != portions[-1].stop:
        yield seen
        return
    for portion in portions:
        if isinstance(seen, AttentionSeen):
            yield _attention(seen, portion)
        else:
            yield _block(seen, portion) if isinstance(seen, BlockSeen) else _rows(seen, portion)


def _tokens(seen: Any) -> int:
    """Tokens of the call that an observation shows; -1 where it shows none of them."""
    if isinstance(seen, AttentionSeen):
        return seen.query.shape[-2]
    if isinstance(seen, BlockSeen):
        return seen.shape[1]
    shown = next((v for f in fields(seen) if isinstance(v := getattr(seen, f.name), Tensor)), None)
    return shown.shape[1] if shown is not None and shown.dim() >= 2 else -1


def _block(seen: BlockSeen, portion: Portion) -> BlockSeen:
    count, here = seen.shape[1], slice(portion.start, portion.stop)
    before = seen.input[:, here] if seen.input.shape[1] == count else seen.input
    context = _moment(seen, portion)
    if seen.written is not None:
        return BlockSeen(seen.site, context, before, written=seen.written[:, here])
    return BlockSeen(seen.site, context, before, seen.output[:, here])


def _rows(seen: Any, portion: Portion) -> Any:
    """Every tensor (batch, tokens, ...) of an observation cut to the portion."""
    count = _tokens(seen)
    cut = {
        f.name: value[:, portion.start : portion.stop]
        for f in fields(seen)
        if isinstance(value := getattr(seen, f.name), Tensor) and value.dim() >= 2 and value.shape[1] == count
    }
    return replace(seen, context=_moment(seen, portion), **cut)


def _attention(seen: AttentionSeen, portion: Portion) -> AttentionSeen:
    """Its queries, and the keys up to the last of them; all keys where they are another text's."""
    queries, keys = seen.query.shape[-2], seen.key.shape[-2]
    own = not seen.across and keys == seen.context.past + queries
    stop = keys - queries + portion.stop if own else keys
    allowed = seen.allowed
    if allowed is not None:
        allowed = allowed[..., portion.start : portion.stop, :] if allowed.shape[-2] == queries else allowed
        allowed = allowed[..., :stop] if allowed.shape[-1] == keys else allowed
    return replace(
        seen,
        context=_moment(seen, portion),
        query=seen.query[..., portion.start : portion.stop, :],
        key=seen.key[..., :stop, :],
        value=seen.value[..., :stop, :],
        allowed=allowed,
        token_ids=None if seen.token_ids is None else seen.token_ids[:, :stop],
        valid_keys=None if seen.valid_keys is None else seen.valid_keys[:, :stop],
    )


def _moment(seen: Any, portion: Portion) -> Context:
    """The portion's; padding as the observation has it, which may be another side's."""
    valid = seen.context.valid
    return portion.context if valid is None else replace(portion.context, valid=valid[:, portion.start : portion.stop])
