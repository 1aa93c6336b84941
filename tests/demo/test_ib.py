"""The classic experiment: its rule, its network, and what its plane must show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnviz.demo.ib import Watched, labels, network, train_and_capture, words
from bnviz.diagnostics.information_plane import information_plane, judge


@pytest.fixture(scope="module")
def watched() -> Watched:
    return train_and_capture(epochs=300, watched=12)


def rotation() -> np.ndarray:
    """A turn of the icosahedron by 72 degrees about one of its vertices, as a permutation of the twelve bits."""
    golden = (1 + 5**0.5) / 2
    corners = [c for a in (-1, 1) for b in (-golden, golden) for c in ((0, a, b), (a, b, 0), (b, 0, a))]
    vertices = np.array(corners) / np.sqrt(1 + golden**2)
    axis, angle = vertices[0], 2 * np.pi / 5
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    onto = np.linalg.norm((vertices @ turn.T)[:, None] - vertices[None], axis=-1)
    assert onto.min(1).max() < 1e-9
    return onto.argmin(1)


def test_the_label_does_not_change_when_the_sphere_is_turned() -> None:
    turn = rotation()
    assert sorted(turn) == list(range(12))
    assert (turn != np.arange(12)).sum() == 10
    moved = words()[:, turn]
    index = (moved.long() * (2 ** torch.arange(11, -1, -1))).sum(1)
    assert torch.equal(labels()[index], labels())


def test_the_labels_are_nearly_balanced_and_not_a_function_of_the_number_of_bits() -> None:
    share = float(labels().double().mean())
    assert -share * np.log2(share) - (1 - share) * np.log2(1 - share) == pytest.approx(0.9988, abs=1e-4)
    six = labels()[words().sum(1) == 6]
    assert 0 < float(six.double().mean()) < 1


def test_the_network_is_the_same_for_a_seed_and_leaves_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    one, again, other = network(seed=3), network(seed=3), network(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_it_learns_and_is_watched_in_eval_mode_only(watched: Watched) -> None:
    record = watched.run["activations"]
    assert watched.accuracy > 0.95
    assert record.sizes["step"] == len(watched.epochs) == 12
    assert record["epoch"].values.tolist() == list(watched.epochs)
    assert record["activation"].shape == (12, 5, 4096, 10)
    assert np.abs(record["activation"].values[np.isfinite(record["activation"].values)]).max() <= 1
    np.testing.assert_array_equal(watched.run["labels"]["label"].values, labels().numpy())


def test_the_plane_shows_what_the_literature_saw_and_says_what_it_is_worth(watched: Watched) -> None:
    result = information_plane(
        watched.run["activations"], watched.run["labels"], estimators=["binned"], bin_range=(-1, 1)
    )
    one = result.sel(estimator="binned")
    kept = one["i_xt"].values
    assert (kept[:, :2] > 0.99 * 12).all()  # the wide layers: at the ceiling from the first epoch
    assert not one["i_xt_valid"].values[:, :2].any()
    assert (one["i_ty_null"].values[:, :2] > 0.98).all()  # and any labels would fit them
    assert not one["i_ty_valid"].values[:, :2].any()
    for deep in (3, 4):
        peak = int(kept[:, deep].argmax())
        assert 0 < peak < len(kept) - 1  # gains first
        assert kept[peak, deep] - kept[0, deep] > 0.3
        assert kept[peak, deep] - kept[-1, deep] > 2  # then loses
    assert judge(result).title.startswith("Layers 3 and 4 lose up to")
