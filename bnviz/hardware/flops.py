"""What an operator must do at least: FLOPs and compulsory bytes from the shapes of its arguments."""

from __future__ import annotations

from functools import lru_cache

from bnviz.profile import Signature

from ._contractions import FALLBACK
from ._contractions import RULES as CONTRACTIONS
from ._pointwise import RULES as POINTWISE
from ._tensors import Arguments, Rule, Work

__all__ = ["FREE", "Work", "has_rule", "is_engine", "work"]

# Views, allocations and questions: nothing is computed and nothing of the tensor's size moves.
FREE = frozenset(
    """
    view reshape _reshape_alias _reshape_copy as_strided as_strided_ t t_ transpose transpose_ permute expand expand_as
    unsqueeze unsqueeze_ squeeze squeeze_ select slice narrow split split_with_sizes chunk unbind unflatten flatten detach
    detach_ alias lift_fresh resolve_conj resolve_neg conj real imag diagonal movedim swapaxes swapdims unfold view_as
    _unsafe_view empty empty_like empty_strided new_empty new_empty_strided resize_ resize_as_ set_ is_nonzero
    requires_grad_ result_type to numpy_T mT T _has_compatible_shallow_copy_type is_same_size size stride dim
    item broadcast_tensors atleast_1d atleast_2d hsplit vsplit tensor_split contiguous positive type_as _conj sym_size
    unsafe_chunk unsafe_split unsafe_split_with_sizes cudnn_is_acceptable
    is_floating_point is_complex output_nr _version data retain_grad record_stream is_pinned
    """.split()  # noqa: SIM905 - a paragraph of names is what one can read
)
_ZERO = Work(0.0, 0.0, "none", "")
_ENGINE = ("autograd::engine::evaluate_function: ", "torch::autograd::")


def _plain(op: str) -> str:
    space, _, name = op.rpartition("::")
    return name if space in ("aten", "mkldnn", "mkldnn_prepacked") else ""


def is_engine(op: str) -> bool:
    """Whether this is autograd calling an operator, and no operator: it does no work of its own."""
    return op.startswith(_ENGINE) or (
        "::" not in op and (op.endswith("Backward") or "Backward" in op or op == "detach")
    )


def _find(op: str, *, last_resort: bool) -> Rule | None:
    name = _plain(op)
    return CONTRACTIONS.get(name) or POINTWISE.get(name) or (FALLBACK.get(name) if last_resort else None)


def has_rule(op: str) -> bool:
    """Whether work is counted at this operator, and not at those inside it.

    Examples
    --------
    >>> has_rule("aten::addmm"), has_rule("aten::linear"), has_rule("aten::topk")
    (True, False, False)
    """
    return _find(op, last_resort=False) is not None


@lru_cache(maxsize=1 << 16)
def work(op: str, signature: Signature, *, last_resort: bool = False) -> Work | None:
    """FLOPs and compulsory bytes of one call.

    Compulsory traffic is a lower bound: every input is read once and every output written once; expanded dimensions are
    stored once, views are free, look-ups and writes into a part count the part. Not counted: reuse between operators,
    workspaces, one tensor passed twice, and whole cache lines for strided access.

    FLOPs count a multiply-accumulate as two and no bias; elementwise operators one an element and operator; softmax 5 and
    layer norm 8 an element; exp, tanh and the like one an evaluation ("special"). Under a causal mask attention counts the
    pairs that meet (torch's `FlopCounterMode` counts all, and nothing for attention on a CPU).

    Parameters
    ----------
    op : str
        As the profiler names it: "aten::addmm".
    signature : Signature
    last_resort : bool
        Also rules for operators that are usually made of others (linear), for a backend that runs them whole.

    Returns
    -------
    Work, optional
        None: no rule, or one that doesn't fit these arguments.

    Cost: 0.1 us for a signature seen before, 10 us for a new one.

    Examples
    --------
    >>> mm = Signature(((4, 8), (8, 16)), ((8, 1), (16, 1)), ("float32", "float32"), ("", ""))
    >>> work("aten::mm", mm)
    Work(flops=1024.0, nbytes=896, kind='matmul', dtype='float32')
    >>> work("aten::topk", mm) is None, work("aten::t", mm).nbytes
    (True, 0.0)
    """
    if _plain(op) in FREE:
        return _ZERO
    rule = _find(op, last_resort=last_resort)
    if rule is None:
        return None
    try:
        return rule(Arguments(signature))
    except (LookupError, ValueError):  # arguments of an overload the rule doesn't know
        return None
