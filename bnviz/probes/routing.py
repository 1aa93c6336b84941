"""Which experts each token went to, with what weight, and how sure the router was."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from bnviz.errors import SchemaError
from bnviz.observation import RouterSeen
from bnviz.schema import Variable, probe

if TYPE_CHECKING:
    from torch import Tensor

_TOKEN = ("step", "layer", "token")


def _softmax(logits: Tensor) -> Tensor:
    return logits.float().softmax(-1)


def _sigmoid(logits: Tensor) -> Tensor:
    gates = logits.float().sigmoid()
    return gates / gates.sum(-1, keepdim=True)


def _given(probabilities: Tensor) -> Tensor:
    shares = probabilities.float()
    return shares / shares.sum(-1, keepdim=True)


_DISTRIBUTION: dict[str, Callable[[Tensor], Tensor]] = {
    "logits": _softmax,
    "sigmoid": _sigmoid,
    "probabilities": _given,
}


@probe(
    sites=("router",),
    variables=(
        Variable("expert", (*_TOKEN, "slot"), "id", "expert the token was sent to; -1: none (dropped)", "append"),
        Variable("weight", (*_TOKEN, "slot"), "1", "weight of that expert's output, as used", "append"),
        Variable("experts", ("step", "layer"), "count", "experts the router chooses among", "last"),
        Variable("entropy", _TOKEN, "nat", "entropy of the router's distribution, 0 to ln experts", "append", True),
        Variable("top_probability", _TOKEN, "1", "largest probability the router gave, 1/experts to 1", "append", True),
        Variable(
            "margin", _TOKEN, "1", "probability of the last chosen minus the first not chosen rank", "append", True
        ),
        Variable(
            "probability",
            ("step", "layer", "candidate"),
            "token",
            "router probability summed over tokens: what each expert would get if tokens could be split",
            "add",
            True,
        ),
    ),
    memory="k x 6 B + 12 B a token and expert layer, + 4 B an expert",
)
class Routing:
    """Each token's experts and their weights, as dispatched, and the router's confidence.

    `expert` and `weight` are what the experts got, not what the router's logits suggest: a capacity limit, groups or a
    bias change the choice. The three confidences describe the router's own distribution p before it chose: softmax of the
    logits, `sigmoid / sum` where the router declares a sigmoid, or the probabilities it gives.

    Notes
    -----
    * `entropy` = -sum p ln p [nat]; 0 is certain, ln E is indifferent. `top_probability` = p_(1).
    * `margin` = p_(k) - p_(k+1) of the sorted p: how far the choice is from tipping. It can be 0; under a selection bias
      or groups the chosen experts need not be the k most probable. Absent when every expert is chosen.
    * `probability` is summed over valid tokens, so that decode steps add up; its mean P gives the Switch auxiliary loss.
    * Absent when the kernel shows no logits. NaN: all logits of the token were -inf.

    Cost: one softmax and one top-k+1 over E numbers a token. Nothing is copied to the host.

    Source: Switch Transformer (arXiv 2101.03961); sigmoid routers as in DeepSeek-V3 (arXiv 2412.19437).

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import Context, RouterSeen, Site
    >>> seen = RouterSeen(Site("router", "mlp.gate", 0), Context(0, 0, "forward"), torch.tensor([[[1, 0]]]),
    ...                   torch.tensor([[[0.75, 0.25]]]), torch.tensor([[[0.25, 0.75, 0.0]]]), 3, "probabilities")
    >>> kept = Routing().observe(seen)
    >>> kept["expert"].dtype, round(float(kept["margin"]), 3)
    (torch.int16, 0.25)
    """

    def observe(self, seen: RouterSeen) -> dict[str, Tensor]:
        """Ids, weights and confidences of one router call."""
        import torch

        kept = {
            "expert": seen.ids.to(torch.int16),
            "weight": seen.weights.float(),
            "experts": torch.tensor(seen.experts, dtype=torch.int32),
        }
        if seen.logits is not None:
            kept |= _confidence(seen)
        return kept


def _confidence(seen: RouterSeen) -> dict[str, Tensor]:
    import torch

    if seen.logits_are not in _DISTRIBUTION:
        raise SchemaError(
            f"Router {seen.site.path!r} declares its scores to be {seen.logits_are!r}; valid: {', '.join(_DISTRIBUTION)}."
        )
    assert seen.logits is not None
    share = _DISTRIBUTION[seen.logits_are](seen.logits)
    slots = seen.ids.shape[-1]
    best = share.topk(min(slots + 1, share.shape[-1]), -1).values
    kept = {"entropy": torch.special.entr(share).sum(-1), "top_probability": best[..., 0]}
    if best.shape[-1] > slots:
        kept["margin"] = best[..., slots - 1] - best[..., slots]
    valid = seen.context.valid
    counted = share.nan_to_num(0.0)
    if valid is not None:
        counted = torch.where(valid[..., None], counted, 0.0)
    kept["probability"] = counted.sum((0, 1))
    return kept
