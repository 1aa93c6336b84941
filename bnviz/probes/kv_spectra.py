"""Second moments of keys and of values, head by head: what their spectra and the error of a smaller rank follow from."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

from ._own_tokens import own_tokens

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE, ELSEWHERE = 1 << 18, 1 << 23  # values that are widened at once: 2 MiB in float64 on a CPU, 64 MiB on a GPU
_HEAD = ("step", "layer", "kv_head")


@probe(
    sites=("attention",),
    variables=(
        Variable("key_tokens", _HEAD, "count", "tokens whose keys were summed", "add", True),
        Variable("key_sum", (*_HEAD, "feature"), "1", "sum of a head's keys, as they lie in the cache", "add", True),
        Variable(
            "key_moment",
            (*_HEAD, "feature", "feature_to"),
            "1",
            "sum of k kᵀ over a head's keys, about zero",
            "add",
            True,
        ),
        Variable("key_bytes", ("step", "layer"), "B", "bytes of one key of one kv head", "last", True),
        Variable("value_tokens", _HEAD, "count", "tokens whose values were summed", "add", True),
        Variable("value_sum", (*_HEAD, "feature"), "1", "sum of a head's values", "add", True),
        Variable(
            "value_moment",
            (*_HEAD, "feature", "feature_to"),
            "1",
            "sum of v vᵀ over a head's values, about zero",
            "add",
            True,
        ),
        Variable("value_bytes", ("step", "layer"), "B", "bytes of one value of one kv head", "last", True),
    ),
    memory="16 B x head size squared a key-value head, layer and step, however many tokens",
    default=False,
)
class KvSpectra:
    """Sums of x and of x xᵀ over the keys, and over the values, of each key-value head.

    Keys are those of the cache: after rotation, norms and whatever else stands before the kernel. Each token counts once, in the
    call that brings it; padding does not count. All sequences of a batch are one sum.

    Notes
    -----
    `key_moment` = sum_j k_j k_jᵀ, about zero: the covariance about the mean is key_moment / n - m mᵀ, m = key_sum / n,
    n = key_tokens. Products and sums are float64 (float32 on a device without it), so that nothing is lost to a large mean; sums
    of several steps add. A key or value that holds NaN or infinity is left out, and `key_tokens` of its head does not count it.
    `key_bytes` = head size x bytes of the dtype that the kernel was given. Keys of another text (cross-attention) have none, and
    neither has what attention by hand does not show. Tokens that were taken back after they had been added stay in the sums, as
    the notes of the run say. Smaller heads than the largest are NaN beyond their own channels. A model that repeats its heads
    before the kernel shows each repeated head.

    Cost: tokens x heads x head size squared multiplications a layer for keys and as many for values, in float64. Measured, 12
    layers of 8 heads of 64 on one CPU thread: a prefill of 1,024 or of 4,096 tokens takes 1.2 times as long.

    Source: the covariances that MatryoshkaKV (arXiv:2410.14731) begins with, and Eigen Attention (arXiv:2408.05646) ends with.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> k = torch.tensor([[[[3.0, 0.0], [1.0, 2.0]]]])
    >>> seen = AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), k, k, k, None, True, 1.0)
    >>> kept = KvSpectra().observe(seen)
    >>> kept["key_moment"].tolist(), kept["key_sum"].tolist(), kept["key_tokens"].tolist(), int(kept["key_bytes"])
    ([[[10.0, 2.0], [2.0, 4.0]]], [[4.0, 2.0]], [2], 8)
    """

    spec: ClassVar[ProbeSpec]

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor]:
        """Sums of one call, over its own tokens: (kv_head, ...)."""
        import torch

        own = own_tokens(seen)
        if own is None:
            return {}
        kept: dict[str, Tensor] = {}
        for name, rows in (("key", own.key), ("value", own.value)):
            if not rows.shape[-1]:
                continue
            count, total, moment = _sums(rows, own.valid)
            kept |= {f"{name}_tokens": count, f"{name}_sum": total, f"{name}_moment": moment}
            kept[f"{name}_bytes"] = torch.tensor(rows.shape[-1] * rows.element_size(), dtype=torch.int64)
        return kept


def _sums(rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Count (heads,), sum (heads, dim) and sum of products (heads, dim, dim) of rows (batch, heads, tokens, dim) that count."""
    import torch

    batch, heads, tokens, dim = rows.shape
    exact = torch.float32 if rows.device.type == "mps" else torch.float64
    count = torch.zeros(heads, dtype=torch.int64, device=rows.device)
    total = torch.zeros(heads, dim, dtype=exact, device=rows.device)
    moment = torch.zeros(heads, dim, dim, dtype=exact, device=rows.device)
    together = max(1, (AT_ONCE if rows.is_cpu else ELSEWHERE) // max(1, batch * heads * dim))
    for start in range(0, tokens, together):
        some = rows[:, :, start : start + together].to(exact)
        counted = some.isfinite().all(-1)
        if valid is not None:
            counted &= valid[:, None, start : start + together]
        some = some.masked_fill(~counted[..., None], 0.0)
        count += counted.sum((0, 2))
        total += some.sum((0, 2))
        flat = some.transpose(0, 1).reshape(heads, -1, dim)
        moment += flat.mT @ flat
    return count, total, moment
