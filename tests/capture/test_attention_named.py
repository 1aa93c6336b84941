"""A module that nothing is known of needs one line: a pattern, a class, a test, or a function that shows its attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnviz
from bnviz.errors import BnvizError, CaptureError, UnknownName

from .spied import close, watched
from .test_attention_functions import BATCH, CAUSAL, HEADS, TOKENS, WIDTH, model_of

ODD = torch.randn(BATCH, TOKENS, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Mixer(nn.Module):
    """No name, no function in its code says attention: what it does is in a library it looks up."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.own: list[Tensor] = []

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        out = vars(torch)["einsum"]("bhij,bhjd->bihd", self.mix(q, k), v)
        return self.out(out.flatten(2))

    def mix(self, q: Tensor, k: Tensor) -> Tensor:
        scores = vars(torch)["einsum"]("bhid,bhjd->bhij", q, k) / 2
        weights = vars(torch)["softmax"](scores.masked_fill(~CAUSAL, -math.inf), -1)
        self.own.append(weights.detach())
        return weights


class Exponents(Mixer):
    """A softmax spelled out: nothing to hear, a function has to show it."""

    def mix(self, q: Tensor, k: Tensor) -> Tensor:
        scores = vars(torch)["einsum"]("bhid,bhjd->bhij", q, k) / 2
        powers = (scores - scores.amax(-1, keepdim=True)).exp() * CAUSAL
        weights = powers / powers.sum(-1, keepdim=True)
        self.own.append(weights.detach())
        return weights


def by_test(path: str, module: nn.Module) -> bool:
    return path.endswith("mix")


