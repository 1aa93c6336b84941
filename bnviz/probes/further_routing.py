"""Routers beside the first of their layer: a mixture of attention heads, a second mixture, one outside every layer."""

from __future__ import annotations

from bnviz.schema import probe

from .routing import VARIABLES, Routing


@probe(
    sites=("further_router",),
    variables=VARIABLES,
    memory="as routing",
)
class FurtherRouting(Routing):
    """The decisions of every router that is not the first of its layer; each has a place of its own.

    Read it like `routing`, whose variables and options it has. `layer` counts these places in the order of the model's
    modules, not its layers; `path` names them. Diagnostics of `routing` take this record too:
    `bnviz.diagnostics.expert_load(run["further_routing"])`.

    Notes
    -----
    Two routers of one layer (JetMoE mixes attention heads and feed-forward experts) would have to share a row of `routing`;
    here they are apart.

    Examples
    --------
    >>> FurtherRouting().logits
    False
    """
