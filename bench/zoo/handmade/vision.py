"""Vision and diffusion models as people write them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .made import Made

WIDTH, HEADS, BATCH, DEPTH = 32, 4, 2, 2


class ImageAttention(nn.Module):
    """As in timm, by hand: fused qkv, scale, softmax."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attn = torch.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k)
        attn = self.attn_drop(attn.softmax(dim=-1))
        return self.proj(torch.einsum("bhqk,bhkd->bqhd", attn, v).flatten(2))


class ImageBlock(nn.Module):
    """Pre-norm with layer scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), ImageAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.gamma_1, self.gamma_2 = nn.Parameter(torch.full((WIDTH,), 0.3)), nn.Parameter(torch.full((WIDTH,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, a class token, blocks in a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, WIDTH)), nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.Sequential(*(ImageBlock() for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.blocks(x)[:, 0])


class MixerLayer(nn.Module):
    """MLP over tokens, MLP over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 8, 8)
        self.layers = nn.ModuleList(MixerLayer() for _ in range(DEPTH))

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class Residual(nn.Module):
    """Two convolutions around a skip."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inside, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.conv2, self.bn2 = nn.Conv2d(outside, outside, 3, padding=1), nn.BatchNorm2d(outside)
        self.skip = nn.Identity() if inside == outside else nn.Conv2d(inside, outside, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.skip(x))


class ResNet(nn.Module):
    """Stages of residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(Residual(8, 8), Residual(8, 8))
        self.layer2 = nn.Sequential(Residual(8, 16), Residual(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.layer1(self.stem(images)), 2)
        return self.head(self.layer2(x).mean((2, 3)))


def conv_only() -> nn.Module:
    """Convolutions in a flat Sequential."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


class SpatialAttention(nn.Module):
    """Attention over the pixels of a feature map, as U-Nets write it; one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = (
            nn.GroupNorm(4, channels),
            nn.Conv2d(channels, 3 * channels, 1),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)
        weights = torch.bmm(q.transpose(1, 2), k) * q.shape[1] ** -0.5
        y = torch.bmm(v, weights.softmax(-1).transpose(1, 2))
        return x + self.proj(y.view_as(x))


class TextAttention(nn.Module):
    """Cross attention of pixels to the tokens of a prompt."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (
            nn.Linear(channels, channels),
            nn.Linear(24, channels),
            nn.Linear(24, channels),
        )
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        q, k, v = (
            t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.to_q(pixels), self.to_k(text), self.to_v(text))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.to_out(y).transpose(1, 2).reshape(x.shape)


class UNet(nn.Module):
    """Down, middle with self and cross attention, up, with a skip across."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(8, 16)
        self.inward = nn.Conv2d(3, 16, 3, padding=1)
        self.down_blocks = nn.ModuleList([Residual(16, 16), Residual(16, 32)])
        self.mid_attention, self.mid_cross = SpatialAttention(32), TextAttention(32)
        self.up_blocks = nn.ModuleList([Residual(32, 16), Residual(32, 16)])
        self.outward = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self.inward(x) + self.time(time)[:, :, None, None]
        skip = self.down_blocks[0](x)
        x = self.down_blocks[1](F.avg_pool2d(skip, 2))
        x = self.mid_cross(self.mid_attention(x), text)
        x = F.interpolate(self.up_blocks[0](x), scale_factor=2)
        return self.outward(self.up_blocks[1](torch.cat([x, skip], 1)))


class DiTBlock(nn.Module):
    """Adaptive norm: shift, scale and gate from the time."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn = ImageAttention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH))
        self.ada = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.ada(F.silu(c))[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """Diffusion transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(12, WIDTH), nn.Linear(1, WIDTH)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(DEPTH))
        self.out = nn.Linear(WIDTH, 12)

    def forward(self, latents: Tensor, time: Tensor) -> Tensor:
        x, c = self.embed(latents), self.time(time)
        for block in self.blocks:
            x = block(x, c)
        return self.out(x)


class JointBlock(nn.Module):
    """MMDiT: image and text have weights of their own and one attention over both."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({s: nn.LayerNorm(WIDTH) for s in ("image", "text")})
        self.qkv = nn.ModuleDict({s: nn.Linear(WIDTH, 3 * WIDTH) for s in ("image", "text")})
        self.out = nn.ModuleDict({s: nn.Linear(WIDTH, WIDTH) for s in ("image", "text")})
        self.mlp = nn.ModuleDict(
            {s: nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for s in ("image", "text")}
        )

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([self.qkv[s](self.norms[s](x)) for s, x in (("text", text), ("image", image))], 1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in both.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        of_text, of_image = y.split([text.shape[1], image.shape[1]], 1)
        image, text = image + self.out["image"](of_image), text + self.out["text"](of_text)
        return image + self.mlp["image"](image), text + self.mlp["text"](text)


class MMDiT(nn.Module):
    """A stack of joint blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(JointBlock() for _ in range(DEPTH))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        for block in self.transformer_blocks:
            image, text = block(image, text)
        return image


def _images(
    model: Callable[[], nn.Module], attention: tuple[tuple[int, int, int], ...] = (), blocks: int = DEPTH
) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(0)
        made, images = model(), torch.randn(BATCH, 3, 32, 32)
        return Made(made, lambda: made(images), attention, blocks=blocks)

    return make


def _unet() -> Made:
    torch.manual_seed(0)
    model, x, time, text = UNet(), torch.randn(BATCH, 3, 16, 16), torch.randn(BATCH, 8), torch.randn(BATCH, 5, 24)
    return Made(model, lambda: model(x, time, text), ((1, 64, 64), (HEADS, 64, 5)), blocks=4)


def _dit() -> Made:
    torch.manual_seed(0)
    model, latents, time = DiT(), torch.randn(BATCH, 16, 12), torch.rand(BATCH, 1)
    return Made(model, lambda: model(latents, time), ((HEADS, 16, 16),) * DEPTH, blocks=DEPTH)


def _mmdit() -> Made:
    torch.manual_seed(0)
    model, image, text = MMDiT(), torch.randn(BATCH, 16, WIDTH), torch.randn(BATCH, 5, WIDTH)
    return Made(model, lambda: model(image, text), ((HEADS, 21, 21),) * DEPTH, blocks=DEPTH)


MODELS: dict[str, Callable[[], Made]] = {
    "vit-einsum": _images(ViT, ((HEADS, 17, 17),) * DEPTH),
    "mlp-mixer": _images(Mixer),
    "resnet": _images(ResNet, blocks=4),
    "conv-only": _images(conv_only, blocks=3),
    "unet": _unet,
    "dit": _dit,
    "mmdit": _mmdit,
}
