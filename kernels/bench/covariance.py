"""covariance beside one product of the rows with themselves (floor), and beside torch.cov and numpy.cov (naive)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from race import DEVICE, Row, plain, race
from torch import Tensor

from bnviz.reduce.covariance import covariance

CPU = ((8192, 64), (8192, 256), (8192, 512), (4096, 1024), (2048, 2048))
GPU = ((65536, 512), (65536, 4096))


def product(x: Tensor) -> Tensor:
    """Of 16 bits there is no product that adds in float32 on a CPU."""
    x = x if x.is_cuda else x.float()
    return x.T @ x


def peers(x: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    yield "torch.cov", lambda: torch.cov(x.float().T, correction=0)
    if x.dtype == torch.float32 and not x.is_cuda:
        array = x.numpy()
        yield "numpy.cov", partial(np.cov, array, rowvar=False, ddof=0, dtype=np.float32)


def rows(seconds: float) -> Iterator[Row]:
    """Tokens of a layer; the operations are those of the upper triangle."""
    for tokens, features in GPU if DEVICE == "cuda" else CPU:
        for dtype in (torch.float32, torch.bfloat16):
            x = (torch.randn(tokens, features, device=DEVICE) + 1).to(dtype)
            ours = partial(covariance, x)
            for name, naive in peers(x):
                variants = {"ours": ours, "plain": plain(ours), "floor": partial(product, x), "naive": naive}
                yield Row(
                    f"covariance: beside {name}",
                    f"{tokens}x{features}",
                    dtype,
                    race(variants, seconds),
                    operations=float(tokens * features * (features + 1)),
                )
