"""Attention through torch's own functions, by any name: what is seen describes the weights they use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as under_another_name

import bnviz

from .spied import close, watched, weights_of
from .test_sites import Body, PreNorm

BATCH, TOKENS, WIDTH, HEADS = 2, 7, 16, 4
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def model_of(mixer: Callable[[], nn.Module], depth: int = 2) -> Body:
    class Block(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.mix = mixer()
            del self.attn

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.mix(self.n1(x))
            return x + self.mlp(self.n2(x))

    model = Body(Block, depth).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


class Kept(nn.Module):
    """Projects, attends in the way that a subclass spells out, and keeps what weights should come of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.own: list[Tensor] = []

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def join(self, out: Tensor) -> Tensor:
        return self.out(out.transpose(1, 2).flatten(2))

    def keep(self, q: Tensor, k: Tensor, allowed: Tensor | None = None, scale: float | None = None) -> None:
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if allowed is not None and allowed.dtype == torch.bool:
            logits = logits.masked_fill(~allowed, -math.inf)
        elif allowed is not None:
            logits = logits + allowed
        self.own.append(logits.detach().softmax(-1))


class Plain(Kept):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.keep(q, k)
        return self.join(under_another_name(q, k, v))


class Causal(Kept):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.keep(q, k, CAUSAL, 0.3)
        return self.join(F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True, scale=0.3))


class Masked(Kept):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        bias = torch.linspace(-1, 1, TOKENS, dtype=x.dtype) + torch.zeros(BATCH, HEADS, TOKENS, 1, dtype=x.dtype)
        self.keep(q, k, bias)
        return self.join(F.scaled_dot_product_attention(q, k, v, bias, 0.0))


class MaskOfPairs(Kept):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.keep(q, k, CAUSAL.T)
        return self.join(F.scaled_dot_product_attention(q, k, v, attn_mask=CAUSAL.T))


