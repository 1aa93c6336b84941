"""Blocks that two streams go through, as image and text in MMDiT: both are shown, each with its parts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnviz
from bnviz.capture.blocks.writers import Writers, shares

from . import architectures as zoo
from .test_arrival import check_equal, put_off, run_of
from .test_sites import PlainAttention

KINDS = {
    "block": (0, 0, 2),
    "attention": (0, 0, 1),
    "mlp": (0, 1, 2),
    "stream_2": (1, 0, 2),
    "stream_2_attention": (1, 0, 1),
    "stream_2_mlp": (1, 1, 2),
}  # which stream, and between which of its states


def made(image: int, text: int) -> tuple[zoo.MMDiT, tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(0)
    given = torch.randn(2, image, 16), torch.randn(2, text, 16), torch.randn(2, 16)
    return zoo.MMDiT(3, zoo.DoubleBlock).eval(), given


def states(model: zoo.MMDiT, x: Tensor, context: Tensor, temb: Tensor) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Both streams of every block, by plain code."""
    found = []
    for block in model.transformer_blocks:
        found.append(block.states(x, context, temb))
        x, context = found[-1][0][-1], found[-1][1][-1]
    return found


def packed(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


@pytest.mark.parametrize("text", [11, 20, 33])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_both_streams_and_their_parts_are_as_plain_code_computes_them(text: int, mode: Any) -> None:
    model, given = made(20, text)
    with mode():
        alone = model(*given)
        with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            watched = [model(*given) for _ in range(2)]
        expected = states(model, *given)
    assert all(torch.equal(alone, one) for one in watched)
    record = recorder.run["activations"]
    assert set(record.kind.values.tolist()) == set(KINDS)
    for kind, (stream, start, end) in KINDS.items():
        for layer, both in enumerate(expected):
            x, y = (both[stream][at].double() for at in (start, end))
            for step in range(2):
                here = record.sel(kind=kind, layer=layer).isel(step=step)
                cosine = F.cosine_similarity(x, y, dim=-1).detach().flatten().numpy()
                assert np.allclose(packed(here["cosine"].values), cosine, atol=1e-5), (kind, layer, step)
                norms = y.norm(dim=-1).detach().flatten().numpy()
                assert np.allclose(packed(here["norm_out"].values), norms, rtol=1e-5), (kind, layer, step)
    of_text = expected[1][1][-1].detach().double().reshape(-1, 16)
    found = record["variance"].sel(kind="stream_2", layer=1).isel(step=0).values
    assert np.allclose(found, of_text.var(0, unbiased=False).numpy(), rtol=1e-4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, contextlib.nullcontext])
def test_numbers_of_both_streams_may_be_put_off(mode: Any) -> None:
    model, given = made(20, 11)

    def act() -> None:
        with mode():
            for _ in range(3):
                model(*given)

    want = run_of(model, act)
    with put_off():
        check_equal(run_of(model, act), want)


def test_every_module_is_counted_with_its_stream() -> None:
    model, given = made(20, 11)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(*given)
    size = {n: sum(p.nbytes for p in m.parameters()) for n, m in model.transformer_blocks[0].named_modules()}
    weights = {part: some[0] for part, some in recorder.run["activations"].attrs["parameter_bytes"].items()}
    gates = size["gates"]  # serves all four, and ends before any of them
    assert weights == {
        "block": size[""],
        "attention": gates + size["attn.qkv"] + size["attn.out"],
        "mlp": size["ff"],
        "stream_2_attention": size["attn.add_qkv"] + size["attn.add_out"],
        "stream_2_mlp": size["ff_context"],
    }
    assert sum(weights.values()) == 2 * weights["block"]


def test_a_writer_that_did_not_run_when_the_other_stream_was_searched() -> None:
    block = nn.ModuleDict(
        {"one": nn.Linear(2, 2), "two": nn.Linear(2, 2, bias=False), "three": nn.Linear(2, 1, bias=False)}
    )

    def wrote(paths: tuple[str, ...], modules: tuple[tuple[str, ...], ...]) -> Writers:
        sizes = (0,) * len(paths)
        return Writers(paths, ("mlp",) * len(paths), sizes, False, (1.0,) * len(paths), sizes, modules)

    found = shares(block, [("", wrote(("one",), (("one", "two"),))), ("stream_2", wrote(("three",), (("three",),)))])
    assert found.modules == (("one",), ("two",))
    assert found.sizes == (24, 16)