@pytest.mark.parametrize(
    "named",
    ["*.mix", "blocks.*.mix", ["blocks.0.mix", "blocks.1.mix"], "Mixer", Mixer, [Mixer], by_test, {"blocks.?.mix"}],
)
def test_one_line_is_enough(named: Any) -> None:
    model = model_of(Mixer)
    assert bnviz.sites(model).attention == []
    plan = bnviz.sites(model, attention=named)
    assert [(a.site.path, a.mechanism) for a in plan.attention] == [(f"blocks.{n}.mix", "named") for n in range(2)]
    seen = watched(model, lambda m: m(ODD), attention=named)
    for one, block in zip(seen, model.blocks, strict=True):
        close(one, block.mix.own[0])
        assert one.key.shape == one.value.shape == (BATCH, HEADS, TOKENS, WIDTH // HEADS)


def weights(module: Mixer, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    return module.own[-1]


def three(module: Mixer, args: Any, kwargs: Any, output: Tensor) -> tuple[Tensor, ...]:
    return module.heads(args[0])


def by_name(module: Mixer, args: Any, kwargs: Any, output: Tensor) -> dict[str, Any]:
    query, key, value = module.heads(args[0])
    return {"query": query, "key": key, "value": value, "causal": True, "scale": 0.5}


def masked(module: Mixer, args: Any, kwargs: Any, output: Tensor) -> dict[str, Any]:
    query, key, _ = module.heads(args[0])
    return {"query": query, "key": key, "allowed": CAUSAL, "scale": 0.5}


def logits(module: Mixer, args: Any, kwargs: Any, output: Tensor) -> dict[str, Any]:
    query, key, value = module.heads(args[0])
    return {"logits": (query @ key.mT / 2).masked_fill(~CAUSAL, -math.inf), "value": value}


class Seen:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


def by_attribute(module: Mixer, args: Any, kwargs: Any, output: Tensor) -> Seen:
    return Seen(**by_name(module, args, kwargs, output))


@pytest.mark.parametrize("shows", [weights, by_name, masked, logits, by_attribute])
@pytest.mark.parametrize("key", ["*.mix", Exponents])
def test_a_function_shows_what_nothing_can_hear(shows: Any, key: Any) -> None:
    model = model_of(Exponents)
    seen = watched(model, lambda m: m(ODD), attention={key: shows})
    assert [(s.site.path, s.site.layer, s.site.kind) for s in seen] == [
        (f"blocks.{n}.mix", n, "attention") for n in range(2)
    ]
    for one, block in zip(seen, model.blocks, strict=True):
        close(one, block.mix.own[0])


def test_three_tensors_see_all_keys() -> None:
    model = model_of(Exponents)
    seen = watched(model, lambda m: m(ODD), attention={"*.mix": three})
    query, key, _ = model.blocks[0].mix.heads(model.blocks[0].n1(model.stem(ODD)))
    close(seen[0], (query @ key.mT / 2).softmax(-1))


def test_weights_of_one_head_and_less_than_one() -> None:
    def some(module: Mixer, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return module.own[-1][:, 0] * 0.5

    model = model_of(Exponents)
    seen = watched(model, lambda m: m(ODD), attention={"*.mix": some})
    close(seen[1], model.blocks[1].mix.own[0][:, :1] * 0.5)


def test_a_function_may_have_nothing_to_show() -> None:
    model = model_of(Exponents)
    with torch.no_grad(), bnviz.capture(model, strict=True, attention={"*.mix": lambda *_: None}) as recorder:
        model(ODD)
    assert "attention" not in recorder.run


GIVES: dict[str, tuple[Any, str]] = {
    "two tensors": (lambda m, *_: (m.own[-1], m.own[-1]), "gave (Tensor, Tensor), expected three tensors"),
    "text": (lambda *_: "weights", "gave str, expected weights, (query, key, value), or fields by name"),
    "a flat tensor": (lambda *_: torch.ones(7), r"gave weights torch.float32 of shape (7,), expected (batch, heads,"),
    "whole numbers": (lambda *_: torch.ones(1, 1, 2, 2).long(), "gave weights torch.int64"),
    "no key": (lambda m, *_: {"query": m.own[-1]}, "gave only one of query and key"),
    "nothing by name": (lambda m, *_: {"value": m.own[-1]}, "gave value, expected query and key, or weights, or logits"),
    "dims that differ": (lambda m, *_: (torch.ones(2, 4, 7, 3), torch.ones(2, 4, 7, 4), torch.ones(2, 4, 7, 4)),
                         "gave query (2, 4, 7, 3), key (2, 4, 7, 4), value (2, 4, 7, 4), expected one batch, one dim"),
    "heads that do not divide": (lambda m, *_: (torch.ones(2, 4, 7, 3), torch.ones(2, 3, 7, 3), torch.ones(2, 3, 7, 3)),
                                 "heads that are a multiple of the key's"),
    "a mask that does not fit": (lambda m, *_: {"query": torch.ones(2, 4, 7, 3), "key": torch.ones(2, 4, 7, 3),
                                                "allowed": torch.ones(5, 5)}, "gave allowed (1, 1, 5, 5)"),
    "a raise": (lambda *_: {}["x"], "KeyError: 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVES)
def test_what_does_not_fit_is_said_in_one_sentence_and_the_model_goes_on(case: str) -> None:
    function, words = GIVES[case]
    model = model_of(Exponents)
    expected = model(ODD)
    with bnviz.capture(model, probes=["attention", "activations"], attention={"*.mix": function}) as recorder:
        assert torch.equal(model(ODD), expected)
        model(ODD)
    said = [note for note in recorder.run.notes if note.startswith("attention of blocks.0.mix was not read")]
    assert len(said) == 1
    assert words in said[0]
    with (
        pytest.raises(CaptureError, match=r"blocks\.0\.mix"),
        bnviz.capture(model, attention={"*.mix": function}, strict=True),
    ):
        model(ODD)


def test_an_unknown_field_is_named_with_the_valid_ones() -> None:
    from bnviz.capture.attention.named import shown

    with pytest.raises(UnknownName, match=r"'querry'; did you mean 'query'\? Valid: allowed, causal"):
        shown({"querry": torch.ones(1, 1, 2, 2), "key": torch.ones(1, 1, 2, 2)}, "attn")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("*.mxi", r"'\*\.mxi' names no module of Body, nearest: '\*\.mix'; expected a pattern of paths"),
        (nn.Conv2d, "Conv2d names no module of Body"),
        (lambda path, module: False, "names no module of Body"),
        (3, r"found int, expected a pattern of paths"),
        ([3], "found int"),
        (nn.Linear(2, 2), "found Linear, expected a pattern"),
        ({"*.mix": "weights"}, "found 'weights' as the function of a module"),
    ],
)
def test_what_names_nothing_is_refused(given: Any, words: str) -> None:
    model = model_of(Mixer)
    with pytest.raises(CaptureError, match=words):
        bnviz.sites(model, attention=given)
    with pytest.raises(CaptureError, match=words):
        bnviz.capture(model, attention=given).attach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_module_that_was_named_stands_for_what_is_in_it() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = PlainInside()

        def forward(self, x: Tensor) -> Tensor:
            return self.attn(x)

    class PlainInside(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.heads(x)
            self.mix(q, k)
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(out.transpose(1, 2).flatten(2))

    model = model_of(Wrapper)
    assert [a.site.path for a in bnviz.sites(model).attention] == [f"blocks.{n}.mix.attn" for n in range(2)]
    seen = watched(model, lambda m: m(ODD), attention="*.mix")
    assert [s.site.path for s in seen] == [f"blocks.{n}.mix" for n in range(2)]
    for one, block in zip(seen, model.blocks, strict=True):
        close(one, block.mix.attn.own[0])


def test_a_module_that_was_named_may_hold_one_that_calls_the_interface() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(2, 26).reshape(2, 12)
    with torch.no_grad():
        seen = watched(model, lambda m: m(input_ids=ids).logits, attention="model.layers.?")
    assert [s.site.path for s in seen] == ["model.layers.0", "model.layers.1"]
    assert seen[0].query.shape == (2, 4, 12, 8)


def test_errors_are_of_one_family() -> None:
    assert issubclass(CaptureError, BnvizError)
    assert issubclass(UnknownName, BnvizError)
