"""Where the axes of a tensor came from: followed through views, permutations and slices by shapes alone.

A layout says, for each axis of a tensor, which parts of the axes of an earlier tensor (the root) it runs over. With it the root,
or anything else in a known layout, is brought into another layout by one reshape and one permutation: no value is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Atom:
    """A part of one axis of the root: `size` of its `whole` indices, each `stride` apart.

    Parameters
    ----------
    axis : int
        Of the root.
    stride : int
        Steps on that axis between two indices.
    whole : int
        Indices before anything was cut off.
    start, size : int
        Which of them are left.
    """

    axis: int
    stride: int
    whole: int
    start: int
    size: int

    @property
    def uncut(self) -> Atom:
        """The same part with nothing cut off."""
        return Atom(self.axis, self.stride, self.whole, 0, self.whole)


Axis = tuple[Atom, ...]
Layout = tuple[Axis, ...]


def root(shape: Sequence[int], axes: Sequence[int] | None = None) -> Layout:
    """The layout of the root itself; `axes` numbers its axes. An axis of size 1 carries nothing.

    Examples
    --------
    >>> [len(axis) for axis in root((2, 1, 3))]
    [1, 0, 1]
    """
    numbers = range(len(shape)) if axes is None else axes
    return tuple((Atom(n, 1, size, 0, size),) if size != 1 else () for n, size in zip(numbers, shape, strict=True))


def extent(axis: Iterable[Atom]) -> int:
    """Size of an axis, or of several together."""
    size = 1
    for atom in axis:
        size *= atom.size
    return size


def reshaped(layout: Layout, shape: Sequence[int]) -> Layout | None:
    """The layout after `view`, `reshape`, `flatten`, ...; None when the new axes do not fall on whole parts.

    Examples
    --------
    >>> merged = reshaped(root((2, 3, 4)), (6, 4))
    >>> [extent(axis) for axis in merged], [extent(axis) for axis in reshaped(merged, (2, 3, 4))]
    ([6, 4], [2, 3, 4])
    >>> reshaped(root((2, 3)), (3, 2)) is None
    True
    """
    atoms = tuple(chain.from_iterable(layout))
    axes: list[Axis] = []
    for wanted in shape:
        found = split(atoms, wanted)
        if found is None:
            return None
        taken, atoms = found
        axes.append(taken)
    return None if atoms else tuple(axes)


def split(axis: Axis, size: int) -> tuple[Axis, Axis] | None:
    """The first parts of an axis, `size` together, and the rest; None when `size` does not fall on whole parts.

    Examples
    --------
    >>> six = root((6,))[0]
    >>> [extent(part) for part in split(six, 2)], split(six, 4)
    ([2, 3], None)
    """
    atoms, taken = list(axis), list[Atom]()
    while size > 1 or (atoms and atoms[0].size == 1):
        if not atoms:
            return None
        atom = atoms.pop(0)
        if size % atom.size == 0:
            taken.append(atom)
            size //= atom.size
        elif atom.size % size == 0 and atom.size == atom.whole:
            inner = atom.size // size
            taken.append(Atom(atom.axis, atom.stride * inner, size, 0, size))
            atoms.insert(0, Atom(atom.axis, atom.stride, inner, 0, inner))
            size = 1
        else:
            return None
    return tuple(taken), tuple(atoms)


def cut(axis: Axis, start: int, stop: int) -> Axis | None:
    """An axis of which [start, stop) is left; None when it is made of several parts."""
    size = extent(axis)
    if (start, stop) == (0, size):
        return axis
    if len(axis) != 1 or not 0 <= start < stop <= size:
        return None
    return (replace(axis[0], start=axis[0].start + start, size=stop - start),)


def arranged(tensor: Tensor, layout: Layout, target: Layout) -> Tensor | None:
    """`tensor`, which lies in `layout`, brought into `target`; a view where that is possible.

    None when the target asks for parts that the tensor does not have, or leaves some out.
    """
    wanted = list(chain.from_iterable(target))
    parts: list[Atom] = []  # of the tensor, in its order, as fine as the target needs them
    sizes: list[int] = []
    for axis, size in zip(layout, tensor.shape, strict=True):
        fine = [finer for atom in axis for finer in _split(atom, wanted)]
        if extent(fine) != size:
            return None
        parts += fine
        sizes += [f.size for f in fine]
    if sorted(map(_key, parts)) != sorted(map(_key, wanted)):
        return None
    found = {_key(part): place for place, part in enumerate(parts)}
    tensor = tensor.reshape(sizes).permute([found[_key(atom)] for atom in wanted])
    for place, atom in enumerate(wanted):
        have = parts[found[_key(atom)]]
        if (have.start, have.size) != (atom.start, atom.size):
            if not have.start <= atom.start < atom.start + atom.size <= have.start + have.size:
                return None
            tensor = tensor.narrow(place, atom.start - have.start, atom.size)
    return tensor.reshape([extent(axis) for axis in target])


def _split(atom: Atom, wanted: Sequence[Atom]) -> list[Atom]:
    """`atom` in the parts that `wanted` has of it, outermost first."""
    inside = [
        w
        for w in wanted
        if w.axis == atom.axis and w.stride >= atom.stride and w.stride * w.whole <= atom.stride * atom.whole
    ]
    if len(inside) == 1 and _key(inside[0]) == _key(atom):
        return [atom]
    return [w.uncut for w in sorted(inside, key=lambda w: -w.stride)]


def _key(atom: Atom) -> tuple[int, int, int]:
    return atom.axis, atom.stride, atom.whole
