"""A kernel that fails costs one warning and no number."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from _twins import asked_of_the_interpreter

from bnviz.reduce import _dispatch
from bnviz.reduce.bin_indices import bin_indices
from bnviz.reduce.binned_codes import binned_codes
from bnviz.reduce.block_stats import block_stats
from bnviz.reduce.covariance import covariance
from bnviz.reduce.gram_pair import gram_pair
from bnviz.reduce.gram_reduce import gram_reduce
from bnviz.reduce.joint_histogram import joint_histogram
from bnviz.reduce.routing_counts import routing_counts
from bnviz.reduce.token_similarity import token_similarity

X = torch.tensor([[1.0], [3.0]])
BINS = {"bins": 2, "low": 0.0, "high": 4.0}
CALLS: dict[tuple[str, str], tuple[Callable[[], Any], Any]] = {  # by the twin's file and function
    ("binned_codes", "binned_words"): (lambda: binned_codes(X, **BINS).code, [0, 1]),
    ("binned_codes", "bin_indices"): (lambda: bin_indices(X, **BINS).index, [[1], [2]]),
    ("block_stats", "stream_stats"): (lambda: block_stats(X, 2 * X).cosine, [1.0, 1.0]),
    ("covariance", "covariance"): (lambda: covariance(X).covariance, [[1.0]]),
    ("gram_reduce", "gram_reduce"): (lambda: gram_reduce(0 * X, variance=1.0).sum, 4.0),
    ("gram_reduce", "gram_products"): (lambda: gram_pair(0 * X, 0 * X, variance=1.0).products, 0.0),
    ("joint_histogram", "joint_histogram"): (
        lambda: joint_histogram(torch.tensor([[1], [0]]), torch.tensor([0, 0]), bins=2, classes=1),
        [[[1], [1]]],
    ),
    ("routing_counts", "routing_counts"): (lambda: routing_counts(torch.tensor([[[1]]]), 2)["count"], [[0, 1]]),
    ("token_similarity", "token_similarity"): (lambda: token_similarity(X).nearest, [1, 0]),
}


@asked_of_the_interpreter
@pytest.mark.parametrize("broken", CALLS, ids=" ".join)
def test_a_kernel_that_fails_costs_a_warning_and_no_number(
    broken: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BNVIZ_KERNELS", "interpret")
    monkeypatch.setattr(_dispatch, "_failed", {})

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such instruction")

    module, function = broken
    monkeypatch.setattr(importlib.import_module(f"bnviz_kernels.{module}"), function, fails)
    act, want = CALLS[broken]
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        assert act().tolist() == want
    assert act().tolist() == want  # and is not tried again
