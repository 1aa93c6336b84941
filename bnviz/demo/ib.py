"""The classic information-plane experiment, trained and watched in seconds: twelve bits in, a rule on a sphere to learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from bnviz.capture import capture

if TYPE_CHECKING:
    from bnviz.run import Run

__all__ = ["Watched", "labels", "network", "train_and_capture", "words"]

WIDTHS = (12, 10, 7, 5, 4, 3)
DEGREE, THRESHOLD = 6, 18.528
TRAINED = 0.8
BATCH, RATE = 512, 4e-4


@dataclass(frozen=True, slots=True)
class Watched:
    """What `train_and_capture` returns.

    Parameters
    ----------
    run : Run
        Records `activations` (with `sample` of every layer at every watched epoch, and the coordinate `epoch`) and `labels`.
    epochs : tuple of int
        The watched epochs; 0 is before training.
    accuracy : float
        On the fifth of the words that was not trained on, at the end.
    """

    run: Run
    epochs: tuple[int, ...]
    accuracy: float


def words() -> Tensor:
    """All 4,096 words of twelve bits, (4096, 12) float32 of 0 and 1, in the order of counting.

    Examples
    --------
    >>> words().shape, words()[5, -3:].tolist()
    (torch.Size([4096, 12]), [1.0, 0.0, 1.0])
    """
    counting = torch.arange(4096)[:, None]
    return ((counting >> torch.arange(11, -1, -1)) & 1).float()


def labels() -> Tensor:
    """The label of each word, (4096,) int64: is there much power at degree 6 in the points that the word switches on?

    The twelve bits are the vertices v_i of an icosahedron. A word puts a unit mass on each vertex whose bit is set; its power
    in the spherical harmonics of degree l is (by the addition theorem, up to a factor) sum_ij x_i x_j P_l(v_i . v_j), with
    the Legendre polynomial P_l. Power does not change when the sphere is turned, so neither does the label. Degree 6 is the
    lowest in which the whole icosahedron has any. The threshold makes both labels nearly equally frequent.

    Examples
    --------
    >>> float(labels().double().mean())
    0.47998046875
    """
    from scipy.special import eval_legendre

    golden = (1 + math.sqrt(5)) / 2
    corners = [c for a in (-1, 1) for b in (-golden, golden) for c in ((0, a, b), (a, b, 0), (b, 0, a))]
    vertices = np.array(corners) / math.sqrt(1 + golden**2)
    kernel = eval_legendre(DEGREE, np.clip(vertices @ vertices.T, -1, 1))
    bits = words().numpy().astype(np.float64)
    power = np.einsum("ni,ij,nj->n", bits, kernel, bits)
    return torch.from_numpy((power > THRESHOLD - 1e-6).astype(np.int64))  # powers are 28 numbers, far apart beside 1e-6


class _Net(nn.Module):
    """Five hidden layers and a readout; a block is a Linear with its activation."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        pairs = itertools.pairwise(WIDTHS)
        self.hidden = nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), activation())))
        self.readout = nn.Linear(WIDTHS[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.hidden(x))  # type: ignore[no-any-return]


def network(*, activation: str = "tanh", seed: int = 0) -> nn.Module:
    """The untrained network 12-10-7-5-4-3-2: weights truncated normal of 1/sqrt(fan-in), no bias; global random state is kept.

    Parameters
    ----------
    activation : {"tanh", "relu"}
    seed : int
    """
    source = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        made = _Net({"tanh": nn.Tanh, "relu": nn.ReLU}[activation])
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            deviation = 1 / math.sqrt(layer.in_features)
            nn.init.trunc_normal_(layer.weight, std=deviation, a=-2 * deviation, b=2 * deviation, generator=source)
            nn.init.zeros_(layer.bias)
    return made


def train_and_capture(*, epochs: int = 600, watched: int = 20, activation: str = "tanh", seed: int = 0) -> Watched:
    """Train the network with Adam (4e-4, batches of 512, on 80 % of the words) and watch every layer on all words.

    Parameters
    ----------
    epochs : int
        The paper trains 8,000; by 600 this rule is learnt.
    watched : int
        Epochs at which all 4,096 words are shown to the network in eval mode, log-spaced, and epoch 0.
    activation : {"tanh", "relu"}
    seed : int
        Of weights, split and batches; the global random state is kept.

    Returns
    -------
    Watched

    Notes
    -----
    About 6 s of one core. Experiment: Shwartz-Ziv and Tishby 2017, arXiv:1703.00810, with a rule given by a formula in place of
    their file. What it does and does not show: Saxe et al. 2018; Goldfeld et al. 2019, arXiv:1810.05728.

    Examples
    --------
    >>> seen = train_and_capture(epochs=2, watched=3)
    >>> seen.epochs, dict(seen.run["activations"]["activation"].sizes)
    ((0, 1, 2), {'step': 3, 'layer': 5, 'sample': 4096, 'feature': 10})
    """
    net, inputs, wanted = network(activation=activation, seed=seed), words(), labels()
    source = torch.Generator().manual_seed(seed + 1)
    order = torch.randperm(len(inputs), generator=source)
    train, held = order[: int(TRAINED * len(order))], order[int(TRAINED * len(order)) :]
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE, fused=True)
    marks = _marks(epochs, watched)
    with capture(
        net,
        probes=["activations"],
        sample=len(inputs),
        when="eval",
        labels=wanted,
        name=f"12-10-7-5-4-3-2 {activation}",
    ) as recorder:
        scores = _look(net, inputs)
        for epoch in range(1, epochs + 1):
            _train(net, optimizer, inputs, wanted, train[torch.randperm(len(train), generator=source)])
            if epoch in marks:
                scores = _look(net, inputs)
    accuracy = float((scores[held].argmax(1) == wanted[held]).double().mean())
    return Watched(_dated(recorder.run, marks), marks, accuracy)


def _marks(epochs: int, watched: int) -> tuple[int, ...]:
    later = np.geomspace(1, epochs, max(1, watched - 1)).round().astype(int) if epochs else np.array([], int)
    return (0, *(int(epoch) for epoch in np.unique(later)))


def _look(net: nn.Module, inputs: Tensor) -> Tensor:
    net.eval()
    with torch.no_grad():
        return net(inputs)  # type: ignore[no-any-return]


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, wanted: Tensor, order: Tensor) -> None:
    net.train()
    for rows in torch.split(order, BATCH):
        loss = nn.functional.cross_entropy(net(inputs[rows]), wanted[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _dated(run: Run, marks: tuple[int, ...]) -> Run:
    """The run with the epoch of each step as a coordinate of `activations`."""
    from bnviz.run import Run

    records = {kind: run[kind] for kind in run.kinds}
    records["activations"] = records["activations"].assign_coords(epoch=("step", np.array(marks)))
    return Run(records, run.provenance)
