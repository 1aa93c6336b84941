"""Sums over Gram matrices beside the products they can't do without (floor) and beside matrices that are formed (naive).

Rows of one bench differ in what naive is: NumPy in float64, as Saxe et al. 2018 published, or torch in the data's dtype, as their
Keras code; of CKA Gram matrices made for every pair, on 3 layers, of which all layers' pairs are so many times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
from race import DEVICE, Row, plain, race
from scipy.special import logsumexp
from torch import Tensor

from bnviz.reduce.cka import cka
from bnviz.reduce.gram_pair import gram_pair
from bnviz.reduce.gram_reduce import gram_reduce

CPU = ((4000, 100), (2048, 1024))
GPU = ((16384, 512), (16384, 4096))
LAYERS = 32


def in_numpy(x: np.ndarray, variance: float) -> object:
    """Distances from norms and a product, then log-sum-exp of rows, in float64."""
    norms = np.square(x).sum(1, keepdims=True)
    return logsumexp(-(norms + norms.T - 2 * x @ x.T) / (2 * variance), axis=1)


def in_torch(x: Tensor, variance: float) -> object:
    """The same in the dtype of x."""
    norms = x.square().sum(1, keepdim=True)
    return torch.logsumexp(-(norms + norms.T - 2 * x @ x.T) / (2 * variance), 1)


def aligned(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of two layers from unbiased HSIC, the Gram matrices made."""
    rows = len(x)
    one, other = (((z - z.mean(0)) @ (z - z.mean(0)).T).fill_diagonal_(0) for z in (x, y))

    def hsic(k: Tensor, m: Tensor) -> Tensor:
        ends = k.sum() * m.sum() / (rows - 1) / (rows - 2) - 2 * (k.sum(0) @ m.sum(0)) / (rows - 2)
        return ((k * m).sum() + ends) / rows / (rows - 3)

    return hsic(one, other) / (hsic(one, one) * hsic(other, other)).sqrt()


def every_pair(layers: list[Tensor]) -> list[Tensor]:
    return [aligned(x, y) for number, x in enumerate(layers) for y in layers[number:]]


def rows(seconds: float) -> Iterator[Row]:
    """Log sums, two kernels at once, and all pairs of layers."""
    for samples, features in GPU if DEVICE == "cuda" else CPU:
        for dtype in (torch.float32, torch.bfloat16):
            yield from _one(samples, features, dtype, seconds)
    samples, features = (4096, 4096) if DEVICE == "cuda" else (2048, 1024)
    yield from _layers(samples, features, seconds)


def _one(samples: int, features: int, dtype: torch.dtype, seconds: float) -> Iterator[Row]:
    torch.manual_seed(0)
    x = torch.randn(samples, features, device=DEVICE).to(dtype)
    variance, operations = features / 4.0, samples * samples * features
    array = x.float().cpu().numpy().astype(np.float64)
    ours = partial(gram_reduce, x, variance=variance)
    peers: dict[str, Callable[[], object]] = {"torch": partial(in_torch, x, variance)}
    if DEVICE == "cpu":
        peers["NumPy"] = partial(in_numpy, array, variance)
    floor = x.float() if DEVICE == "cpu" else x
    half = floor[: samples // 2]
    for name, naive in peers.items():
        variants = {"ours": ours, "plain": plain(ours), "floor": lambda: half @ floor.T, "naive": naive}
        yield Row(
            f"gram_reduce: beside {name}", f"{samples}x{features}", dtype, race(variants, seconds), 0.0, operations
        )
    y = x.flip(1) + 1
    pair = partial(gram_pair, x, y, variance=variance, other_variance=variance)

    def formed() -> object:
        one, other = (torch.exp(-torch.cdist(z.float(), z.float()).square() / (2 * variance)) for z in (x, y))
        return (one * other).sum(), one.square().sum(), other.square().sum(), one.sum(1), other.sum(1)

    variants = {"ours": pair, "plain": plain(pair), "floor": lambda: (half @ floor.T, half @ floor.T), "naive": formed}
    yield Row("gram_pair: Gaussian", f"{samples}x{features}", dtype, race(variants, seconds), 0.0, 2 * operations)


def _layers(samples: int, features: int, seconds: float) -> Iterator[Row]:
    for count in (3, LAYERS):
        layers = [torch.randn(samples, features, device=DEVICE) for _ in range(count)]
        halves = [layer[: samples // 2] for layer in layers]
        variants: dict[str, Callable[[], object]] = {
            "ours": partial(cka, layers),
            "floor": lambda some=halves, every=layers: [a @ b.T for a, b in zip(some, every, strict=True)],
        }
        if count == 3:
            variants["naive"] = partial(every_pair, layers)
        operations = count * samples * samples * features
        yield Row(
            f"cka: {count} layers", f"{samples}x{features}", torch.float32, race(variants, seconds), 0.0, operations
        )
