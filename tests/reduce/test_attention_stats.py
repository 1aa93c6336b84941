"""attention_stats against the formulas in float64 over shapes, patterns and dtypes, and against cases solved on paper."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from bnviz.errors import SchemaError, UnknownName
from bnviz.reduce.attention_stats import STATISTICS, Pattern, Statistics, attention_stats, bin_size

_spec = importlib.util.spec_from_file_location(
    "attention_definition", Path(__file__).parent / "_attention_definition.py"
)
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
definition, weights = _module.definition, _module.weights

# Input is rounded first and the definition sees the rounded input, so only float32 accumulation differs, in every dtype.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-5, torch.float16: 2e-5}


def agree(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float, near: Tensor | None = None) -> None:
    for name, value in got.items():
        expected = want[name]
        assert value.shape == expected.shape, name
        assert torch.equal(value.isnan(), expected.isnan()), name
        if name == "pivotal" and near is not None:
            assert ((value.double() - expected).abs() <= near).all(), name
            continue
        scale = max(1.0, expected.nan_to_num().abs().max().item() if expected.numel() else 1.0)
        error = (value.double() - expected).nan_to_num().abs().max().item() if expected.numel() else 0.0
        assert error <= tolerance * scale, (name, error)


def undecided(query: Tensor, key: Tensor, pattern: Pattern, valid: Tensor | None) -> Tensor:
    """Rows a key whose share is within rounding of the pivotal limit."""
    p, sees, _, _ = weights(query, key, pattern, None if valid is None else valid[:, -query.shape[2] :])
    limit = (1 + 1e-4) / sees.sum(-1, keepdim=True)
    return ((p / limit - 1).abs() < 5e-5).double().sum(-2)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    batch, kv, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries = draw(st.sampled_from([1, 2, 7, 33, 64, 65, 130]))
    keys = queries + draw(st.sampled_from([0, 0, 1, 40]))
    dim = draw(st.sampled_from([1, 8, 24]))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    sharp = draw(st.sampled_from([0.0, 1.0, 4.0]))
    query = (sharp * torch.randn(batch, kv * group, queries, dim, generator=generator)).to(dtype)
    key = torch.randn(batch, kv, keys, dim, generator=generator).to(dtype)
    heads = draw(st.sampled_from([1, kv * group]))
    shape = (draw(st.sampled_from([1, batch])), heads, draw(st.sampled_from([1, queries])), keys)
    kind = draw(st.sampled_from(["none", "none", "bool", "additive"]))
    allowed = None
    if kind != "none":
        allowed = torch.rand(shape, generator=generator) < 0.6
    if kind == "additive":
        bias = torch.randn(shape, generator=generator).to(dtype)
        allowed = bias.masked_fill(~allowed, torch.finfo(dtype).min)
    pattern = Pattern(
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, None, 1, 5, 50])),
        allowed=allowed,
        softcap=draw(st.sampled_from([None, 3.0])),
        sinks=torch.randn(kv * group, generator=generator) if draw(st.booleans()) else None,
        scale=draw(st.sampled_from([None, 0.3])),
    )
    valid = None
    if draw(st.booleans()):
        width = draw(st.sampled_from([queries, keys]))
        lengths = torch.randint(1, width + 1, (batch, 1), generator=generator)
        place = torch.arange(width)
        valid = place >= width - lengths if draw(st.booleans()) else place < lengths
        if width != keys and allowed is not None:
            valid = None  # which cached keys are real is then read off the mask: tested on its own below
    return {
        "query": query,
        "key": key,
        "pattern": pattern,
        "statistics": Statistics(
            snap=draw(st.sampled_from([1, 10, 64])),
            sink=draw(st.sampled_from([1, 4])),
            local=draw(st.sampled_from([1, 6, 128])),
            bins=draw(st.sampled_from([1, 4, 64])),
        ),
        "valid": valid,
        "token_ids": torch.randint(0, 9, (batch, keys), generator=generator),
    }


@settings(deadline=None, max_examples=60)
@given(cases())
def test_agrees_with_the_formulas(case: dict[str, object]) -> None:
    pattern, query = case["pattern"], case["query"]
    if pattern.allowed is not None and query.shape[2] < case["key"].shape[2]:
        case["token_ids"] = None
        case["statistics"] = dataclasses.replace(
            case["statistics"], names=tuple(n for n in STATISTICS[:-1] if n not in ("sink_mass", "previous_mass", "echo_mass", "induction_mass"))
        )  # fmt: skip
    want = definition(**case)
    got = attention_stats(**case)
    agree(got, want, TOLERANCE[query.dtype], undecided(query, case["key"], pattern, case["valid"]))
