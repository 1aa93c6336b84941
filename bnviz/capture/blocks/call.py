"""What is known of one call of a block until it ends."""

from __future__ import annotations

from torch import Tensor

from bnviz.capture.values import version
from bnviz.observation import Site

from .stream import Place


class BlockCall:
    """One call of a block.

    Parameters
    ----------
    site : Site, optional
        The block as the layer that this call of it is; None: not shown.

    Attributes
    ----------
    given, copies : dict of Place to Tensor
        What it was given that may be a stream, and copies of those that it may write into.
    versions : dict of Place to int
        Of what it was given, as the call began.
    real : Tensor (batch, tokens) bool, optional
        Which tokens are no padding, as PyTorch's own layers were told.
    """

    __slots__ = ("copies", "given", "real", "site", "versions")

    def __init__(self, site: Site | None) -> None:
        self.site = site
        self.given: dict[Place, Tensor] = {}
        self.copies: dict[Place, Tensor] = {}
        self.versions: dict[Place, int] = {}
        self.real: Tensor | None = None

    def take(self, place: Place, value: Tensor, *, copy: bool) -> None:
        """It was given `value`, which is copied where the block may write into it."""
        self.given[place], self.versions[place] = value, version(value)
        if copy:
            self.copies[place] = value.detach().clone()

    def bare(self) -> BlockCall:
        """The same without what the block was given."""
        found = BlockCall(self.site)
        found.real = self.real
        return found
