"""From a router's decision over flat rows to what probes are shown: a place in the model, tokens, a distribution over experts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bnviz.capture.clock import Clock
from bnviz.capture.watch import Watch
from bnviz.observation import RouterSeen, Site

from .find import RouterSite
from .lineage import tensors
from .route import Route
from .scores import kind_of, share_of


@dataclass(frozen=True, slots=True)
class Place:
    """Which tokens flat rows are.

    Parameters
    ----------
    batch, tokens : int
    turned : bool
        Rows go through the batch first: (tokens, batch).
    mapped : bool
        They are the tokens of the sequences; else only their number is known.
    """

    batch: int
    tokens: int
    turned: bool = False
    mapped: bool = True

    def shaped(self, value: Tensor) -> Tensor:
        """(rows, ...) as (batch, tokens, ...)."""
        if self.turned:
            return value.reshape(self.tokens, self.batch, *value.shape[1:]).transpose(0, 1)
        return value.reshape(self.batch, self.tokens, *value.shape[1:])


def place_of(rows: int, read: Tensor | None, shape: tuple[int, int] | None) -> Place:
    """The place of `rows` that a block made of what it `read`, in a call of (batch, tokens) `shape`.

    Examples
    --------
    >>> place_of(6, torch.zeros(2, 3, 8), (2, 3))
    Place(batch=2, tokens=3, turned=False, mapped=True)
    >>> place_of(6, torch.zeros(3, 2, 8), (2, 3)).turned
    True
    >>> place_of(4, torch.zeros(4, 8), (2, 3)).mapped
    False
    """
    outer = tuple(read.shape[:-1]) if read is not None and read.dim() > 1 else ()
    if len(outer) > 1 and read is not None and read.numel() == rows * read.shape[-1]:
        batch, tokens = outer[0], rows // outer[0]
        if shape is not None and outer == shape[::-1] != shape:
            return Place(tokens, batch, turned=True)
        return Place(batch, tokens)
    if shape is not None:
        return Place(*shape) if shape[0] * shape[1] == rows else Place(1, rows, mapped=False)
    return Place(rows, 1) if outer == (rows,) else Place(1, rows, mapped=False)


def wide_scores(output: Any, rows: int, router: RouterSite) -> Tensor | None:
    """What a router made for every expert, of what its module returned: (rows, experts), or more with ways past them."""
    made = router.router.parameters() if router.router is not None else ()
    widths = {
        router.count,
        *(p.shape[0] for p in made if p.dim() == 2 and router.count < p.shape[0] <= router.count + 8),
    }
    for value in tensors(output):
        fits = value.is_floating_point() and value.dim() >= 2 and value.numel() == rows * value.shape[-1]
        if fits and value.shape[-1] in widths:
            return value.detach().reshape(rows, -1)
    return None


def with_skip(route: Route, computing: int) -> tuple[Route, int]:
    """`route` with the experts that compute nothing counted, and how many of the last they are.

    Where the router has one score more than there are experts, the last is a way past them; the model sends such a token to
    expert 0 with weight 0.
    """
    if route.logits is None:
        return route, max(route.experts - computing, 0) if computing else 0
    wide = route.logits.shape[-1]
    if wide == route.experts + 1:
        past = (route.weights == 0) & (route.ids == 0)
        route = replace(route, ids=route.ids.masked_fill(past, route.experts), experts=wide)
    return replace(route, experts=max(wide, route.experts)), max(
        max(wide, route.experts) - computing, 0
    ) if computing else 0


class Kind:
    """How one router's scores become weights: decided at its first call, on its device, and read on the host not before the next.

    Parameters
    ----------
    code : Tensor
        Index into `scores.KINDS`.
    """

    def __init__(self, code: Tensor) -> None:
        self._code = code
        pinned = code.device.type == "cuda"
        self._host = torch.full((), -1, dtype=torch.int64, device="cpu", pin_memory=pinned)
        self._host.copy_(code, non_blocking=pinned)

    @property
    def known(self) -> int | Tensor:
        """The code; the tensor as long as its copy has not arrived."""
        code = int(self._host)
        return code if code >= 0 else self._code


class Shown:
    """Makes observations of one router.

    Parameters
    ----------
    site : Site
    router : RouterSite
    watch : Watch
    """

    def __init__(self, site: Site, router: RouterSite, watch: Watch) -> None:
        self._site, self._router, self._watch = site, router, watch
        self._kind: Kind | None = None

    def of(self, route: Route, read: Tensor | None, scores: Any = None) -> RouterSeen | None:
        """What probes see of `route`; None when this moment is not watched.

        Parameters
        ----------
        route : Route
        read : Tensor, optional
            What the block was given.
        scores : optional
            What the router's module returned, where the route has no logits of its own.
        """
        clock: Clock = self._watch.clock
        context, rows = clock.now, route.ids.shape[0]
        site = self._watch.layers.of(self._site, clock.nth(self._site)) if context is not None else None
        if context is None or site is None:
            return None
        if route.logits is None and scores is not None:
            route = replace(route, logits=wide_scores(scores, rows, self._router))
        route, skip = with_skip(route, self._router.computing)
        place, share = place_of(rows, read, clock.shape), self._share(route)
        return RouterSeen(
            site,
            clock.seen(place.tokens) or context,
            place.shaped(route.ids),
            place.shaped(route.weights),
            None if route.logits is None else place.shaped(route.logits),
            route.experts,
            share=None if share is None else place.shaped(share),
            skip=skip,
            shared=self._router.shared.count,
            verified=route.verified,
            mapped=place.mapped,
        )

    def _share(self, route: Route) -> Tensor | None:
        if route.logits is None:
            return None
        if self._kind is None:
            self._kind = Kind(kind_of(route.logits, route.ids, route.weights))
        return share_of(route.logits, self._kind.known)
