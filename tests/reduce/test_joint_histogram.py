"""Counts of codes and labels against counting them one by one, and the information that is read from them."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score

from bnviz.errors import SchemaError
from bnviz.reduce.bin_indices import bin_indices
from bnviz.reduce.joint_histogram import joint_histogram


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 33]),
    features=st.sampled_from([0, 1, 5]),
    bins=st.sampled_from([1, 3, 120]),
    classes=st.sampled_from([1, 4]),
    dtype=st.sampled_from(["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_counting(rows: int, features: int, bins: int, classes: int, dtype: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    codes = draw.integers(0, bins, (features, rows)).astype(dtype).T
    labels = draw.integers(0, classes, rows).astype(dtype)
    want = np.zeros((features, bins, classes), np.int64)
    for row, label in zip(codes.tolist(), labels.tolist(), strict=True):
        for feature, code in enumerate(row):
            want[feature, code, label] += 1
    got = joint_histogram(codes, labels, bins=bins, classes=classes)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, want)
    of_tensors = joint_histogram(torch.from_numpy(codes), torch.from_numpy(labels), bins=bins, classes=classes)
    assert torch.equal(of_tensors, torch.from_numpy(want))


@pytest.mark.parametrize("classes", [3, 600])  # tables of several features in a block, and of one
def test_parts_of_the_rows_add_up_to_the_whole(classes: int) -> None:
    draw = np.random.default_rng(0)
    codes, labels = draw.integers(0, 32, (3000, 40), np.uint8), draw.integers(0, classes, 3000)
    whole = joint_histogram(codes, labels, bins=32, classes=classes)
    parts = [joint_histogram(codes[at], labels[at], bins=32, classes=classes) for at in (slice(0, 7), slice(7, None))]
    np.testing.assert_array_equal(parts[0] + parts[1], whole)
    assert (whole.sum((1, 2)) == 3000).all()
    np.testing.assert_array_equal(whole.sum(1), np.tile(np.bincount(labels, minlength=classes), (40, 1)))
    for feature in (0, 39):
        np.testing.assert_array_equal(whole[feature].sum(1), np.bincount(codes[:, feature], minlength=32))


def test_information_of_each_feature_is_that_of_scikit_learn() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 500)
    x = draw.normal(size=(500, 4)) + labels[:, None] * np.array([0.0, 0.5, 1.0, 5.0])
    index = bin_indices(x, bins=10, low=-3.0, high=12.0).index
    share = joint_histogram(index, labels, bins=12, classes=3) / 500

    def entropy(p: np.ndarray) -> np.ndarray:
        return -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).reshape(4, -1).sum(1)

    nats = entropy(share.sum(2)) + entropy(share.sum(1)) - entropy(share)
    want = [mutual_info_score(labels, index[:, feature]) for feature in range(4)]
    np.testing.assert_allclose(nats, want, atol=1e-12)


def test_what_runs_on_a_device_gives_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    codes, labels = torch.randint(0, 9, (70, 6), generator=generator), torch.randint(0, 4, (70,), generator=generator)
    there = importlib.import_module("bnviz.reduce.joint_histogram")._there(codes.int(), labels, 9, 4)
    assert torch.equal(there, joint_histogram(codes, labels, bins=9, classes=4))


def test_blocks_of_rows_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    codes, labels = draw.integers(0, 5, (200, 3)), draw.integers(0, 2, 200)
    want = joint_histogram(codes, labels, bins=5, classes=2)
    module = importlib.import_module("bnviz.reduce.joint_histogram")
    monkeypatch.setattr(module, "PAIRS", 20)
    monkeypatch.setattr(module, "CELLS", 20)
    np.testing.assert_array_equal(joint_histogram(codes, labels, bins=5, classes=2), want)


@pytest.mark.parametrize(
    ("codes", "labels", "bins", "classes", "message"),
    [
        (np.zeros((2, 1)), np.zeros(2, int), 2, 2, "codes are float64, expected integers; bin_indices makes them"),
        (np.zeros((2, 1), int), np.full(2, np.nan), 2, 2, "labels are float64, expected integers"),
        (np.zeros((2, 1), int), np.zeros(3, int), 2, 2, r"found \(2, 1\) and \(3,\)"),
        (np.zeros((2, 1), int), np.zeros(2, int), 0, 2, "bins is 0 and classes 2"),
        (np.full((2, 1), 5), np.zeros(2, int), 5, 2, "codes lie between 5 and 5, expected 0 to 4"),
        (np.zeros((2, 1), int), np.array([0, -1]), 5, 2, "labels lie between -1 and 0, expected 0 to 1"),
    ],
)
def test_refuses(codes: np.ndarray, labels: np.ndarray, bins: int, classes: int, message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        joint_histogram(codes, labels, bins=bins, classes=classes)
