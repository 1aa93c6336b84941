"""Work of everything that is bound by moving data: elementwise operators, sums, norms, softmax, copies and look-ups."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ._tensors import ITEMSIZE, Arguments, Rule, Tensor, Work, spread, widest

# operators an element: sums, products, comparisons count one, a fused pair two
VECTOR = {
    "add": 1, "sub": 1, "rsub": 1, "mul": 1, "div": 1, "neg": 1, "abs": 1, "relu": 1, "threshold": 1, "clamp": 1,
    "clamp_min": 1, "clamp_max": 1, "maximum": 1, "minimum": 1, "sqrt": 1, "rsqrt": 1, "reciprocal": 1, "square": 1,
    "sign": 1, "floor": 1, "ceil": 1, "round": 1, "remainder": 1, "fmod": 1, "lerp": 2, "addcmul": 2, "addcdiv": 2,
    "masked_fill": 1, "where": 1, "eq": 1, "ne": 1, "lt": 1, "le": 1, "gt": 1, "ge": 1, "isnan": 1, "isinf": 1,
    "logical_and": 1, "logical_or": 1, "logical_not": 1, "logical_xor": 1, "bitwise_and": 1, "bitwise_or": 1,
    "bitwise_not": 1, "bitwise_xor": 1, "__and__": 1, "__or__": 1, "leaky_relu": 1, "hardtanh": 1, "hardswish": 4,
    "hardsigmoid": 3, "threshold_backward": 1, "leaky_relu_backward": 1, "hardtanh_backward": 1,
    "hardswish_backward": 3, "tanh_backward": 3, "sigmoid_backward": 3, "native_dropout_backward": 2,
}  # fmt: skip
# evaluations of exp, tanh and the like; their sums and products are not counted beside them
SPECIAL = {
    "exp": 1, "exp2": 1, "expm1": 1, "log": 1, "log2": 1, "log10": 1, "log1p": 1, "sin": 1, "cos": 1, "tan": 1,
    "tanh": 1, "sigmoid": 1, "silu": 1, "gelu": 1, "erf": 1, "erfc": 1, "softplus": 1, "mish": 2, "elu": 1, "selu": 1,
    "log_sigmoid_forward": 2, "pow": 1, "atan2": 1, "silu_backward": 1, "gelu_backward": 2, "softplus_backward": 1,
    "mish_backward": 2, "elu_backward": 1, "log_sigmoid_backward": 1,
}  # fmt: skip
_TO_BOOL = {
    "eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "logical_and", "logical_or", "logical_not", "logical_xor",
}  # fmt: skip
REDUCTIONS = {
    "sum": 1, "nansum": 1, "mean": 1, "amax": 1, "amin": 1, "max": 1, "min": 1, "argmax": 1, "argmin": 1, "any": 1,
    "all": 1, "prod": 1, "linalg_vector_norm": 2, "norm": 2, "var": 3, "std": 3, "var_mean": 3, "count_nonzero": 1,
}  # fmt: skip
_PRODUCTS = {"2", "2.0", "3", "3.0", "-1", "-1.0", "0.5", "-0.5", "1", "1.0"}
_INDEX_RESULT = {"max", "min"}  # with a dim: also where it was found
_SECOND_IS_DIM = set(REDUCTIONS) - {"linalg_vector_norm", "norm"}


def _is_real(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


def _elementwise(name: str, per_element: int, kind: str) -> Rule:
    inplace = name.endswith("_")
    plain = name.removesuffix("_")

    def rule(a: Arguments) -> Work:
        inputs = a.tensors()
        compute = widest(inputs[1:] if plain == "where" and len(inputs) > 1 else inputs)
        shape = inputs[0].shape if inplace else np.broadcast_shapes(*(t.shape for t in inputs))
        out = math.prod(shape) * (1 if plain in _TO_BOOL and not inplace else ITEMSIZE[compute])
        real = _is_real(compute)
        return Work(
            float(per_element * math.prod(shape)) if real else 0.0,
            sum(t.nbytes for t in inputs) + out,
            kind if real else "move",
            compute,
        )

    return rule


def _power(name: str) -> Rule:
    """Small whole exponents and roots are products; any other takes a logarithm and an exponential."""
    product, general = _elementwise(name, 1, "vector"), _elementwise(name, 1, "special")
    return lambda a: (product if a.text(1) in _PRODUCTS else general)(a)


def _foreach(per_element: int, kind: str) -> Rule:
    """One operator over lists of tensors, in place or not: all lists are read and one is written. Optimizers use these."""

    def rule(a: Arguments) -> Work | None:
        lists = [found for i in range(len(a)) if (found := a.listed(i))]
        if not lists:
            return None
        read = sum(t.nbytes for one in lists for t in one)
        written = sum(t.count * t.item for t in lists[0])
        return Work(float(per_element * sum(t.count for t in lists[0])), read + written, kind, lists[0][0].dtype)

    return rule


def _reduction(name: str, per_element: int) -> Rule:
    def rule(a: Arguments) -> Work:
        x = a.tensor(0)
        if name in _INDEX_RESULT and a.find(1) is not None:  # max of two tensors
            return _elementwise(name, 1, "vector")(a)  # type: ignore[return-value]
        dims = a.numbers(1 if name in _SECOND_IS_DIM else 2)
        out = x.count
        for d in dims:
            out //= max(1, x.shape[d]) if x.shape else 1
        out = out if dims else 1
        size = ITEMSIZE["int64"] if name in ("argmax", "argmin") else x.item
        size += ITEMSIZE["int64"] if name in _INDEX_RESULT and dims else 0
        real = _is_real(x.dtype)
        flops = float(per_element * x.count) if real else 0.0
        return Work(flops, x.nbytes + out * size, "vector" if real else "move", x.dtype)

    return rule


# --------------------------------------------------------------------------------------- several passes fused in a kernel
def _over(first: int, flops: float, reads: int = 1, writes: int = 1, others: bool = True) -> Rule:
    """`flops` an element of the tensor at `first`, which is read `reads` and written `writes` times; the rest is read."""

    def rule(a: Arguments) -> Work:
        x = a.tensor(first)
        rest = sum(t.nbytes for i in range(len(a)) if i != first and (t := a.find(i)) is not None) if others else 0
        return Work(flops * x.count, reads * x.nbytes + rest + writes * x.count * x.item, "vector", x.dtype)

    return rule


def _dropout(a: Arguments) -> Work:
    x = a.tensor(0)
    return Work(2.0 * x.count, x.nbytes + x.count * (x.item + 1), "vector", x.dtype)


def _nll(a: Arguments) -> Work:
    """One value is picked from each row."""
    x, target = a.tensor(0), a.tensor(1)
    return Work(float(target.count), target.nbytes + target.count * x.item, "vector", x.dtype)


def _nll_backward(a: Arguments) -> Work:
    x, target = a.tensor(1), a.tensor(2)
    return Work(float(target.count), target.nbytes + x.count * x.item, "vector", x.dtype)


def _pool(a: Arguments, indices: int) -> Work:
    """`indices` bytes an output element for where the maximum was."""
    x, dims = a.tensor(0), 2
    kernel = spread(a.numbers(1), dims)
    stride = spread(a.numbers(2) or kernel, dims)
    padding = spread(a.numbers(3) or [0], dims)
    sizes = zip(x.shape[-dims:], kernel, stride, padding, strict=True)
    out = math.prod(x.shape[:-dims]) * math.prod((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
    return Work(float(out * math.prod(kernel)), x.nbytes + out * (x.item + indices), "vector", x.dtype)


def _adaptive_pool(a: Arguments) -> Work:
    x = a.tensor(0)
    out = math.prod(x.shape[:-2]) * math.prod(spread(a.numbers(1), 2))
    return Work(float(x.count), x.nbytes + out * x.item, "vector", x.dtype)


def _fused_optimizer(per_element: int, written: int) -> Rule:
    """`written` of the lists (parameters and state) are updated, all are read."""

    def rule(a: Arguments) -> Work | None:
        lists = [found for i in range(5) if (found := a.listed(i))]
        if not lists:
            return None
        sizes = [sum(t.count * t.item for t in one) for one in lists]
        kept = [s for i, s in enumerate(sizes) if i != 1][:written]  # gradients stay as they are
        flops = float(per_element * sum(t.count for t in lists[0]))
        return Work(flops, sum(sizes) + sum(kept), "vector", lists[0][0].dtype)

    return rule


# ------------------------------------------------------------------------------------------------------ moving data only
def _moved(nbytes: float, of: Tensor) -> Work:
    return Work(0.0, nbytes, "move", of.dtype)


def _copy(a: Arguments) -> Work:
    to, source = a.tensor(0), a.tensor(1)
    return _moved(source.nbytes + to.count * to.item, to)


def _fill(a: Arguments) -> Work:
    x = a.tensor(0)
    return _moved(x.count * x.item, x)


def _duplicate(a: Arguments) -> Work:
    x = a.tensor(0)
    return _moved(x.nbytes + x.count * x.item, x)


def _cat(a: Arguments) -> Work | None:
    parts = a.listed(0)
    return _moved(sum(t.nbytes + t.count * t.item for t in parts), parts[0]) if parts else None


def _embedding(a: Arguments) -> Work:
    table, ids = a.tensor(0), a.tensor(1)
    rows = ids.count * table.shape[-1] * table.item
    return _moved(ids.nbytes + 2 * rows, table)


def _embedding_backward(a: Arguments) -> Work:
    grad, ids, rows = a.tensor(0), a.tensor(1), a.numbers(2)[0]
    dense = rows * grad.shape[-1] * grad.item  # the gradient is as large as the table, mostly zeros
    return Work(float(grad.count), grad.nbytes + ids.nbytes + dense, "vector", grad.dtype)


def _index_select(a: Arguments) -> Work:
    x, ids = a.tensor(0), a.tensor(2)
    dim = a.numbers(1)[0]
    taken = x.count // max(1, x.shape[dim]) * ids.count
    return _moved(ids.nbytes + 2 * taken * x.item, x)


def _index_put(a: Arguments) -> Work | None:
    """The profiler doesn't see the indices; the values say how much is written, unless one value is spread."""
    x, values = a.tensor(0), a.tensor(2)
    if not values.shape:
        return None
    passes = 3 if a.flag(3) else 2  # accumulating reads what is there
    return _moved(passes * values.count * x.item, x)


