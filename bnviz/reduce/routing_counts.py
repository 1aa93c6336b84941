"""How often each expert was chosen, with which others, and what followed in the next layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnviz.errors import SchemaError

from . import _dispatch
from ._given import as_arrays, as_tensor, quiet

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]


def routing_counts(
    ids: Any, experts: int, *, weights: Any = None, together: bool = True, transition: bool = True
) -> dict[str, Any]:
    """Load, weight, companions and successors of every expert, exact to the last choice.

    Read `count` first: an expert with 0 did nothing. `together` and `transition` say which experts share tokens, in a layer
    and from one to the next; over what independence gives, count_e count_f / tokens, they say who goes with whom.

    Parameters
    ----------
    ids : Tensor or array (layers, tokens, slots) int
        Experts a token was sent to, any integer type; -1: a slot that went nowhere (dropped, or padding).
    experts : int
        Experts of a layer.
    weights : Tensor or array (layers, tokens, slots), optional
        What the router weighed each choice with; None: 1 each. Those of dropped slots are not looked at.
    together, transition : bool
        Also the pairs of that name; of arrays without either torch is not imported.

    Returns
    -------
    dict of str to Tensor (NumPy for NumPy input)
        On the device of `ids` (on the host for one without float64).
        count (layers, experts) int64: choices of the expert.
        mass (layers, experts) float64: their weights' sum; equals count without `weights`. Where a weight is NaN or infinite, so
        is the mass of its expert, and of no other.
        together (layers, experts, experts) int64: pairs of choices of one token, symmetric; an expert with itself on the
        diagonal, so it is `count` when no token has an expert twice.
        transition (layers - 1, experts, experts) int64: pairs of choices of one token, in a layer and in the next.

    Raises
    ------
    SchemaError
        Shapes that do not fit, ids that are no integers or not below `experts`.

    Notes
    -----
    With marks m[t, e] = how often token t chose e: count = sum_t m, together = m'm, transition = m' m_next. All are sums over
    tokens: those of parts of the tokens add up to those of the whole. Counts are exact.

    mass: float64, added in the order of the tokens, so the same every run; error below choices x 1.1e-16 of the weights' sizes
    added up. On a GPU the Triton twin (`BNVIZ_KERNELS`) adds whole multiples of one unit, which is as repeatable: each weight is
    rounded by at most 2**-62 x tokens x slots x the layer's greatest weight, both rounded up to powers of two. On a GPU without
    it the last bits may differ between runs.

    Cost on a CPU, up to 8 experts a slot: products of blocks of marks, 2 layers x tokens x experts**2 multiplications each;
    beyond: one addition a pair, layers x tokens x slots**2. Memory beside the results: 16 bytes x tokens x slots, 2 MiB of
    blocks, and 4 bytes for each of the pairs' cells.

    Examples
    --------
    >>> import torch
    >>> ids = torch.tensor([[[0, 1], [0, 2], [-1, 1]], [[2, 0], [1, 1], [0, -1]]])
    >>> seen = routing_counts(ids, 3)
    >>> seen["count"].tolist(), seen["together"][0].tolist()
    ([[2, 2, 1], [2, 2, 1]], [[2, 1, 1], [1, 2, 0], [1, 0, 1]])
    >>> seen["transition"][0].tolist()
    [[1, 2, 1], [2, 0, 1], [0, 2, 0]]
    """
    _check(ids, experts, weights)
    if isinstance(ids, np.ndarray) and isinstance(weights, np.ndarray | None) and _dispatch.mode() != "interpret":
        return _of_arrays(ids, experts, weights, together, transition)
    import torch

    chosen, weighed = as_tensor(ids).detach(), None if weights is None else as_tensor(weights).detach()
    with quiet(chosen):
        out = _twin(chosen, experts, weighed, together, transition)
        if out is None and chosen.device.type in ("cpu", "mps"):
            host = None if weighed is None else _exact(weighed.cpu())
            found = _of_arrays(chosen.cpu().numpy(), experts, host, together, transition)
            return found if isinstance(ids, np.ndarray) else {n: torch.from_numpy(v) for n, v in found.items()}
        if out is None:
            out = _there(chosen, experts, weighed, together, transition)
    return as_arrays(out) if isinstance(ids, np.ndarray) else out


def _check(ids: Any, experts: int, weights: Any) -> None:
    """What can be said without looking at a value."""
    if ids.ndim != 3 or "int" not in str(ids.dtype):
        raise SchemaError(
            f"routing_counts expects integer ids (layers, tokens, slots); found {tuple(ids.shape)} of {ids.dtype}."
        )
    if experts < 1:
        raise SchemaError(f"experts must be at least 1; found {experts}.")
    if weights is not None and tuple(weights.shape) != tuple(ids.shape):
        raise SchemaError(f"weights must have the shape of ids, {tuple(ids.shape)}; found {tuple(weights.shape)}.")


def _check_range(low: int, high: int, experts: int) -> None:
    if low < -1 or high >= experts:
        raise SchemaError(f"ids must lie between -1 (dropped) and experts - 1 = {experts - 1}; found {low} to {high}.")


def _of_arrays(ids: Array, experts: int, weights: Array | None, together: bool, transition: bool) -> dict[str, Array]:
    if ids.size:
        _check_range(int(ids.min()), int(ids.max()), experts)
    count, mass = _loads(ids, experts, weights)
    out: dict[str, Array] = {"count": count, "mass": mass}
    if together or transition:
        from ._routing_pairs import on_the_host

        out |= on_the_host(ids, experts, count, together, transition)
    return out


def _loads(ids: Array, experts: int, weights: Array | None) -> tuple[Array, Array]:
    """Count and mass, a layer at a time: each expert's weights are added in the order of the tokens."""
    count = np.zeros((len(ids), experts), np.int64)
    mass = np.zeros((len(ids), experts))
    for layer, chosen in enumerate(ids):
        place = chosen.astype(np.intp).ravel()
        place += 1  # dropped slots, whatever their weight, are counted at 0 and cut off
        count[layer] = np.bincount(place, minlength=experts + 1)[1:]
        if weights is not None:
            mass[layer] = np.bincount(place, weights[layer].ravel(), experts + 1)[1:]
    return count, count.astype(np.float64) if weights is None else mass


