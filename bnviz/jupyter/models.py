"""Which model a magic means: the one that is named, else the only one there is; and which runs there are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from IPython.core.error import UsageError


def candidates(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Models a person may mean, by the first name each has.

    Names that begin with an underscore are IPython's own or meant to be private. A module that is part of another one there
    (`block = model.layers[0]`) is not a model by itself, and neither is one without parameters (a loss) when others have some.

    Parameters
    ----------
    namespace : mapping
        Names of the user.

    Returns
    -------
    dict
        Name to `torch.nn.Module`; empty while torch is not imported, as then nothing can be one.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    found: dict[int, tuple[str, Any]] = {}
    for name, value in list(namespace.items()):
        if not name.startswith("_") and isinstance(value, torch.nn.Module):
            found.setdefault(id(value), (name, value))
    parts = {id(part) for _, module in found.values() for part in module.modules() if part is not module}
    outer = {name: module for key, (name, module) in found.items() if key not in parts}
    trained = {name: module for name, module in outer.items() if next(module.parameters(), None) is not None}
    return trained or outer


def runs(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Runs among the names of the user, by name; empty while nothing has made one."""
    kind = getattr(sys.modules.get("bnviz.run"), "Run", ())
    return {n: value for n, value in list(namespace.items()) if not n.startswith("_") and isinstance(value, kind)}


def named(shell: Any, expression: str) -> Any:
    """The module that `expression` gives in the user's namespace.

    Raises
    ------
    UsageError
        It cannot be evaluated or is no module; says which models there are.
    """
    torch = sys.modules.get("torch")
    try:
        value = shell.ev(expression)
    except Exception as error:
        raise UsageError(f"{expression}: {type(error).__name__}: {error}. {_choices(shell)}") from None
    if torch is None or not isinstance(value, torch.nn.Module):
        raise UsageError(f"{expression} is a {type(value).__name__}, expected a torch.nn.Module. {_choices(shell)}")
    return value


def only(shell: Any) -> Any:
    """The one model in the user's namespace.

    Raises
    ------
    UsageError
        There is none, or there are several; says which.
    """
    found = candidates(shell.user_ns)
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise UsageError(f"Which model? Name one of: {', '.join(sorted(found))}.")
    raise UsageError("No model to watch: no variable is a torch.nn.Module. Make one, or name it: %%bnviz MODEL.")


def _choices(shell: Any) -> str:
    found = sorted(candidates(shell.user_ns))
    return f"Models here: {', '.join(found)}." if found else "There is no torch.nn.Module among the variables."
