"""Where the blocks of a model are, by structure: no model is known by name.

A block list is the outermost `ModuleList` or `Sequential` that holds a good share of the parameters. In a flat `Sequential` a
block is a module with parameters and the parameterless ones (activations, pooling) that follow it. A model without such a list
has its own parametric children as blocks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

SHARE = 0.05  # of the parameters: below it a list is a detail (a head, a stem), not the body
_NOT_A_BODY = re.compile(r"expert", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Block:
    """One block: `first` sees the input, `last` gives the output; they are the same module but in a flat Sequential."""

    path: str
    first: nn.Module
    last: nn.Module
    evidence: str


def size_of(module: nn.Module) -> int:
    """Parameters of a module, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def find_blocks(model: nn.Module) -> list[Block]:
    """Blocks in order; empty when nothing in the model has parameters."""
    total = size_of(model)
    if total == 0:
        return []
    found: list[Block] = []
    taken: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or _NOT_A_BODY.search(path):
            continue
        if any(path.startswith(f"{t}.") or t == "" for t in taken):
            continue
        children = [(n, c) for n, c in module.named_children() if c is not None]
        if sum(size_of(c) > 0 for _, c in children) < 2 or size_of(module) < SHARE * total:
            continue
        taken.append(path)
        found += _flat(path, children) if isinstance(module, nn.Sequential) else _listed(path, children)
    return found or _children(model)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _listed(path: str, children: list[tuple[str, nn.Module]]) -> list[Block]:
    return [Block(_join(path, n), c, c, f"item of ModuleList {path!r}") for n, c in children]


def _flat(path: str, children: list[tuple[str, nn.Module]]) -> list[Block]:
    blocks: list[Block] = []
    for name, child in children:
        if size_of(child) > 0:
            blocks.append(Block(_join(path, name), child, child, f"item of Sequential {path!r}"))
        elif blocks:
            blocks[-1] = Block(blocks[-1].path, blocks[-1].first, child, blocks[-1].evidence)
    return blocks


def _children(model: nn.Module) -> list[Block]:
    """The parametric children of the first module that has more than one; the model itself when there is none."""
    path, module = "", model
    while not isinstance(module, nn.TransformerEncoderLayer):  # one kernel: nothing in it is called
        children = [(n, c) for n, c in module.named_children() if size_of(c) > 0]
        if len(children) != 1 or not any(True for _ in children[0][1].children()):
            break
        path, module = _join(path, children[0][0]), children[0][1]
    else:
        children = []
    if len(children) < 2:
        return [Block(path, module, module, "the only module with parameters")]
    return [Block(_join(path, n), c, c, "child with parameters") for n, c in children]
