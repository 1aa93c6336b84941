"""Words of chunks are those of the whole, and hold every bin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce._refine import refined
from bnviz.reduce.bin_indices import bin_indices
from bnviz.reduce.binned_codes import binned_codes
from bnviz.reduce.binned_words import binned_words, word_codes


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    features=st.integers(0, 40),
    bins=st.sampled_from([1, 2, 30, 1000, 2**20]),
    cut=st.integers(0, 60),
    seed=st.integers(0, 10**6),
)
def test_words_of_chunks_give_the_codes_of_the_whole(rows: int, features: int, bins: int, cut: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(rows, features)).astype(np.float32)[draw.integers(0, rows, rows)]
    edges = {"bins": bins, "low": -1.0, "high": 1.0}
    chunks = [binned_words(part, **edges) for part in (x[:cut], x[cut:]) if len(part)]
    code, cells = word_codes(np.concatenate([chunk.word for chunk in chunks]))
    whole = binned_codes(x, **edges)
    assert code.tolist() == whole.code.tolist()
    assert (cells, sum(chunk.outside for chunk in chunks)) == (whole.cells, whole.outside)


@pytest.mark.parametrize("bins", [1, 30, 2**20])
def test_every_bin_can_be_read_back(bins: int) -> None:
    x = np.random.default_rng(0).normal(size=(20, 50))
    index = bin_indices(x, bins=bins, low=-1.0, high=1.0).index
    word, radix = binned_words(x, bins=bins, low=-1.0, high=1.0).word, bins + 2
    digits = max(count for count in range(1, 63) if radix**count < 1 << 63)
    back = []
    for number in range(word.shape[1]):
        rest, some = word[:, number].copy(), []
        for _ in range(min(digits, 50 - number * digits)):
            some.append(rest % radix)
            rest //= radix
        assert not rest.any()
        back += some[::-1]
    np.testing.assert_array_equal(np.stack(back, 1), index)


def test_no_word_is_negative_at_the_greatest_bin() -> None:
    for bins in (1, 2, 6, 14, 30, 62, 2**20):
        assert binned_words(np.full((1, 80), 9.0), bins=bins, low=0.0, high=1.0).word.min() > 0


def test_ranks_of_words_that_take_all_63_bits() -> None:
    """The oracle: rows as they are, sorted by numpy. The same words are ranked as arrays, tensors, and on a device."""
    draw = np.random.default_rng(0)
    word = draw.integers(0, 2**63 - 1, (9, 4))[draw.integers(0, 9, 70)]
    word[:, :2] = word[0, :2]
    word[::3, 3] = 2**63 - 1
    distinct, oracle = np.unique(word, axis=0, return_inverse=True)
    there = torch.from_numpy(word)
    on_device = refined(70, 4, lambda number, rows: there[rows, number], torch.device("cpu"))
    for code, cells in (word_codes(word), word_codes(there), on_device):
        assert code.tolist() == oracle.reshape(-1).tolist()
        assert cells == len(distinct)


def test_refuses() -> None:
    for word in (np.zeros((2, 2)), np.zeros(2, np.int64), np.zeros((0, 2), np.int64)):
        with pytest.raises(SchemaError, match="word_codes expects int64 words"):
            word_codes(word)
    with pytest.raises(SchemaError, match="binned_words: x holds NaN or infinity"):
        binned_words(np.array([[np.nan]]), bins=2, low=0.0, high=1.0)
