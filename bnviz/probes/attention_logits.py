"""The largest logit that the softmax of every head is given: what grows when training becomes unstable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnviz.observation import AttentionSeen
from bnviz.schema import Variable, probe

if TYPE_CHECKING:
    from torch import Tensor

_HEAD = ("step", "layer", "head")


@probe(
    sites=("attention",),
    variables=(
        Variable("largest", _HEAD, "1", "largest finite logit of any query and key it sees; 0: none is above 0", "max"),
        Variable("lse_total", _HEAD, "nat", "ln of the sum of e^logit over a query's keys, summed over queries", "add"),
        Variable("nonfinite", _HEAD, "query", "queries with a logit that is NaN, or whose largest is infinite", "add"),
        Variable("queries", _HEAD, "query", "queries that are tokens, see a key and have finite logits", "add"),
    ),
    memory="16 B a head, layer and step",
    default=False,
)
class AttentionLogits:
    """The largest attention logit of every head in every step, and what the mean log-sum-exp is made of.

    Watch it over training: logits that grow from step to step turn attention into a choice of one key, and gradients vanish. In a
    trained model it says how much room a 16-bit softmax has: bfloat16 holds numbers from 128 on in steps of 1.

    Notes
    -----
    A logit is what the softmax gets: scale q.k, the softcap, what an additive mask adds; of pairs that are seen. Padding is left
    out. `lse_total` / `queries` is the mean log-sum-exp, learned sinks included. All is computed in float32 (float64 where the
    model is), whatever the model's kernel rounds to. Decode steps of one generation become one row: the largest of all, sums of
    the others. Keys of another text are not looked at.

    Cost: one product of queries and keys and one exponential a pair; 0.8 to 1.1 times `scaled_dot_product_attention` (512 to
    8,192 tokens, 8 heads of 64, float32, one CPU thread). Nothing of size queries x keys is held.

    Sources: ViT-22B, Dehghani et al. 2023, arXiv:2302.05442; small-scale proxies, Wortsman et al. 2023, arXiv:2309.14322.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> q, k = torch.full((1, 2, 3, 4), 2.0), torch.ones(1, 1, 3, 4)
    >>> seen = AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), q, k, k, None, True, 0.5)
    >>> kept = AttentionLogits().observe(seen)
    >>> kept["largest"].tolist(), kept["queries"].tolist()
    ([4.0, 4.0], [3.0, 3.0])
    """

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor] | None:
        """Largest and sums (head,) of one call; None for keys of another text."""
        if seen.across:
            return None
        import torch

        from bnviz.reduce.attention_logits import attention_logits
        from bnviz.reduce.attention_stats import Pattern

        largest, lse = attention_logits(
            seen.query,
            seen.key,
            pattern=Pattern(seen.causal, seen.window, seen.allowed, seen.softcap, seen.sinks, seen.scale),
            valid=seen.context.valid if seen.valid_keys is None else seen.valid_keys,
        )
        told, broken = largest.isfinite() & lse.isfinite(), largest.isnan() | largest.isposinf()
        flat = largest.masked_fill(~told, 0.0).transpose(0, 1).flatten(1)
        return {
            "largest": torch.nn.functional.pad(flat, (0, 1)).amax(1),
            "lse_total": lse.masked_fill(~told, 0.0).sum((0, 2)),
            "nonfinite": broken.sum((0, 2)).to(largest.dtype),
            "queries": told.sum((0, 2)).to(largest.dtype),
        }
