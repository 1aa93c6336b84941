"""Gradients are seen where they are made: once, whole, of the right layer and step, whatever runs the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .steps import inputs, loss_of, of, reference, watched
from .test_sites import Body, Parallel, PreNorm

ATTENTION = ("n1.", "attn.")


def test_norms_are_those_of_autograd() -> None:
    model, (x,) = Body(PreNorm), inputs()
    loss = loss_of(model(x))
    expected = {
        "block": [reference(model, loss, lambda n, i=i: n.startswith(f"blocks.{i}.")) for i in range(3)],
        "attention": [
            reference(model, loss, lambda n, i=i: n.startswith(tuple(f"blocks.{i}.{a}" for a in ATTENTION)))
            for i in range(3)
        ],
        "mlp": [
            reference(model, loss, lambda n, i=i: n.startswith((f"blocks.{i}.n2.", f"blocks.{i}.mlp.")))
            for i in range(3)
        ],
    }
    record = watched(model, lambda _: loss_of(model(x)).backward())
    for kind, values in expected.items():
        assert of(record, "gradient_norm", kind=kind) == pytest.approx(values, rel=1e-5), kind
    assert float(record["model_norm"][0]) == pytest.approx(reference(model, loss), rel=1e-5)
    weights = [sum(float(p.detach().square().sum()) for p in block.parameters()) ** 0.5 for block in model.blocks]
    assert of(record, "parameter_norm") == pytest.approx(weights, rel=1e-5)
    assert (record["reached"].values == 1).all()
    assert (record["nonfinite"].values == 0).all()


@pytest.mark.parametrize("kind", [PreNorm, Parallel])
def test_gradients_of_outputs_are_those_of_the_stream(kind: type[nn.Module]) -> None:
    model, (x,) = Body(kind), inputs()
    stream = [model.stem(x)]
    for block in model.blocks:
        middle = stream[-1] + block.attn(block.n1(stream[-1]))
        written = block.mlp(block.n2(middle)) if kind is PreNorm else block.mlp(block.n1(stream[-1]))
        stream += [middle, middle + written]
    found = torch.autograd.grad(loss_of(model.head(stream[-1])), stream)
    norms = [g.norm(dim=-1).flatten().numpy() for g in found]
    record = watched(model, lambda _: loss_of(model(x)).backward(), per_token=True)
    for layer in range(3):
        middle, after = norms[1 + 2 * layer], norms[2 + 2 * layer]
        assert record["output_norm"].sel(step=0, kind="block", layer=layer).values == pytest.approx(after, rel=1e-4)
        assert record["output_norm"].sel(step=0, kind="mlp", layer=layer).values == pytest.approx(after, rel=1e-4)
        stands = middle if kind is PreNorm else after
        assert record["output_norm"].sel(step=0, kind="attention", layer=layer).values == pytest.approx(
            stands, rel=1e-4
        )
        assert of(record, "output_mean")[layer] == pytest.approx(after.mean(), rel=1e-4)
        assert of(record, "output_max")[layer] == pytest.approx(after.max(), rel=1e-4)


def test_accumulation_counts_every_pass_once_and_adds_up_to_the_big_batch() -> None:
    model, micro = Body(PreNorm), inputs(3)
    alone = [reference(model, loss_of(model(x)) / 3) for x in micro]
    whole = [
        reference(model, loss_of(model(torch.cat(micro))), lambda n, i=i: n.startswith(f"blocks.{i}."))
        for i in range(3)
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def act(_: Any) -> None:
        for x in micro:
            (loss_of(model(x)) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()

    record = watched(model, act)
    assert record["model_norm"].values == pytest.approx(alone, rel=1e-5)
    assert of(record, "total_norm", 2) == pytest.approx(whole, rel=1e-4)
    assert np.isnan(record["total_norm"].values[:2]).all()


def test_every_keeps_the_total_of_the_steps_between() -> None:
    model, micro = Body(PreNorm), inputs(6)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)

    def act(_: Any) -> None:
        for at, x in enumerate(micro):
            loss_of(model(x)).backward()
            if at % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    everything, third = watched(model, act), watched(model, act, every=3)
    assert third["gradient_norm"].values == pytest.approx(everything["gradient_norm"].values[::3])
    assert third["total_norm"].values == pytest.approx(everything["total_norm"].values[2::3])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("what", ["blocks", "model"])
def test_checkpointing_changes_no_number(reentrant: bool, what: str) -> None:
    class Checkpointed(Body):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if what == "blocks" else block(x)
            return self.head(x)

    plain, model, micro = Body(PreNorm), Checkpointed(PreNorm), inputs(3)
    expected = watched(plain, lambda _: [loss_of(plain(x)).backward() for x in micro] and None)
    plain.zero_grad()

    def act(_: Any) -> None:
        for x in micro:
            given = x.clone().requires_grad_()
            out = checkpoint(model, given, use_reentrant=reentrant) if what == "model" else model(given)
            loss_of(out).backward()

    record = watched(model, act)
    assert record.sizes["step"] == 3
    kinds = ["block"] if reentrant else ["block", "attention", "mlp"]
    for kind in kinds:
        assert record["output_mean"].sel(kind=kind).values == pytest.approx(
            expected["output_mean"].sel(kind=kind).values, rel=1e-5
        )
    assert record["gradient_norm"].values == pytest.approx(expected["gradient_norm"].values, rel=1e-5)


def test_tied_weights_stand_at_each_layer_with_all_their_uses() -> None:
    class Tied(PreNorm):
        pass

    model, (x,) = Body(Tied), inputs()
    model.blocks[2].mlp = model.blocks[0].mlp
    loss = loss_of(model(x))
    names = dict(model.named_parameters())
    shared = reference(model, loss, lambda n: n.startswith("blocks.0.mlp.") and n in names)
    record = watched(model, lambda _: loss_of(model(x)).backward())
    rest = reference(model, loss, lambda n: n.startswith("blocks.2."))
    assert of(record, "gradient_norm")[2] == pytest.approx((shared**2 + rest**2) ** 0.5, rel=1e-5)
    assert float(record["model_norm"][0]) == pytest.approx(reference(model, loss), rel=1e-5)


def test_a_block_that_runs_several_times_has_its_parameters_once() -> None:
    class Looped(Body):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(2):
                for block in self.blocks:
                    x = block(x)
            return self.head(x)

    model, (x,) = Looped(PreNorm, 2), inputs()
    loss = loss_of(model(x))
    record = watched(model, lambda _: loss_of(model(x)).backward())
    assert list(record.path.values) == ["blocks.0", "blocks.1", "blocks.0 (call 2)", "blocks.1 (call 2)"]
    found = of(record, "gradient_norm")
    assert found[0] == pytest.approx(reference(model, loss, lambda n: n.startswith("blocks.0.")), rel=1e-5)
    assert np.isnan(found[2:]).all()
    assert np.isfinite(of(record, "output_mean")).all()


def test_frozen_and_unused_parameters_are_told() -> None:
    class Skipping(Body):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks[0](self.stem(x)))

    model, (x,) = Skipping(PreNorm, 2), inputs()
    model.blocks[0].attn.requires_grad_(False)
    loss = loss_of(model(x))
    record = watched(model, lambda _: loss_of(model(x)).backward())
    assert of(record, "gradient_norm")[0] == pytest.approx(
        reference(model, loss, lambda n: n.startswith("blocks.0.")), rel=1e-5
    )
    assert list(record.layer.values) == [0]  # nothing reached layer 1
    assert of(record, "reached").tolist() == [1.0]

    model.blocks[0].attn.requires_grad_(True)

    def act(_: Any) -> None:
        out = model.blocks[0].mlp(model.stem(x)).sum() + 0 * model(x).sum()
        out.backward(inputs=list(model.blocks[0].mlp.parameters()))

    record = watched(model, act)
    mlp = sum(p.numel() for p in model.blocks[0].mlp.parameters())
    assert of(record, "reached") == pytest.approx([mlp / sum(p.numel() for p in model.blocks[0].parameters())])


def test_what_autograd_grad_returns_is_no_gradient_of_the_step() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh()), inputs()[0].requires_grad_()

    def loss() -> Tensor:
        out = loss_of(model(x))
        (slope,) = torch.autograd.grad(out, x, create_graph=True)
        torch.autograd.grad(out, list(model.parameters()), retain_graph=True)
        return out + slope.square().sum()

    expected = reference(model, loss())
    record = watched(model, lambda _: loss().backward())
    assert float(record["model_norm"][0]) == pytest.approx(expected, rel=1e-5)


def test_several_passes_of_one_step_are_one_sum_or_not_known() -> None:
    model, (x,) = Body(PreNorm), inputs()

    def act(_: Any) -> None:
        out = model(x)
        out.square().mean().backward(retain_graph=True)
        out[..., 0].sum().backward()

    out = model(x)
    expected = reference(model, out.square().mean() + out[..., 0].sum())
    record = watched(model, act)
    assert float(record["model_norm"][0]) == pytest.approx(expected, rel=1e-5)
    record = watched(model, act)  # there is a gradient now: of two passes on top the sum is not known
    assert np.isnan(record["gradient_norm"].values).all()
    assert (record["nonfinite"].values == 0).all()


def test_a_backward_pass_belongs_to_the_forward_it_goes_through() -> None:
    model, (x, y) = Body(PreNorm), inputs(2)
    expected = [reference(model, loss_of(model(v)), lambda n: n.startswith("blocks.")) for v in (x, y)]

    def act(_: Any) -> None:
        first, second = loss_of(model(x)), loss_of(model(y))
        second.backward()
        first.backward()

    record = watched(model, act)
    found = (record["gradient_norm"].sel(kind="block") ** 2).sum("layer") ** 0.5
    assert found.values == pytest.approx(expected, rel=1e-5)


def test_a_scaled_loss_is_unscaled() -> None:
    model, micro = Body(PreNorm), inputs(4)
    scaled, scaler = copy.deepcopy(model), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)

    def train(one: nn.Module, scale: Any) -> Callable[[Any], None]:
        optimizer = torch.optim.SGD(one.parameters(), 0.01)

        def act(_: Any) -> None:
            for at, x in enumerate(micro):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(one(x).float())
                scale.scale(loss).backward()
                if at % 2:
                    scale.step(optimizer)
                    scale.update()
                    optimizer.zero_grad()

        return act

    expected = watched(model, train(model, torch.amp.GradScaler("cpu", enabled=False)), batches=2)
    record = watched(scaled, train(scaled, scaler), batches=2)
    assert record["loss_scale"].values.tolist() == [1024.0, 1024.0, 2048.0, 2048.0]
    assert expected["loss_scale"].values.tolist() == [1.0] * 4
    for name in ("gradient_norm", "total_norm", "output_mean", "drift", "diffusion", "model_norm"):
        assert record[name].values == pytest.approx(expected[name].values, rel=2e-2, nan_ok=True), name


def test_the_scale_before_a_step_that_was_left_out_is_not_guessed() -> None:
    model, micro = Body(PreNorm), inputs(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-120)

    def act(_: Any) -> None:
        for x in micro:
            scaler.scale(100 * loss_of(model(x))).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    record = watched(model, act)
    assert np.isnan(record["loss_scale"].values[0])
    assert record["loss_scale"].values[1:].tolist() == [64.0] * 3
    assert record["nonfinite"].values[0].max() > 0
    assert np.isfinite(record["gradient_norm"].values[1:]).all()


def test_without_an_optimizer_nobody_says_whether_the_loss_was_scaled() -> None:
    model, (x,) = Body(PreNorm), inputs()
    record = watched(model, lambda _: loss_of(model(x)).backward())
    assert np.isnan(record["loss_scale"].values).all()


def test_what_an_optimizer_changes() -> None:
    model, micro = Body(PreNorm), inputs(2)
    optimizer = torch.optim.SGD(model.parameters(), 0.125)

    def act(_: Any) -> None:
        for x in micro:
            loss_of(model(x)).backward()
            optimizer.step()
            optimizer.zero_grad()

    record = watched(model, act, updates=True)
    ratio = 0.125 * record["total_norm"] / record["parameter_norm"]
    assert record["update_ratio"].values == pytest.approx(ratio.values, rel=1e-3)


def test_an_optimizer_inside_the_backward_pass_is_seen_too() -> None:
    model, micro = Body(PreNorm), inputs(2)
    twin = copy.deepcopy(model)

    def fused(one: nn.Module) -> None:
        for parameter in one.parameters():
            optimizer = torch.optim.SGD([parameter], 0.1)

            def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)

    fused(model)
    fused(twin)

    def act(one: nn.Module) -> None:
        for x in micro:
            loss_of(one(x)).backward()

    act(twin)
    record = watched(model, lambda _: act(model), updates=True)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert record["total_norm"].values == pytest.approx(record["gradient_norm"].values)
    assert record["update_ratio"].values == pytest.approx(
        (0.1 * record["total_norm"] / record["parameter_norm"]).values, rel=1e-3
    )


def exact(model: nn.Module, losses: list[Callable[[], Tensor]], layer: int) -> tuple[float, float]:
    """Norm of the mean gradient and of the deviation about it, over that of the weights, from all gradients at once."""
    some = [p for n, p in model.named_parameters() if n.startswith(f"blocks.{layer}.")]
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(loss(), some)]).double() for loss in losses]
    )
    weight = sum(float(p.detach().double().square().sum()) for p in some) ** 0.5
    return float(rows.mean(0).norm()) / weight, float(rows.std(0, correction=0).norm()) / weight


@pytest.mark.parametrize(("drift", "tolerance"), [("exact", 1e-4), ("projected", 0.12)])
def test_drift_and_diffusion_are_those_of_the_definition(drift: str, tolerance: float) -> None:
    model, micro = Body(PreNorm), inputs(8)
    losses = [lambda x=x: loss_of(model(x)) for x in micro]
    record = watched(model, lambda _: [loss().backward() for loss in losses] and None, drift=drift, batches=4)
    for window in (0, 1):
        for layer in range(3):
            mean, deviation = exact(model, losses[4 * window : 4 * window + 4], layer)
            place = {"step": 4 * window + 3, "kind": "block", "layer": layer}
            assert float(record["drift"].sel(place)) == pytest.approx(mean, rel=tolerance)
            assert float(record["diffusion"].sel(place)) == pytest.approx(deviation, rel=tolerance)
    assert np.isnan(record["drift"].values[[0, 1, 2, 4, 5, 6]]).all()
    assert ("cosine" in record) and np.isfinite(record["cosine"].values[1:]).all()


def test_the_cosine_of_steps_is_that_of_their_gradients() -> None:
    model, micro = Body(PreNorm), inputs(2)
    some = list(model.blocks[1].parameters())
    rows = [torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(model(x)), some)]) for x in micro]
    record = watched(model, lambda _: [loss_of(model(x)).backward() for x in micro] and None)
    assert of(record, "cosine", 1)[1] == pytest.approx(float(torch.cosine_similarity(*rows, dim=0)), abs=0.15)
