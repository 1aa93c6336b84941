"""A plan as a tree of few lines: layers that are alike are described once, whatever their number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from bnviz.quantities import counted

from .unknown import Unknown

if TYPE_CHECKING:
    from .blocks.find import Block
    from .plan import Plan

LINES = 40  # of a tree; what does not fit is counted
_SEEN = {
    "interface": "seen at transformers' attention interface",
    "sdpa": "seen at F.scaled_dot_product_attention",
    "multi_head": "seen at F.multi_head_attention_forward",
    "flex": "seen at flex_attention",
    "softmax": "written by hand, followed from its softmax",
    "native": "torch's own layer, its projections are read again",
    "named": "named by attention=, listened to",
    "adapter": "shown by the function given to attention=",
}


@dataclass(frozen=True, slots=True)
class Branch:
    """One line of a tree and what hangs below it.

    Parameters
    ----------
    name : str
        What it is: "layer 0", "attention", "not understood".
    code : str
        A path, a class, a call: what stands in code.
    words : str
        The rest.
    below : tuple of Branch
    """

    name: str
    code: str = ""
    words: str = ""
    below: tuple[Branch, ...] = ()


def tree(plan: Plan) -> Branch:
    """The plan as branches; at most `LINES` of them."""
    kinds = {"attention": 0, "cross_attention": 0}
    for place in plan.attention:
        kinds[place.site.kind] = kinds.get(place.site.kind, 0) + 1
    head = [counted(len(plan.blocks), "block"), f"{kinds['attention']} attention"]
    head += [f"{kinds['cross_attention']} cross attention"] if kinds["cross_attention"] else []
    head.append(counted(plan.count("router"), "router"))
    head += [f"{further} further routers"] if (further := plan.count("further_router")) else []
    parts = [*_layers(plan), *_outside(plan), *_unknown(plan.unknown)]
    return Branch(plan.model, words=" · ".join(head), below=_cut(parts, LINES - 1))


def text(branch: Branch) -> str:
    """A tree as lines.

    Examples
    --------
    >>> print(text(Branch("net", below=(Branch("layer 0", "0  Linear"), Branch("layer 1", "2  Linear")))))
    net
    ├─ layer 0  0  Linear
    └─ layer 1  2  Linear
    """
    return "\n".join(_lines(branch))


def _lines(branch: Branch) -> Iterator[str]:
    yield "  ".join(part for part in (branch.name, branch.code, branch.words) if part)
    for at, inner in enumerate(branch.below):
        last = at == len(branch.below) - 1
        first, *rest = _lines(inner)
        yield f"{'└─' if last else '├─'} {first}"
        yield from (f"{'  ' if last else '│ '} {line}" for line in rest)


def size(branch: Branch) -> int:
    """Lines of a tree."""
    return 1 + sum(map(size, branch.below))


def _cut(parts: Sequence[Branch], room: int) -> tuple[Branch, ...]:
    """As many whole parts as there is room for; what is not understood is never cut off by what is."""
    if sum(map(size, parts)) <= room:
        return tuple(parts)
    last = [part for part in parts if part.name == "not understood"]
    room -= sum(map(size, last)) + 1
    kept: list[Branch] = []
    others = [part for part in parts if part.name != "not understood"]
    for part in others:
        room -= size(part)
        if room < 0:
            break
        kept.append(part)
    rest = len(others) - len(kept)
    return (*kept, Branch(f"{rest} more kinds of layer", words="in .blocks, .attention and .routers"), *last)


def _layers(plan: Plan) -> Iterator[Branch]:
    """One branch for each kind of layer, at its first; all others of the kind on one line."""
    alike: dict[Any, list[int]] = {}
    inside = {site.layer: tuple(_inside(plan, site.layer, site.path, block)) for site, block in plan.blocks}
    blocks = {site.layer: (site, block) for site, block in plan.blocks}
    for layer, (site, block) in blocks.items():
        alike.setdefault((type(block.first), site.evidence, inside[layer]), []).append(layer)
    for first, *others in alike.values():
        site, block = blocks[first]
        code = f"{site.path or 'the model itself'}  {type(block.first).__name__}"
        yield Branch(f"layer {first}", code, f"({site.evidence})", inside[first])
        if others:
            many = "layer" if len(others) == 1 else "layers"
            ends = [blocks[n][0].path for n in (others[0], others[-1])]
            where = ends[0] if len(others) == 1 else f"{ends[0]} to {ends[1]}"
            yield Branch(f"{many} {ranges(others)}: as layer {first}", where)


def _inside(plan: Plan, layer: int, path: str, block: Block) -> Iterator[Branch]:
    for place in plan.attention:
        if place.site.layer == layer:
            yield _attention(place, path)
    for site, router in plan.routers:
        further = site.kind == "further_router"
        if (further and site.path.startswith(f"{path}.")) or (not further and site.layer == layer):
            yield _router(site, router, path)
    whole = next(block.first.children(), None) is None and not block.parts  # a plain layer has nothing inside
    if not whole and not plan.fused(f"{path}.x" if path else "x"):
        yield Branch("residual writers", words="found at the first forward")


def _attention(place: Any, block: str) -> Branch:
    code = f"{_below(place.site.path, block)}  {type(place.module).__name__}"
    words = _SEEN.get(place.mechanism, f"seen by {place.mechanism} ({place.site.evidence})")
    return Branch(place.site.kind.replace("_", " "), code, words)


def _router(site: Any, router: Any, block: str) -> Branch:
    words = counted(router.count, "expert") if router.count else "experts counted at the first forward"
    words += f", {router.shared.count} shared" if router.shared.count else ""
    return Branch(site.kind.replace("_", " "), _below(site.path, block), f"{words} ({site.evidence})")


def _below(path: str, block: str) -> str:
    return path.removeprefix(f"{block}.") if block and path != block else path or "the model itself"


def _outside(plan: Plan) -> Iterator[Branch]:
    found = [_attention(place, "") for place in plan.attention if place.site.layer < 0]
    found += [_router(site, router, "") for site, router in plan.routers if _is_outside(plan, site)]
    if found:
        yield Branch("outside every block", below=_cut(found, 6))


def _is_outside(plan: Plan, site: Any) -> bool:
    if site.kind != "further_router":
        return bool(site.layer < 0)
    return not any(site.path.startswith(f"{block.path}.") for block, _ in plan.blocks)


def _unknown(places: Iterable[Unknown]) -> Iterator[Branch]:
    """Places that are alike once, each with the ways of naming them."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for place in places:
        alike.setdefault((place.cls, place.why, place.option), []).append(place.path)
    found = []
    for (cls, why, option), paths in alike.items():
        pattern = common(paths)
        named = Branch("name it", f'{option}="{pattern}"  or  {option}={{{cls}: function}}') if option else None
        found.append(Branch("", f"{pattern}  {cls}", why, (named,) if named else ()))
    if found:
        yield Branch("not understood", below=_cut(found, 12))


def common(paths: Sequence[str]) -> str:
    """A pattern of several paths; the path itself where there is one.

    Examples
    --------
    >>> common(["blocks.0.mix", "blocks.1.mix"]), common(["encoder.mix"])
    ('blocks.*.mix', 'encoder.mix')
    """
    if len(paths) == 1:
        return paths[0]
    split = [path.split(".") for path in paths]
    if len({len(parts) for parts in split}) > 1:
        ends = {parts[-1] for parts in split}
        return f"*.{ends.pop()}" if len(ends) == 1 else "*"
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*split, strict=True))


def ranges(numbers: Sequence[int]) -> str:
    """Ascending whole numbers in few words.

    Examples
    --------
    >>> ranges([1, 2, 3, 4]), ranges([1, 3, 5, 7]), ranges([0, 1, 2, 8, 9, 12])
    ('1-4', '1, 3, … 7', '0-2, 8-9, 12')
    """
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1 and steps != {1}:
        return f"{numbers[0]}, {numbers[1]}, … {numbers[-1]}"
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    shown = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join(shown if len(shown) <= 8 else [*shown[:4], f"… {shown[-1]} ({len(numbers)} in all)"])
