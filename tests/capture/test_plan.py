"""What `bnviz.sites` says: a short tree, complete as data, and the way of naming what was not understood."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import Tensor, nn

import bnviz
from bnviz.capture.tree import LINES, Branch, common, ranges, size, text, tree
from bnviz.capture.unknown import Unknown

from .test_sites import Body, PreNorm


class OddAttention(nn.Module):
    """Named attention; calls nothing that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x).cumsum(1)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = OddAttention(), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.attn(x))


def test_layers_that_are_alike_are_described_once() -> None:
    lines = repr(bnviz.sites(Body(PreNorm, 80))).splitlines()
    assert lines[0] == "Body  80 blocks · 80 attention · 0 routers"
    assert lines[1] == "├─ layer 0  blocks.0  PreNorm  (item of ModuleList 'blocks')"
    assert re.match(r"│  ├─ attention  attn  PlainAttention  seen at F\.scaled_dot_product_attention", lines[2])
    assert lines[3] == "│  └─ residual writers  found at the first forward"
    assert lines[4:] == ["└─ layers 1-79: as layer 0  blocks.1 to blocks.79"]


def test_kinds_of_layer_that_alternate_are_two() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) if i % 2 else nn.Conv1d(4, 4, 1) for i in range(10)))
    shown = repr(bnviz.sites(model))
    assert "├─ layers 2, 4, … 8: as layer 0  2 to 8" in shown
    assert "└─ layers 3, 5, … 9: as layer 1  3 to 9" in shown


def test_a_mixture_of_experts_shows_its_routers(load_model: Any) -> None:
    plan = bnviz.sites(load_model("mixtral-bard"))
    shown = repr(plan)
    assert shown.splitlines()[0].endswith("4 blocks · 4 attention · 4 routers")
    assert re.search(r"router  mlp\.experts  8 experts", shown)
    assert [site.layer for site, _ in plan.routers] == [0, 1, 2, 3]


def test_a_tree_never_grows_with_the_model() -> None:
    kinds = [type(f"Kind{i}", (nn.Linear,), {}) for i in range(70)]
    plan = bnviz.sites(nn.Sequential(*(kind(4, 4) for kind in kinds)))
    plan.unknown += [Unknown(f"odd.{i}", f"Odd{i}", "named attention", "attention") for i in range(60)]
    assert size(tree(plan)) <= LINES
    lines = repr(plan).splitlines()
    assert len(lines) <= LINES
    assert any("more kinds of layer" in line for line in lines)
    assert any(line.endswith("not understood") for line in lines)  # what needs the reader is not what is cut off


def test_what_was_not_understood_says_how_it_is_named() -> None:
    model = Body(Odd, 6)
    plan = bnviz.sites(model)
    assert [place.path for place in plan.unknown] == [f"blocks.{i}.attn" for i in range(6)]
    assert {(place.cls, place.option) for place in plan.unknown} == {("OddAttention", "attention")}
    named = 'name it  attention="blocks.*.attn"  or  attention={OddAttention: function}'
    assert repr(plan).splitlines()[-1].strip() == f"└─ {named}"
    assert bnviz.sites(model, attention="blocks.*.attn").unknown == []


def test_it_draws_itself_with_nothing_of_the_model_run_as_html() -> None:
    hostile = type("<script>alert(1)</script>", (nn.Linear,), {})
    shown = bnviz.sites(nn.Sequential(hostile(2, 2), nn.Linear(2, 2)))._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in shown
    assert shown.count("<ul") == shown.count("</ul>")
    assert "layer 0" in shown


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([3], "3"), ([1, 2], "1-2"), ([0, 2, 4, 6, 8], "0, 2, … 8"), ([0, 1, 3, 4, 9], "0-1, 3-4, 9")],
)
def test_numbers_in_few_words(numbers: list[int], words: str) -> None:
    assert ranges(numbers) == words
    assert ranges([*list(range(0, 400, 7)), 401]).endswith("401 (59 in all)")


def test_patterns_of_paths() -> None:
    assert common(["a.0.x", "a.12.x"]) == "a.*.x"
    assert common(["a.0.x", "b.x"]) == "*.x"
    assert common(["a.x", "b.0.y"]) == "*"


def test_a_tree_is_lines() -> None:
    inner = Branch("b", below=(Branch("c", "code", "words"),))
    assert text(Branch("a", below=(inner, Branch("d")))).splitlines() == ["a", "├─ b", "│  └─ c  code  words", "└─ d"]
