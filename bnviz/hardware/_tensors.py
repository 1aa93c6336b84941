"""What rules of work are written with: the arguments of an operator, and the work they add up to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bnviz.profile import Signature

ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Work:
    """What an operator must do at least.

    Parameters
    ----------
    flops : float
        Floating-point operations, a multiply-accumulate being two.
    nbytes : float
        Compulsory traffic: every input read once, every output written once, nothing reused between operators.
    kind : str
        Whose ceiling holds: "matmul", "vector" (sums, products, comparisons), "special" (exp, tanh, ...), "move" (none).
    dtype : str
        In which it computes.
    """

    flops: float
    nbytes: float
    kind: str
    dtype: str


Rule = Callable[["Arguments"], Work | None]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Sizes, strides and dtype of one argument."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def count(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return ITEMSIZE[self.dtype]

    @property
    def nbytes(self) -> int:
        """Distinct bytes: an expanded dimension is stored once."""
        strides = self.strides if len(self.strides) == len(self.shape) else (1,) * len(self.shape)
        return self.item * math.prod(n if s else min(n, 1) for n, s in zip(self.shape, strides, strict=True))


class Arguments:
    """The arguments of one call, by position."""

    __slots__ = ("signature",)

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def __len__(self) -> int:
        return len(self.signature.dtypes)

    def tensor(self, i: int) -> Tensor:
        """The tensor at `i`.

        Raises
        ------
        LookupError
            There is none, or its dtype has no known size.
        """
        found = self.find(i)
        if found is None:
            raise LookupError(f"argument {i} is no tensor of a known dtype")
        return found

    def find(self, i: int) -> Tensor | None:
        """The tensor at `i`, None when there is none (an optional argument left out)."""
        s = self.signature
        if i >= len(s.dtypes) or s.dtypes[i] not in ITEMSIZE or _is_list(s.shapes[i]):
            return None
        return Tensor(s.shapes[i], s.strides[i], s.dtypes[i])

    def tensors(self) -> list[Tensor]:
        """All single tensors, in order."""
        return [t for t in map(self.find, range(len(self))) if t is not None]

    def listed(self, i: int) -> list[Tensor]:
        """The members of a list of tensors at `i`; empty for anything else."""
        s = self.signature
        if i >= len(s.dtypes) or s.dtypes[i] not in ITEMSIZE or not _is_list(s.shapes[i]):
            return []
        return [Tensor(a, b, s.dtypes[i]) for a, b in zip(s.shapes[i], s.strides[i], strict=False)]

    def text(self, i: int) -> str:
        """A number or flag as text; "" for none."""
        return self.signature.values[i] if i < len(self) else ""

    def numbers(self, i: int) -> list[int]:
        """A list of whole numbers, or one as a list of one; empty for none."""
        return [int(float(x)) for x in self.text(i).strip("[]").split(",") if x.strip() and x.strip() != "None"]

    def flag(self, i: int) -> bool:
        """Whether a flag is set."""
        return self.text(i) in ("True", "1", "true")


def _is_list(shape: Any) -> bool:
    return bool(shape) and isinstance(shape[0], tuple)


def widest(tensors: Iterable[Tensor]) -> str:
    """The dtype a mixed operation computes in; a tensor of no dimensions doesn't widen others."""
    some = list(tensors)
    ranked = [t for t in some if t.shape] or some
    if not ranked:
        raise LookupError("no tensor among the arguments")
    return max(ranked, key=lambda t: (t.dtype.startswith(("float", "bfloat", "complex")), t.item)).dtype


def spread(values: list[int], dims: int) -> list[int]:
    """A setting of a convolution for each of `dims` dimensions: one value stands for all."""
    return values * dims if len(values) == 1 else values
