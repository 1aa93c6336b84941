"""The gradients probe: its numbers on paper, windows, padding, options, and a linear model end to end."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnviz
from bnviz.errors import CaptureError, UnknownName
from bnviz.observation import Context, GradientSeen, Site
from bnviz.probes.gradients import Gradients

NAN = math.nan


def seen(added: list[float], **given: Any) -> GradientSeen:
    site, context = Site("gradient", "layers.0", 0), Context(0, 0, "forward", valid=given.pop("valid", None))
    wide = {n: torch.tensor(v, dtype=torch.float64) for n, v in given.items() if isinstance(v, list)}
    other = {n: v for n, v in given.items() if not isinstance(v, list)}
    weights = wide.pop("weights", torch.where(torch.tensor(added).isnan(), NAN, 2.0).double())
    sizes = torch.tensor([10 * (n + 1) for n in range(len(added))])
    return GradientSeen(
        site,
        context,
        sizes,
        weights,
        torch.tensor(added, dtype=torch.float64),
        other.pop("nonfinite", 0),
        **wide,
        **other,
    )


def numbers(kept: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in kept.items() if value.numel() == 1}


def test_norms_of_a_layer_are_those_of_its_parameters_together() -> None:
    kept = numbers(Gradients().observe(seen([3.0, 4.0], weights=[6.0, 8.0], scale=1.0, whole=13.0)))
    assert kept == {
        "gradient_norm": 5,
        "parameter_norm": 10,
        "reached": 1,
        "nonfinite": 0,
        "loss_scale": 1,
        "model_norm": 13,
    }


def test_parameters_without_a_gradient_are_left_out_and_told() -> None:
    kept = numbers(Gradients().observe(seen([3.0, NAN])))
    assert kept["gradient_norm"] == 3
    assert kept["parameter_norm"] == 2
    assert kept["reached"] == pytest.approx(10 / 30)
    kept = numbers(Gradients().observe(seen([NAN, NAN])))
    assert kept["reached"] == 0
    assert "gradient_norm" not in kept
    assert "reached" not in Gradients().observe(seen([]))


def test_a_sum_that_is_not_known_is_nan() -> None:
    assert math.isnan(float(Gradients().observe(seen([3.0, NAN], weights=[1.0, 1.0]))["gradient_norm"]))


def test_the_optimizer_s_own_numbers() -> None:
    kept = numbers(Gradients().observe(seen([3.0, NAN], weights=[4.0, 3.0], total=[6.0, 8.0], changes=[0.4, NAN])))
    assert kept["total_norm"] == 10
    assert kept["update_ratio"] == pytest.approx(0.1)


def test_padding_does_not_count_in_the_gradient_of_outputs() -> None:
    output = torch.tensor([[100.0, 1.0, 3.0]])
    probe = Gradients(per_token=True)
    kept = probe.observe(seen([], output=output, valid=torch.tensor([[False, True, True]])))
    assert float(kept["output_mean"]) == 2
    assert float(kept["output_max"]) == 3
    assert kept["output_norm"].tolist() == [[100, 1, 3]]  # the recorder leaves padding out
    kept = Gradients().observe(seen([], output=output, valid=torch.ones(1, 2, dtype=torch.bool)))
    assert float(kept["output_max"]) == 100  # a mask of other rows
    assert "output_norm" not in kept


def test_drift_and_diffusion_of_a_window_on_paper() -> None:
    """Gradients (6, 0) and (0, 8): mean (3, 4), deviations of length 5 each; weights of norm 2."""
    probe = Gradients(batches=2)
    rows = [torch.zeros(16), torch.zeros(16)]
    rows[0][0], rows[1][1] = 6, 8
    first, second = (probe.observe(seen([float(row.norm())], projection=row)) for row in rows)
    assert not {"drift", "diffusion", "cosine"} & set(first)
    assert numbers(second)["drift"] == pytest.approx(2.5)
    assert numbers(second)["diffusion"] == pytest.approx(2.5)
    assert numbers(second)["cosine"] == 0
    again = probe.observe(seen([6.0], projection=rows[0]))  # a new window
    assert "drift" not in again
    assert "cosine" in again


def test_exact_windows_take_the_mean_they_are_shown() -> None:
    probe = Gradients(batches=2, drift="exact")
    assert "drift" not in probe.observe(seen([6.0]))
    kept = numbers(probe.observe(seen([8.0], mean=[5.0], window=2)))
    assert kept["drift"] == pytest.approx(2.5)
    assert kept["diffusion"] == pytest.approx(2.5)


def test_what_it_wants_is_what_it_is_asked_for() -> None:
    assert (Gradients().wants.projection, Gradients().wants.window, Gradients().wants.changes) == (True, 0, False)
    assert (Gradients(drift="exact", batches=5, updates=True).wants.window) == 5
    assert not Gradients(drift="off").wants.projection
    assert not Gradients.spec.default


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UnknownName, match="did you mean 'exact'"):
        Gradients(drift="exakt")
    with pytest.raises(CaptureError, match="batches=1: expected the steps of a window, 2 or more"):
        Gradients(batches=1)


def test_a_linear_model_on_paper() -> None:
    """y = w x, loss y^2: gradient 2 y x. With w = (1, 2) and x = (3, 4): y = 11, gradient (66, 88), of norm 110."""
    net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Identity())
    net[0].weight.data = torch.tensor([[1.0, 2.0]])
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with bnviz.capture(net, probes=["gradients"], updates=True, strict=True) as recorder:
        for _ in range(2):
            net(torch.tensor([[3.0, 4.0]])).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    record = recorder.run["gradients"].sel(kind="block", layer=0)
    after = 11 - 0.01 * (66 * 3 + 88 * 4)  # y once the weights have moved
    assert record["gradient_norm"].values == pytest.approx([110, 2 * after * 5])
    assert record["total_norm"].values == pytest.approx([110, 2 * after * 5])
    assert record["parameter_norm"].values[0] == pytest.approx(5**0.5)
    assert record["update_ratio"].values[0] == pytest.approx(1.1 / 5**0.5)
    assert record["output_mean"].values == pytest.approx([22, 2 * after])  # dL/dy = 2 y
    assert recorder.run["gradients"]["loss_scale"].values.tolist() == [1, 1]


def test_noise_and_signal_are_told_apart() -> None:
    """Gradients that agree have a ratio far above 1, pure noise has 1 / batches^(1/2)."""
    generator = torch.Generator().manual_seed(0)
    for signal, low, high in ((0.0, 0.8, 1.25), (100.0, 50.0, 1e9)):
        net = nn.Sequential(nn.Linear(3000, 1, bias=False), nn.Identity())
        with bnviz.capture(net, probes=["gradients"], batches=16, strict=True) as recorder:
            for _ in range(16):
                net(torch.randn(1, 3000, generator=generator) + signal).sum().backward()
        record = recorder.run["gradients"].isel(step=15, layer=0).sel(kind="block")
        ratio = float(record["drift"] / record["diffusion"]) * (4 if signal == 0 else 1)
        assert low < ratio < high


def test_a_padded_batch_of_a_transformer(load_model: Any) -> None:
    import copy

    model = copy.deepcopy(load_model("llama-bard")).train()
    ids, mask = torch.arange(3, 23).reshape(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    with bnviz.capture(model, probes=["gradients"], per_token=True, strict=True) as recorder:
        model(ids, attention_mask=mask, labels=labels).loss.backward()
    record = recorder.run["gradients"].isel(step=0)
    assert record.sizes["token"] == 16
    for name, reduced in (
        ("output_mean", record["output_norm"].mean("token")),
        ("output_max", record["output_norm"].max("token")),
    ):
        assert np.allclose(record[name].values, reduced.values, rtol=1e-5), name
    assert list(record.kind.values) == ["block", "attention", "mlp"]
    total = sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    assert float(record["model_norm"]) == pytest.approx(total, rel=1e-6)
