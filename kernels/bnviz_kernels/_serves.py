"""What a kernel asks of every tensor that it reads."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch


def unserved(first: torch.Tensor, *others: torch.Tensor, dtypes: Collection[torch.dtype]) -> Iterator[str]:
    """Why tensors can't be read together: kinds that are more than their values, dtypes, devices, no values."""
    if first.numel() == 0:
        yield "no values"
    for one in (first, *others):
        if type(one) not in (torch.Tensor, torch.nn.Parameter):
            yield f"a {type(one).__name__}"
        if one.dtype not in dtypes:
            yield f"{one.dtype}"
        if one.device != first.device:
            yield "tensors on several devices"
