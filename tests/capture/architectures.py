"""Small models of many shapes, written as people write them; for tests of what a capture finds in them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .test_sites import PlainAttention


def mlp(width: int, wide: int = 32) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))


class Looped(nn.Module):
    """A list of blocks, one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# ---------------------------------------------------------------------- images


class BasicBlock(nn.Module):
    def __init__(self, into: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = None
        if stride != 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + identity)


class ResNet(nn.Module):
    """As torchvision names it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16))
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Permute(nn.Module):
    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.dims)


class CNBlock(nn.Module):
    """ConvNeXt's block, as torchvision writes it: channels first outside, last inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Permute(0, 3, 1, 2),
        )
        self.layer_scale = nn.Parameter(torch.rand(width, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer_scale * self.block(x)


def convnext() -> nn.Module:
    """Stages and what lies between them in one nested Sequential."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GroupNorm(1, 8)),
        nn.Sequential(CNBlock(8), CNBlock(8)),
        nn.Sequential(nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 2, 2)),
        nn.Sequential(CNBlock(16)),
    )


def vgg() -> nn.Module:
    """Plain layers in nested Sequentials, with norms, activations and pooling between them."""
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(8, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(16 * 4, 12),
        nn.Dropout(),
    )


class Inception(nn.Module):
    """Branches side by side."""

    def __init__(self, into: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(into, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, k, padding=k // 2)) for k in (1, 3, 5)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Branches(nn.Module):
    """The whole model is branches side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(mlp(6, 20 + i) for i in range(3))
        self.head = nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([tower(x) for tower in self.towers], -1))


# ---------------------------------------------------------------------- U-Nets and diffusion


class Double(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(into, out, 3, padding=1), nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))))


class UNet(nn.Module):
    """The middle is defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = Double(16, 16)
        self.down = nn.ModuleList([Double(3, 8), Double(8, 16)])
        self.up = nn.ModuleList([Double(32, 8), Double(16, 8)])
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level in self.down:
            x = level(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for level in self.up:
            x = level(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.out(x)


class ResnetBlock2D(nn.Module):
    def __init__(self, into: int, out: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(2, into), nn.Conv2d(into, out, 3, padding=1)
        self.time_emb_proj = nn.Linear(emb, out)
        self.norm2, self.conv2 = nn.GroupNorm(2, out), nn.Conv2d(out, out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(into, out, 1) if into != out else None

    def forward(self, input_tensor: Tensor, temb: Tensor) -> Tensor:
        x = self.conv1(F.silu(self.norm1(input_tensor)))
        x = x + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        x = self.conv2(F.silu(self.norm2(x)))
        return (input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)) + x


class Attention(nn.Module):
    def __init__(self, width: int, context: int | None = None, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context or width, width, bias=False) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(0.0)])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        other = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.to_q(hidden_states), self.to_k(other), self.to_v(other))
        )
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        for layer in self.to_out:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context)
        self.norm3, self.ff = nn.LayerNorm(width), mlp(width)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        x = self.attn1(self.norm1(hidden_states)) + hidden_states
        x = self.attn2(self.norm2(x), encoder_hidden_states=encoder_hidden_states) + x
        return self.ff(self.norm3(x)) + x


class Transformer2DModel(nn.Module):
    def __init__(self, width: int, context: int, depth: int = 1) -> None:
        super().__init__()
        self.norm, self.proj_in = nn.GroupNorm(2, width), nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(width, context) for _ in range(depth))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.proj_in(self.norm(hidden_states))
        shape, x = x.shape, x.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            x = block(x, encoder_hidden_states=encoder_hidden_states)
        return self.proj_out(x.transpose(1, 2).reshape(shape)) + hidden_states


class Level(nn.Module):
    """CrossAttnDownBlock2D, UNetMidBlock2DCrossAttn and CrossAttnUpBlock2D in one."""

    def __init__(self, sizes: list[tuple[int, int]], context: int, *, scale: str = "") -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(i, o, 8) for i, o in sizes)
        self.attentions = nn.ModuleList(Transformer2DModel(o, context) for _, o in sizes)
        out = sizes[-1][1]
        if scale == "down":
            self.downsamplers = nn.ModuleList([nn.Sequential(nn.Conv2d(out, out, 3, 2, 1))])
        elif scale == "up":
            self.upsamplers = nn.ModuleList([nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(out, out, 3, 1, 1))])
        self.scale = scale

    def forward(self, hidden_states: Tensor, temb: Tensor, text: Tensor, skips: list[Tensor]) -> Tensor:
        for resnet, attn in zip(self.resnets, self.attentions, strict=True):
            if self.scale == "up":
                hidden_states = torch.cat([hidden_states, skips.pop()], 1)
            hidden_states = resnet(hidden_states, temb)
            hidden_states = attn(hidden_states, encoder_hidden_states=text)
            if self.scale == "down":
                skips.append(hidden_states)
        if self.scale == "down":
            for downsampler in self.downsamplers:
                hidden_states = downsampler(hidden_states)
        elif self.scale == "up":
            for upsampler in self.upsamplers:
                hidden_states = upsampler(hidden_states)
        return hidden_states


class UNet2DCondition(nn.Module):
    """Stable Diffusion's, with its names and its order of definition: the middle after the ups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 3, padding=1)
        self.time_embedding = nn.ModuleDict({"linear_1": nn.Linear(4, 8), "linear_2": nn.Linear(8, 8)})
        self.down_blocks = nn.ModuleList([Level([(8, 8)], 6, scale="down"), Level([(8, 16)], 6, scale="down")])
        self.up_blocks = nn.ModuleList([Level([(32, 16)], 6, scale="up"), Level([(24, 8)], 6, scale="up")])
        self.mid_block = Level([(16, 16)], 6)
        self.conv_out = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        wave = timestep[:, None] * torch.tensor([1.0, 0.5, 0.25, 0.1])
        temb = self.time_embedding["linear_2"](F.silu(self.time_embedding["linear_1"](wave.sin())))
        x, skips = self.conv_in(sample), []
        for block in self.down_blocks:
            x = block(x, temb, encoder_hidden_states, skips)
        x = self.mid_block(x, temb, encoder_hidden_states, skips)
        x = F.interpolate(x, scale_factor=2)
        for block in self.up_blocks:
            x = block(x[..., : skips[-1].shape[-1]], temb, encoder_hidden_states, skips)
        return self.conv_out(x)


