"""The stream of a block: found wherever it goes in and comes out, its features and its tokens on the right axes."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnviz
from bnviz.capture.blocks.axes import features_axis, tokens_first
from bnviz.capture.blocks.stream import Route, continued, fetch, fetch_given, floats, routes

from . import architectures as zoo
from .test_sites import PreNorm


def cosine(x: Tensor, y: Tensor) -> np.ndarray:
    return F.cosine_similarity(x.detach().double(), y.detach().double(), dim=-1).flatten().numpy()


def captured(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True, **options) as recorder:
        model(*inputs)
    return recorder.run["activations"].isel(step=0)


# ---------------------------------------------------------------------- places


@dataclass
class Given:
    state: Tensor
    extra: Any = None


def test_floats_are_found_the_outermost_first() -> None:
    x, y, z = torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 5)
    value = ({"a": x, "n": 3}, y, [torch.ones(2, dtype=torch.long), Given(z)])
    assert [place for place, _ in floats(value)] == [(1,), (0, "a"), (2, 1, "state")]
    for place, tensor in floats(value):
        assert fetch(value, place) is tensor
    assert fetch(value, (0, "b")) is None and fetch(value, (7,)) is None and fetch(x, ()) is x
    assert fetch_given((), {"h": x}, ("h",)) is x and fetch_given((y,), {}, (0,)) is y


def test_routes_pair_equal_shapes_and_equal_names_first() -> None:
    x, m = torch.ones(2, 3, 4), torch.ones(2, 1, 3, 3)
    assert routes({(0,): m, ("x",): x}, {(): x}) == [Route(("x",), ())]
    two = routes({("a",): x, ("b",): x}, {("b",): x, ("a",): x})
    assert two[0] == Route(("a",), ("a",))
    assert routes({(0,): m, (1,): x}, {(): torch.ones(2, 3, 8)}) == [Route((1,), ())]  # the width changes
    assert routes({(0,): torch.ones(2, 8)}, {(): torch.ones(2, 3, 8)}) == [Route((0,), ())]
    assert routes({}, {(): x}) == [] and routes({(0,): x}, {}) == []


def test_a_state_beside_the_stream_is_not_taken_for_it() -> None:
    x, h = torch.ones(2, 7, 6), torch.ones(1, 2, 8)
    assert routes({(0,): x, (1, 0): h}, {(0,): torch.ones(2, 7, 8), (1, 0): h}) == [Route((0,), (0,))]


def test_the_next_block_tells_which_way_the_stream_goes() -> None:
    x, y, one, other = (torch.ones(2, 3) for _ in range(4))
    given, made = {("x",): x, ("y",): y}, {(0,): one, (1,): other}
    found = routes(given, made)
    both = [Route(("x",), (1,)), Route(("y",), (0,))]
    assert continued(found, given, made, {("x",): other, ("y",): one}) == both
    assert continued(found, given, made, {("q",): other}) == both[:1]
    assert continued(found, given, made, {}) == found[:1]


def test_what_a_block_hands_on_as_it_is_is_no_stream() -> None:
    x, bias, out = (torch.ones(2, 3) for _ in range(3))
    given, made = {("x",): x, ("bias",): bias}, {(0,): out, (1,): bias}
    assert continued(routes(given, made), given, made, {("x",): out, ("bias",): bias}) == [Route(("x",), (0,))]


class Inner(nn.Module):
    """x + f(x), in ways that differ only in how x comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = zoo.mlp(16), nn.Linear(16, 16)

    def new(self, x: Tensor) -> Tensor:
        return x + self.f(x)


class ByKeyword(Inner):
    def forward(self, *, attention_mask: Tensor, hidden_states: Tensor) -> Tensor:
        return self.new(hidden_states)