def _there(ids: Tensor, experts: int, weights: Tensor | None, together: bool, transition: bool) -> dict[str, Tensor]:
    """On a device, by torch's operations."""
    import torch

    from ._routing_pairs import pairs

    place = ids.long()
    if ids.numel():
        low, high = torch.aminmax(place)
        _check_range(int(low), int(high), experts)
    place = (place + 1 + torch.arange(len(ids), device=ids.device)[:, None, None] * (experts + 1)).flatten()
    one = torch.ones((), dtype=torch.int64, device=ids.device)
    added = torch.zeros(len(ids) * (experts + 1), dtype=torch.int64, device=ids.device)
    count = added.scatter_add_(0, place, one.expand(place.shape)).view(len(ids), -1)[:, 1:].contiguous()
    mass = count.double()
    if weights is not None:
        added = torch.zeros(added.shape, dtype=torch.float64, device=ids.device)
        mass = added.index_add_(0, place, weights.double().flatten()).view(len(ids), -1)[:, 1:].contiguous()
    return {"count": count, "mass": mass} | pairs(ids, experts, count, together, transition)


def _twin(
    ids: Tensor, experts: int, weights: Tensor | None, together: bool, transition: bool
) -> dict[str, Tensor] | None:
    """What the Triton twin makes of it, where it runs."""
    import torch

    twin = _dispatch.twin("routing_counts", ids, (experts, weights))
    if twin is None:
        return None
    low, high = torch.aminmax(ids)
    _check_range(int(low), int(high), experts)
    found: dict[str, Tensor] | None = _dispatch.tried(
        "routing_counts", twin, ids, experts, weights=weights, together=together, transition=transition
    )
    return found


def _exact(weights: Tensor) -> Array:
    """As an array; of what NumPy has no type for, in one that holds every value."""
    import torch

    found: Array = (weights.float() if weights.dtype == torch.bfloat16 else weights).numpy()
    return found