class Grouped(Kept):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        k, v = k[:, :2], v[:, :2]
        self.keep(q, k)
        return self.join(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


class OneKeyHead(Kept):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        k, v = k[:, :1], v[:, :1]
        self.keep(q, k)
        return self.join(F.scaled_dot_product_attention(q, k, v))


class Flattened(Kept):
    """(batch x heads, tokens, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.keep(q, k, CAUSAL)
        parts = (t.flatten(0, 1) for t in (q, k, v))
        mask = CAUSAL.expand(BATCH * HEADS, -1, -1)
        return self.join(F.scaled_dot_product_attention(*parts, attn_mask=mask).unflatten(0, (BATCH, HEADS)))


class Operator(Kept):
    """By the operator's own name, as exported code does."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.keep(q, k, CAUSAL)
        kernel = torch.ops.aten.scaled_dot_product_attention
        return self.join(kernel(q, k, v, None, 0.0, True))


class FlashOperator(Kept):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        self.keep(q, k, CAUSAL, 0.4)
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        return self.join(kernel(q, k, v, 0.0, True, scale=0.4)[0])


class LowerRight(Kept):
    """torch.nn.attention.bias: causal, the last query level with the last key."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.bias import causal_lower_right

        q, k, v = self.split(x)
        q = q[:, :, -3:]
        self.keep(q, k, CAUSAL[-3:])
        out = self.join(F.scaled_dot_product_attention(q, k, v, causal_lower_right(3, TOKENS)))
        return F.pad(out, (0, 0, TOKENS - 3, 0))


class UpperLeft(Kept):
    """`is_causal` with fewer queries than keys: torch aligns it with the first key."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        q = q[:, :, :3]
        self.keep(q, k, CAUSAL[:3])
        out = self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return F.pad(out, (0, 0, 0, TOKENS - 3))


class MultiHead(Kept):
    """`F.multi_head_attention_forward` itself, as CLIP's pooling calls it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        out, weights = F.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, self.qkv.weight, self.qkv.bias, None, None, False, 0.0, self.out.weight, self.out.bias,
            training=False, attn_mask=~CAUSAL, average_attn_weights=False,
        )  # fmt: skip
        self.own.append(weights.detach())
        return out.transpose(0, 1)


WAYS = [
    Plain,
    Causal,
    Masked,
    MaskOfPairs,
    Grouped,
    OneKeyHead,
    Flattened,
    Operator,
    FlashOperator,
    LowerRight,
    UpperLeft,
]
WAYS += [MultiHead]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_every_function_gives_the_weights_it_uses(way: type[Kept]) -> None:
    model, x = model_of(way), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    options = {"attention": "*.mix"} if way in (Operator, FlashOperator) else {}  # their code names no known function
    seen = watched(model, lambda m: m(x), **options)
    assert [(s.site.kind, s.site.layer, s.site.path) for s in seen] == [
        ("attention", n, f"blocks.{n}.mix") for n in range(2)
    ]
    for one, block in zip(seen, model.blocks, strict=True):
        close(one, block.mix.own[0])
    if way in (Grouped, OneKeyHead):
        assert seen[0].key.shape[1] == {Grouped: 2, OneKeyHead: 1}[way]


def test_queries_learned_for_all_are_one_for_each() -> None:
    class Pool(Kept):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(1, HEADS, 3, WIDTH // HEADS))

        def forward(self, x: Tensor) -> Tensor:
            _, k, v = self.split(x)
            self.keep(self.queries.expand(BATCH, -1, -1, -1), k)
            out = self.join(F.scaled_dot_product_attention(self.queries, k, v))
            return F.pad(out, (0, 0, 0, TOKENS - 3))

    model, x = model_of(Pool, 1), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    (one,) = watched(model, lambda m: m(x))
    close(one, model.blocks[0].mix.own[0])
    assert one.across  # three queries that are none of the seven tokens


def test_axes_before_batch_and_heads_are_sequences() -> None:
    class Frames(Kept):
        """Attention inside each frame of a video, five axes."""

        def forward(self, x: Tensor) -> Tensor:
            frames = x.unflatten(1, (3, -1))
            q, k, v = self.qkv(frames).unflatten(-1, (3, HEADS, -1)).permute(3, 0, 1, 4, 2, 5)
            self.keep(q.flatten(0, 1), k.flatten(0, 1))
            return self.out(F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(x.shape))

    model, x = model_of(Frames, 1), torch.randn(BATCH, 12, 8, dtype=torch.float64)
    (one,) = watched(model, lambda m: m(x))
    assert one.query.shape == (BATCH * 3, HEADS, 4, WIDTH // HEADS)
    close(one, model.blocks[0].mix.own[0])


def distance(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh(score) * 2 - 0.25 * (h + 1) * (q - k).abs()


def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k < 4 + b)


class Flex(Kept):
    """flex_attention called directly, with a score function and a mask; two key heads."""

    score: Any = staticmethod(distance)
    compiled: Any = None

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        q, k, v = self.split(x)
        k, v = k[:, :2], v[:, :2]
        mask = create_block_mask(visible, BATCH, None, TOKENS, TOKENS, device="cpu")
        attend = self.compiled or flex_attention
        out = attend(q, k, v, score_mod=self.score, block_mask=mask, scale=0.7, enable_gqa=True)
        self.told(q, k)
        return self.join(out)

    def told(self, q: Tensor, k: Tensor) -> None:
        b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (BATCH, HEADS, TOKENS, TOKENS)), indexing="ij")
        logits = 0.7 * q @ k.repeat_interleave(2, 1).mT
        logits = self.score(logits, b, h, i, j) if self.score is not None else logits
        self.own.append(logits.masked_fill(~visible(b, h, i, j), -math.inf).softmax(-1).detach())


class FlexMaskOnly(Flex):
    score = None


class FlexIndexed(Flex):
    """A score function that looks a bias up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.linspace(-1, 1, HEADS * TOKENS).view(HEADS, TOKENS))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        self.score = lambda score, b, h, q, k: score + bias[h, k]
        return super().forward(x)


FLEX = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:flex_attention called without")


@FLEX
@pytest.mark.parametrize("way", [Flex, FlexMaskOnly, FlexIndexed])
def test_flex_attention_called_directly(way: type[Flex], monkeypatch: pytest.MonkeyPatch) -> None:
    from bnviz.capture.attention import masks

    model, x = model_of(way), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    for piece in (1 << 22, 40):
        monkeypatch.setattr(masks, "PIECE", piece)
        for block in model.blocks:
            block.mix.own.clear()
        with torch.no_grad():
            seen = watched(model, lambda m: m(x))
        assert (seen[0].allowed.dtype == torch.bool) is (way is FlexMaskOnly)
        for one, block in zip(seen, model.blocks, strict=True):
            close(one, block.mix.own[0])
            assert one.key.shape[1] == 2


attend_compiled = None


class FlexCompiled(Kept):
    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import create_block_mask

        q, k, v = self.split(x)
        mask = create_block_mask(visible, BATCH, None, TOKENS, TOKENS, device="cpu")
        b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (BATCH, HEADS, TOKENS, TOKENS)), indexing="ij")
        self.keep(q, k, visible(b, h, i, j), 0.7)
        return self.join(attend_compiled(q, k, v, block_mask=mask, scale=0.7))


