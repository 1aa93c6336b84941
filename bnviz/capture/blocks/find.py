"""Where the blocks of a model are, by structure and by how its code uses its lists: no model is known by name.

Blocks are the items of the outermost lists (`ModuleList`, `Sequential`, a `ModuleDict` of one class) whose items run one after
the other. An item that is itself little more than such a list (a stage of a vision model, a level of a U-Net) is looked into: the
blocks inside are the layers, and what changes the resolution between them. Items that run side by side (experts, heads,
branches) are no blocks. In a flat list a block is a module with weights, and the norms and activations that follow it. A model
without a list has its own parametric children as blocks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from bnviz.capture.values import nbytes_of

from .code import in_a_row
from .parts import holds_both

SHARE = 0.05  # of the parameters: below it a list of plain layers is a detail (a head, a stem), not the body
HEAD = 0.2  # of the parameters: below it a list of plain layers beside lists of blocks is a head or a stem
MOST = 0.5  # of its weight matrices: an item with more of them in a list of its own is a stage
_NOT_A_BODY = re.compile(r"expert", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Block:
    """One block: `first` sees the input, `last` gives the output; they are the same module but in a flat list.

    Parameters
    ----------
    path : str
    first, last : nn.Module
    evidence : str
    members : tuple of nn.Module
        What it is made of: `first` alone, or `first` to `last`.
    parts : tuple of str
        Names of the members where each is given the stream and what adds their outputs to it lies outside of them; else ().
    """

    path: str
    first: nn.Module
    last: nn.Module
    evidence: str
    members: tuple[nn.Module, ...] = ()
    parts: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its parameters, shared ones once."""
        held = {id(p): p for module in self.members or (self.first,) for p in module.parameters()}
        return sum(nbytes_of(p) for p in held.values())


@dataclass(frozen=True, slots=True)
class _List:
    path: str
    module: nn.Module
    row: bool | None  # its items run one after the other; None: not known
    owner: nn.Module  # the module that holds it

    @property
    def items(self) -> list[tuple[str, nn.Module]]:
        return [(n, c) for n, c in self.module.named_children() if size_of(c) > 0]

    @property
    def composite(self) -> bool:
        """Some item has several weight matrices: it is more than a plain layer."""
        return any(matrices(c) > 1 for _, c in self.items)


def size_of(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters()) + sum(_packed(m) for m in module.modules())


def _packed(module: nn.Module) -> int:
    """Weights that torch's quantisation packed into something that is no parameter."""
    held = vars(module)
    return held.get("in_features", 0) * held.get("out_features", 0) if hasattr(module, "_packed_params") else 0


def matrices(module: nn.Module) -> int:
    """Modules below (and itself) that hold weights of two dimensions or more; look-up tables are none."""
    return sum(
        not isinstance(m, nn.Embedding) and (_packed(m) > 0 or any(p.dim() > 1 for p in m.parameters(recurse=False)))
        for m in module.modules()
    )


def find_blocks(model: nn.Module) -> list[Block]:
    """Blocks in the order of their definition; empty when nothing in the model has parameters."""
    total = size_of(model)
    if total == 0:
        return []
    lists = [_List("", model, True, model)] if _is_list(model) else list(_outermost("", model, ()))
    chosen = [one for one in lists if one.row is not False]
    bodies = [one for one in chosen if one.composite and (_several(one) or size_of(one.module) >= SHARE * total)]
    classes = {type(c) for one in bodies for _, c in one.items}
    bodies += [one for one in chosen if one not in bodies and classes & {type(c) for _, c in one.items}]
    bodies += _plain_lists([one for one in chosen if one not in bodies], (HEAD if bodies else SHARE) * total)
    if not bodies:
        beside = [one for one in lists if one.row is False and size_of(one.module) >= HEAD * total]
        return _branches(beside) if beside else _children(model)
    paths = {one.path: one for one in bodies}
    return [b for path, item in _in_order(model, paths) for b in (_expand(paths[path]) if item is None else [item])]