class DiTBlock(nn.Module):
    """adaLN: shift, scale and gate of both parts come from the conditioning."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attn = PlainAttention(width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.x_embedder, self.t_embedder = nn.Linear(4, 16), nn.Linear(1, 16)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(depth))
        self.final_layer = nn.Linear(16, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.x_embedder(x), self.t_embedder(t[:, None])
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x)


class JointBlock(nn.Module):
    """Two streams, text first in what is given and given back, image first in what it takes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm1, self.norm1_context = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn = PlainAttention(width)
        self.norm2, self.norm2_context = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.ff, self.ff_context = mlp(width), mlp(width)
        self.gates = nn.Linear(width, 4 * width)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        g = self.gates(temb)[:, None].chunk(4, -1)
        many = hidden_states.shape[1]
        both = self.attn(torch.cat([self.norm1(hidden_states), self.norm1_context(encoder_hidden_states)], 1))
        hidden_states = hidden_states + g[0] * both[:, :many]
        encoder_hidden_states = encoder_hidden_states + g[1] * both[:, many:]
        hidden_states = hidden_states + g[2] * self.ff(self.norm2(hidden_states))
        encoder_hidden_states = encoder_hidden_states + g[3] * self.ff_context(
            self.norm2_context(encoder_hidden_states)
        )
        return encoder_hidden_states, hidden_states


class JointAttention(nn.Module):
    """Every stream has projections of its own, and all tokens attend to all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.add_qkv = (nn.Linear(width, 3 * width) for _ in range(2))
        self.out, self.add_out = (nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = torch.cat([self.add_qkv(context), self.qkv(x)], 1)[:, None].chunk(3, -1)
        both = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return self.out(both[:, context.shape[1] :]), self.add_out(both[:, : context.shape[1]])


class DoubleBlock(JointBlock):
    """The same with an output for each stream, as in FLUX; `states` gives what both are on the way."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(width)
        self.attn: Any = JointAttention(width)

    def states(self, x: Tensor, context: Tensor, temb: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        g = self.gates(temb)[:, None].chunk(4, -1)
        one, two = self.attn(self.norm1(x), self.norm1_context(context))
        first, second = [x, x + g[0] * one], [context, context + g[1] * two]
        first.append(first[1] + g[2] * self.ff(self.norm2(first[1])))
        second.append(second[1] + g[3] * self.ff_context(self.norm2_context(second[1])))
        return first, second

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        first, second = self.states(hidden_states, encoder_hidden_states, temb)
        return second[-1], first[-1]


class MMDiT(nn.Module):
    def __init__(self, depth: int = 3, block: type[nn.Module] = JointBlock) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(block() for _ in range(depth))

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            encoder_hidden_states, hidden_states = block(
                hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states, temb=temb
            )
        return hidden_states


# ---------------------------------------------------------------------- sequences, graphs


class Recurrent(nn.Module):
    """A stack of LSTMs."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.rnns = nn.ModuleList([nn.LSTM(6, 8, batch_first=batch_first), nn.LSTM(8, 8, batch_first=batch_first)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for rnn in self.rnns:
            x, _ = rnn(x)
        return x


class Cells(nn.Module):
    """Two cells, called once a token."""

    def __init__(self, cell: type[nn.Module], sizes: tuple[int, int] = (6, 8)) -> None:
        super().__init__()
        self.cells = nn.ModuleList([cell(sizes[0], sizes[1]), cell(sizes[1], sizes[1])])
        self.width = sizes[1]

    def forward(self, x: Tensor) -> Tensor:
        states: list[Any] = [None, None]
        outputs = []
        for step in range(x.shape[1]):
            token = x[:, step]
            for at, cell in enumerate(self.cells):
                states[at] = cell(token, states[at] if states[at] is not None else self.first(cell, token))
                token = states[at][0] if isinstance(states[at], tuple) else states[at]
            outputs.append(token)
        return torch.stack(outputs, 1)

    def first(self, cell: nn.Module, token: Tensor) -> Any:
        zeros = token.new_zeros(len(token), self.width)
        return (zeros, zeros) if isinstance(cell, nn.LSTMCell) else zeros


class OwnCell(nn.Module):
    def __init__(self, into: int, width: int) -> None:
        super().__init__()
        self.input, self.hidden = nn.Linear(into, width), nn.Linear(width, width)

    def forward(self, token: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.input(token) + self.hidden(state))


class MessagePassing(nn.Module):
    """Neighbours' features are summed; the edges come first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(width + 2, width), nn.Linear(2 * width, width)

    def forward(self, edge_attr: Tensor, edge_index: Tensor, x: Tensor) -> Tensor:
        source, target = edge_index
        message = F.relu(self.message(torch.cat([x[source], edge_attr], -1)))
        gathered = torch.zeros_like(x).index_add_(0, target, message)
        return x + self.update(torch.cat([x, gathered], -1))


class Graph(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.convs = nn.ModuleList(MessagePassing(8) for _ in range(depth))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(edge_attr, edge_index, x)
        return x