@FLEX
def test_a_function_that_was_compiled_runs_eager_while_it_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention, backend="eager")
    monkeypatch.setitem(globals(), "attend_compiled", compiled)
    model, x = model_of(FlexCompiled, 1), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    with torch.no_grad():
        seen = watched(model, lambda m: m(x))
        with bnviz.capture(model, probes=["attention"]) as recorder:
            model(x)
    (one,) = seen
    close(one, model.blocks[0].mix.own[-1])
    assert any("ran eager" in note for note in recorder.run.notes)


class Processor:
    """What diffusers gives an attention module to call."""

    def __call__(self, module: Kept, x: Tensor) -> Tensor:
        q, k, v = module.split(x)
        module.keep(q, k)
        return module.join(F.scaled_dot_product_attention(q, k, v))


class WithProcessor(Kept):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x: Tensor) -> Tensor:
        return self.processor(self, x)


def test_code_in_an_object_that_is_no_module_is_read() -> None:
    model, x = model_of(WithProcessor), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    seen = watched(model, lambda m: m(x))
    assert [(s.site.path, s.site.evidence) for s in seen] == [
        (f"blocks.{n}.mix", "its code calls F.scaled_dot_product_attention") for n in range(2)
    ]
    for one, block in zip(seen, model.blocks, strict=True):
        close(one, block.mix.own[0])


class OddAttention(nn.Module):
    """What it calls is looked up by a name that is no name in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.own: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = vars(F)["scaled_dot_product_attention"](q, k, v, is_causal=True)
        self.own += [q.detach(), k.detach()]
        return self.out(out.transpose(1, 2).flatten(2))


def test_what_is_named_attention_is_listened_to_though_its_code_says_nothing() -> None:
    model, x = model_of(OddAttention), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    assert [u.path for u in bnviz.sites(model).unknown] == ["blocks.0.mix", "blocks.1.mix"]
    seen = watched(model, lambda m: m(x))
    for one, block in zip(seen, model.blocks, strict=True):
        q, k = block.mix.own[:2]
        close(one, (q @ k.mT / 2).masked_fill(~CAUSAL, -math.inf).softmax(-1))
    with torch.no_grad(), bnviz.capture(model, probes=["attention"], strict=True) as recorder:
        model(x)
    assert list(recorder.run["attention"].path.values) == ["blocks.0.mix", "blocks.1.mix"]
    assert not any("not read" in note for note in recorder.run.notes)


def test_a_native_layer_inside_keeps_its_fused_path() -> None:
    class Mixed(Kept):
        """Attention of its own, and torch's in the same module."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(self.inner(x))
            self.keep(q, k)
            return self.join(F.scaled_dot_product_attention(q, k, v))

    model, x = model_of(Mixed).float(), torch.randn(BATCH, TOKENS, 8)
    with torch.no_grad():
        seen = watched(model, lambda m: m(x))  # bit for bit: the fused path differs in the last digit
    assert sorted((s.site.path, s.site.kind) for s in seen) == [
        (f"blocks.{n}.mix{end}", kind)
        for n in range(2)
        for end, kind in (("", "attention"), (".inner.self_attn", "cross_attention"))
    ]
    own = next(s for s in seen if s.site.path == "blocks.0.mix")
    close(own, model.blocks[0].mix.own[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_kindly() -> None:
    class Nested(Kept):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                torch.nested.nested_tensor([*t], layout=torch.jagged).transpose(1, 2) for t in self.split_tokens(x)
            )
            out = F.scaled_dot_product_attention(q, k, v)
            return self.out(torch.stack([*out.transpose(1, 2).unbind()]).flatten(2))

        def split_tokens(self, x: Tensor) -> tuple[Tensor, ...]:
            return self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)

    model, x = model_of(Nested), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        with bnviz.capture(model, probes=["attention", "activations"]) as recorder:
            assert torch.equal(model(x), expected)
    assert any("blocks.0.mix was not read: nested tensors" in note for note in recorder.run.notes)


def test_the_weights_are_float64_where_the_model_is() -> None:
    model, x = model_of(Plain, 1), torch.randn(BATCH, TOKENS, 8, dtype=torch.float64)
    (one,) = watched(model, lambda m: m(x))
    assert (weights_of(one) - model.blocks[0].mix.own[0]).abs().max() < 1e-12
