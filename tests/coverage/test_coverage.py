"""A sample of the sweep: types of transformers and hand-written models, plain, counted, captured."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnviz
from bench.coverage import examine
from bench.experts import again
from bench.zoo import page, table
from bench.zoo.census import census
from bench.zoo.compare import left_behind, same, state_of
from bench.zoo.handmade.language import WIDTH
from bench.zoo.handmade.mixtures import OneHotMixture
from bench.zoo.layers import reason, unmatched
from bench.zoo.watched import Result
from bnviz.observation import Context, RouterSeen, Site

TYPES = (
    "llama",
    "bert",
    "clip",
    "deepseek_v3",
    "gemma2",
    "gpt_oss",
    "jetmoe",
    "llava",
    "mixtral",
    "qwen3_moe",
    "swin",
    "vit",
    "mamba",
)
MADE = (
    "nanogpt",
    "odd-names",
    "torch-encoder",
    "mlp-mixer",
    "resnet",
    "mmdit",
    "linear-attention",
    "mamba",
    "graph-attention",
    "gshard",
)


@pytest.mark.parametrize("name", [*TYPES, *(f"zoo/{m}" for m in MADE)])
def test_a_capture_sees_the_model_and_leaves_it(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of models that warn by themselves
        row = examine(name).row
    assert table.verdict(row) == "right", table.line(row)
    assert row["rebuilt"] == row["routers"], row["not_rebuilt"]


class Written(nn.Module):
    """Attention by hand; a router's softmax beside it, which is none."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.gate = nn.Linear(8, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        weights = F.softmax(q @ k.mT, dim=-1)
        y = (weights @ v).transpose(1, 2).flatten(2)
        shares = F.softmax(self.gate(y), dim=-1)
        return (y[..., None, :] * shares[..., None]).sum(-2)


def test_the_census_counts_attention_and_no_other_softmax() -> None:
    model, x = Written(), torch.randn(3, 5, 8)
    (seen,) = census(model, lambda: model(x)).seen
    assert (seen.rows, seen.heads, seen.queries, seen.keys, seen.logits) == (6, 2, 5, 5, True)


def test_the_census_counts_kernels_whole() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    (seen,) = census(layer, lambda: layer(torch.randn(3, 5, 8))).seen
    assert (seen.rows, seen.heads, seen.queries, seen.keys) == (6, 2, 5, 5)
    q = torch.randn(2, 4, 6, 8)
    (seen,) = census(layer, lambda: F.scaled_dot_product_attention(q, q[:, :, :3], q[:, :, :3])).seen
    assert (seen.rows, seen.heads, seen.queries, seen.keys) == (8, 4, 6, 3)


def test_what_is_left_behind_is_told() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    before = state_of(model)
    assert left_behind(before, state_of(model)) == []
    handle = model[0].register_forward_hook(lambda *_: None)
    assert "0: _forward_hooks" in left_behind(before, state_of(model))
    handle.remove()
    model[0].mine = 1
    assert left_behind(before, state_of(model)) == ["0: attributes"]


def test_outputs_are_compared_bit_for_bit() -> None:
    nan = torch.tensor([1.0, float("nan")])
    assert same({"a": nan}, {"a": nan.clone()})
    assert not same({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0 + 1e-45])})
    assert not same((), ())


def test_experts_of_other_ids_or_weights_are_told() -> None:
    torch.manual_seed(0)
    mixture = OneHotMixture().eval()
    ((_, router),) = bnviz.sites(mixture).routers
    x = torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        gates = mixture.wg(x.flatten(0, 1)).softmax(-1)
        output = mixture(x)
    site, now = Site("router", "", 0), Context(0, 0, "forward")
    weights, ids = gates.max(-1, keepdim=True)
    seen = RouterSeen(site, now, ids[None], weights[None], None, 4)
    assert again(router, seen, x, output) < 1e-6
    assert again(router, replace(seen, weights=1.001 * weights[None]), x, output) == pytest.approx(1e-3, rel=0.01)
    assert again(router, replace(seen, ids=(ids[None] + 1) % 4), x, output) > 0.1


def test_each_number_of_layers_answers_to_a_list_of_blocks() -> None:
    found = ["stages.0.layers.0", "stages.0.layers.1", "stages.1.layers.0", "decoder.0", "shared.0"]
    ran = [*found, "shared.0 (call 2)", "shared.0 (call 3)", "shared.0 (call 4)"]
    assert unmatched({"depths": 3, "decoder_layers": 1, "num_hidden_layers": 4}, found, ran) == []
    assert unmatched({"depths": 3, "num_layers": 3}, found, ran) == ["num_layers = 3"]
    assert reason("levit", "depths = 4")
    assert reason("llama", "num_hidden_layers = 2") == ""


def test_the_page_names_every_model_in_its_place() -> None:
    rows = {
        "fine": Result("fine", attention=2, attention_expected=2, mechanisms=["sdpa"], equal=True),
        "blind": Result("blind", attention_expected=2, missing=["a: 4 heads, 7 x 7"], equal=True),
        "routed": Result("routed", routers=1, routers_expected=1, rebuilt=1, rebuilt_error=2e-4, equal=True),
        "deaf": Result("deaf", idle="run without input_values", blocks=4, blocks_seen=2, equal=True),
        "odd": Result("odd", layers=1, layers_lost=["depths = 4: a second name"], equal=True),
        "gone": Result("gone", reason="SomeModel requires the timm library but it was not found"),
        "broken": Result("broken", error="ValueError: no\nmore"),
    }
    text = page.markdown({name: result.row for name, result in rows.items()})
    places = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    assert "| blind | attention | 0 of 2 | 0 of 0 | not seen: a: 4 heads, 7 x 7 |" in places["Not right"]
    assert "experts differ by 2e-04" in places["Not right"]
    assert "| broken | failed |" in places["Not right"]
    assert "| routed | 1 of 1 | 1 of 1 | 2.0e-04 |" in places["Routers"]
    assert "**a second name** (1): odd `depths = 4`" in places["Layers"]
    assert "deaf (2 of 4 blocks ran)" in places["Run in part"]
    assert "scaled_dot_product_attention** (1): fine 2." in places["Right"]
    assert "**needs the package timm, which is not installed** (1): gone." in places["Not built"]
    assert "| built and run, of all that were tried | 5 of 7 (71.4 %) |" in text
