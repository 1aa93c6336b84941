"""Which modules of a block write to its residual stream: found by arithmetic in the first forward, not by name.

Among the outputs of a block's descendants, the smallest set with output - input = sum of the set is taken, or of the set scaled
(Granite adds 0.22 of each); one of them is the attention, another the feed-forward part. A block that is no such sum (post-norm,
hyper-connections) has no verified writers and is watched as a whole.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOLERANCE = 1e-3  # relative; bf16 sums of two terms stay near 4e-3 and are judged in float32 with 1e-2
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe|expert|fc|dense|linear", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Writers:
    """Verified residual writers of one block, in order of execution.

    Parameters
    ----------
    paths : tuple of str
        Relative to the block.
    parts : tuple of str
        "attention" or "mlp" for each.
    calls : tuple of int
        Which call of the module in a forward of the block: a dropout may serve both.
    parallel : bool
        All read the block's input (GPT-J, Falcon); else each reads the sum so far.
    scales : tuple of float
        What each output is multiplied by before it is added.
    sizes : tuple of int
        Bytes of the parameters of the modules that ended after the writer before and up to this one.
    modules : tuple of tuple of str
        Those modules, relative to the block.
    """

    paths: tuple[str, ...]
    parts: tuple[str, ...]
    calls: tuple[int, ...]
    parallel: bool
    scales: tuple[float, ...]
    sizes: tuple[int, ...]
    modules: tuple[tuple[str, ...], ...] = ()


def stream(value: object) -> Tensor | None:
    """The hidden state in what a module took or gave: a floating tensor, or the first of a tuple."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 2 else None


