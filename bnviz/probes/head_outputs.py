"""How alike what the heads of a layer give is: pairs of heads that do the same for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

if TYPE_CHECKING:
    from torch import Tensor


@probe(
    sites=("attention",),
    variables=(
        Variable(
            "hsic",
            ("step", "layer", "head", "head_to"),
            "1",
            "unbiased linear HSIC of the outputs of two heads; NaN: fewer than 4 queries",
            "last",
            True,
        ),
        Variable("rows", ("step", "layer"), "query", "queries that were looked at", "last", True),
    ),
    memory="8 B a pair of heads, layer and step; the outputs of `rows` queries of one layer while they are compared",
    default=False,
)
class HeadOutputs:
    """Similarity of what every two heads of a layer give, token by token, before the output projection mixes them.

    The quotient hsic_ab / sqrt(hsic_aa hsic_bb) is the centred kernel alignment (CKA): 1 where one head's outputs are the other's
    but for rotation, shift and scale, about 0 where they have nothing to do with each other.

    Parameters
    ----------
    rows : int
        Queries of a sequence that are compared, about; of more, strips of 64 that lie evenly over it.

    Raises
    ------
    SchemaError
        Fewer than 4 rows.

    Notes
    -----
    The outputs are made again from queries, keys and values in float32: o = softmax(s) v. Those of all queries of a call are rows
    of one matrix a head, padding left out; unbiased HSIC with linear kernels, which does not grow with dims over rows. Only calls
    that read a passage are looked at; of attention whose values are not known nothing is kept.
    Cost: with 1,024 and 2,048 tokens 2.0 times `scaled_dot_product_attention`, with 4,096, of which half are compared, 0.9 times
    (8 heads of 64, float32, one CPU thread); a product of features with features as large as the output projection's is in it.

    Sources: Kornblith et al. 2019, arXiv:1905.00414; Nguyen et al. 2021, arXiv:2010.15327; heads that do the same, CHAI,
    arXiv:2403.08058.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> q = k = torch.zeros(1, 2, 8, 4)
    >>> v = torch.arange(8.0)[:, None].expand(1, 1, 8, 4).repeat(1, 2, 1, 1)
    >>> seen = AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), q, k, v, None, True, 0.5)
    >>> kept = HeadOutputs().observe(seen)
    >>> tuple(kept["hsic"].shape), float(kept["rows"])
    ((2, 2), 8.0)
    """

    spec: ClassVar[ProbeSpec]

    def __init__(self, *, rows: int = 2048) -> None:
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 4:
            raise SchemaError(f"Probe {self.spec.name}: rows is {rows!r}, expected a whole number from 4.")
        self.rows = rows

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor] | None:
        """HSIC (head, head_to) of one call that reads a passage; None for any other."""
        if seen.context.phase == "decode" or seen.across or not seen.value.shape[-1]:
            return None
        from bnviz.reduce.attention_stats import Pattern
        from bnviz.reduce.head_likeness import head_likeness

        hsic, rows = head_likeness(
            seen.query,
            seen.key,
            seen.value,
            pattern=Pattern(seen.causal, seen.window, seen.allowed, seen.softcap, seen.sinks, seen.scale),
            valid=seen.context.valid if seen.valid_keys is None else seen.valid_keys,
            rows=self.rows,
        )
        return {"hsic": hsic, "rows": rows}
