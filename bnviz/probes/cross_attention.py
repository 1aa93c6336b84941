"""Who attends to what across texts, and in every second attention of a layer: reduced as `attention` is."""

from __future__ import annotations

from bnviz.schema import probe

from .attention import Attention


@probe(
    sites=("cross_attention",),
    variables=Attention.spec.variables,
    memory="(9 x 4 B a key + 4 x 4 B a query) x heads x places, + bins^2 x 4 B a head, place and step",
)
class CrossAttention(Attention):
    """Attention over another text or image, and every attention of a layer beside its self-attention, summed as the model runs.

    `layer` counts these places in order of execution, not blocks: a block may have several (the two directions of a two-way
    decoder, temporal and spatial attention). `path` says which place it is.

    Parameters
    ----------
    window, sinks, local, bins, history : int
        As in `attention`.

    Raises
    ------
    SchemaError
        An option below 1.

    Notes
    -----
    The variables are those of `attention`. Where the keys are another text, `key` counts its tokens, padding left out, and what
    compares positions does not exist: `local_mass` and `previous_mass` are NaN; `echo_mass`, `induction_mass`,
    `recent_mass`, `recent_pivotal` and `ranged_mass` are left out.
    In decoding, the keys are the same at every step, so that `mass` is what the whole generation looked at.

    Cost: as `attention`.

    Examples
    --------
    >>> import torch
    >>> from bnviz.observation import AttentionSeen, Context, Site
    >>> q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 5, 4)
    >>> place = Site("cross_attention", "decoder.cross_attn", 0)
    >>> seen = AttentionSeen(place, Context(0, 0, "forward"), q, k, k, None, False, 0.5, across=True)
    >>> kept = CrossAttention().observe(seen)
    >>> [round(x, 3) for x in kept["mass"][0, 0].tolist()]
    [0.6, 0.6, 0.6, 0.6, 0.6]
    >>> bool(kept["previous_mass"].isnan().all())
    True
    """
