"""What has been observed so far: small tensors waiting on their device, then rows on the host, under one ceiling of bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnviz.assemble import Row, inner_dims, merge, token_dim
from bnviz.errors import CaptureError, SchemaError
from bnviz.observation import Context, Site
from bnviz.schema import Variable

_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def budget_bytes(budget: str | int) -> int:
    """A budget in bytes.

    Examples
    --------
    >>> budget_bytes("1 GiB"), budget_bytes(4096)
    (1073741824, 4096)
    """
    if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0:
        return budget
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", str(budget))
    if not found or found[2].upper() not in _UNITS:
        raise CaptureError(
            f"budget={budget!r}: expected bytes or a text like '512 MiB'; units: B, KB, MB, GB, KiB, MiB, GiB."
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(slots=True)
class _Waiting:
    record: str
    site: Site
    context: Context
    values: dict[str, Tensor]
    valid: dict[str, Tensor | None]


class Shelf:
    """Rows by record, step, layer and kind.

    Parameters
    ----------
    declared : mapping of str to tuple of Variable
        By record.
    ceiling : int
        Bytes that may be kept, host and device together. What would pass it is not kept.
    """

    def __init__(self, declared: Mapping[str, tuple[Variable, ...]], ceiling: int) -> None:
        self._declared = {record: {v.name: v for v in some} for record, some in declared.items()}
        self._waiting: list[_Waiting] = []
        self.rows: dict[str, dict[tuple[int, int, str], Row]] = {}
        self.ceiling, self.held = ceiling, 0
        self.full_at: int | None = None
        self.fresh: set[int] = set()

    def put(
        self,
        record: str,
        site: Site,
        context: Context,
        values: Mapping[str, Tensor],
        valid: Mapping[str, Tensor | None],
    ) -> bool:
        """Keep an observation; False when the ceiling leaves no room. Nothing is copied from a GPU here."""
        declared = self._declared[record]
        for name in values:
            if name not in declared:
                raise SchemaError(
                    f"Probe {record!r} gave {name!r}, which it does not declare; declared: {', '.join(declared)}."
                )
        size = sum(v.numel() * v.element_size() for v in values.values()) + self._layout_bytes(record, values)
        if self.full_at is not None or self.held + size > self.ceiling:
            self.full_at = context.step if self.full_at is None else self.full_at
            return False
        self.held += size
        kept = {name: _own(value) for name, value in values.items()}
        self._waiting.append(_Waiting(record, site, context, kept, dict(valid)))
        return True

    def _layout_bytes(self, record: str, values: Mapping[str, Tensor]) -> int:
        """Of the mask, `sequence` and `position` that come with each token-like axis."""
        axes: dict[str, int] = {}
        for name, value in values.items():
            variable = self._declared[record][name]
            dim = token_dim(variable)
            if dim is not None:
                axes[dim] = value.shape[0] * value.shape[1 + inner_dims(variable).index(dim)]
        return 9 * sum(axes.values())

    def drain(self) -> None:
        """Bring what waits to the host and merge decode steps. Called between forwards: copying waits for the device."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            values = {name: to_host(value) for name, value in one.values.items()}
            valid = {dim: mask.cpu().numpy() for dim, mask in one.valid.items() if mask is not None}
            self._fill_valid(one.record, values, valid)
            row = Row(
                one.context.step,
                one.site.layer,
                one.site.part,
                one.context.phase,
                values,
                valid,
                _past(one.context, valid),
            )
            at = (row.step, row.layer, row.kind)
            known = self.rows.setdefault(one.record, {})
            if at in known:
                before = known[at].nbytes
                merge(known[at], row, self._declared[one.record])
                self.held += known[at].nbytes - before - row.nbytes
            else:
                known[at] = row
            self.fresh.add(row.step)

    def _fill_valid(self, record: str, values: Mapping[str, np.ndarray], valid: dict[str, np.ndarray]) -> None:
        """An all-true mask where the model gave none, so that later masks of the same step can join it."""
        for name, value in values.items():
            dim = token_dim(self._declared[record][name])
            if dim is None:
                continue
            shape = (value.shape[0], value.shape[1 + inner_dims(self._declared[record][name]).index(dim)])
            if dim not in valid or valid[dim].shape != shape:
                valid[dim] = np.ones(shape, bool)

    def of_step(self, step: int) -> dict[str, list[Row]]:
        """All rows of one step, by record."""
        found = {record: [r for (s, _, _), r in some.items() if s == step] for record, some in self.rows.items()}
        return {record: some for record, some in found.items() if some}

    @property
    def waiting(self) -> bool:
        """Something has not been drained."""
        return bool(self._waiting)


def _past(context: Context, valid: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Tokens each sequence had before this call, padding left out."""
    if context.past == 0 or not valid:
        return None
    keys = valid.get("key")
    if keys is not None and keys.shape[1] > context.past:
        counted: np.ndarray = keys[:, : context.past].sum(1)
        return counted
    return np.full(len(next(iter(valid.values()))), context.past)


def to_host(value: Tensor) -> np.ndarray:
    """A tensor as NumPy; bf16, fp16 and fp8 become float32, which holds each of their values exactly."""
    if value.is_floating_point() and value.dtype not in (torch.float32, torch.float64):
        value = value.float()
    return value.numpy(force=True)


def _own(value: Tensor) -> Tensor:
    """A tensor that shares no memory with the model, so that a later in-place operation cannot change it."""
    value = value.detach()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value if whole and value._base is None else value.clone()
