"""Norms of the keys and values that lie in the cache, and what a token costs there."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

from ._key_parts import lag_spread, mean_cosine

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AT_ONCE = 1 << 19  # values whose magnitudes are held: 2 MiB in float32
_KEY = ("step", "layer", "kv_head", "key")


@probe(
    sites=("attention",),
    variables=(
        Variable("key_norm", _KEY, "norm", "L2 norm of a key after rotation, as the kernel got it", "last", True),
        Variable("value_norm", _KEY, "norm", "L2 norm of a value", "last", True),
        Variable("value_norm_l1", _KEY, "norm", "L1 norm of a value", "last", True),
        Variable(
            "key_cosine", _KEY, "1", "cosine of a key with the mean direction of its head's keys, −1 to 1", "last", True
        ),
        Variable(
            "lag_key",
            _KEY,
            "1",
            "spread over channels of a key, scaled by the range of the next block of keys; NaN: none follows",
            "last",
            True,
        ),
        Variable("lag_value", _KEY, "1", "the same of a value", "last", True),
        Variable(
            "bytes_per_token", ("step", "layer"), "B", "bytes of one token's keys and values in a layer", "last", True
        ),
    ),
    memory="6 x 4 B a key, key-value head and layer, and half of that again while decoding",
)
class KeysValues:
    """Norms of keys and values per key-value head, and the bytes a token takes in the cache.

    A key with a small norm tends to be one that gets attention (arXiv:2406.11430); a value with a small norm does little even
    when it does (VATP, arXiv:2406.12335). Both need no attention weights, and neither do the places of keys among the others of
    a passage (KeyDiff, arXiv:2504.15364; LagKV, arXiv:2504.04704).

    Parameters
    ----------
    lag : int
        Tokens of a block of `lag_key` and `lag_value`.
    sinks : int
        Keys at the start of a sequence that lie before the first block.

    Raises
    ------
    SchemaError
        An option below 1.

    Notes
    -----
    `key_norm` = ||k_j||_2, `value_norm` = ||v_j||_2, `value_norm_l1` = ||v_j||_1, in float32 or wider. `bytes_per_token` is what
    lies in the cache (quantised, shared by heads, with its scales) where it is one of transformers, and without a cache kv_heads
    x (key dim + value dim) x bytes of the dtype that the kernel was given: a model that repeats its heads before the kernel, or
    caches something smaller in a cache of its own, is overstated then. In decoding all keys are seen again at
    each step; the last step stays, NaN where a sliding cache no longer holds the key. What attention written by hand does not
    show (its keys, its values) is left out, and the bytes with it. Cost: one pass over keys and values; in decoding over those
    that are new, where the cache only grows.

    Of a passage alone, and its tokens that are no padding: `key_cosine` = cos(k_j, sum_i k_i / ||k_i||); `lag_key` = standard
    deviation over channels of (k_j - min) / (max - min), min and max of the channel over the next block of `lag` keys. A channel
    that is constant there is left out.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> k, v = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, -1.0]]]])
    >>> seen = AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), k, k, v, None, True, 1.0)
    >>> kept = KeysValues().observe(seen)
    >>> kept["key_norm"].item(), kept["value_norm_l1"].item(), kept["bytes_per_token"].item()
    (5.0, 2.0, 16.0)
    """

    spec: ClassVar[ProbeSpec]

    def __init__(self, *, lag: int = 128, sinks: int = 4) -> None:
        for name, value in (("lag", lag), ("sinks", sinks)):
            if value < 1:
                raise SchemaError(f"Probe {self.spec.name}: {name} is {value}, expected 1 or more.")
        self.lag, self.sinks = lag, sinks
        self._last: dict[tuple[str, int], tuple[int, dict[str, Tensor]]] = {}

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor]:
        """Norms (batch, kv_head, key) of one call."""
        import torch

        place, key = (seen.site.path, seen.site.layer), seen.key
        line, before = self._last.get(place, (0, {}))
        some = next(iter(before.values()), None)
        goes_on = seen.grows == line != 0 and not seen.dropped and some is not None and some.shape[:-1] == key.shape[:2]
        known = some.shape[-1] if goes_on and some is not None and some.shape[-1] <= key.shape[2] else 0
        kept = _norms(key[..., known:, :], seen.value[..., known:, :])
        if known:
            kept = {name: torch.cat([before[name], norm], -1) for name, norm in kept.items()}
        for norm in kept.values():
            norm[..., : seen.dropped] = torch.nan
        if seen.grows:
            self._last[place] = seen.grows, dict(kept)
        if seen.context.phase != "decode":
            kept |= self._passage(seen, kept)
        dims = key.shape[-1], seen.value.shape[-1]
        taken = key.shape[1] * (dims[0] * key.element_size() + dims[1] * seen.value.element_size())
        if seen.cached >= 0 or all(dims):
            kept["bytes_per_token"] = torch.tensor(seen.cached if seen.cached >= 0 else taken, dtype=torch.float64)
        return kept

    def _passage(self, seen: AttentionSeen, norms: dict[str, Tensor]) -> dict[str, Tensor]:
        """How keys and values lie among the others, where all of a passage are there."""
        kept: dict[str, Tensor] = {}
        if seen.dropped or seen.across or not seen.key.shape[2]:
            return kept
        valid = seen.context.valid if seen.valid_keys is None else seen.valid_keys
        valid = valid if valid is not None and valid.shape[1] == seen.key.shape[2] else None
        if seen.key.shape[-1]:
            kept["key_cosine"] = mean_cosine(seen.key, norms["key_norm"], valid)
        if seen.key.shape[-1] > 1 and seen.value.shape[-1] > 1:
            kept["lag_key"] = lag_spread(seen.key, self.lag, self.sinks, valid)
            kept["lag_value"] = lag_spread(seen.value, self.lag, self.sinks, valid)
        return kept


def _norms(key: Tensor, value: Tensor) -> dict[str, Tensor]:
    import torch

    exact = [torch.promote_types(t.dtype, torch.float32) for t in (key, value)]
    found: dict[str, Tensor] = {}
    if key.shape[-1]:
        found["key_norm"] = torch.linalg.vector_norm(key, dim=-1, dtype=exact[0])
    if value.shape[-1]:
        found["value_norm"] = torch.linalg.vector_norm(value, dim=-1, dtype=exact[1])
        found["value_norm_l1"] = _l1(value, exact[1])
    return found


def _l1(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of magnitudes over the last axis."""
    import torch

    if value.device.type != "cpu":
        found: Tensor = torch.linalg.vector_norm(value, ord=1, dim=-1, dtype=dtype)
        return found
    keys = max(1, AT_ONCE * value.shape[-2] // max(1, value.numel()))
    sums = [part.abs().sum(-1, dtype=dtype) for part in torch.split(value, keys, -2)]  # a third of the time of a norm
    return torch.cat(sums, -1)
