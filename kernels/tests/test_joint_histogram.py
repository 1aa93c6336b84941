"""The Triton twin of joint_histogram against the plain definition: the same counts."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from _twins import DEVICE, asked_of_the_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from bnviz.errors import SchemaError
from bnviz.reduce.joint_histogram import joint_histogram


def twin() -> Any:
    return importlib.import_module("bnviz_kernels.joint_histogram")


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([1, 15, 300]),
    features=st.sampled_from([1, 5, 17]),
    bins=st.sampled_from([1, 2, 32, 100]),
    classes=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]),
    label=st.sampled_from([torch.uint8, torch.int64]),
)
def test_agrees_with_the_plain_definition(
    seed: int, rows: int, features: int, bins: int, classes: int, dtype: torch.dtype, label: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, bins, (rows, features), generator=generator).to(dtype)
    labels = torch.randint(0, classes, (rows,), generator=generator).to(label)
    got = twin().joint_histogram(codes.to(DEVICE), labels.to(DEVICE), bins=bins, classes=classes)
    assert torch.equal(got.cpu(), joint_histogram(codes, labels, bins=bins, classes=classes))


def test_more_codes_than_a_byte_holds_and_a_label_that_never_comes() -> None:
    generator = torch.Generator().manual_seed(0)
    codes, labels = torch.randint(0, 400, (90, 6), generator=generator)[:, ::2], torch.arange(90) % 3 * 2
    got = twin().joint_histogram(codes.to(DEVICE), labels.to(DEVICE), bins=400, classes=6)
    assert torch.equal(got.cpu(), joint_histogram(codes, labels, bins=400, classes=6))


def test_rows_with_another_label_are_not_counted() -> None:
    codes, labels = torch.zeros(4, 1, dtype=torch.uint8, device=DEVICE), torch.tensor([-1, 0, 2**32, 7], device=DEVICE)
    assert twin().joint_histogram(codes, labels, bins=2, classes=3).tolist() == [[[1, 0, 0], [0, 0, 0]]]


def test_what_it_does_not_serve_is_refused() -> None:
    codes, labels = (
        torch.zeros(2, 3, dtype=torch.uint8, device=DEVICE),
        torch.zeros(2, dtype=torch.int64, device=DEVICE),
    )
    for given_codes, bins, words in (
        (codes.float(), 2, "torch.float32"),
        (codes[:0], 2, "no codes"),
        (codes, 1025, "1025 bins"),
    ):
        with pytest.raises(ValueError, match=f"does not serve {words}"):
            twin().joint_histogram(given_codes, labels, bins=bins, classes=2)


@asked_of_the_interpreter
def test_the_public_reduction_runs_the_kernel_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    codes, labels = torch.randint(0, 9, (50, 3), generator=generator), torch.randint(0, 4, (50,), generator=generator)
    want = joint_histogram(codes, labels, bins=9, classes=4)
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    called = []
    module = twin()
    real = module.joint_histogram
    monkeypatch.setattr(module, "joint_histogram", lambda *a, **k: called.append(1) or real(*a, **k))
    assert torch.equal(joint_histogram(codes, labels, bins=9, classes=4), want)
    arrays = joint_histogram(codes.numpy(), labels.numpy(), bins=9, classes=4)
    assert isinstance(arrays, np.ndarray)
    assert arrays.tolist() == want.tolist()
    assert called == [1, 1]
    with pytest.raises(SchemaError, match="labels lie between 0 and 3, expected 0 to 2"):
        joint_histogram(codes, labels, bins=9, classes=3)
