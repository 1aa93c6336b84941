"""What writes to the residual stream of a block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from bnviz.capture.values import nbytes_of
from bnviz.kinds import kind_of

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
    elsewhere : frozenset of str
        Modules that took or gave other tokens only: those of another stream.
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
    elsewhere: frozenset[str] = frozenset()

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


@dataclass(frozen=True, slots=True)
class Shares:
    """Which modules of a block belong to which of its parts.

    Parameters
    ----------
    parts : tuple of str
    sizes : tuple of int
        Bytes of the parameters of its modules.
    modules : tuple of tuple of str
        Relative to the block.
    """

    parts: tuple[str, ...]
    sizes: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...]


def shares(block: nn.Module, found: Sequence[tuple[str, Writers]]) -> Shares:
    """Those of the parts of all streams of a block, each with its name.

    A module belongs to the first part that ends after it, of the streams whose tokens it, or a module around it, may have seen:
    what two streams share, to the first that it serves.
    """
    if len(found) == 1:
        name, one = found[0]
        return Shares(tuple(kind_of(name, part) for part in one.parts), one.sizes, one.modules)
    ran = [path for paths in found[0][1].modules for path in paths]
    parts = [
        (_end(ran, path, call), kind_of(name, part), one)
        for name, one in found
        for path, call, part in zip(one.paths, one.calls, one.parts, strict=True)
    ]
    modules: dict[str, list[str]] = {part: [] for _, part, _ in parts}
    order = sorted(parts, key=lambda part: part[0])
    for at, path in enumerate(ran):
        told = ([part for part in order if held not in part[2].elsewhere] for held in _around(path))
        own = next((some for some in told if 0 < len(some) < len(order)), order)
        modules[next((part for end, part, _ in own if at <= end), own[-1][1])].append(path)
    counted, sizes = set[int](), dict.fromkeys(modules, 0)
    for part, paths in modules.items():
        for parameter in (p for path in paths for p in block.get_submodule(path).parameters(recurse=False)):
            sizes[part] += 0 if id(parameter) in counted else nbytes_of(parameter)
            counted.add(id(parameter))
    return Shares(tuple(modules), tuple(sizes.values()), tuple(map(tuple, modules.values())))


def _around(path: str) -> list[str]:
    """A module's path and those of the modules around it, the innermost first."""
    names = path.split(".")
    return [".".join(names[:many]) for many in range(len(names), 0, -1)]


def _end(ran: Sequence[str], path: str, call: int) -> int:
    """Where in a row of modules the so-manieth call of one ended; after all where it did not run that time."""
    ends = [at for at, known in enumerate(ran) if known == path]
    return ends[min(call, len(ends) - 1)] if ends else len(ran)


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
