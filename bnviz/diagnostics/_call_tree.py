"""Sums over a calling-context tree: what a function, a line or a chain of calls took, with and without what it called."""

from __future__ import annotations

import numpy as np


def subtree(parent: np.ndarray, own: np.ndarray) -> np.ndarray:
    """`own` of every row and of all rows below it; `parent` comes before its children, -1 for a root.

    Examples
    --------
    >>> subtree(np.array([-1, 0, 1, 0]), np.array([1, 2, 4, 8])).tolist()
    [15, 6, 4, 8]
    """
    whole = np.asarray(own, np.int64).copy()
    for row in range(len(parent) - 1, -1, -1):
        if parent[row] >= 0:
            whole[parent[row]] += whole[row]
    return whole


def outermost(parent: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Which rows have no row of their own group above them: a recursive function counts once.

    Examples
    --------
    >>> outermost(np.array([-1, 0, 1]), np.array([5, 7, 5])).tolist()
    [True, True, False]
    """
    first = np.ones(len(parent), bool)
    above: list[frozenset[int]] = []
    for row in range(len(parent)):
        over = above[parent[row]] if parent[row] >= 0 else frozenset()
        first[row] = int(group[row]) not in over
        above.append(over | {int(group[row])})
    return first


def inclusive(parent: np.ndarray, group: np.ndarray, own: np.ndarray, groups: int) -> np.ndarray:
    """Sum of `own` over all rows that lie in or below a row of the group, each row once a group.

    Examples
    --------
    >>> inclusive(np.array([-1, 0, 1]), np.array([0, 1, 0]), np.array([1, 2, 4]), 2).tolist()
    [7.0, 6.0]
    """
    first = outermost(parent, group)
    return np.bincount(group[first], subtree(parent, own)[first], minlength=groups)


def merged(
    parent: np.ndarray, group: np.ndarray, root: np.ndarray, own: np.ndarray, fold: np.ndarray
) -> tuple[np.ndarray, ...]:
    """The tree with siblings of one group made one row, and rows of `fold (event,)` taken into their caller.

    Returns
    -------
    parent, group, root, own : arrays
        Of the merged rows, callers before callees.

    Examples
    --------
    >>> tree = merged(np.array([-1, 0, 1, 0]), np.array([0, 9, 2, 2]), np.zeros(4, int), np.array([1, 2, 4, 8]),
    ...               np.array([False, True, False, False]))
    >>> [column.tolist() for column in tree]
    [[-1, 0], [0, 2], [0, 0], [3, 12]]
    """
    rows: dict[tuple[int, int, int], int] = {}
    place: list[int] = []
    sums: list[int] = []
    for at in range(len(parent)):
        above = place[parent[at]] if parent[at] >= 0 else -1
        if fold[at] and above >= 0:
            sums[above] += int(own[at])
            place.append(above)
            continue
        row = rows.setdefault((above, int(group[at]), int(root[at])), len(rows))
        if row == len(sums):
            sums.append(0)
        sums[row] += int(own[at])
        place.append(row)
    keys = np.array(list(rows), np.int64).reshape(-1, 3)
    return keys[:, 0], keys[:, 1], keys[:, 2], np.array(sums, np.int64)