def _several(one: _List) -> bool:
    """More items than one, or one that is a layer or holds one: something in it has an attention and an MLP."""
    return len(one.items) > 1 or any(holds_both(module) for module in one.module.modules())


def _plain_lists(lists: list[_List], least: float) -> list[_List]:
    """Lists of plain layers that are the body of what holds them, and not one part of a block beside others."""
    plain = [one for one in lists if not one.composite and len(one.items) > 1]
    held = Counter[int]()
    for one in plain:
        held[id(one.owner)] += matrices(one.module)
    return [one for one in plain if size_of(one.module) >= least and held[id(one.owner)] > MOST * matrices(one.owner)]


def _is_list(module: nn.Module) -> bool:
    if isinstance(module, ParametrizationList):
        return False
    if isinstance(module, nn.ModuleDict):
        kinds = {type(c) for c in module.children()}
        return len(kinds) == 1 < len(module) and all(matrices(c) > 1 for c in module.children())
    return isinstance(module, nn.ModuleList) or _is_sequence(module)


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _outermost(path: str, module: nn.Module, owners: tuple[nn.Module, ...]) -> Iterator[_List]:
    """The lists below a module that lie in no other list; lists whose items run side by side are looked into as well."""
    owners = (module, *owners)
    for name, child in module.named_children():
        at = _join(path, name)
        if _NOT_A_BODY.search(name) or isinstance(child, ParametrizationList) or matrices(child) == 0:
            continue
        if not _is_list(child):
            yield from _outermost(at, child, owners)
            continue
        row = True if _is_sequence(child) else _row(owners, name)
        inner = (
            []
            if row is not False
            else [x for n, c in child.named_children() for x in _outermost(_join(at, n), c, owners)]
        )
        yield from inner or [_List(at, child, row, module)]


def _row(owners: tuple[nn.Module, ...], name: str) -> bool | None:
    """What the nearest class whose code uses a list says of it."""
    return next((answer for owner in owners if (answer := in_a_row(owner, name)) is not None), None)


def _in_order(model: nn.Module, bodies: dict[str, _List]) -> Iterator[tuple[str, Block | None]]:
    """Paths of the bodies in order of definition, and blocks that stand alone beside them (the middle of a U-Net)."""
    kinds = {type(c) for one in bodies.values() for _, c in one.items}
    many = Counter(path.rpartition(".")[0] for path in bodies)
    conv = max(p.dim() for one in bodies.values() for p in one.module.parameters()) > 2
    for path, module in model.named_modules():
        if path in bodies:
            yield path, None
        parent = path.rpartition(".")[0]
        inside = any(path.startswith(f"{p}.") or f"{p}.".startswith(f"{path}.") or not p for p in bodies)
        if inside or not path or parent not in many or _is_list(module):
            continue
        level = many[parent] > 1 and conv and matrices(module) > 1 and any(p.dim() > 2 for p in module.parameters())
        # one plain layer beside a list is a head
        alike = type(module) in kinds and next(module.children(), None) is not None
        if alike or level:
            yield path, Block(path, module, module, "beside lists of blocks")


# ---------------------------------------------------------------------- a list to its blocks


def _expand(one: _List) -> list[Block]:
    word = type(one.module).__name__
    return _flat(one.path, one.module, f"item of {word} {one.path!r}")


def _flat(path: str, module: nn.Module, evidence: str) -> list[Block]:
    """Blocks of a list: norms and activations join the layer before them, a norm at the beginning the layer after it."""
    blocks: list[Block] = []
    waiting: list[nn.Module] = []
    open_ = False
    for name, child in module.named_children():
        if matrices(child):
            found = _blocks_of(_join(path, name), child, evidence)
            if waiting and len(found) == 1 and not found[0].parts:
                found = [replace(found[0], first=waiting[0], members=(*waiting, *found[0].members))]
            waiting, open_ = [], bool(found)
            blocks += found
        elif isinstance(child, nn.Flatten | nn.Unflatten):
            open_ = False
        elif open_ and not waiting and _joins(module, blocks[-1], child):
            blocks[-1] = replace(blocks[-1], last=child, members=(*blocks[-1].members, child))
        elif size_of(child) > 0 and not blocks:
            waiting.append(child)
    return blocks


