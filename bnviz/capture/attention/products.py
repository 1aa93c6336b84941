"""Products of two tensors, by whatever name: which axes they share, which they sum over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bnviz.capture.values import version


@dataclass(frozen=True, slots=True)
class Product:
    """One product of two tensors, with a label for every axis, as in an einsum.

    Parameters
    ----------
    left, right : Tensor
    of_left, of_right, of_output : tuple of str
        Labels; those of the output are in its order, the others are summed over.
    scale : float
        What the product is multiplied by before anything is added (`alpha` of baddbmm).
    versions : tuple of int
        Of the operands when they were multiplied; a later in-place change shows.
    """

    left: Tensor
    right: Tensor
    of_left: tuple[str, ...]
    of_right: tuple[str, ...]
    of_output: tuple[str, ...]
    scale: float = 1.0
    versions: tuple[int, int] = (0, 0)


def product(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    """The product that a call of the torch function `name` is; None for what is none, or not of two tensors."""
    reader = _READERS.get(name)
    found = None if reader is None else reader(args, kwargs)
    return None if found is None else replace(found, versions=(version(found.left), version(found.right)))


def _matmul(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    operands = (*args, *(kwargs[name] for name in ("input", "self", "other", "mat2") if name in kwargs))
    return _of_matrices(*operands[:2]) if len(operands) >= 2 else None


def _reflected(args: tuple[Any, ...], _: Mapping[str, Any]) -> Product | None:
    return _of_matrices(args[1], args[0])


def _baddbmm(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
    given = dict(zip(("input", "batch1", "batch2"), args, strict=False)) | dict(kwargs)
    alpha = given.get("alpha", 1)
    return _of_matrices(given.get("batch1"), given.get("batch2"), alpha if isinstance(alpha, int | float) else 1.0)


def _of_matrices(left: Any, right: Any, scale: float = 1.0) -> Product | None:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)) or min(left.dim(), right.dim()) < 2:
        return None
    batch = max(left.dim(), right.dim()) - 2
    shared = tuple(f"batch{n}" for n in range(batch))
    of_left = (*shared[batch - (left.dim() - 2) :], "row", "inner")
    of_right = (*shared[batch - (right.dim() - 2) :], "inner", "column")
    return Product(left, right, of_left, of_right, (*shared, "row", "column"), scale)


def _einsum(args: tuple[Any, ...], _: Mapping[str, Any]) -> Product | None:
    if len(args) < 2 or not isinstance(args[0], str):
        return None
    operands = args[1] if isinstance(args[1], list | tuple) else args[1:]
    equation = args[0].replace(" ", "")
    terms, arrow, output = equation.partition("->")
    sides = terms.split(",")
    if len(sides) != 2 or len(operands) != 2 or not all(isinstance(o, Tensor) for o in operands):
        return None
    dots = max(o.dim() - len(s.replace("...", "")) if "..." in s else 0 for s, o in zip(sides, operands, strict=True))
    spread = [_labels(s, o.dim(), dots) for s, o in zip(sides, operands, strict=True)]
    if not arrow:
        once = sorted({c for c in terms if c.isalpha() and terms.count(c) == 1})
        output = ("..." if dots else "") + "".join(once)
    out = _labels(output, len(output.replace("...", "")) + (dots if "..." in output else 0), dots)
    if any(len(set(labels)) != len(labels) for labels in (*spread, out)):
        return None
    return Product(operands[0], operands[1], spread[0], spread[1], out)


def _labels(term: str, dim: int, dots: int) -> tuple[str, ...]:
    """A term's labels, an ellipsis spelled out; aligned from the right, as torch does."""
    before, ellipsis, after = term.partition("...")
    if not ellipsis:
        return tuple(term)
    many = dim - len(before) - len(after)
    return (*before, *(f"batch{n}" for n in range(dots - many, dots)), *after)


_Reader = Callable[[tuple[Any, ...], Mapping[str, Any]], Product | None]
_READERS: dict[str, _Reader] = {
    **dict.fromkeys(("matmul", "linalg_matmul", "bmm", "mm", "__matmul__"), _matmul),
    "__rmatmul__": _reflected,
    "baddbmm": _baddbmm,
    "baddbmm_": _baddbmm,
    "einsum": _einsum,
}
