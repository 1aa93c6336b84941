"""Attention mass under Gumbel noise, reduced on the device while the model reads a passage: what Keyformer ranks keys by."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from bnviz.errors import SchemaError
from bnviz.observation import AttentionSeen
from bnviz.schema import ProbeSpec, Variable, probe

if TYPE_CHECKING:
    from torch import Tensor

_KEY = ("step", "layer", "head", "key")


@probe(
    sites=("attention",),
    variables=(
        Variable(
            "noisy_mass",
            _KEY,
            "query",
            "attention a key received with Gumbel noise on the logits, mean over draws",
            "last",
            True,
        ),
        Variable(
            "noisy_mass_spread",
            _KEY,
            "query",
            "standard deviation of that from one draw to another; NaN: one draw",
            "last",
            True,
        ),
    ),
    memory="2 x 4 B a key, head and layer, and 4 B a key, head and draw of one layer while it is made",
    default=False,
)
class Keyformer:
    """Attention mass with Gumbel noise on the logits, mean and spread over several draws of the noise.

    Noise gives keys that a few queries nearly looked at a share, as they may be looked at later. One draw is one number of a
    random variable: read the mean beside its spread.

    Parameters
    ----------
    seeds : int
        Draws of the noise, seeds 0 to seeds - 1.
    tau : float
        Temperature; the paper's is 1 for a prompt.

    Raises
    ------
    SchemaError
        Fewer than one draw, or a temperature that is none.

    Notes
    -----
    With s_ij the scaled, masked logits and g_ij noise of the standard Gumbel distribution, y_ij = softmax_j((s_ij + g_ij) / tau)
    over the keys that query i sees, and of each draw sum_i y_ij over all queries of a passage. `noisy_mass` is its mean over
    draws and `noisy_mass_spread` its standard deviation (of a sample); the mean itself is known to spread / sqrt(seeds). A
    learned sink logit takes part with its own logit, without noise. The noise is a hash of the draw, the layer, the head and the
    two positions: a run gives the same numbers again, whatever else is in the batch, and no random state is touched. Calls that
    decode, and keys of another text, have none.

    Cost: with three draws 6.8 times `scaled_dot_product_attention`, with one 3.7 times (2,048 tokens, 8 heads of 64, float32, one
    CPU thread); a quarter more with a tau that is not 1. Nothing of size queries x keys is held.

    Source: Keyformer, Adnan et al. 2024, arXiv:2403.09054.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> q = k = torch.zeros(1, 1, 3, 4)
    >>> seen = AttentionSeen(Site("attention", "attn", 0), Context(0, 0, "forward"), q, k, k, None, True, 0.5)
    >>> kept = Keyformer().observe(seen)
    >>> sorted(kept), round(kept["noisy_mass"].sum().item(), 3)  # every query gives away one
    (['noisy_mass', 'noisy_mass_spread'], 3.0)
    """

    spec: ClassVar[ProbeSpec]

    def __init__(self, *, seeds: int = 3, tau: float = 1.0) -> None:
        if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
            raise SchemaError(f"Probe {self.spec.name}: seeds is {seeds!r}, expected a whole number from 1.")
        if not 0 < tau < math.inf:
            raise SchemaError(f"Probe {self.spec.name}: tau is {tau}, expected a temperature above 0.")
        self.seeds, self.tau = seeds, float(tau)

    def observe(self, seen: AttentionSeen) -> dict[str, Tensor] | None:
        """Mean and spread (batch, head, key) of one call that reads a passage; None for any other."""
        if seen.context.phase == "decode" or seen.across:
            return None
        import torch

        from bnviz.reduce.attention_stats import Pattern
        from bnviz.reduce.gumbel_mass import gumbel_mass

        mass = gumbel_mass(
            seen.query,
            seen.key,
            seeds=self.seeds,
            stream=seen.site.layer,
            tau=self.tau,
            pattern=Pattern(seen.causal, seen.window, seen.allowed, seen.softcap, seen.sinks, seen.scale),
            valid=seen.context.valid if seen.valid_keys is None else seen.valid_keys,
        )
        spread = torch.full_like(mass[0], torch.nan) if self.seeds == 1 else mass.std(0)
        return {"noisy_mass": mass.mean(0), "noisy_mass_spread": spread}
