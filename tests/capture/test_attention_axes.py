"""The arithmetic behind attention written by hand: axes, products, batch and heads, pieces. Every answer is known beforehand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnviz.capture.attention.axes import arranged, cut, extent, reshaped, root
from bnviz.capture.attention.call import Call
from bnviz.capture.attention.code import bypasses, reaches
from bnviz.capture.attention.heads import Shape, batch_and_heads
from bnviz.capture.attention.pieces import dense, together
from bnviz.capture.attention.products import product

from .spied import watched


@st.composite
def journeys(draw: st.DrawFn) -> tuple[Tensor, Tensor, Any]:
    """A tensor, what views, permutations and slices made of it, and its layout."""
    shape = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    start = tensor = torch.arange(int(torch.tensor(shape).prod())).reshape(shape)
    layout: Any = root(shape)
    for step in draw(st.lists(st.sampled_from(["permute", "merge", "split", "slice", "unsqueeze"]), max_size=6)):
        at = draw(st.integers(0, tensor.dim() - 1))
        if step == "permute":
            order = draw(st.permutations(range(tensor.dim())))
            tensor, layout = tensor.permute(order), tuple(layout[n] for n in order)
            continue
        if step == "slice":
            stop = draw(st.integers(1, tensor.shape[at]))
            begin = draw(st.integers(0, stop - 1))
            piece = cut(layout[at], begin, stop)
            if piece is None:
                continue
            tensor, layout = tensor.narrow(at, begin, stop - begin), (*layout[:at], piece, *layout[at + 1 :])
            continue
        if step == "merge" and at + 1 < tensor.dim():
            new = tensor.flatten(at, at + 1)
        elif step == "split" and tensor.shape[at] % 2 == 0:
            new = tensor.unflatten(at, (2, -1))
        else:
            new = tensor.unsqueeze(at)
        found = reshaped(layout, new.shape)
        if found is None:
            continue
        tensor, layout = new, found
    return start, tensor, layout


@given(journeys())
@settings(max_examples=300)
def test_a_layout_leads_from_the_root_to_the_tensor(journey: tuple[Tensor, Tensor, Any]) -> None:
    start, tensor, layout = journey
    assert tuple(extent(axis) for axis in layout) == tuple(tensor.shape)
    if any(n != 1 and not any(a.axis == at for axis in layout for a in axis) for at, n in enumerate(start.shape)):
        return  # an axis that was cut to nothing but one index may have been lost in a view
    found = arranged(start, root(start.shape), layout)
    assert found is not None
    assert torch.equal(found, tensor)


def test_what_does_not_fall_on_whole_parts_is_not_followed() -> None:
    assert reshaped(root((2, 3)), (3, 2)) is None
    assert reshaped(root((6,)), (4,)) is None
    merged = reshaped(root((2, 3)), (6,))
    assert merged is not None
    assert cut(merged[0], 1, 4) is None
    assert arranged(torch.zeros(2, 3), root((2, 3)), root((3, 2))) is None


PRODUCTS: list[tuple[str, Any, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ("matmul", torch.matmul, (2, 3, 4, 5), (2, 3, 5, 6), {}),
    ("matmul", torch.matmul, (4, 5), (2, 3, 5, 6), {}),
    ("matmul", torch.matmul, (2, 3, 4, 5), (3, 5, 6), {}),
    ("bmm", torch.bmm, (2, 4, 5), (2, 5, 6), {}),
    ("mm", torch.mm, (4, 5), (5, 6), {}),
    ("einsum", "bhqd,bhkd->bhqk", (2, 3, 4, 5), (2, 3, 6, 5), {}),
    ("einsum", "bqhd, bkd -> bhqk", (2, 4, 3, 5), (2, 6, 5), {}),
    ("einsum", "...qd,...kd->...qk", (2, 3, 4, 5), (3, 6, 5), {}),
    ("einsum", "bqd,bkd", (2, 4, 5), (2, 6, 5), {}),
]


@pytest.mark.parametrize(("name", "function", "left", "right", "more"), PRODUCTS)
def test_a_product_is_the_einsum_of_its_labels(
    name: str, function: Any, left: tuple[int, ...], right: tuple[int, ...], more: Any
) -> None:
    a, b = torch.randn(left, dtype=torch.float64), torch.randn(right, dtype=torch.float64)
    args = (function, a, b) if name == "einsum" else (a, b)
    expected = torch.einsum(*args) if name == "einsum" else function(*args)
    found = product(name, args, more)
    assert found is not None
    letters = {label: chr(97 + n) for n, label in enumerate(dict.fromkeys((*found.of_left, *found.of_right)))}
    equation = ",".join("".join(letters[x] for x in side) for side in (found.of_left, found.of_right))
    again = torch.einsum(f"{equation}->{''.join(letters[x] for x in found.of_output)}", a, b)
    assert torch.allclose(again, expected)


def test_products_that_are_none() -> None:
    x = torch.randn(3, 3)
    assert product("linear", (x, x), {}) is None
    assert product("matmul", (x[0], x), {}) is None
    assert product("einsum", ("ij,jk,kl->il", x, x, x), {}) is None
    assert product("einsum", ("ii,ij->j", x, x), {}) is None
    reflected = product("__rmatmul__", (x, 2 * x), {})
    assert reflected is not None
    assert reflected.right is x
    scaled = product("baddbmm", (x[None],), {"batch1": x[None], "batch2": x[None], "alpha": 0.5})
    assert scaled is not None
    assert scaled.scale == 0.5


@pytest.mark.parametrize(
    ("axes", "queries", "shape", "expected"),
    [
        ((2, 4), 7, Shape((2, 7)), (2, 4)),
        ((4, 2), 7, Shape((2, 7)), (2, 4)),  # heads before the batch
        ((8,), 7, Shape((2, 7)), (2, 4)),  # batch x heads
        ((8,), 7, Shape((7, 2), batch=2), (2, 4)),  # tokens before the batch
        ((2,), 7, Shape((2, 7)), (2, 1)),  # one head
        ((4,), 7, Shape((1, 7)), (1, 4)),
        ((2, 3, 4), 5, Shape((2, 15)), (6, 4)),  # windows, then heads
        ((2, 4, 3), 5, Shape((2, 15)), (6, 4)),  # heads, then windows
        ((2, 2, 3), 7, Shape((2, 7)), (2, 6)),  # groups of heads
        ((6, 4), 5, Shape((2, 15)), (6, 4)),  # windows in the batch
        ((), 7, Shape((7,)), (1, 1)),
        ((8,), 7, Shape(), (8, 1)),  # nothing known: all is batch
        ((8,), 1, Shape((2, 1)), (2, 4)),  # a step of decoding
    ],
)
def test_batch_and_heads_are_told_apart(axes: tuple[int, ...], queries: int, shape: Shape, expected: Any) -> None:
    assert tuple(extent(part) for part in batch_and_heads(root(axes), queries, shape)) == expected


def call(rows: int, columns: int, *, batch: int = 1, heads: int = 2, seed: int = 0, **how: Any) -> Call:
    draw = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, heads, n, 3, generator=draw) for n in (rows, columns))
    given = {"mask": None, "causal": False, "scale": 1.0} | how
    return Call(query, key, key, **given)


def weights(one: Call) -> Tensor:
    logits, mask = one.scale * one.query @ one.key.mT, dense(one)
    if mask is None:
        return logits.softmax(-1)
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return logits.softmax(-1)


def test_sequences_end_to_end_are_blocks() -> None:
    parts = [call(3, 3, seed=1), call(2, 2, seed=2, causal=True)]
    (one,) = together(parts, Shape((5,)))
    expected = torch.zeros(1, 2, 5, 5)
    expected[..., :3, :3], expected[..., 3:, 3:] = weights(parts[0]), weights(parts[1])
    assert torch.allclose(weights(one), expected)


def test_rows_against_the_same_keys_are_rows() -> None:
    whole = call(5, 5, causal=True)
    parts = [
        Call(whole.query[:, :, a:b], whole.key[:, :, :b], whole.key[:, :, :b], None, True, 1.0)
        for a, b in ((0, 2), (2, 5))
    ]
    (one,) = together(parts, Shape((1, 5)))
    assert torch.allclose(weights(one), weights(whole))
    assert torch.equal(one.key, whole.key)


def test_heads_and_parts_of_the_batch_side_by_side() -> None:
    heads = [call(4, 4, batch=2, heads=1, seed=n, causal=True) for n in range(3)]
    (one,) = together(heads, Shape((2, 4)))
    assert one.query.shape == (2, 3, 4, 3)
    assert one.mask is None
    assert one.causal
    assert torch.allclose(weights(one), torch.cat([weights(h) for h in heads], 1))
    parts = [call(4, 4, seed=n, mask=torch.randn(1, 1, 4, 4)) for n in range(3)]
    (one,) = together(parts, Shape((3, 4)))
    assert torch.allclose(weights(one), torch.cat([weights(p) for p in parts], 0))


def test_layers_that_follow_each_other_in_one_module_are_no_heads() -> None:
    """A model of one module, its layers a loop: each attention is computed from the one before."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ParameterList(torch.randn(8, 24) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for weight in self.layers:
                q, k, v = (x @ weight).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
                x = x + ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
            return x

    model, x = Loop(), torch.randn(2, 5, 8)
    seen = watched(model, lambda m: m(x))
    assert [tuple(s.query.shape) for s in seen] == [(2, 2, 5, 4)] * 3
    assert [s.site.kind for s in seen] == ["attention", "cross_attention", "cross_attention"]
    assert [s.site.layer for s in seen[1:]] == [0, 1]


def test_what_is_no_piece_of_another_stays_alone() -> None:
    parts = [call(4, 4), call(3, 4)]
    assert together(parts, Shape((1, 4))) == parts
    unlike = [call(3, 3), call(2, 2, softcap=3.0)]
    assert together(unlike, Shape((5,))) == unlike
    assert together(parts[:1], Shape()) == parts[:1]


class Methods(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def inner(self, x: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Inherits(Methods):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_code_is_read_through_methods_and_bases() -> None:
    assert "sdpa" in reaches(Methods())
    assert "sdpa" in reaches(Inherits())
    assert reaches(nn.Linear(2, 2)) == frozenset()
    assert reaches(nn.ModuleList()) == frozenset()
    assert bypasses(Methods())
    assert not bypasses(nn.Linear(2, 2))