def _gather(a: Arguments) -> Work:
    x, ids = a.tensor(0), a.tensor(2)
    return _moved(ids.nbytes + 2 * ids.count * x.item, x)


def _scatter(ids: int, source: int, passes: int) -> Callable[[Arguments], Work]:
    """Only what is written moves, not the whole target: a key-value cache is not copied to add one token."""

    def rule(a: Arguments) -> Work:
        x, where, values = a.tensor(0), a.tensor(ids), a.find(source)
        count = values.count if values is not None and values.shape else where.count
        return Work(float(count if passes == 3 else 0), where.nbytes + passes * count * x.item, "move", x.dtype)

    return rule


def _scalar(a: Arguments) -> Work:
    x = a.tensor(0)
    return _moved(x.item, x)


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    for table, kind in ((VECTOR, "vector"), (SPECIAL, "special")):
        for name, per_element in table.items():
            for spelled in (name, f"{name}_"):
                rules[spelled] = _elementwise(spelled, per_element, kind)
                rules[f"_foreach_{spelled}"] = _foreach(per_element, kind)
    rules |= {name: _reduction(name, n) for name, n in REDUCTIONS.items()}
    return rules


RULES: dict[str, Rule] = _rules() | {
    # softmax: maximum, subtract, exp, sum, divide; its gradient: product, sum, subtract, product
    "_softmax": _over(0, 5), "_log_softmax": _over(0, 5), "_safe_softmax": _over(0, 5),
    "_softmax_backward_data": _over(1, 4), "_log_softmax_backward_data": _over(1, 4),
    # norms: mean and variance (4), normalise (2), scale and shift (2)
    "native_layer_norm": _over(0, 8), "native_group_norm": _over(0, 8), "native_batch_norm": _over(0, 8),
    "_native_batch_norm_legit": _over(0, 8), "cudnn_batch_norm": _over(0, 8), "_fused_rms_norm": _over(0, 4),
    "native_layer_norm_backward": _over(1, 14), "native_group_norm_backward": _over(1, 14),
    "native_batch_norm_backward": _over(1, 14), "_fused_rms_norm_backward": _over(1, 10),
    "pow": _power("pow"), "pow_": _power("pow_"),
    "cumsum": _over(0, 1), "cumprod": _over(0, 1), "native_dropout": _dropout,
    "nll_loss_forward": _nll, "nll_loss2d_forward": _nll, "nll_loss_backward": _nll_backward,
    "mse_loss": _over(0, 3, writes=0), "mse_loss_backward": _over(1, 3),
    "binary_cross_entropy_with_logits": _over(0, 4, writes=0),
    "max_pool2d_with_indices": lambda a: _pool(a, 8), "mkldnn_max_pool2d": lambda a: _pool(a, 0),
    "avg_pool2d": lambda a: _pool(a, 0), "_adaptive_avg_pool2d": _adaptive_pool,
    "_fused_adamw_": _fused_optimizer(14, 3), "_fused_adam_": _fused_optimizer(14, 3),
    "_fused_sgd_": _fused_optimizer(3, 2), "_fused_adagrad_": _fused_optimizer(6, 2),
    "copy_": _copy, "fill_": _fill, "zero_": _fill, "_foreach_zero_": _foreach(0, "move"),
    "_foreach_copy_": _foreach(0, "move"), "cat": _cat, "flip": _duplicate, "roll": _duplicate,
    "tril": _duplicate, "triu": _duplicate, "embedding": _embedding, "embedding_dense_backward": _embedding_backward,
    "index_select": _index_select, "index_put_": _index_put, "_index_put_impl_": _index_put,
    "gather": _gather, "take_along_dim": _gather,
    "scatter_": _scatter(2, 3, 2), "scatter": _scatter(2, 3, 2), "scatter_add_": _scatter(2, 3, 3),
    "scatter_add": _scatter(2, 3, 3), "index_copy_": _scatter(2, 3, 2), "index_add_": _scatter(2, 3, 3),
    "_local_scalar_dense": _scalar,
}  # fmt: skip
