"""The information plane on records made by hand: what is measured, what is judged, what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from bnviz.diagnostics.information_plane import information_plane, judge
from bnviz.errors import NotCaptured, SchemaError, UnknownName
from bnviz.estimators.binned import binned
from bnviz.estimators.kde import kde

DIMS = ("step", "layer", "sample", "feature")
ROWS = 512


def record(steps: list[list[np.ndarray]], **coords: Any) -> xr.Dataset:
    """Steps of layers of (sample, feature), padded with NaN to the widest."""
    width = max(layer.shape[1] for step in steps for layer in step)
    values = np.full((len(steps), len(steps[0]), len(steps[0][0]), width), np.nan, np.float32)
    for s, step in enumerate(steps):
        for at, layer in enumerate(step):
            values[s, at, :, : layer.shape[1]] = layer
    paths = np.array([f"net.{n}" for n in range(values.shape[1])], dtype=object)
    return xr.Dataset({"activation": (DIMS, values)}, {"path": ("layer", paths), **coords}, attrs={"model": "by hand"})


def labels() -> xr.Dataset:
    return xr.Dataset({"label": ("sample", np.arange(ROWS) % 2)})


def spread(bits: int) -> np.ndarray:
    """A layer that tells exactly 2^bits groups of samples apart, from 0 to 100, each group holding both labels."""
    group = (np.arange(ROWS) // 2) % 2**bits
    return (100.0 * group / max(1, 2**bits - 1))[:, None]


def by_label(bits: int) -> np.ndarray:
    """The same with the label as a second feature: one bit more."""
    return np.concatenate([spread(bits), 100.0 * (np.arange(ROWS) % 2)[:, None]], 1)


def alone() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(ROWS, 8))


def test_bits_on_paper_with_both_estimators() -> None:
    result = information_plane(record([[by_label(3), spread(2)]]), labels())
    np.testing.assert_allclose(result["i_xt"].values[:, 0], [[4, 2], [4, 2]], atol=1e-4)
    np.testing.assert_allclose(result["i_ty"].values[:, 0], [[1, 0], [1, 0]], atol=1e-4)
    np.testing.assert_allclose(result["i_xt_lower"].sel(estimator="kde").values, [[4, 2]], atol=1e-4)
    assert np.isnan(result["i_xt_lower"].sel(estimator="binned")).all()
    assert result["i_ty_valid"].values[:, 0].tolist() == [[True, False], [True, False]]
    assert result["width"].values.tolist() == [2, 1]
    assert result.attrs["label_entropy"] == pytest.approx(1)
    assert result.attrs["input_ceiling"] == pytest.approx(9)
    assert result["i_xt"].attrs["units"] == "bit"


def test_numbers_are_those_of_the_estimators() -> None:
    """Padding is no feature, the range is that of all steps, and seeds are passed on."""
    draw = np.random.default_rng(1)
    early, late, wide = draw.normal(size=(ROWS, 2)), 3 * draw.normal(size=(ROWS, 2)), draw.normal(size=(ROWS, 4))
    result = information_plane(record([[early, wide], [late, wide]]), labels(), bins=12, noise=0.2, seed=7)
    values = record([[early, wide], [late, wide]])["activation"].values[:, 0, :, :2]
    edges = (float(values.min()), float(values.max()))
    y = labels()["label"].values
    for row, found in (
        (0, binned(values[0], y, bins=12, bin_range=edges, seed=7)),
        (1, kde(values[0], y, noise=0.2, seed=7)),
    ):
        assert found.i_ty is not None
        assert result["i_xt"].values[row, 0, 0] == pytest.approx(found.i_xt.bits)
        assert result["i_ty"].values[row, 0, 0] == pytest.approx(found.i_ty.bits)
        assert result["i_ty_null"].values[row, 0, 0] == pytest.approx(found.i_ty.null)
        assert result["i_xt_interval_low"].values[row, 0, 0] == pytest.approx(found.i_xt.interval[0])
    assert result.attrs["ranges"][0] == pytest.approx(list(edges))
    assert result.attrs["scales"] == {"binned": "12 bins", "kde": "noise variance 0.2"}


def test_without_labels_there_is_no_label_axis() -> None:
    result = information_plane(record([[spread(2)]]))
    assert "i_ty" not in result
    assert judge(result).subtitle.startswith("I(X;T) at 30 bins")


def test_a_layer_that_was_not_seen_at_a_step_is_not_defined() -> None:
    absent = np.full((ROWS, 1), np.nan)
    result = information_plane(record([[spread(2), spread(1)], [spread(2), absent]]), labels(), estimators=["binned"])
    assert np.isnan(result["i_xt"].values[0, 1, 1])
    assert not result["i_xt_valid"].values[0, 1, 1]
    table = result["i_xt_reason"].attrs["table"]
    assert table[int(result["i_xt_reason"].values[0, 1, 1])] == "not captured"


def test_compression_is_said_when_every_estimator_sees_it() -> None:
    steps = [[alone(), by_label(b)] for b in (2, 4, 3, 1)]
    result = information_plane(record(steps), labels())
    judgement = judge(result)
    assert judgement.title == "Layer 1 loses 3.0 bit of I(X;T) after a peak; layer 0 at the ceiling"
    codes = {finding.code: finding for finding in judgement.findings}
    assert codes["information_plane/compression"].value == pytest.approx(3, abs=1e-3)
    assert codes["information_plane/compression"].where == {"layer": 1, "path": "net.1"}
    assert codes["information_plane/ceiling"].where == {"layer": 0, "path": "net.0"}
    assert all(finding.severity == "note" for finding in judgement.findings)
    assert any("Permuted labels reach up to" in caveat and "layer 0" in caveat for caveat in judgement.caveats)


def test_a_layer_that_only_gains_does_not_compress() -> None:
    result = information_plane(record([[by_label(b)] for b in (1, 2, 3, 4)]), labels())
    assert judge(result).title == "No layer loses more than 0.25 bit of I(X;T) after its peak"


def test_bits_lost_at_a_ceiling_are_no_compression() -> None:
    """From a sample in each cell to two: only the last value is valid, so nothing is claimed."""
    narrow = np.repeat(alone()[::2], 2, 0)
    result = information_plane(record([[alone()], [alone()], [alone()], [narrow]]), estimators=["binned"])
    assert result["i_xt_valid"].values.ravel().tolist() == [False, False, False, True]
    assert judge(result).findings == ()


def test_a_loss_seen_by_one_estimator_only_is_not_claimed() -> None:
    steps = [[by_label(b)] for b in (2, 4, 3, 1)]
    result = information_plane(record(steps), labels())
    result["i_xt"][1] = result["i_xt"][1].max()
    assert not judge(result).title.startswith("Layer 0 loses")


def test_a_label_lost_between_layers_is_found() -> None:
    result = information_plane(record([[by_label(3), spread(3)]]), labels())
    codes = {finding.code: finding for finding in judge(result).findings}
    lost, silent = codes["information_plane/label_lost"], codes["information_plane/silent"]
    assert lost.severity == "medium"
    assert lost.where == {"layer": 1, "path": "net.1"}
    assert lost.value == pytest.approx(1, abs=0.05)
    assert silent.where == {"layer": 1, "path": "net.1"}
    assert judge(result, label_loss=2.0).findings == (silent,)


def test_a_fixed_range_made_for_tanh_is_doubted_on_rectified_outputs() -> None:
    outputs = np.maximum(np.random.default_rng(2).normal(size=(ROWS, 2)), 0) * 3
    result = information_plane(record([[outputs]]), labels(), bin_range=(-1, 1))
    assert not result["i_xt_valid"].sel(estimator="binned").any()
    assert result["i_xt_valid"].sel(estimator="kde").all()
    assert any("may be made by the bins" in caveat for caveat in judge(result).caveats)
    assert result.attrs["bin_range"] == [-1.0, 1.0]


def test_more_information_in_a_later_layer_is_called_impossible() -> None:
    result = information_plane(record([[by_label(2), by_label(4)]]), labels())
    assert any("no true information can" in caveat for caveat in judge(result).caveats)


def test_epochs_are_carried_along() -> None:
    steps = record([[spread(1)], [spread(2)]], epoch=("step", [0, 40]))
    assert information_plane(steps, estimators=["binned"])["epoch"].values.tolist() == [0, 40]


def test_titles_fit_whatever_the_layers() -> None:
    many = [spread(b % 5) for b in range(40)]
    falling = [[*many], [*many], [spread(0)] * 40]
    falling[1] = [by_label(4)] * 40
    assert len(judge(information_plane(record(falling), labels(), estimators=["binned"])).title) <= 90


def test_what_does_not_fit_is_said() -> None:
    good = record([[spread(2)]])
    with pytest.raises(NotCaptured, match="holds no outputs"):
        information_plane(xr.Dataset())
    with pytest.raises(SchemaError, match="3 labels for 512 kept samples"):
        information_plane(good, xr.Dataset({"label": ("sample", [0, 1, 1])}))
    with pytest.raises(SchemaError, match=r"no 'label' \(sample\)"):
        information_plane(good, xr.Dataset())
    with pytest.raises(UnknownName, match="did you mean 'binned'"):
        information_plane(good, estimators=["bined"])
    with pytest.raises(SchemaError, match="no estimator was named"):
        information_plane(good, estimators=[])
    with pytest.raises(SchemaError, match="bin_range is 'tanh'"):
        information_plane(good, bin_range="tanh")  # type: ignore[arg-type]
    with pytest.raises(SchemaError, match="no layer has two samples"):
        information_plane(record([[np.full((3, 1), np.nan)]]))
