"""Work of products: matrix products, convolutions, attention. A multiply-accumulate is two FLOPs; a bias is not counted."""

from __future__ import annotations

import math

from ._tensors import Arguments, Rule, Tensor, Work, spread


def _product(left: Tensor, right: Tensor, flops: float, out: int, extra: int = 0) -> Work:
    return Work(flops, left.nbytes + right.nbytes + extra + out * left.item, "matmul", left.dtype)


def _mm(a: Arguments, first: int = 0, extra: int = 0) -> Work:
    x, y = a.tensor(first), a.tensor(first + 1)
    m, k = x.shape
    n = y.shape[1]
    return _product(x, y, 2.0 * m * k * n, m * n, extra)


def _addmm(a: Arguments) -> Work:
    return _mm(a, 1, a.tensor(0).nbytes)


def _bmm(a: Arguments, first: int = 0, extra: int = 0) -> Work:
    x, y = a.tensor(first), a.tensor(first + 1)
    b, m, k = x.shape
    n = y.shape[2]
    return _product(x, y, 2.0 * b * m * k * n, b * m * n, extra)


def _baddbmm(a: Arguments) -> Work:
    return _bmm(a, 1, a.tensor(0).nbytes)


def _mv(a: Arguments, first: int = 0, extra: int = 0) -> Work:
    x, y = a.tensor(first), a.tensor(first + 1)
    return _product(x, y, 2.0 * x.count, x.shape[0], extra)


def _addmv(a: Arguments) -> Work:
    return _mv(a, 1, a.tensor(0).nbytes)


def _dot(a: Arguments) -> Work:
    x, y = a.tensor(0), a.tensor(1)
    return _product(x, y, 2.0 * x.count, 1)


def _linear(a: Arguments) -> Work:
    """Where a backend takes the whole layer at once."""
    x, w = a.tensor(0), a.tensor(1)
    rows, bias = x.count // x.shape[-1], a.find(2)
    return _product(x, w, 2.0 * rows * w.count, rows * w.shape[0], bias.nbytes if bias else 0)


def _grouped_mm(a: Arguments) -> Work:
    """Products of groups of rows (or columns) with a matrix each: every row meets one matrix."""
    x, y = a.tensor(0), a.tensor(1)
    if len(x.shape) == 2 and len(y.shape) == 3:  # rows in groups, experts' weights
        out = x.shape[0] * y.shape[2]
        return _product(x, y, 2.0 * x.count * y.shape[2], out)
    if len(x.shape) == 2 and len(y.shape) == 2:  # the inner dimension in groups: gradient of the weights
        groups = a.tensor(2).count
        return _product(x, y, 2.0 * x.count * y.shape[1], groups * x.shape[0] * y.shape[1])
    if len(x.shape) == 3 and len(y.shape) == 2:  # columns in groups
        out = x.shape[1] * y.shape[1]
        return _product(x, y, 2.0 * y.count * x.shape[1], out)
    return _bmm(a)


def _rnn_layer(a: Arguments) -> Work:
    """One layer and direction of oneDNN's LSTM or GRU: each step multiplies by both weights."""
    x, w_input, w_hidden = a.tensor(0), a.tensor(1), a.tensor(2)
    rows = x.shape[0] * x.shape[1]
    flops = 2.0 * rows * (w_input.count + w_hidden.count)
    out = rows * w_hidden.shape[-1]
    return Work(flops, x.nbytes + w_input.nbytes + w_hidden.nbytes + out * x.item, "matmul", x.dtype)


