"""The attention a key can expect from queries to come, from the mean and the spread of those that came."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen, Rotary
from bnviz.schema import ProbeSpec, Variable, probe

if TYPE_CHECKING:
    from torch import Tensor


@probe(
    sites=("attention",),
    variables=(
        Variable(
            "expected_logit",
            ("step", "layer", "head", "key"),
            "nat",
            "logarithm of the weight, before it is normalised, that queries to come are expected to give a key; NaN: a sink, "
            "or the queries before rotation are not known",
            optional=True,
        ),
        Variable(
            "verified",
            ("step", "layer"),
            "1",
            "share of the sequences whose queries before rotation were found and verified",
            optional=True,
        ),
    ),
    memory="4 B a key, query head and layer of a passage",
    default=False,
)
class QueryMoments:
    """Logits that keys can expect from queries to come, if those are like the ones of the passage.

    Queries before their rotation are taken for draws from a normal distribution, one a head. Turned by the mean of the rotations
    that the next `future` positions would give them, they have a known mean of exp(logit) for every key (arXiv:2510.00636).

    Parameters
    ----------
    sinks : int
        Tokens at the start of a passage whose queries and keys are left out.
    future : int
        Positions after the passage over which rotations are averaged.

    Raises
    ------
    SchemaError
        An option below 0, or no future.

    Notes
    -----
    With mu and Sigma the mean and the covariance (divided by their number) of a head's queries before rotation from token `sinks`
    on, R = mean over p = N, ..., N + future - 1 of the rotation of position p, s the scale of the model's logits, and k_j a key
    as it is cached:

        expected_logit_j = s k_j . R mu + s^2 / 2 k_j^T R Sigma R^T k_j

    Queries before rotation are what a projection or a norm of the model gave, wherever that, turned by angles that grow evenly
    from token to token, is what the kernel got; channels that do not turn, and models without rotary positions, are the case of
    angle 0. Frequencies are those of this forward: a model that changes them with the length is taken as it was. Where nothing
    fits, `verified` is 0 and the logits are NaN: positions that begin anew or are not evenly spaced, a norm after the rotation,
    queries written by a fused kernel. A soft cap, a bias of positions and a window are no part of the formula. Of passages alone,
    and in decoding and calls that go on with a cache there are none.

    Cost: O(tokens x heads x dim^2) a layer. Nothing is held but the logits; what the modules inside an attention gave is held
    until that attention has run.

    Source: Devoto et al. 2025, arXiv:2510.00636.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Rotary, Site
    >>> q, k = torch.tensor([[[[1.0], [3.0]]]]), torch.tensor([[[[0.5], [2.0]]]])
    >>> still = torch.zeros(1, 1)
    >>> rotary = Rotary(q, torch.tensor([0]), still[0], still, still, torch.tensor([True]))
    >>> seen = AttentionSeen(
    ...     Site("attention", "attn", 0), Context(0, 0, "forward"), q, k, k, None, True, 1.0, rotary=rotary
    ... )
    >>> QueryMoments(sinks=0).observe(seen)["expected_logit"][0, 0].tolist()  # 2 k + k^2 / 2
    [1.125, 6.0]
    """

    spec: ClassVar[ProbeSpec]
    rotary: ClassVar[bool] = True

    def __init__(self, *, sinks: int = 4, future: int = 512) -> None:
        for name, value, least in (("sinks", sinks, 0), ("future", future, 1)):
            if value < least:
                raise SchemaError(f"Probe {self.spec.name}: {name} is {value}, expected {least} or more.")
        self.sinks, self.future = sinks, future

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor]:
        """Logits (batch, head, key) of one call."""
        import torch

        batch, heads, queries, dim = seen.query.shape
        if seen.context.phase == "decode" or seen.across or not dim or seen.key.shape[-1] != dim:
            return {}
        rotary = seen.rotary
        if rotary is None or rotary.query.shape != seen.query.shape or seen.key.shape[2] != queries:
            nothing = torch.full((batch, heads, seen.key.shape[2]), torch.nan, device=seen.query.device)
            return {"expected_logit": nothing, "verified": torch.zeros((), device=seen.query.device)}
        valid = seen.context.valid
        kept = None if valid is None else valid & (valid.cumsum(1) > self.sinks)
        mean, spread = _moments(rotary.query, kept, self.sinks)
        cosine, sine = _ahead(rotary, valid, self.future)
        turn = _Turn(rotary, cosine.to(mean.dtype), sine.to(mean.dtype))
        mean, spread = turn(mean), turn(turn(spread).mT).mT
        logits = _logits(seen.key, mean, spread, seen.scale)
        if kept is None:
            logits[..., : self.sinks] = torch.nan
        else:
            logits.masked_fill_(~kept[:, None], torch.nan)
        logits.masked_fill_(~rotary.holds[:, None, None], torch.nan)
        return {"expected_logit": logits, "verified": rotary.holds.float().mean()}


def _moments(query: Tensor, kept: Tensor | None, sinks: int) -> tuple[Tensor, Tensor]:
    """Mean (batch, heads, dim) and covariance (batch, heads, dim, dim) of queries."""
    import torch

    exact = torch.promote_types(query.dtype, torch.float32)
    if kept is None:
        some = query[:, :, sinks:].to(exact)
        mean = some.mean(2)
        centred = some - mean[:, :, None]
        return mean, centred.mT @ centred / some.shape[2]
    here = kept[:, None, :, None]
    count = kept.sum(1).to(exact)[:, None, None]
    some = query.to(exact).masked_fill(~here, 0)
    mean = some.sum(2) / count
    centred = (some - mean[:, :, None]).masked_fill(~here, 0)
    return mean, centred.mT @ centred / count[..., None]


def _ahead(rotary: Rotary, valid: Tensor | None, future: int) -> tuple[Tensor, Tensor]:
    """(batch, dim) each: mean cosine and sine of the angles of the next tokens.

    The mean of e^(i (a + n w)) over n = 1, ..., f is e^(i (a + (f + 1) w / 2)) sin(f w / 2) / (f sin(w / 2)).
    """
    import torch

    angle, rate = rotary.angle, rotary.rate
    if valid is not None:  # padding at the end
        place = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid, place, 0).amax(1)
        angle = angle - (valid.shape[1] - 1 - last)[:, None] * rate
    half = torch.sin(rate / 2)
    length = torch.where(half.abs() < 1e-12, 1.0, torch.sin(future * rate / 2) / (future * half))
    middle = angle + (future + 1) / 2 * rate
    return length * middle.cos(), length * middle.sin()


class _Turn:
    """A mean rotation of the last axis of (batch, heads, ..., dim)."""

    def __init__(self, rotary: Rotary, cosine: Tensor, sine: Tensor) -> None:
        self._partner, self._cosine, self._sine = rotary.partner, cosine, sine * rotary.sign.to(sine.dtype)

    def __call__(self, of: Tensor) -> Tensor:
        shape = (of.shape[0], *(1,) * (of.dim() - 2), of.shape[-1])
        return self._cosine.view(shape) * of + self._sine.view(shape) * of.index_select(of.dim() - 1, self._partner)


def _logits(key: Tensor, mean: Tensor, spread: Tensor, scale: float) -> Tensor:
    """(batch, heads, keys)."""
    import torch

    kv_heads = key.shape[1]
    exact = key.to(mean.dtype)
    given = scale * mean, scale**2 / 2 * spread
    mean, spread = (one.view(one.shape[0], kv_heads, -1, *one.shape[2:]) for one in given)
    found = [
        ((exact @ spread[:, :, n] + mean[:, :, n, None]) * exact).sum(-1) for n in range(mean.shape[2])
    ]  # one of a group at a time: no more than the keys are held
    return torch.stack(found, 2).flatten(1, 2)
