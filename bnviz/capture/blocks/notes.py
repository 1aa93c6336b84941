"""Sentences about blocks whose parts are not seen, a sentence for each reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def sentences(unsolved: Iterable[tuple[str, str]], blocks: int) -> list[str]:
    """What the notes of a run say.

    Parameters
    ----------
    unsolved : iterable of (str, str)
        Class and reason of each block without verified writers; "" is no reason to say anything.
    blocks : int
        All blocks.

    Examples
    --------
    >>> sentences([("BertLayer", "add what is no sum")] * 2, 3)
    ['activations: attention and MLP are not shown apart in 2 of 3 blocks (BertLayer): they add what is no sum.']
    """
    counted = Counter((reason, name) for name, reason in unsolved if reason)
    said = []
    for reason in dict.fromkeys(reason for reason, _ in counted):
        names = [name for known, name in counted if known == reason]
        many = sum(counted[reason, name] for name in names)
        some = ", ".join(dict.fromkeys(names))
        said.append(
            f"activations: attention and MLP are not shown apart in {many} of {blocks} blocks ({some}): they {reason}."
        )
    return said