class Second(Inner):
    def forward(self, mask: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return self.new(x), None


class SameShapeFirst(Inner):
    """What is given first, and given back first, has the stream's shape and is not the stream."""

    def forward(self, position: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.g(x), self.new(x)


class Dict(Inner):
    def forward(self, x: Tensor) -> dict[str, Any]:
        return OrderedDict(weights=torch.rand(2, 4, 7, 7), hidden=self.new(x))


class Data(Inner):
    def forward(self, given: Given) -> Given:
        return Given(self.new(given.state), given.extra)


def called(block: nn.Module, x: Tensor) -> Tensor:
    """One call, as the model of that block makes it."""
    mask = torch.zeros(2, 1, 7, 7)
    if isinstance(block, ByKeyword):
        return block(attention_mask=mask, hidden_states=x)
    if isinstance(block, Second):
        return block(mask, x)[0]
    if isinstance(block, SameShapeFirst):
        return block(torch.randn(2, 7, 16), x)[1]
    return block(x)["hidden"] if isinstance(block, Dict) else block(Given(x)).state


class Calling(nn.Module):
    def __init__(self, kind: type[nn.Module], depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = called(block, x)
        return x


@pytest.mark.parametrize("kind", [ByKeyword, Second, SameShapeFirst, Dict, Data])
def test_the_stream_is_found_wherever_it_comes_and_goes(kind: type[Inner]) -> None:
    model, x = Calling(kind), torch.randn(2, 7, 16)
    record = captured(model, x)
    assert record.sizes["layer"] == 3
    for layer, block in enumerate(model.blocks):
        y = block.new(x)
        assert np.allclose(record["cosine"].sel(kind="block", layer=layer), cosine(x, y), atol=1e-5)
        x = y.detach()


def test_a_model_output_is_looked_into() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    class Output(Inner):
        def forward(self, x: Tensor) -> Any:
            return outputs.BaseModelOutput(last_hidden_state=self.new(x), hidden_states=(x,))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Output(), Output()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x).last_hidden_state
            return x

    model, x = Model(), torch.randn(2, 7, 16)
    record = captured(model, x)
    assert np.allclose(record["cosine"].sel(kind="block", layer=0), cosine(x, model.blocks[0].new(x)), atol=1e-5)


# ---------------------------------------------------------------------- axes


@pytest.mark.parametrize(
    ("module", "shape", "axis"),
    [
        (nn.Conv2d(8, 8, 3), (2, 8, 5, 5), 1),
        (nn.Conv2d(8, 8, 3), (2, 8, 8, 8), 1),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), (2, 5, 5, 8), -1),
        (nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)), (2, 8, 8, 8), -1),
        (zoo.CNBlock(8), (2, 8, 8, 8), 1),
        (nn.Conv1d(8, 4, 3), (2, 8, 9), 1),
        (nn.Conv1d(8, 4, 3), (2, 4, 7), 1),
        (nn.Linear(9, 4), (2, 8, 9), -1),
        (
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.Conv1d(32, 32, 3, groups=32)),
            (2, 32, 16),
            -1,
        ),  # T = 32
        (nn.Conv3d(6, 6, 3), (2, 6, 4, 5, 5), 1),
        (nn.Linear(6, 6), (2, 4, 5, 5, 6), -1),
        (nn.GroupNorm(2, 6), (2, 6, 4, 4), 1),
        (nn.LSTM(4, 6), (2, 5, 6), -1),
        (nn.ReLU(), (2, 3, 4, 4), 1),
        (nn.ReLU(), (2, 3, 4), -1),
        (nn.Linear(4, 4), (5, 4), -1),
    ],
)
def test_weights_tell_where_the_features_are(module: nn.Module, shape: tuple[int, ...], axis: int) -> None:
    assert features_axis([module], torch.empty(shape)) == axis


def test_a_hidden_state_on_paper() -> None:
    x = torch.arange(24.0)
    assert tokens_first(x.view(6, 4)).shape == (6, 1, 4)
    assert torch.equal(tokens_first(x.view(1, 2, 3, 4), 1)[0, 5], x.view(2, 12)[:, 5])
    assert torch.equal(tokens_first(x.view(1, 2, 3, 4))[0, 5], x.view(6, 4)[5])
    assert torch.equal(tokens_first(x.view(2, 3, 4), -1, 1), x.view(2, 3, 4).transpose(0, 1))
    assert tokens_first(x.view(1, 2, 2, 2, 3), 1).shape == (1, 12, 2)


