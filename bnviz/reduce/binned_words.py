"""Rows of activations to a few 63-bit words each, which hold every feature's bin: what chunks of a data set keep."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bnviz.errors import SchemaError

from . import _dispatch
from ._bins import VALUES, Bins, HostRows, blocks, checked_rows, refuse
from ._given import as_arrays, as_tensor, like
from ._refine import refined

__all__ = ["Words", "binned_words", "word_codes"]


class Words(NamedTuple):
    """What `binned_words` returns.

    Parameters
    ----------
    word : array or Tensor (rows, words) int64
        At least 0. Bins of neighbouring features are digits in base bins + 2, the first feature's the highest.
    outside : int
        Values (not rows) below `low` or above `high`.
    """

    word: Any
    outside: int


def binned_words(x: Any, *, bins: int, low: float, high: float) -> Words:
    """The bins of every row, packed without loss: two rows share all words exactly if they share every bin.

    Words mean the same in every call with the same bins and range, so those of chunks, one after the other, are those of the
    whole: `word_codes` of them joined gives what `binned_codes` gives of all rows. They take 8 bytes for as many features as
    fit into 63 bits (12 of 30 bins), a sixth of float32.

    Parameters
    ----------
    x : array or Tensor (rows, features)
        Finite.
    bins : int
        At least 1, at most 2^20.
    low, high : float
        As in `binned_codes`.

    Returns
    -------
    Words
        On the device of `x`; NumPy for NumPy input.

    Raises
    ------
    SchemaError
        As `binned_codes`.

    Notes
    -----
    word = sum_j bin_j (bins + 2)^(last - j). Exact: bins are made in float64 and added as whole numbers below 2^53. Two reads of
    `x` in blocks of 256 KiB beside the result; on a GPU the Triton twin (`BNVIZ_KERNELS`) makes them in one read and one write.

    Examples
    --------
    >>> binned_words(np.array([[0.1, 0.9], [0.2, 0.8], [7.0, 0.1]]), bins=2, low=0.0, high=1.0).word.tolist()
    [[6], [6], [13]]
    """
    rows, into = checked_rows("binned_words", x), Bins.checked("binned_words", bins, low, high)
    if (there := words_there("binned_words", rows, into)) is not None:
        return Words(*there)
    given = HostRows("binned_words", _host(rows))
    outside = given.outside(into)
    word = np.empty((given.shape[0], into.words(given.shape[1])), np.int64)
    for part in blocks(len(word), given.shape[1], VALUES):
        word[part] = into.packed(given.part(part, slice(None)))
    return Words(like(word, x), outside)


def word_codes(word: Any) -> tuple[Any, int]:
    """Rank of each row among the distinct rows of words, in ascending order (rows,) int64, and how many there are.

    Parameters
    ----------
    word : array or Tensor (rows, words) int64
        At least 0: those of `binned_words`, of any number of calls with the same bins and range, one after the other.

    Raises
    ------
    SchemaError
        Words that are not of that kind.

    Examples
    --------
    >>> word_codes(np.array([[6, 1], [4, 9], [6, 1], [6, 0]]))
    (array([2, 0, 2, 1]), 3)
    """
    if word.ndim != 2 or len(word) == 0 or not str(word.dtype).endswith("int64"):
        raise SchemaError(f"word_codes expects int64 words (rows, words); found {tuple(word.shape)} of {word.dtype}.")
    (rows, words), on_host = word.shape, isinstance(word, np.ndarray) or word.device.type == "cpu"
    table = word.numpy() if on_host and not isinstance(word, np.ndarray) else word
    code, cells = refined(rows, words, lambda number, at: table[at, number], None if on_host else word.device)
    return (like(code, word) if on_host else code), cells


def words_there(what: str, x: Any, bins: Bins) -> tuple[Any, int] | None:
    """Words and values outside where `x` is on a GPU, or the twin is interpreted; None: on the host."""
    found = run_twin("binned_words", x, bins)
    if found is None and (isinstance(x, np.ndarray) or x.device.type in ("cpu", "mps")):
        return None
    if found is None:
        word = bins.packed_there(x)
        found = {
            "word": word,
            "nonfinite": (~x.isfinite()).sum(),
            "outside": ((x.double() < bins.low) | (x.double() > bins.high)).sum(),
        }
    if int(found["nonfinite"]):
        refuse(what)
    return found["word"], int(found["outside"])


def run_twin(function: str, x: Any, bins: Bins) -> dict[str, Any] | None:
    """What the Triton twin makes of it, where it runs; "nonfinite" says of how many values it could not."""
    if _dispatch.plain_here("binned_codes", x):
        return None
    rows = as_tensor(x)
    twin = _dispatch.twin("binned_codes", rows, bins.bins, function=function)
    found: dict[str, Any] | None = _dispatch.tried(
        "binned_codes", twin, rows, bins=bins.bins, low=bins.low, high=bins.high
    )
    return as_arrays(found) if isinstance(x, np.ndarray) else found


def _host(x: Any) -> Any:
    return x if isinstance(x, np.ndarray) else x.cpu()
