"""What tests of the desk share: a small input, a stand-in for the thread of the cells, and a look at what hangs on a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from IPython.utils.capture import capture_output
from torch import nn

from bnviz.jupyter.desk import Desk

X = torch.ones(2, 5, 8)


class Later:
    """Stands for the thread that runs cells: does what it is given when that is free."""

    def __init__(self) -> None:
        self.acts: list[Callable[[], None]] = []

    def __call__(self, act: Callable[[], None]) -> None:
        self.acts.append(act)

    def free(self) -> None:
        acts, self.acts = self.acts, []
        for act in acts:
            act()


def ran(desk: Desk, source: str) -> Any:
    with capture_output():
        return desk.shell.run_cell(source, store_history=True)


def names(desk: Desk) -> dict[str, Any]:
    variables: dict[str, Any] = desk.shell.user_ns
    return variables


def untouched(model: nn.Module) -> bool:
    """Nothing hangs on any of its modules."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(m, kind) for m in model.modules() for kind in kinds) and not any(
        "forward" in vars(m) for m in model.modules()
    )
