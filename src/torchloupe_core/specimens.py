"""Tiny models with random weights, one for each way of building that breaks interpretability tools.

    handle, inputs = SPECIMENS["residual"](seed=0)

Each answers in milliseconds. `inputs` is a float batch `[3, C, H, W]` of model inputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchloupe_core.borrow import kept_randomness
from torchloupe_core.handle import Handle
from torchloupe_core.spec import Spec

__all__ = ["CLASSES", "SPECIMENS", "Specimen"]

CLASSES = ("ant", "bee", "cat", "dog", "elk")
IMAGES = 3

Specimen = Callable[..., tuple[Handle, Tensor]]


class Plain(nn.Module):
    """Convolution, ReLU, pooling; global average pooling and a linear classifier, so that CAM is exact."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.ReLU()
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu1(self.conv1(x)))
        x = self.relu2(self.conv2(x))
        return self.fc(self.gap(x).flatten(1))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """Two normalised convolutions and a skip; one ReLU module is called twice."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.relu = nn.ReLU()
        same = before == after and stride == 1
        self.skip = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.skip(x))  # type: ignore[no-any-return]


class Residual(nn.Module):
    """A small ResNet with dropout before its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        self.layer1, self.layer2 = ResidualBlock(8, 8, 2), ResidualBlock(8, 16, 2)
        self.dropout, self.fc = nn.Dropout(0.5), nn.Linear(16, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(self.dropout(x.mean((2, 3))))  # type: ignore[no-any-return]


class Concat(nn.Module):
    """Branches and earlier maps joined by concatenation, as in Inception and DenseNet; rectified by functions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.narrow, self.wide = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 5, padding=2)
        self.dense1, self.dense2 = nn.Conv2d(16, 6, 3, padding=1), nn.Conv2d(22, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(28)
        self.classifier = nn.Linear(28, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        pooled = F.max_pool2d(x, 3, 1, 1)
        x = torch.cat([self.narrow(x), self.wide(x), pooled], 1)
        x = torch.cat([x, F.relu(self.dense1(x))], 1)
        x = torch.cat([x, F.relu(self.dense2(F.avg_pool2d(x, 1)))], 1)
        x = F.relu(self.norm(F.avg_pool2d(x, 2)))
        return self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class SqueezeExcite(nn.Module):
    """Channels weighed by what they hold on average."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.act, self.gate = nn.SiLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(self.pool(x)))))  # type: ignore[no-any-return]


class Depthwise(nn.Module):
    """Inverted bottleneck, depthwise convolution, squeeze-excite; a 1x1 convolution classifies. No ReLU anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn1, self.act1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish()
        self.expand, self.act2 = nn.Conv2d(8, 16, 1), nn.SiLU()
        self.depthwise, self.act3 = nn.Conv2d(16, 16, 3, 2, 1, groups=16), nn.SiLU()
        self.se, self.project = SqueezeExcite(16), nn.Conv2d(16, 8, 1)
        self.head, self.act4 = nn.Conv2d(8, 20, 1), nn.Hardswish()
        self.gap, self.fc, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Conv2d(20, len(CLASSES), 1), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.stem(x)))
        x = self.act3(self.depthwise(self.act2(self.expand(x))))
        x = self.act4(self.head(self.project(self.se(x))))
        return self.flatten(self.fc(self.gap(x)))  # type: ignore[no-any-return]


class InPlace(nn.Module):
    """Writes into its own input, and into every map: one in-place ReLU module serves throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.conv2, self.conv3 = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(12, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.1).mul_(1.5)
        x = self.relu(self.bn1(self.conv1(x)))
        y = self.conv2(x)
        y += x
        y = self.relu(self.conv3(self.relu(y)))
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


class WindowAttention(nn.Module):
    """Attention inside windows that are folded into the batch dimension, as in Swin."""

    def __init__(self, dim: int, window: int, heads: int) -> None:
        super().__init__()
        self.window, self.heads = window, heads
        self.qkv, self.proj, self.softmax = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        s = self.window
        x = x.view(n, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)  # [N*windows, s*s, C]
        q, k, v = self.qkv(x).view(len(x), s * s, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = self.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5) @ v
        x = self.proj(x.transpose(1, 2).reshape(-1, s * s, c))
        return x.view(n, h // s, w // s, s, s, c).transpose(2, 3).reshape(n, h, w, c)


class WindowBlock(nn.Module):
    """One Swin-like block on `[N, h, w, C]`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim, window=4, heads=2)
        self.norm2, self.fc1, self.act, self.fc2 = (
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * dim),
            nn.GELU(),
            nn.Linear(2 * dim, dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]


class ConvBlock(nn.Module):
    """One ConvNeXt-like block: `[N, C, h, w]` outside, channels last within."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.LayerNorm(dim)
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.fc2(self.act(self.fc1(y))).permute(0, 3, 1, 2)  # type: ignore[no-any-return]


class ChannelsLast(nn.Module):
    """A ConvNeXt-like stage, then a Swin-like one, pooled over `[N, h, w, C]`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv_block = nn.Conv2d(3, 12, 2, 2), ConvBlock(12)
        self.down = nn.Conv2d(12, 16, 2, 2)
        self.window_block, self.norm = WindowBlock(16), nn.LayerNorm(16)
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.conv_block(self.stem(x)))
        x = self.norm(self.window_block(x.permute(0, 2, 3, 1)))
        return self.head(x.mean((1, 2)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Multi-head attention through the fused kernel, with normalised queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = nn.LayerNorm(dim // heads), nn.LayerNorm(dim // heads)

    def forward(self, x: Tensor) -> Tensor:
        n, length, dim = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(n, length, dim))  # type: ignore[no-any-return]


class TokenBlock(nn.Module):
    """One ViT block on `[N, L, D]`."""

    def __init__(self, dim: int, heads: int = 2) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(dim), Attention(dim, heads), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Tokens(nn.Module):
    """A ViT with a class token and four register tokens on a 4 x 6 grid; the class token alone is classified."""

    def __init__(self, dim: int = 16, registers: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, 8, 8)
        self.prefix = nn.Parameter(torch.randn(1, 1 + registers, dim))
        self.positions = nn.Parameter(torch.randn(1, 24, dim))
        self.blocks = nn.Sequential(*(TokenBlock(dim) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, len(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions  # [N, 24, D]
        x = torch.cat([self.prefix.expand(len(x), -1, -1), x], 1)  # [N, 5 + 24, D]
        return self.head(self.norm(self.blocks(x))[:, 0])  # type: ignore[no-any-return]


def _specimen(
    build: Callable[[], nn.Module],
    size: tuple[int, int, int] = (3, 32, 32),
    *,
    prefix: int | None = None,
    fixed: bool = False,
) -> Specimen:
    def make(seed: int = 0) -> tuple[Handle, Tensor]:
        with kept_randomness():
            torch.manual_seed(seed)
            module = build().eval()
            for part in module.modules():
                if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
                    part.running_mean.normal_(std=0.2)
                    part.running_var.uniform_(0.5, 1.5)
            inputs = torch.randn(IMAGES, *size)
        facts = Spec(
            type(module).__name__.lower(),
            "specimen",
            input_size=size,
            fixed_size=fixed,
            classes=CLASSES,
            prefix=prefix,
        )
        return Handle(module, facts), inputs

    return make


SPECIMENS: dict[str, Specimen] = {
    "plain": _specimen(Plain),
    "residual": _specimen(Residual),
    "concat": _specimen(Concat),
    "depthwise": _specimen(Depthwise),
    "inplace": _specimen(InPlace),
    "nhwc": _specimen(ChannelsLast),
    "vit_registers": _specimen(Tokens, (3, 32, 48), prefix=5, fixed=True),
    "grayscale": _specimen(lambda: Plain(1), (1, 32, 32)),
}