def _joins(module: nn.Module, before: Block, child: nn.Module) -> bool:
    """Whether `child` is sure to run right after the block before it."""
    return not before.parts and (_is_sequence(module) or size_of(child) > 0)


def _blocks_of(path: str, item: nn.Module, evidence: str) -> list[Block]:
    """An item of a list: a block, or a stage that holds several."""
    if _is_sequence(item) and matrices(item) > 1:
        return _flat(path, item, f"item of {type(item).__name__} {path!r}")
    if type(item) is nn.ModuleList:
        parts = [(n, c) for n, c in item.named_children() if matrices(c)]
        if len(parts) > 1 and not _repeated([c for _, c in parts]):
            members = tuple(c for _, c in parts)
            return [Block(path, members[0], members[-1], evidence, members, tuple(n for n, _ in parts))]
        return _flat(path, item, f"item of ModuleList {path!r}")
    return list(_levels(path, item)) if _is_stage(item) else [Block(path, item, item, evidence, (item,))]


def _is_stage(item: nn.Module) -> bool:
    """Most of its weights are in lists of like blocks that run in a row."""
    held = sum(matrices(one.module) for one in _stage_lists(item))
    return held > MOST * matrices(item)


def _stage_lists(item: nn.Module) -> list[_List]:
    return [
        one
        for one in _outermost("", item, ())
        if one.row and _alike([c for _, c in one.items if matrices(c)], composite=True)
    ]


def _alike(items: list[nn.Module], *, composite: bool = False) -> bool:
    """Most are of one class (and more than a plain layer): a stack, and not the parts of one block."""
    counted = Counter(type(c) for c in items if not composite or matrices(c) > 1)
    return 2 * max(counted.values(), default=0) > len(items)


def _repeated(items: list[nn.Module]) -> bool:
    """Most hold weights under the same names: a stack, and not an attention beside an MLP, whatever their classes."""
    held = [{name for name, _ in item.named_parameters()} for item in items]
    like = sum(2 * len(names & held[0]) >= len(names | held[0]) for names in held)
    return 2 * like > len(items)


def _levels(path: str, stage: nn.Module) -> Iterator[Block]:
    """Blocks in a stage, and the modules between them that hold weights (what changes the resolution)."""
    for name, child in stage.named_children():
        at = _join(path, name)
        if _NOT_A_BODY.search(name) or matrices(child) == 0:
            continue
        if _is_list(child):
            yield from _flat(at, child, f"item of {type(child).__name__} {at!r}")
        elif _stage_lists(child):
            yield from _levels(at, child)
        elif any(True for _ in child.children()):
            yield Block(at, child, child, f"in stage {path!r}", (child,))


# ---------------------------------------------------------------------- models without a list


def _branches(lists: list[_List]) -> list[Block]:
    return [
        replace(block, evidence=f"branch of {one.path!r}")
        for one in lists
        for name, child in one.items
        for block in _blocks_of(_join(one.path, name), child, "")
    ]


def _children(model: nn.Module) -> list[Block]:
    """The parametric children of the first module that has more than one; the model itself when there is none."""
    path, module = "", model
    while not isinstance(module, nn.TransformerEncoderLayer):  # one kernel: nothing in it is called
        children = [(n, c) for n, c in module.named_children() if matrices(c)]
        if len(children) != 1 or not any(True for _ in children[0][1].children()):
            break
        path, module = _join(path, children[0][0]), children[0][1]
    else:
        children = []
    if len(children) < 2:
        return [Block(path, module, module, "the only module with parameters", (module,))]
    return [
        block for name, child in children for block in _blocks_of(_join(path, name), child, "child with parameters")
    ]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