class Search:
    """Watches the descendants of one block for one forward and finds its writers.

    Parameters
    ----------
    block : nn.Module
    shape : tuple of int
        Of the block's stream: only tensors of this shape are held, and only until the block ends.
    """

    def __init__(self, block: nn.Module, shape: tuple[int, ...]) -> None:
        self._shape = tuple(shape)
        self._ended: list[tuple[str, nn.Module]] = []
        self._outputs: list[tuple[str, Tensor]] = []
        self._inputs: list[Tensor] = []
        self._handles = [h for path, module in _candidates(block) for h in self._watch(path, module)]

    def _watch(self, path: str, module: nn.Module) -> Iterator[torch.utils.hooks.RemovableHandle]:
        def before(_: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            seen = stream(args) if args else stream(next(iter(kwargs.values()), None))
            if seen is not None and tuple(seen.shape) == self._shape:
                self._inputs.append(seen.detach())

        def after(_: nn.Module, __: object, output: object) -> None:
            self._ended.append((path, module))
            seen = stream(output)
            if seen is not None and tuple(seen.shape) == self._shape:
                self._outputs.append((path, seen))

        yield module.register_forward_pre_hook(before, with_kwargs=True)
        yield module.register_forward_hook(after)

    def close(self) -> None:
        """Take the hooks back and let the tensors go."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._outputs.clear()
        self._inputs.clear()
        self._ended.clear()

    @torch.no_grad()
    def found(self, before: Tensor, after: Tensor) -> tuple[Writers | None, list[Tensor]]:
        """The writers and their outputs, or None when the block is no sum of its descendants' outputs."""
        delta = after.detach().float() - before.detach().float()
        candidates = self._outermost()
        tolerance = TOLERANCE if before.dtype == torch.float32 else 10 * TOLERANCE
        if not bool(delta.norm() > 0):
            return None, []
        some, thinned = _thin(delta), {id(y): _thin(y).float() for _, _, y in candidates}
        for fitted in (_sum, _scaled):
            for count in (2, 1, 3):
                for chosen in itertools.combinations(candidates, count):
                    scales = fitted(some, [thinned[id(y)] for _, _, y in chosen], tolerance)
                    if scales is not None and _adds_up(delta, [y for _, _, y in chosen], scales, tolerance):
                        return self._writers(before, chosen, tolerance, scales), [y for _, _, y in chosen]
        return None, []

    def _outermost(self) -> list[tuple[str, int, Tensor]]:
        """(path, call, output), equal outputs once: of the last to end, the outermost; of one called once, where there is one."""
        often = Counter(path for path, _ in self._outputs)
        called: Counter[str] = Counter()
        kept: dict[int, tuple[str, int, Tensor]] = {}
        for path, output in self._outputs:
            before = kept.get(output.data_ptr())
            if before is None or often[path] == 1 or often[before[0]] > 1:
                kept[output.data_ptr()] = (path, called[path], output)
            called[path] += 1
        return list(kept.values())

    def _writers(
        self, before: Tensor, chosen: tuple[tuple[str, int, Tensor], ...], tolerance: float, scales: tuple[float, ...]
    ) -> Writers:
        paths, calls = tuple(p for p, _, _ in chosen), tuple(n for _, n, _ in chosen)
        middle = before.detach().float() + scales[0] * chosen[0][2].float()
        reads = any(
            x.shape == middle.shape and bool((x.float() - middle).norm() <= tolerance * middle.norm())
            for x in self._inputs
        )
        parts, parallel = tuple(_part(p, i) for i, p in enumerate(paths)), len(chosen) > 1 and not reads
        sizes, modules = self._shares(paths, calls)
        return Writers(paths, parts, calls, parallel, scales, sizes, modules)

    def _shares(
        self, paths: tuple[str, ...], calls: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[tuple[str, ...], ...]]:
        """Bytes of parameters, and modules, between the ends of the writers; what comes after the last belongs to the last."""
        ends = [
            [at for at, (p, _) in enumerate(self._ended) if p == path][call]
            for path, call in zip(paths, calls, strict=True)
        ]
        sizes, counted = [0] * len(ends), set[int]()
        modules: list[list[str]] = [[] for _ in ends]
        for at, (path, module) in enumerate(self._ended):
            part = next((i for i, end in enumerate(ends) if at <= end), len(ends) - 1)
            modules[part].append(path)
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in counted:
                    counted.add(id(parameter))
                    sizes[part] += parameter.numel() * parameter.element_size()
        return tuple(sizes), tuple(map(tuple, modules))


def _thin(values: Tensor) -> Tensor:
    """At most 64 tokens, spread evenly: a set that does not add up there does not add up."""
    rows = values.reshape(-1, values.shape[-1])
    return rows[:: max(1, -(-len(rows) // 64))]


def _adds_up(delta: Tensor, terms: list[Tensor], scales: tuple[float, ...], tolerance: float) -> bool:
    left = delta.clone()
    for term, scale in zip(terms, scales, strict=True):
        left.sub_(term.float(), alpha=scale)
    return bool(left.norm() <= tolerance * delta.norm())


def _sum(delta: Tensor, terms: list[Tensor], tolerance: float) -> tuple[float, ...] | None:
    """Ones, when `delta` is the sum of the terms."""
    total = sum(terms[1:], terms[0])
    return (1.0,) * len(terms) if bool((total - delta).norm() <= tolerance * delta.norm()) else None


def _scaled(delta: Tensor, terms: list[Tensor], tolerance: float) -> tuple[float, ...] | None:
    """The positive factors with which the terms add up to `delta`; None when there are none."""
    stacked = torch.stack([t.reshape(-1) for t in terms]).double()
    flat = delta.reshape(-1).double()
    products = stacked @ stacked.T
    if bool(torch.linalg.matrix_rank(products, hermitian=True) < len(terms)):
        return None
    scales = torch.linalg.solve(products, stacked @ flat)
    if not bool((scales > 0).all()) or bool((scales @ stacked - flat).norm() > tolerance * flat.norm()):
        return None
    return tuple(scales.tolist())


def _part(path: str, place: int) -> str:
    head = path.partition(".")[0]
    for text in (head, path):
        if _ATTENTION.search(text):
            return "attention"
        if _FORWARD.search(text):
            return "mlp"
    return "attention" if place == 0 else "mlp"


def _candidates(block: nn.Module) -> list[tuple[str, nn.Module]]:
    fused = fused_below(block)
    return [(p, m) for p, m in block.named_modules() if p and not fused(p)]


def fused_below(model: nn.Module) -> Callable[[str], bool]:
    """Tells paths inside modules whose native fused path a hook on a descendant would switch off."""
    roots = [
        f"{p}." if p else ""
        for p, m in model.named_modules()
        if isinstance(m, nn.TransformerEncoderLayer | nn.MultiheadAttention)
    ]
    return lambda path: any(path.startswith(root) for root in roots if path != root[:-1])
