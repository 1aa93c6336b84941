"""What a value adds to the residual stream through the output projection, head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE, ELSEWHERE = 1 << 18, 1 << 24  # projected values at once: 1 MiB in float32 on a CPU, 64 MiB on a GPU


@probe(
    sites=("attention",),
    variables=(
        Variable(
            "value_norm_projected",
            ("step", "layer", "head", "key"),
            "norm",
            "L1 norm of what the output projection makes of a value for a query head; NaN: the projection is not known",
            optional=True,
        ),
        Variable(
            "verified",
            ("step", "layer"),
            "1",
            "1 where the output projection was found and verified, else 0",
            optional=True,
        ),
    ),
    memory="4 B a key, query head and layer of a passage",
    default=False,
)
class ProjectedValues:
    """How much each value would write to the residual stream if a query head gave it all its attention.

    A value of a large norm does little where the output projection shrinks it: this is the norm behind the projection, by which
    CriticalKV weighs keys (arXiv:2502.03805). `value_norm` ranks by it with `norm="projected"`.

    Notes
    -----
    value_norm_projected_hj = ||v_j W_h||_1, with W_h the rows of the output projection for head h; its bias is no part of it. The
    projection is the last module with a matrix inside the attention whose input is the output of the heads: verified on the
    first, the middle and the last query of every call. Where nothing is (a gate before the projection, a quantised or sharded
    matrix), `verified` is 0 and the norms are NaN. Of an adapter beside the matrix (LoRA) only the matrix is read. Of passages
    alone: calls that go on with a cache have none.

    Cost: as the output projection itself once a query head of a group, O(tokens x heads x value dim x features) a layer.

    Source: Feng et al. 2025, arXiv:2502.03805.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Projection, Site
    >>> q, v = torch.zeros(1, 1, 2, 1), torch.tensor([[[[1.0], [-2.0]]]])
    >>> onto = Projection(torch.tensor([[[0.5, 0.25]]]), torch.tensor(True))
    >>> seen = AttentionSeen(
    ...     Site("attention", "attn", 0), Context(0, 0, "forward"), q, q, v, None, True, 1.0, projection=onto
    ... )
    >>> ProjectedValues().observe(seen)["value_norm_projected"][0, 0].tolist()
    [0.75, 1.5]
    """

    spec: ClassVar[ProbeSpec]
    projection: ClassVar[bool] = True

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor]:
        """Norms (batch, head, key) of one call."""
        import torch

        batch, heads = seen.query.shape[:2]
        if seen.context.phase == "decode" or seen.across:
            return {}
        onto, value = seen.projection, seen.value
        if onto is None or onto.weight.shape[:2] != (heads, value.shape[-1]) or heads % value.shape[1]:
            nothing = torch.full((batch, heads, seen.key.shape[2]), torch.nan, device=seen.query.device)
            return {"value_norm_projected": nothing, "verified": torch.zeros((), device=seen.query.device)}
        norms = _norms(value, onto.weight).masked_fill_(~onto.holds, torch.nan)
        return {"value_norm_projected": norms, "verified": onto.holds.float()}


def _norms(value: Tensor, weight: Tensor) -> Tensor:
    """(batch, heads, keys): L1 norms of value (batch, kv_heads, keys, dim) times weight (heads, dim, features)."""
    import torch

    batch, kv_heads, keys, _ = value.shape
    exact = torch.promote_types(torch.promote_types(value.dtype, weight.dtype), torch.float32)
    found = torch.empty(batch, len(weight), keys, dtype=exact, device=value.device)
    together = max(1, (AT_ONCE if value.is_cpu else ELSEWHERE) // (batch * weight.shape[-1]))
    for head, matrix in enumerate(weight):
        wide, rows = matrix.to(exact), value[:, head * kv_heads // len(weight)]
        for some, into in zip(torch.split(rows, together, 1), torch.split(found[:, head], together, 1), strict=True):
            torch.linalg.vector_norm(some.to(exact) @ wide, 1, -1, out=into)
    return found
