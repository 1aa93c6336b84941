"""What writes to the residual stream of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from .fits import Scale

Call = tuple[
    str, int, tuple[object, ...]
]  # a module's path in the block, which call of it, where in what it took or gave


@dataclass(frozen=True, slots=True)
class Writers:
    """Verified residual writers of one block, in order of execution.

    Parameters
    ----------
    paths : tuple of str
        Relative to the block.
    parts : tuple of str
        "attention" for what mixes tokens (attention, convolutions over tokens, recurrent and state-space mixers), "mlp" for what
        mixes channels; a second attention is "cross_attention", a second mlp "mlp_2".
    calls : tuple of int
        Which call of the module in a forward of the block: a dropout may serve both.
    parallel : bool
        All read the block's input (GPT-J, Falcon); else each reads the sum so far.
    scales : tuple of float
        What each output is multiplied by before it is added; 1.0 where `vectors` or `read` say more.
    sizes : tuple of int
        Bytes of the parameters of the modules that ended after the writer before and up to this one.
    modules : tuple of tuple of str
        Those modules, relative to the block.
    places : tuple
        Where in what each module gives its writing is.
    vectors : tuple of Tensor
        Factors of each channel, where a scale is not one number; else ().
    read : bool
        Factors differ from token to token or from forward to forward, so that what each wrote is read off the stream.
    states : tuple
        The calls of modules that are given the stream between two writers, when it is read there.
    copied : frozenset of str
        Modules after whose call the block writes into what they took or gave: copies are kept.
    evidence : str
        By what the sum was verified.
    """

    paths: tuple[str, ...]
    parts: tuple[str, ...]
    calls: tuple[int, ...]
    parallel: bool
    scales: tuple[float, ...]
    sizes: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...] = ()
    places: tuple[tuple[object, ...], ...] = ()
    vectors: tuple[Tensor, ...] = field(default=(), compare=False)
    read: bool = False
    states: tuple[Call, ...] = ()
    copied: frozenset[str] = frozenset()
    evidence: str = "sum"

    @property
    def factors(self) -> tuple[Scale, ...]:
        """What each output is multiplied by: a number, or one a channel."""
        return self.vectors or self.scales

    @property
    def watched(self) -> tuple[Call, ...]:
        """The calls that tell what was written: of the writers, or of those that are given the stream between them."""
        return self.states if self.read else tuple(zip(self.paths, self.calls, self.places, strict=True))


@dataclass(frozen=True, slots=True)
class Unsolved:
    """Why a block has no verified writers.

    Parameters
    ----------
    reason : str
        Said in the run's notes; "" when there is nothing to say.
    final : bool
        A later forward may tell more, unless this is set.
    """

    reason: str = ""
    final: bool = True


def stream(value: object) -> Tensor | None:
    """The hidden state in what a module took or gave: a floating tensor, or the first of a tuple."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 else None


def fused_below(model: nn.Module) -> Callable[[str], bool]:
    """Tells paths inside modules whose native fused path a hook on a descendant would switch off."""
    roots = [
        f"{p}." if p else ""
        for p, m in model.named_modules()
        if isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention)
    ]
    return lambda path: any(path.startswith(root) for root in roots if path != root[:-1])
