"""How often each feature's bin met each label: the table that information of single features is computed from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnviz.errors import SchemaError

from . import _dispatch
from ._bins import blocks
from ._given import as_arrays, as_tensor, like

if TYPE_CHECKING:
    from torch import Tensor

Ints = npt.NDArray[np.int64]

CELLS = 1 << 14  # of a block of features' tables, int64: 128 KiB
PAIRS = 1 << 16  # of a block, int64: 512 KiB


def joint_histogram(codes: Any, labels: Any, *, bins: int, classes: int) -> Any:
    """Rows with each pair of a feature's code and a label, counted exactly.

    Tables of chunks of rows add up to that of the whole. What is read from them for feature j, with n the rows:
    H(T_j) from `counts[j].sum(1) / n`, H(Y) from `counts[j].sum(0) / n`, I(T_j;Y) = H(T_j) + H(Y) - H(`counts[j] / n`). Plug-in
    numbers: with few rows a cell they are too high, by about (bins - 1)(classes - 1) / (2 n ln 2) bit.

    Parameters
    ----------
    codes : array or Tensor (rows, features) int
        Codes 0 to bins - 1, any integer type: `bin_indices` makes them, then `bins` is its bins + 2. Values that are not
        finite have none: `bin_indices` refuses them.
    labels : array or Tensor (rows,) int
        0 to classes - 1.
    bins, classes : int
        At least 1.

    Returns
    -------
    array or Tensor (features, bins, classes) int64
        Like `codes`, on its device.

    Raises
    ------
    SchemaError
        Shapes that do not fit, codes or labels that are no integers or out of range.

    Notes
    -----
    counts[j, b, y] = sum over rows of [codes = b][label = y]. One addition a code, on a CPU in blocks of features whose tables
    take 128 KiB and of rows; memory beside the result: 1.5 MiB. On a GPU the Triton twin (`BNVIZ_KERNELS`) sorts rows by
    label and adds up each feature's codes between two labels in registers; without it torch counts.

    Examples
    --------
    >>> joint_histogram(np.array([[0, 1], [0, 0], [1, 1]]), np.array([0, 1, 1]), bins=2, classes=2).tolist()
    [[[1, 1], [0, 1]], [[0, 1], [1, 1]]]
    """
    _check(codes, labels, bins, classes)
    if not isinstance(codes, np.ndarray) and codes.device.type not in ("cpu", "mps"):
        return _there(codes, labels, bins, classes)
    if (
        _dispatch.mode() == "interpret"
        and (found := _twin(as_tensor(codes), as_tensor(labels), bins, classes)) is not None
    ):
        return as_arrays(found) if isinstance(codes, np.ndarray) else found
    table, label = _array(codes), _array(labels)
    if table.size:
        _check_range("codes", int(table.min()), int(table.max()), bins)
    if label.size:
        _check_range("labels", int(label.min()), int(label.max()), classes)
    return like(_counted(table, label.astype(np.int64), bins, classes), codes)


def _counted(codes: npt.NDArray[Any], labels: Ints, bins: int, classes: int) -> Ints:
    rows, features = codes.shape
    out = np.zeros((features, bins * classes), np.int64)
    width = max(1, min(features, CELLS // (bins * classes)))
    for first in range(0, features, width):
        some = codes[:, first : first + width]
        many = some.shape[1]
        base = np.arange(many, dtype=np.int64) * (bins * classes)
        for part in blocks(rows, many, PAIRS):
            pair = some[part].astype(np.int64)
            pair *= classes
            pair += base
            pair += labels[part, None]
            out[first : first + many] += np.bincount(pair.ravel(), minlength=many * bins * classes).reshape(many, -1)
    return out.reshape(features, bins, classes)


def _there(codes: Tensor, labels: Any, bins: int, classes: int) -> Tensor:
    """On a device: by the twin, else by torch's operations."""
    import torch

    label = as_tensor(labels).to(codes.device)
    if (found := _twin(codes, label, bins, classes)) is not None:
        return found
    _check_there(codes, label, bins, classes)
    rows, features = codes.shape
    base = torch.arange(features, device=codes.device) * (bins * classes)
    out = torch.zeros(features * bins * classes, dtype=torch.int64, device=codes.device)
    one = out.new_ones(())
    for part in blocks(rows, features, 1 << 24):
        pair = (codes[part].long() * classes + base + label[part, None].long()).flatten()
        out.scatter_add_(0, pair, one.expand(pair.shape))
    return out.view(features, bins, classes)


def _twin(codes: Tensor, labels: Tensor, bins: int, classes: int) -> Tensor | None:
    """What the Triton twin makes of it, where it runs."""
    twin = _dispatch.twin("joint_histogram", codes, (labels, bins, classes))
    if twin is None:
        return None
    _check_there(codes, labels, bins, classes)
    found: Tensor | None = _dispatch.tried("joint_histogram", twin, codes, labels, bins=bins, classes=classes)
    return found


def _check(codes: Any, labels: Any, bins: int, classes: int) -> None:
    """What can be said without looking at a value."""
    shapes = tuple(codes.shape), tuple(labels.shape)
    if codes.ndim != 2 or labels.ndim != 1 or len(codes) != len(labels):
        raise SchemaError(
            f"joint_histogram expects codes (rows, features) and labels (rows,); found {shapes[0]} and {shapes[1]}."
        )
    for name, values in (("codes", codes), ("labels", labels)):
        if "int" not in str(values.dtype):
            raise SchemaError(f"joint_histogram: {name} are {values.dtype}, expected integers; bin_indices makes them.")
    if bins < 1 or classes < 1:
        raise SchemaError(f"joint_histogram: bins is {bins} and classes {classes}, expected at least 1 of each.")


def _check_range(name: str, low: int, high: int, limit: int) -> None:
    if low < 0 or high >= limit:
        raise SchemaError(f"joint_histogram: {name} lie between {low} and {high}, expected 0 to {limit - 1}.")


def _check_there(codes: Tensor, labels: Tensor, bins: int, classes: int) -> None:
    import torch

    for name, values, limit in (("codes", codes, bins), ("labels", labels, classes)):
        if values.numel():
            low, high = torch.aminmax(values if values.dtype.itemsize < 2 or values.dtype.is_signed else values.long())
            _check_range(name, int(low), int(high), limit)


def _array(values: Any) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = values if isinstance(values, np.ndarray) else values.detach().cpu().numpy()
    return found
