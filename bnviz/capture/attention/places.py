"""Which attention of a layer is its self-attention, and the numbers of all others: cross attention, second branches."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from bnviz.observation import Site

from .find import AttentionSite

if TYPE_CHECKING:
    from bnviz.capture.plan import Plan

SELF, CROSS = "attention", "cross_attention"


class Places:
    """The attention sites of a model by what they turn out to be, for the length of a capture.

    A layer has one self-attention. Names tell cross attention apart; where several sites of a layer have no such name, the first
    is taken for the self-attention, and gives its place to the second when its keys turn out not to be its queries' tokens.

    Parameters
    ----------
    plan : Plan
        Kept true: a site that turns out to be something else is replaced in `attention`, a suspect that shows attention joins it,
        and `cross` has the path of every place that is no layer's self-attention, by its number, in order of execution.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sites = [*plan.attention, *plan.suspects]
        self._at = {id(place.module): at for at, place in enumerate(self._sites)}
        self._known = set(range(len(plan.attention)))
        self._settled: set[int] = set()
        self._numbers: dict[tuple[str, int, int], int] = {}

    def called_cross(self, place: AttentionSite) -> bool:
        """Whether a name says that the keys are of another text."""
        return place.site.kind == CROSS and not place.second

    def kind(self, place: AttentionSite, *, across: bool) -> str:
        """What a site is, now that one of its calls was seen."""
        at, layer = self._at[id(place.module)], place.site.layer
        if self._sites[at].site.kind == SELF and across and layer not in self._settled:
            other = next((n for n, s in enumerate(self._sites) if s.site.layer == layer and s.second), None)
            if other is not None:
                self._become(other, SELF)
                self._become(at, CROSS)
        self._settled.add(layer)
        if at not in self._known:
            self._known.add(at)
            self._plan.unknown[:] = [u for u in self._plan.unknown if u.path != place.site.path]
            self._publish()
        return self._sites[at].site.kind

    def _become(self, at: int, kind: str) -> None:
        place = self._sites[at]
        self._sites[at] = replace(place, site=replace(place.site, kind=kind), second=False)
        self._publish()

    def _publish(self) -> None:
        self._plan.attention[:] = [self._sites[at] for at in sorted(self._known)]

    def numbered(self, site: Site, again: int) -> Site:
        """`site` among the places that are no layer's self-attention; `again` counts attention inside one call of its module."""
        key = (site.path, site.layer, again)
        number = self._numbers.setdefault(key, len(self._numbers))
        if number not in self._plan.cross:
            self._plan.cross[number] = " ".join(
                [site.path] * bool(site.path) + [f"(attention {again + 1})"] * bool(again)
            )
        return replace(site, kind=CROSS, layer=number)
