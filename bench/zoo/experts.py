"""Which modules hold experts, told by what they own: an independent count for the routers a capture should find."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

_EXPERTS = re.compile(r"experts?$", re.IGNORECASE)
_COUNT = re.compile(r"num_experts$")
_SHARED = re.compile(r"shared", re.IGNORECASE)


def experts_that_ran(model: nn.Module, ran: Mapping[str, int]) -> list[str]:
    """Paths of the modules that own experts (several sets of weights of one kind) and ran; the experts' owner, not each expert.

    Parameters
    ----------
    model : nn.Module
    ran : mapping
        Calls of each path in one forward.
    """
    homes: dict[str, None] = {}
    for path, module in model.named_modules():
        owner = path.rpartition(".")[0]
        if _holds(path, module) and any(ran.get(p, 0) for p in (path, owner)):
            homes[owner] = None
    return [h for h in homes if not any(h.startswith(f"{o}.") for o in homes if o != h and o)]


def _holds(path: str, module: nn.Module) -> bool:
    if _flat(module):
        return True
    name, cls = path.rpartition(".")[2], type(module).__name__
    if not (_EXPERTS.search(name) or _EXPERTS.search(cls)) or _SHARED.search(name):
        return False
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        items = [m for m in module.children() if next(m.parameters(), None) is not None]
        return len(items) > 1 and len({type(m) for m in items}) == 1
    return any(p.dim() == 3 and p.shape[0] > 1 for p in module.parameters(recurse=False))


def _flat(module: nn.Module) -> bool:
    """Says how many experts it has, and holds them in the rows of matrices: some rows each, or one row of an embedding."""
    count = next((v for n, v in vars(module).items() if _COUNT.search(n) and isinstance(v, int) and v > 1), 0)
    own = [p.shape[0] for p in module.parameters(recurse=False) if p.dim() == 2]
    rows = [c.num_embeddings for c in module.children() if isinstance(c, nn.Embedding)]
    return count > 1 and (sum(r > count and r % count == 0 for r in own) > 1 or rows.count(count) > 1)