def test_gradients_of_both_streams() -> None:
    model, given = made(20, 11)
    model.train()
    expected = states(model, *given)
    both = [stream[at] for pair in expected for stream in pair for at in (1, 2)][:-2]  # the last text leads to no loss
    gradients = torch.autograd.grad(expected[-1][0][-1].square().sum(), both)
    norms = [g.norm(dim=-1).flatten().numpy() for g in gradients]
    with bnviz.capture(model, probes=["gradients"], strict=True, per_token=True) as recorder:
        model(*given).square().sum().backward()
    record = recorder.run["gradients"].isel(step=0)
    parts = [f"{stream}{part}" for stream in ("", "stream_2_") for part in ("attention", "mlp")] * 3
    for at, norm in enumerate(norms):
        found = packed(record["output_norm"].sel(layer=at // 4, kind=parts[at]).values)
        assert np.allclose(found, norm, rtol=1e-4), (at // 4, parts[at])
    block = model.transformer_blocks[0]
    text = [p.grad for p in block.ff_context.parameters()]
    found = float(record["gradient_norm"].sel(layer=0, kind="stream_2_mlp"))
    assert np.isclose(found, float(torch.stack([g.norm() for g in text if g is not None]).norm()), rtol=1e-5)


class WritesIntoText(zoo.JointBlock):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        text, image = super().forward(hidden_states, encoder_hidden_states, temb)
        encoder_hidden_states.zero_()
        return text, image


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_block_that_writes_into_its_second_stream_is_read_as_it_was(mode: Any) -> None:
    torch.manual_seed(0)
    model = zoo.MMDiT(3, WritesIntoText).eval()
    x, text, temb = torch.randn(2, 9, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
    with mode():
        expected, image, context = [], x, text
        for block in model.transformer_blocks:
            before = context.clone()
            context, image = zoo.JointBlock.forward(block, image, before, temb)
            expected.append(F.cosine_similarity(before.double(), context.double(), dim=-1).flatten().numpy())
        with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            for _ in range(2):
                model(x, text.clone(), temb)
    record = recorder.run["activations"]["cosine"].sel(kind="stream_2")
    for step in range(2):
        for layer in range(3):
            assert np.allclose(packed(record.isel(step=step, layer=layer).values), expected[layer], atol=1e-5)


class LastWithoutText(zoo.MMDiT):
    """The last block gives no text, as in Stable Diffusion 3."""

    def __init__(self) -> None:
        super().__init__(3, zoo.DoubleBlock)
        self.transformer_blocks[-1].register_forward_hook(lambda _, __, output: (None, output[1]))


def test_a_stream_may_end_before_the_other() -> None:
    _, given = made(20, 11)
    model = LastWithoutText().eval()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for _ in range(2):
            model(*given)
    seen = np.isfinite(recorder.run["activations"]["norm_out"]).any(("token", "step"))
    assert seen.sel(kind="stream_2").values.tolist() == [True, True, False]
    assert seen.sel(kind="mlp").values.all()


class Reversible(nn.Module):
    """Two halves that write to one another in turn, as in Reformer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.feed_forward = PlainAttention(16), zoo.mlp(16)

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        one = one + self.attention(other)
        return one, other + self.feed_forward(one)


class TwoHalves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Reversible() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        one = other = x
        for layer in self.layers:
            one, other = layer(one, other)
        return torch.cat([one, other], -1)


def test_reversible_halves_are_two_streams_with_a_writer_each() -> None:
    torch.manual_seed(0)
    model = TwoHalves().eval()
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(torch.randn(2, 12, 16))
    seen = np.isfinite(recorder.run["activations"]["norm_out"]).any(("token", "step"))
    kinds = {layer: set(seen.kind.values[seen.isel(layer=layer).values].tolist()) for layer in range(3)}
    assert kinds == {layer: {"block", "attention", "stream_2", "stream_2_mlp"} for layer in range(3)}


def test_a_report_shows_both_and_says_which_is_which(tmp_path: Path) -> None:
    model, given = made(20, 11)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(*given)
    report = bnviz.diagnose(recorder.run, "layer_redundancy", strict=True)
    result = report["layer_redundancy"]
    assert set(result["kind"].values.tolist()) == set(KINDS)
    assert result["tokens"].sel(kind="stream_2").values.tolist() == [22, 22, 22]
    caveats = report.judgement("layer_redundancy").caveats
    said = "The second stream is what blocks take as encoder_hidden_states, the first as hidden_states"
    assert said in caveats
    page = report.save(tmp_path / "page.html").read_text(encoding="utf-8")
    assert said in page and "turns the second stream least of all blocks" in page
