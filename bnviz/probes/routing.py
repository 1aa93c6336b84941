"""Which experts each token went to, with what weight, and how sure the router was."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from bnviz.errors import SchemaError
from bnviz.observation import RouterSeen
from bnviz.schema import Variable, probe

if TYPE_CHECKING:
    from torch import Tensor

_TOKEN, _PLACE = ("step", "layer", "token"), ("step", "layer")
_EACH = (*_TOKEN, "candidate")
MOST = 32767  # ids are kept as int16

VARIABLES = (
    Variable(
        "expert",
        (*_TOKEN, "slot"),
        "id",
        "expert the token was sent to; -1: none (dropped, or, where weight is NaN, no further choice)",
        "append",
    ),
    Variable("weight", (*_TOKEN, "slot"), "1", "weight of that expert's output, as used; 0 where dropped", "append"),
    Variable("tokens", _PLACE, "token", "tokens routed, padding left out", "add"),
    Variable("experts", _PLACE, "count", "things the router chooses among", "last"),
    Variable("skip", _PLACE, "count", "how many of the last ids compute nothing: ways past the experts", "last"),
    Variable("shared", _PLACE, "count", "experts that every token passes, beside the chosen", "last"),
    Variable("unverified", _PLACE, "1", "1: seen where the choice is made, not where experts use it", "max"),
    Variable("unmapped", _PLACE, "1", "1: rows are not the tokens that sequence and position name", "max"),
    Variable("entropy", _TOKEN, "nat", "entropy of the router's distribution, 0 to ln experts", "append", True),
    Variable("top_probability", _TOKEN, "1", "largest probability the router gave, 1/experts to 1", "append", True),
    Variable("margin", _TOKEN, "1", "probability of the last chosen minus the first not chosen rank", "append", True),
    Variable(
        "probability",
        (*_PLACE, "candidate"),
        "token",
        "router probability summed over tokens: what each expert would get if tokens could be split",
        "add",
        True,
    ),
    Variable(
        "logit", _EACH, "1", "what the router computed for each expert before it chose", "append", True, "logits=True"
    ),
)


@probe(
    sites=("router",),
    variables=VARIABLES,
    memory="k x 6 B + 12 B a token and expert layer, + 4 B an expert; with logits + 4 B an expert and token",
)
class Routing:
    """Each token's experts and their weights, as dispatched, and the router's confidence.

    `expert` and `weight` are what the experts got, not what the router's logits suggest: a capacity limit, groups or a
    bias change the choice. The three confidences describe the router's own distribution p before it chose: softmax of its
    logits, its gates over their sum, or the probabilities it gives, whichever makes the weights in use.

    Parameters
    ----------
    logits : bool
        Also keep what the router computed for every expert.

    Notes
    -----
    * `entropy` = -sum p ln p [nat]; 0 is certain, ln E is indifferent. `top_probability` = p_(1).
    * `margin` = p_(k) - p_(k+1) of the sorted p: how far the choice is from tipping. It can be 0; under a selection bias
      or groups the chosen experts need not be the k most probable. Absent when every expert is chosen, or k varies.
    * `probability` is summed over valid tokens, so that decode steps add up; its mean P gives the Switch auxiliary loss.
    * Absent when the kernel shows no logits. NaN: all logits of the token were -inf, or no known rule makes the weights.
    * A layer has one row: its first router that is not part of an attention. Others are in `further_routing`.
    * `tokens` differs between places that read different texts in one forward (an encoder, a decoder); `sequence` and
      `position` are then those of the place with the most.
    * `unverified`: no second witness (arguments of the experts, rows that each computed, weights seen in use) confirms the
      choice. `unmapped`: the router reads a part of the tokens, or other rows, in an order that only the model knows.

    Cost: one softmax and one top-k+1 over E numbers a token. Nothing is copied to the host.

    Source: Switch Transformer (arXiv 2101.03961); sigmoid routers as in DeepSeek-V3 (arXiv 2412.19437); experts that choose
    tokens as in Zhou et al. 2022 (arXiv 2202.09368).

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import Context, RouterSeen, Site
    >>> share = torch.tensor([[[0.25, 0.75, 0.0]]])
    >>> seen = RouterSeen(Site("router", "mlp.gate", 0), Context(0, 0, "forward"), torch.tensor([[[1, 0]]]),
    ...                   torch.tensor([[[0.75, 0.25]]]), share.log(), 3, share)
    >>> kept = Routing().observe(seen)
    >>> kept["expert"].dtype, round(float(kept["margin"]), 3)
    (torch.int16, 0.25)
    """

    def __init__(self, *, logits: bool = False) -> None:
        self.logits = logits

    def observe(self, seen: RouterSeen) -> dict[str, Tensor]:
        """Ids, weights and confidences of one router call.

        Raises
        ------
        SchemaError
            More experts than 16-bit ids can name.
        """
        import torch

        if seen.experts > MOST + 1:
            raise SchemaError(
                f"Router {seen.site.path!r} chooses among {seen.experts:,} experts; ids are kept for at most {MOST + 1:,}. "
                "Leave the probe out with probes=[...]."
            )
        sure, valid = seen.verified, seen.context.valid
        padded = valid is not None and valid.shape == seen.ids.shape[:2]
        kept = {
            "expert": seen.ids.to(torch.int16),
            "weight": seen.weights.float(),
            "experts": _whole(seen.experts),
            "skip": _whole(seen.skip),
            "shared": _whole(seen.shared),
            "unmapped": _whole(int(not seen.mapped)),
            "unverified": _whole(int(not sure)) if isinstance(sure, bool) else (~sure).int(),
            "tokens": valid.sum(dtype=torch.int32)
            if padded and valid is not None
            else _whole(seen.ids.shape[:2].numel()),
        }
        if seen.share is not None:
            kept |= _confidence(seen, seen.share.float())
        if self.logits and seen.logits is not None:
            kept["logit"] = seen.logits.float()
        return kept


@functools.lru_cache(maxsize=256)
def _whole(value: int) -> Tensor:
    """A whole number as a tensor; nobody writes to it, so that one serves all calls."""
    import torch

    return torch.tensor(value, dtype=torch.int32)


def _confidence(seen: RouterSeen, share: Tensor) -> dict[str, Tensor]:
    import torch

    slots = seen.ids.shape[-1]
    best = share.topk(min(slots + 1, share.shape[-1]), -1).values
    kept = {"entropy": torch.special.entr(share).sum(-1), "top_probability": best[..., 0]}
    if best.shape[-1] > slots:
        kept["margin"] = best[..., slots - 1] - best[..., slots]
    valid = seen.context.valid
    counted = share.nan_to_num(0.0)
    if valid is not None and valid.shape == share.shape[:-1]:
        counted = torch.where(valid[..., None], counted, 0.0)
    kept["probability"] = counted.sum((0, 1))
    return kept
