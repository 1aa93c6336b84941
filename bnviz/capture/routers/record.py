"""What a run keeps of routers besides their decisions: paths, weights, and what a reader has to know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from bnviz.observation import Site

from .find import RouterSite

if TYPE_CHECKING:
    from .tap import RouterTap

_RECORDS = {"router": "routing", "further_router": "further_routing"}


def by_record(routers: Iterable[tuple[Site, RouterSite]]) -> dict[str, dict[int, RouterSite]]:
    """Routers by the record their decisions go to, and by its `layer`."""
    found: dict[str, dict[int, RouterSite]] = {record: {} for record in _RECORDS.values()}
    for site, router in routers:
        found[_RECORDS[site.kind]][site.layer] = router
    return found


def bytes_of(routers: Mapping[int, RouterSite]) -> dict[str, dict[int, Any]]:
    """Weights of one expert (None: not known) and of all shared ones, by layer."""
    return {
        "expert_bytes": {layer: r.expert_bytes or None for layer, r in routers.items()},
        "shared_bytes": {layer: r.shared.nbytes for layer, r in routers.items()},
    }


def remarks(taps: Iterable[RouterTap]) -> list[str]:
    """A sentence for routers whose choice nothing confirmed, and one for those whose rows are no tokens."""
    taps, said = list(taps), []
    for record in _RECORDS.values():
        of = [tap for tap in taps if _RECORDS[tap.site.kind] == record]
        for marked, words in (
            ([t for t in of if t.unverified], "the choice was seen where it is made, not where experts use it"),
            ([t for t in of if t.unmapped], "the rows are in the router's order, not tokens of the sequences"),
        ):
            if marked:
                first = f"{marked[0].site.path}{', ...' * (len(marked) > 1)}"
                said.append(f"{record}: of {len(marked)} of {len(of)} places ({first}) {words}.")
        if len({tap.tokens for tap in of if tap.tokens[0] == max(t.tokens[0] for t in of) >= 0}) > 1:
            said.append(
                f"{record}: places read different tokens in one forward (an encoder and a decoder do); `sequence` and `position` "
                "are those of the most, `tokens` says how many each place had."
            )
    return said