# ---------------------------------------------------------------------------------------------------------- convolutions
def _out_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _positions(x: Tensor, w: Tensor, settings: list[list[int]], transposed: bool, output_padding: list[int]) -> int:
    """Spatial positions of the output."""
    dims = len(x.shape) - 2
    stride, padding, dilation = (spread(s, dims) for s in settings)
    sizes = zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
    if not transposed:
        return math.prod(_out_size(n, k, s, p, d) for n, k, s, p, d in sizes)
    extra = spread(output_padding or [0], dims)
    return math.prod((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for (n, k, s, p, d), o in zip(sizes, extra, strict=True))


def _products(x: Tensor, w: Tensor, positions: int, transposed: bool) -> float:
    """FLOPs of one pass; the weight's sizes already hold only the channels of its group."""
    where = math.prod(x.shape[2:]) if transposed else positions
    return 2.0 * x.shape[0] * where * w.count


def _convolution(a: Arguments) -> Work:
    x, w, bias = a.tensor(0), a.tensor(1), a.find(2)
    transposed, groups = a.flag(6), (a.numbers(8) or [1])[0]
    positions = _positions(x, w, [a.numbers(i) for i in (3, 4, 5)], transposed, a.numbers(7))
    channels = w.shape[1] * groups if transposed else w.shape[0]
    out = x.shape[0] * channels * positions
    return _product(x, w, _products(x, w, positions, transposed), out, bias.nbytes if bias else 0)


def _mkldnn_convolution(a: Arguments) -> Work:
    x, w, bias = a.tensor(0), a.tensor(1), a.find(2)
    positions = _positions(x, w, [a.numbers(4), a.numbers(3), a.numbers(5)], False, [])
    out = x.shape[0] * w.shape[0] * positions
    return _product(x, w, _products(x, w, positions, False), out, bias.nbytes if bias else 0)


def _convolution_backward(a: Arguments) -> Work:
    """As many products again for each gradient that is asked for."""
    grad, x, w = a.tensor(0), a.tensor(1), a.tensor(2)
    transposed = a.flag(7)
    wanted = [part.strip() in ("True", "1") for part in a.text(10).strip("[]").split(",")]
    for_input, for_weight, for_bias = wanted
    flops = _products(x, w, math.prod(grad.shape[2:]), transposed) * (for_input + for_weight)
    nbytes = grad.nbytes
    nbytes += for_input * (w.nbytes + x.count * x.item) + for_weight * (x.nbytes + w.count * w.item)
    return Work(flops, nbytes + for_bias * grad.shape[1] * grad.item, "matmul", x.dtype)


# ------------------------------------------------------------------------------------------------------------- attention
def _pairs(queries: int, keys: int, causal: bool) -> int:
    """Pairs of query and key that meet; torch's causal mask starts at the upper left."""
    if not causal:
        return queries * keys
    full = max(0, queries - keys)  # queries that see every key
    rest = min(queries, keys)
    return full * keys + rest * (rest + 1) // 2


def _attention(causal_at: int) -> Rule:
    """Attention kept in the kernel: the matrix of weights is never in memory.

    A causal mask halves the pairs, as flash kernels skip what is masked. `FlopCounterMode` counts all of them.
    """

    def rule(a: Arguments) -> Work:
        q, k, v = (a.tensor(i) for i in range(3))
        batch, heads, queries, width = q.shape
        pairs = _pairs(queries, k.shape[-2], a.flag(causal_at))
        flops = 2.0 * batch * heads * pairs * (width + v.shape[-1])
        out = batch * heads * queries * (v.shape[-1] * q.item + 4)  # and the log-sum-exp of every row
        mask = sum(t.nbytes for t in a.tensors()[3:])
        return Work(flops, q.nbytes + k.nbytes + v.nbytes + mask + out, "matmul", q.dtype)

    return rule


def _attention_backward(causal_at: int) -> Rule:
    """Five products instead of two: the weights again, and gradients of weights, values, queries and keys."""

    def rule(a: Arguments) -> Work:
        grad, q, k, v = (a.tensor(i) for i in range(4))
        batch, heads, queries, width = q.shape
        pairs = _pairs(queries, k.shape[-2], a.flag(causal_at))
        flops = 2.0 * batch * heads * pairs * (3 * width + 2 * v.shape[-1])
        output = grad.count * grad.item  # read again, as is the log-sum-exp
        read = sum(t.nbytes for t in (grad, q, k, v)) + output + 4 * batch * heads * queries
        return Work(flops, read + sum(t.count * t.item for t in (q, k, v)), "matmul", q.dtype)

    return rule


RULES: dict[str, Rule] = {
    "mm": _mm,
    "addmm": _addmm,
    "_addmm_activation": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "mv": _mv,
    "addmv": _addmv,
    "addmv_": _addmv,
    "dot": _dot,
    "vdot": _dot,
    "_grouped_mm": _grouped_mm,
    "mkldnn_rnn_layer": _rnn_layer,
    "convolution": _convolution,
    "_convolution": _convolution,
    "convolution_overrideable": _convolution,
    "mkldnn_convolution": _mkldnn_convolution,
    "convolution_backward": _convolution_backward,
    "_scaled_dot_product_flash_attention_for_cpu": _attention(4),
    "_scaled_dot_product_flash_attention": _attention(4),
    "_scaled_dot_product_cudnn_attention": _attention(6),
    "_scaled_dot_product_efficient_attention": _attention(6),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward(7),
    "_scaled_dot_product_flash_attention_backward": _attention_backward(11),
    "_scaled_dot_product_efficient_attention_backward": _attention_backward(11),
    "_scaled_dot_product_cudnn_attention_backward": _attention_backward(14),
}
FALLBACK: dict[str, Rule] = {"linear": _linear, "mkldnn_linear": _linear, "_linear_pointwise": _linear}
