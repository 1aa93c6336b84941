"""What each generated token attends to, kept as it is: its most attended keys, and its attention over the text in cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

from ._top_keys import in_cells, top_keys

if TYPE_CHECKING:
    from torch import Tensor

_QUERY = ("step", "layer", "query")
_HEAD = ("step", "layer", "kv_head", "query")


@probe(
    sites=("attention",),
    variables=(
        Variable(
            "top_key",
            (*_HEAD, "place"),
            "token",
            "position in its sequence of a key among the `top` with most weight, most first; -1: none",
            "append",
        ),
        Variable(
            "top_weight", (*_HEAD, "place"), "1", "weight on it, mean over the query heads of the group", "append"
        ),
        Variable("top_share", _HEAD, "1", "share of all weight on keys that lies on those, 0 to 1", "append"),
        Variable(
            "layer_key",
            (*_QUERY, "place"),
            "token",
            "the same of the layer: keys with most weight in the mean over all heads; -1: none",
            "append",
        ),
        Variable("layer_weight", (*_QUERY, "place"), "1", "weight on it, mean over all query heads", "append"),
        Variable(
            "cells",
            (*_QUERY, "key_bin"),
            "1",
            "weight on the keys at positions bin x cell_width and on, mean over all query heads",
            "append",
        ),
        Variable("visible", _QUERY, "count", "keys with any weight, in any head", "append"),
        Variable("cell_width", ("step", "layer"), "token", "keys in a cell; the last cells of a text stay 0", "last"),
    ),
    memory="(top x 8 B x (kv heads + 1) + cells x 4 B) a generated token and layer, up to `steps` tokens of a text",
    default=False,
)
class DecodeAttention:
    """The keys that each generated token attends to most, per key-value head and layer, and its attention over the text.

    Read two tokens' `top_key` against each other: what stays among them is what a cache must keep, and what two layers have in
    common need be looked for once.

    Parameters
    ----------
    top : int
        Keys that are kept of each token, head and layer, 1 to 1,024.
    steps : int
        Tokens that are kept of each text that is generated: its first. Later ones are not kept, and cost nothing.
    cells : int
        Cells of the text, at most: a cell is so many tokens wide that the prompt and `steps` tokens fit.

    Raises
    ------
    SchemaError
        An option below 1, or `top` above 1,024.

    Notes
    -----
    With p_hij the weight of head h and generated token i on key j, a key-value head g has w_gij = mean of p_hij over the query
    heads h that share it, and a layer has w_ij = mean over all h. `top_key` are the positions j of the `top` largest w_gij,
    `top_share` = their sum / sum_j w_gij; `layer_key` the same of w_ij; `cells` = sum of w_ij over the keys of a cell. Positions
    count the tokens of a sequence, padding left out, and padded keys are never among them. Of equal weights the earlier key comes
    first. What a cache no longer holds, or a window hides, has no weight; where fewer keys than `top` have any, the rest is -1
    and NaN. With learned sinks the weights of a token sum to less than one, and `top_share` is of that sum.

    Only decoding is kept: a passage that is read at once, and attention over another text, have none.

    Cost: one row of the attention of each head, O(keys x dim) a token, layer and head, which is made again from queries and keys.
    At most 2 million weights are held meanwhile (33 million on a GPU).

    Sources: Scissorhands, Liu et al. 2023, arXiv:2305.17118; TidalDecode, Yang et al. 2024, arXiv:2410.05076.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> k = torch.eye(4)[None, None]
    >>> site, now = Site("attention", "attn", 0), Context(1, 4, "decode", 3)
    >>> seen = AttentionSeen(site, now, 2 * k[:, :, 1:2], k, k, None, True, 1.0)
    >>> DecodeAttention(top=2).observe(seen)["top_key"].tolist()
    [[[[1, 0]]]]
    """

    spec: ClassVar[ProbeSpec]

    def __init__(self, *, top: int = 64, steps: int = 512, cells: int = 256) -> None:
        for name, value in (("top", top), ("steps", steps), ("cells", cells)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SchemaError(f"Probe {self.spec.name}: {name} is {value!r}, expected a whole number from 1.")
        if top > 1024:
            raise SchemaError(f"Probe {self.spec.name}: top is {top}, expected at most 1024.")
        self.top, self.steps, self.cells = top, steps, cells
        self._begun: dict[int, int] = {}

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor] | None:
        """What the generated tokens of one call attend to; None for any other call, and beyond `steps` tokens of a text."""
        past, own = seen.context.past, not seen.across and seen.key.shape[2] == seen.context.past + seen.query.shape[2]
        if seen.context.phase != "decode" or not own:
            return None
        begun = self._begun.setdefault(seen.context.step, past)
        if past - begun >= self.steps:
            return None
        width = -(-(begun + self.steps) // self.cells)
        size = width, -(-(begun + self.steps) // width)
        found = self._found(seen, size)
        late = begun + self.steps - past
        if late < seen.query.shape[2]:  # they keep their place, so that padding still fits
            for name, of in found.items():
                rows = of[:, :, late:] if name in ("top_key", "top_weight", "top_share") else of[:, late:]
                rows.fill_(-1 if name.endswith("_key") else float("nan"))
        return found | {"cell_width": _number(width)}

    def _found(self, seen: AttentionSeen, size: tuple[int, int]) -> dict[str, Tensor]:
        import torch

        from bnviz.reduce._attention_shares import attention_shares
        from bnviz.reduce.attention_stats import Pattern

        order = _packing(seen)
        pattern = Pattern(seen.causal, seen.window, seen.allowed, seen.softcap, seen.sinks, seen.scale)
        parts: dict[str, list[Tensor]] = {}
        for _, weights in attention_shares(seen.query, seen.key, pattern):
            by_group = _of_groups(weights, seen.key.shape[1])
            if order is not None:
                index, real = order
                by_group = by_group.gather(-1, index[:, None, None].expand_as(by_group)) * real[:, None, None]
            for name, part in self._kept(by_group, size).items():
                parts.setdefault(name, []).append(part)
        at = dict.fromkeys(("top_key", "top_weight", "top_share"), 2)
        return {name: torch.cat(some, at.get(name, 1)) for name, some in parts.items()}

    def _kept(self, by_group: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
        """Of weights (batch, kv_heads, queries, keys), a key at its position."""
        import torch

        of_layer = by_group.mean(1)
        key, weight = top_keys(by_group, self.top)
        layer_key, layer_weight = top_keys(of_layer, self.top)
        return {
            "top_key": key,
            "top_weight": weight,
            "top_share": torch.nansum(weight, -1) / by_group.sum(-1),
            "layer_key": layer_key,
            "layer_weight": layer_weight,
            "cells": in_cells(of_layer, *size),
            "visible": (of_layer > 0).sum(-1).float(),
        }


def _of_groups(weights: Tensor, groups: int) -> Tensor:
    """(batch, groups, queries, keys): the mean over the heads of each."""
    batch, heads, *rest = weights.shape
    return weights if heads == groups else weights.view(batch, groups, heads // groups, *rest).mean(2)


def _packing(seen: AttentionSeen) -> tuple[Tensor, Tensor] | None:
    """(batch, keys) each: the key at each position of its sequence, and whether there is one; None where nothing is padding."""
    import torch

    shape, context = (seen.key.shape[0], seen.key.shape[2]), seen.context
    real = seen.valid_keys
    if (real is None or tuple(real.shape) != shape) and (context.held is not None or context.valid is not None):
        ones = torch.ones(shape, dtype=torch.bool, device=seen.key.device)
        parts = (context.held, ones[:, : context.past]), (context.valid, ones[:, context.past :])
        real = torch.cat([ours if given is None else given.bool() for given, ours in parts], 1)
    if real is None or tuple(real.shape) != shape:
        return None
    order = real.logical_not().int().argsort(dim=-1, stable=True)
    return order, real.gather(-1, order)


def _number(value: int) -> Tensor:
    import torch

    return torch.tensor(value, dtype=torch.int64)
