"""Work of operators: torch's own counter where it is right, paper where it is not."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bnviz.capture.profiler import Profiler
from bnviz.hardware.flops import has_rule, is_engine, work
from bnviz.probes.ops import Ops
from bnviz.profile import Signature


@pytest.fixture(autouse=True, scope="module")
def few_objects() -> Iterator[None]:
    """A profiler looks through all objects for another one before it starts; those of the imports are none."""
    gc.freeze()
    yield
    gc.unfreeze()


def seen(run: Callable[[], Any]) -> dict[str, Any]:
    """The record `ops` of one function."""
    profiler = Profiler(nn.Identity())
    assert profiler.start() is None
    run()
    record = Ops(ceilings=False).profiled(profiler.stop())
    assert record is not None
    record["names"] = np.array(record["tables"]["op"])[record["op"]]
    record["kinds"] = np.array(record["tables"]["work"])[record["work"]]
    return record


def product_flops(run: Callable[[], Any]) -> float:
    record = seen(run)
    return float(record["flops"][record["kinds"] == "matmul"].sum())


def counted(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def grads(output: torch.Tensor) -> None:
    output.sum().backward()


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, requires_grad=True)


CASES: dict[str, Callable[[], torch.Tensor]] = {
    "mm": lambda: rand(5, 7) @ rand(7, 3),
    "bmm": lambda: torch.bmm(rand(4, 5, 7), rand(4, 7, 3)),
    "baddbmm": lambda: torch.baddbmm(rand(4, 5, 3), rand(4, 5, 7), rand(4, 7, 3)),
    "einsum": lambda: torch.einsum("bij,bkj->bik", rand(2, 5, 7), rand(2, 3, 7)),
    "linear": lambda: nn.Linear(7, 3)(rand(2, 5, 7)),
    "linear without bias": lambda: nn.Linear(7, 3, bias=False)(rand(2, 5, 7)),
    "matmul broadcasting": lambda: rand(2, 1, 5, 7) @ rand(3, 7, 4),
    "conv1d": lambda: nn.Conv1d(3, 8, 5, stride=2, padding=1)(rand(2, 3, 17)),
    "conv2d": lambda: nn.Conv2d(3, 8, 3, padding="same")(rand(2, 3, 9, 11)),
    "conv2d dilated": lambda: nn.Conv2d(3, 8, (3, 5), stride=(1, 2), dilation=2)(rand(2, 3, 15, 17)),
    "conv3d": lambda: nn.Conv3d(2, 4, 3)(rand(1, 2, 5, 6, 7)),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, output_padding=1)(rand(2, 6, 5, 7)),
    "gru": lambda: nn.GRU(7, 5, batch_first=True)(rand(2, 4, 7))[0],
    "multi-layer perceptron": lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 2))(rand(6, 7)),
}


@pytest.mark.parametrize("case", CASES)
def test_forward_products_are_those_of_torch(case: str) -> None:
    assert product_flops(CASES[case]) == counted(CASES[case]) > 0


@pytest.mark.parametrize("case", CASES)
def test_backward_products_are_those_of_torch(case: str) -> None:
    assert product_flops(lambda: grads(CASES[case]())) == counted(lambda: grads(CASES[case]()))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_grouped_convolution_costs_two_forwards_backward(groups: int) -> None:
    x, layer = rand(2, 8, 9, 9), nn.Conv2d(8, 16, 3, groups=groups)
    forward = 2 * 2 * 7 * 7 * 16 * (8 // groups) * 9
    assert product_flops(lambda: layer(x)) == forward
    assert product_flops(lambda: grads(layer(x))) == 3 * forward  # torch counts the weights' part `groups` times


def test_first_layer_needs_no_gradient_of_its_input() -> None:
    x, layer = torch.rand(2, 3, 9, 9), nn.Conv2d(3, 4, 3)
    assert product_flops(lambda: grads(layer(x))) == 2 * (2 * 2 * 49 * 4 * 3 * 9)


def test_attention_on_a_cpu() -> None:
    q, k, v = rand(2, 4, 16, 8), rand(2, 4, 12, 8), rand(2, 4, 12, 8)
    forward = 2 * 2 * 4 * 16 * 12 * (8 + 8)
    assert counted(lambda: F.scaled_dot_product_attention(q, k, v)) == 0  # no formula for the CPU's kernel
    with sdpa_kernel(SDPBackend.MATH):
        assert counted(lambda: F.scaled_dot_product_attention(q, k, v)) == forward
        assert product_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == forward
    assert product_flops(lambda: F.scaled_dot_product_attention(q, k, v)) == forward
    assert product_flops(lambda: grads(F.scaled_dot_product_attention(q, k, v))) == 3.5 * forward


@pytest.mark.parametrize(("queries", "keys", "pairs"), [(16, 16, 136), (4, 9, 10), (9, 4, 10 + 5 * 4), (1, 7, 1)])
def test_causal_attention_counts_the_pairs_that_meet(queries: int, keys: int, pairs: int) -> None:
    q, k = torch.rand(1, 1, queries, 8), torch.rand(1, 1, keys, 8)
    mask = torch.ones(queries, keys).tril()  # torch's own definition
    assert int(mask.sum()) == pairs
    assert product_flops(lambda: F.scaled_dot_product_attention(q, k, k, is_causal=True)) == 2 * pairs * 16


def test_lstm_on_a_cpu_by_hand() -> None:
    layer, x = nn.LSTM(7, 5), torch.rand(3, 2, 7)
    with torch.no_grad():
        assert product_flops(lambda: layer(x)) == 2 * (3 * 2) * (4 * 5 * 7 + 4 * 5 * 5)


def test_vector_products_by_hand() -> None:
    a, x = torch.rand(6, 5), torch.rand(5)
    assert product_flops(lambda: torch.mv(a, x)) == 2 * 30
    assert product_flops(lambda: torch.addmv(torch.rand(6), a, x)) == 2 * 30
    assert product_flops(lambda: torch.dot(x, x)) == 2 * 5


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch has no grouped_mm")
def test_grouped_products_of_experts_by_hand() -> None:
    x, w = torch.rand(24, 16, dtype=torch.bfloat16), torch.rand(4, 16, 32, dtype=torch.bfloat16)
    ends = torch.tensor([8, 8, 20, 24], dtype=torch.int32)
    record = seen(lambda: F.grouped_mm(x, w, offs=ends))
    row = int(np.flatnonzero(record["names"] == "aten::_grouped_mm")[0])
    assert record["flops"][row] == 2 * 24 * 16 * 32
    assert record["bytes"][row] == 2 * (24 * 16 + 4 * 16 * 32 + 24 * 32)


class Gpt(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width), "mlp": nn.Linear(width, width)}
            )
            for _ in range(layers)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in block["qkv"](x).chunk(3, -1))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](y.transpose(1, 2).flatten(2))
            x = x + F.gelu(block["mlp"](x))
        return self.head(x)


def test_a_transformer_by_hand_forward_and_backward() -> None:
    width, layers, batch, tokens = 16, 3, 2, 12
    model, ids = Gpt(width, layers), torch.randint(11, (batch, tokens))
    rows = batch * tokens
    linear = 2 * rows * (layers * 5 * width * width + 11 * width)
    attention = layers * 2 * batch * (tokens * (tokens + 1) // 2) * (2 * width)
    assert product_flops(lambda: model(ids)) == linear + attention
    assert product_flops(lambda: grads(model(ids))) == 3 * linear + 3.5 * attention


X = torch.rand(4, 6)
WIDE = torch.rand(1, 6).expand(4, 6)
TABLE, IDS = torch.rand(1000, 8), torch.tensor([1, 5, 5])
BYTES: dict[str, tuple[Callable[[], Any], str, int, int]] = {
    "add": (lambda: X + X, "aten::add", 24, 3 * 96),
    "add broadcasts": (lambda: X + X[0], "aten::add", 24, 96 + 24 + 96),
    "add of an expanded tensor": (lambda: X + WIDE, "aten::add", 24, 96 + 24 + 96),
    "add to itself": (lambda: X.clone().add_(X), "aten::add_", 24, 3 * 96),
    "compare": (lambda: X > 0.5, "aten::gt", 24, 96 + 24),
    "gelu": (lambda: F.gelu(X), "aten::gelu", 24, 2 * 96),
    "square": (lambda: X.pow(2), "aten::pow", 24, 2 * 96),
    "lerp": (lambda: X.clone().lerp_(X, 0.5), "aten::lerp_", 48, 3 * 96),
    "sum": (X.sum, "aten::sum", 24, 96 + 4),
    "sum of rows": (lambda: X.sum(-1), "aten::sum", 24, 96 + 16),
    "mean of columns": (lambda: X.mean(0, keepdim=True), "aten::mean", 24, 96 + 24),
    "maximum and where": (lambda: X.max(1), "aten::max", 24, 96 + 4 * (4 + 8)),
    "softmax": (lambda: X.softmax(-1), "aten::_softmax", 5 * 24, 2 * 96),
    "layer norm": (lambda: nn.LayerNorm(6)(X), "aten::native_layer_norm", 8 * 24, 2 * 96 + 2 * 24),
    "copy": (lambda: torch.empty(4, 6).copy_(WIDE), "aten::copy_", 0, 24 + 96),
    "convert": (lambda: X.to(torch.bfloat16), "aten::copy_", 0, 96 + 48),
    "fill": (lambda: torch.zeros(4, 6), "aten::zero_", 0, 0),
    "concatenate": (lambda: torch.cat([X, X]), "aten::cat", 0, 4 * 96),
    "embedding": (lambda: F.embedding(IDS, TABLE), "aten::embedding", 0, 24 + 2 * 3 * 32),
    "look-up": (lambda: TABLE[IDS], "aten::index", 0, 2 * 3 * 32),
    "select rows": (lambda: TABLE.index_select(0, IDS), "aten::index_select", 0, 24 + 2 * 3 * 32),
    "write into a cache": (
        lambda: TABLE.clone().index_copy_(0, IDS[:1], TABLE[:1]),
        "aten::index_copy_",
        0,
        8 + 2 * 32,
    ),
    "pool": (lambda: F.max_pool2d(torch.rand(1, 2, 8, 8), 2), "aten::max_pool2d_with_indices", 128, 512 + 32 * 12),
    "integers": (lambda: IDS + 1, "aten::add", 0, 24 + 8 + 24),
}


@pytest.mark.parametrize("case", BYTES)
def test_flops_and_bytes_by_hand(case: str) -> None:
    run, name, flops, nbytes = BYTES[case]
    record = seen(run)
    rows = np.flatnonzero(record["names"] == name)
    if case == "fill":  # the allocator gives zeros without a pass where it can
        assert set(record["bytes"][rows]) <= {0.0, 96.0}
        return
    assert len(rows) == 1
    assert (record["flops"][rows[0]], record["bytes"][rows[0]]) == (flops, nbytes)


def test_lists_of_tensors_in_an_optimizer() -> None:
    parameters = [torch.rand(3, 4), torch.rand(5)]
    record = seen(lambda: torch._foreach_mul_(parameters, 0.9))
    row = int(np.flatnonzero(record["names"] == "aten::_foreach_mul_")[0])
    assert (record["flops"][row], record["bytes"][row]) == (17, 2 * 17 * 4)
    half = [p.to(torch.bfloat16) for p in parameters]
    record = seen(lambda: torch._foreach_add_(half, half))
    row = int(np.flatnonzero(record["names"] == "aten::_foreach_add_")[0])
    assert record["bytes"][row] == 3 * 17 * 2  # the dtype of a list is only in the event tree


def test_views_are_free_and_wrappers_do_nothing() -> None:
    record = seen(lambda: nn.Linear(6, 3)(X).t().reshape(12)[2:].unsqueeze(0))
    products = np.isin(record["names"], ["aten::addmm", "aten::uniform_"])
    moved = {n: b for n, b in zip(record["names"][~products], record["bytes"][~products], strict=True) if b > 0}
    assert set(moved) <= {"aten::clone", "aten::copy_"}  # reshape of a transposed tensor copies
    linear = int(np.flatnonzero(record["names"] == "aten::linear")[0])
    assert (record["flops"][linear], record["kinds"][linear]) == (0.0, "none")


def test_nothing_counts_twice() -> None:
    record = seen(lambda: nn.Linear(6, 3)(X).softmax(-1))
    assert "aten::expand" not in record["names"]  # inside addmm, which counts the bias
    root = record["self_time"].sum()
    assert root == pytest.approx(record["duration"][np.isin(record["names"], _roots(record))].sum(), rel=1e-9)


def _roots(record: dict[str, Any]) -> list[str]:
    """Names of the operators that lie in no other, in order of their end."""
    end, names = -1.0, []
    for name, start, duration in zip(record["names"], record["start"], record["duration"], strict=True):
        if start >= end:
            names.append(str(name))
            end = start + duration
    return names


def test_unknown_operators_say_so() -> None:
    record = seen(lambda: X.topk(2))
    row = int(np.flatnonzero(record["names"] == "aten::topk")[0])
    assert np.isnan(record["flops"][row]) and np.isnan(record["bytes"][row])
    assert record["attrs"]["coverage"] < 1
    mask = seen(lambda: X[X > 0.5])
    assert np.isnan(mask["bytes"][np.flatnonzero(mask["names"] == "aten::index")[0]])


def test_operators_of_others_are_not_guessed() -> None:
    @torch.library.custom_op("bnviz_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x.clone().mul_(2.0)

    record = seen(lambda: twice(X))
    assert np.isnan(record["flops"][record["names"] == "bnviz_test::twice"]).all()
    assert record["flops"][record["names"] == "aten::mul_"].sum() == 24


def test_arguments_a_rule_does_not_know_are_refused() -> None:
    assert work("aten::mm", Signature(((3,),), ((1,),), ("float32",), ("",))) is None
    assert work("aten::mm", Signature(((2, 3), (3, 4)), ((3, 1), (4, 1)), ("", ""), ("", ""))) is None
    assert work("aten::cat", Signature(((), ()), ((), ()), ("float32", ""), ("", "0"))) is None


def test_names() -> None:
    assert has_rule("aten::mm") and not has_rule("other::mm") and not has_rule("aten::linear")
    assert is_engine("autograd::engine::evaluate_function: AddmmBackward0") and is_engine("AddmmBackward0")
    assert is_engine("torch::autograd::AccumulateGrad") and not is_engine("aten::gelu_backward")


def matrix(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rows, columns), (columns, 1)


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 64), st.integers(1, 8))
def test_products_scale_with_each_dimension(m: int, k: int, n: int, times: int) -> None:
    def product(rows: int) -> tuple[float, float]:
        (a, sa), (b, sb) = matrix(rows, k), matrix(k, n)
        found = work("aten::mm", Signature((a, b), (sa, sb), ("float32", "float32"), ("", "")))
        assert found is not None
        return found.flops, found.nbytes

    assert product(times * m)[0] == times * product(m)[0]
    assert product(times * m)[1] == times * product(m)[1] - (times - 1) * 4 * k * n  # the right matrix is read once


@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=4))
def test_expanded_dimensions_take_no_memory(dims: list[tuple[int, bool]]) -> None:
    tensor = torch.zeros([1 if expanded else n for n, expanded in dims]).expand([n for n, _ in dims])
    signature = Signature((tuple(tensor.shape),) * 2, (tensor.stride(),) * 2, ("float32",) * 2, ("", ""))
    found = work("aten::add", signature)
    assert found is not None
    distinct = 4 * int(np.prod([1 if s == 0 else n for n, s in zip(tensor.shape, tensor.stride(), strict=True)]))
    assert found.nbytes == 2 * distinct + 4 * tensor.numel()


@pytest.mark.parametrize("op", ["aten::unsafe_chunk", "aten::unsafe_split", "aten::cudnn_is_acceptable"])
def test_splitting_into_views_moves_nothing(op: str) -> None:
    found = work(op, Signature(((4, 8),), ((8, 1),), ("float32",), ("",)))
    assert found is not None and (found.flops, found.nbytes) == (0, 0)