class Image(nn.Module):
    """y = x + conv(x), with features first or last, of images or videos."""

    def __init__(self, *, last: bool, video: bool = False) -> None:
        super().__init__()
        self.last = last
        self.f: nn.Module = nn.Linear(6, 6) if last else nn.Conv3d(6, 6, 1) if video else nn.Conv2d(6, 6, 3, padding=1)
        self.g = nn.Linear(6, 6) if last else (nn.Conv3d if video else nn.Conv2d)(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.g(torch.tanh(self.f(x)))


@pytest.mark.parametrize("video", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_images_and_videos_are_measured_pixel_by_pixel(last: bool, video: bool, channels_last: bool) -> None:
    torch.manual_seed(0)
    model = zoo.Looped(Image(last=last, video=video), Image(last=last, video=video))
    shape = (2, 3, 4, 4) if video else (2, 4, 4)
    x = torch.randn(shape[0], *shape[1:], 6) if last else torch.randn(shape[0], 6, *shape[1:])
    if channels_last and not last:
        x = x.contiguous(memory_format=torch.channels_last_3d if video else torch.channels_last)
    with torch.no_grad():
        expected = model(x)
        with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            found = model(x)
        y = model.blocks[0](x)
    assert torch.equal(expected, found) and found.stride() == expected.stride()
    record = recorder.run["activations"].isel(step=0).sel(kind="block", layer=0)
    pixels = [v.movedim(-1 if last else 1, -1).reshape(-1, 6) for v in (x, y)]
    assert np.allclose(record["cosine"], cosine(*pixels), atol=1e-5)
    assert np.allclose(record["mean"], pixels[1].mean(0), atol=1e-5)
    assert record.sizes["feature"] == 6


# ---------------------------------------------------------------------- recurrence


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_layer_is_read_token_by_token(batch_first: bool) -> None:
    torch.manual_seed(0)
    model, ids = zoo.Recurrent(batch_first=batch_first), torch.randint(0, 20, (2, 7))
    record = captured(model, ids if batch_first else ids.T.contiguous())
    with torch.no_grad():
        x = model.embed(ids if batch_first else ids.T)
        x, _ = model.rnns[0](x)
        y, _ = model.rnns[1](x)
    x, y = (v if batch_first else v.transpose(0, 1) for v in (x, y))
    assert np.allclose(record["norm_out"].sel(kind="block", layer=0), x.norm(dim=-1).flatten(), atol=1e-5)
    assert np.allclose(record["cosine"].sel(kind="block", layer=1), cosine(x, y), atol=1e-5)
    assert record.sequence.values.tolist() == [0] * 7 + [1] * 7


@pytest.mark.parametrize("sizes", [(6, 8), (8, 8)])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell, zoo.OwnCell])
def test_calls_of_a_cell_are_tokens_of_one_layer(kind: type[nn.Module], sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    model, x = zoo.Cells(kind, sizes), torch.randn(3, 300, sizes[0])
    record = captured(model, x)
    assert record.path.values.tolist() == ["cells.0", "cells.1"]
    assert record.sequence.values.tolist() == [0] * 300 + [1] * 300 + [2] * 300
    with torch.no_grad():
        last = model(x)
        model.cells, both = model.cells[:1], model.cells
        first = model(x)
    model.cells = both
    assert np.allclose(record["norm_out"].sel(kind="block", layer=1), last.norm(dim=-1).flatten(), atol=1e-5)
    assert np.allclose(record["cosine"].sel(kind="block", layer=1), cosine(first, last), atol=1e-5)
    assert np.allclose(record["mean"].sel(kind="block", layer=1), last.mean((0, 1)), atol=1e-5)
    if sizes[0] == sizes[1]:
        assert np.allclose(record["cosine"].sel(kind="block", layer=0), cosine(x, first), atol=1e-5)
    else:
        assert np.isnan(record["cosine"].sel(kind="block", layer=0)).all()


def test_later_forwards_of_a_cell_are_steps() -> None:
    torch.manual_seed(0)
    model = zoo.Cells(zoo.OwnCell)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for length in (4, 2, 5):
            model(torch.randn(2, length, 6))
    record = recorder.run["activations"]["norm_out"].sel(kind="block", layer=1)
    assert np.isfinite(record).sum("token").values.tolist() == [8, 4, 10]


class Attending(nn.Module):
    """A decoder that looks at what was encoded before each step of its cell."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.attention, self.cell = nn.LSTM(6, 8, batch_first=True), nn.Linear(16, 8), nn.GRUCell(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        memory, _ = self.encoder(x)
        state, states = memory[:, -1], []
        for _ in range(5):
            state = self.cell(self.attention(torch.cat([state, memory.mean(1)], -1)), state)
            states.append(state)
        return torch.stack(states, 1)


def test_what_runs_beside_a_cell_is_called_once_a_token_too() -> None:
    torch.manual_seed(0)
    model, x = Attending(), torch.randn(2, 7, 6)
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for _ in range(2):
            states = model(x)
    record = recorder.run["activations"]
    assert record.path.values.tolist() == ["encoder", "attention", "cell"]
    for step in range(2):
        seen = record["norm_out"].isel(step=step).sel(kind="block")
        assert np.isfinite(seen).sum("token").values.tolist() == [14, 10, 10]
        assert np.allclose(seen.sel(layer=2)[:10], states.norm(dim=-1).flatten(), atol=1e-5)


class Deep(nn.Module):
    """One block of rows, looped over depth, with the conditioning beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([zoo.OwnCell(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        condition = x * 2
        for _ in range(4):
            x = self.blocks[0](x, condition)
        return x


def test_a_block_that_is_given_its_own_output_is_looped_over_depth() -> None:
    torch.manual_seed(0)
    record = captured(Deep(), torch.randn(5, 8))
    assert record.path.values.tolist() == ["blocks.0", "blocks.0 (call 2)", "blocks.0 (call 3)", "blocks.0 (call 4)"]


# ---------------------------------------------------------------------- odd tensors


class Same(nn.Module):
    """Gives what it was given, or a view of it."""

    def __init__(self, *, view: bool) -> None:
        super().__init__()
        self.view, self.unused = view, PreNorm()

    def forward(self, x: Tensor) -> Tensor:
        return x.view_as(x) if self.view else x


@pytest.mark.parametrize("view", [False, True])
def test_a_block_that_gives_back_its_input_changes_nothing(view: bool) -> None:
    record = captured(zoo.Looped(Same(view=view), PreNorm(), PreNorm()), torch.randn(2, 7, 16)).sel(
        kind="block", layer=0
    )
    assert np.allclose(record["cosine"], 1) and (record["relative_change"] == 0).all()


class InPlace(nn.Module):
    """Adds to its own input, and to what its attention gave."""

    def __init__(self) -> None:
        super().__init__()
        inner = PreNorm()
        self.n1, self.attn, self.n2, self.mlp = inner.n1, inner.attn, inner.n2, inner.mlp

    def forward(self, x: Tensor) -> Tensor:
        x += self.attn(self.n1(x))
        y = self.mlp(self.n2(x))
        y += x
        return y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writing_in_place_hides_nothing_not_even_in_the_first_forward(mode: Any) -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(InPlace(), InPlace(), InPlace()), torch.randn(2, 7, 16)
    with mode(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for _ in range(2):
            model(x.clone())
    with torch.no_grad():
        now = x.clone()
        for layer, block in enumerate(model.blocks):
            middle = now + block.attn(block.n1(now))
            after = middle + block.mlp(block.n2(middle))
            for step in range(2):
                record = recorder.run["activations"].isel(step=step).sel(layer=layer)
                assert np.allclose(record["cosine"].sel(kind="block"), cosine(now, after), atol=1e-5)
                if (step, layer) == (0, 0):
                    continue  # what the first block wrote over while it was searched
                assert np.allclose(record["cosine"].sel(kind="attention"), cosine(now, middle), atol=1e-5)
                assert np.allclose(record["cosine"].sel(kind="mlp"), cosine(middle, after), atol=1e-5)
            now = after


class Either(nn.Module):
    """Adds to its input in place, or not."""

    def __init__(self, *, writes: bool) -> None:
        super().__init__()
        self.inner, self.writes = nn.Linear(16, 16), writes

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.inner(x)) if self.writes else x + self.inner(x)


def test_blocks_of_one_class_of_which_some_write_in_place_are_all_seen_from_the_first_forward() -> None:
    torch.manual_seed(0)
    model = zoo.Looped(Either(writes=False), Either(writes=True), Either(writes=False))
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        for _ in range(2):
            model(torch.randn(2, 7, 16))
    assert recorder.run["activations"]["cosine"].sel(kind="block").notnull().all()


def test_under_autocast_the_stream_keeps_its_precision() -> None:
    torch.manual_seed(0)
    model, x = zoo.Looped(PreNorm(), PreNorm()), torch.randn(2, 7, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(x)
        with bnviz.capture(model, probes=["activations"], strict=True) as recorder:
            found = model(x)
        y = model.blocks[0](x)
    assert torch.equal(expected, found)
    record = recorder.run["activations"].isel(step=0)
    assert record.kind.values.tolist() == ["block", "attention", "mlp"]
    assert np.allclose(record["cosine"].sel(kind="block", layer=0), cosine(x, y.float()), atol=1e-6)


def test_an_empty_batch_is_no_observation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad(), bnviz.capture(model, probes=["activations"], strict=True) as recorder:
        model(torch.ones(0, 4))
        model(torch.ones(3, 4))
    assert recorder.run["activations"]["norm_out"].isel(step=-1).sel(kind="block", layer=0).size == 3


def test_what_cannot_be_read_is_noted_and_the_model_goes_on() -> None:
    class Odd(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            raise OSError("the shelf is elsewhere")

    class Strange(PreNorm):
        def forward(self, x: Tensor) -> Any:
            return Odd(x=super().forward(x["x"] if isinstance(x, Odd) else x))

    model, x = zoo.Looped(Strange(), PreNorm()), torch.randn(2, 7, 16)
    model.blocks[1].register_forward_pre_hook(lambda _, args: (args[0]["x"],))
    expected = model(x)
    with bnviz.capture(model, probes=["activations"]) as recorder:
        found = model(x)
    assert torch.equal(found, expected)
    assert recorder.run["activations"].path.values.tolist() == ["blocks.1"]
    assert any("blocks.0" in note and "the shelf is elsewhere" in note for note in recorder.run.notes)
