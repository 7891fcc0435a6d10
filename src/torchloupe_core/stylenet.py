"""The network that changes a picture into a style in one pass, one network for several styles.

Johnson et al. 2016, Perceptual Losses for Real-Time Style Transfer, with the conditional instance normalisation of
Dumoulin et al. 2017, A Learned Representation for Artistic Style: all weights are shared but the scale and shift after
each normalisation, of which each style has its own. Pads repeat the border, so that no picture is too small.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchloupe_core.borrow import kept_randomness

__all__ = ["StyleNet"]

STRIDE = 4  # sides are padded to a multiple of it


class StyleNet(nn.Module):
    """Pictures `[N, C, H, W]` in [0, 1] of any size to such, in a mix of styles `[N, S]` whose rows add up to 1.

    width: channels at full resolution, 32 in the papers; blocks: of the residual part, 5 in the papers.
    """

    def __init__(self, styles: int, *, channels: int = 3, width: int = 32, blocks: int = 5, seed: int = 0) -> None:
        super().__init__()
        with kept_randomness():
            torch.manual_seed(seed)
            self.enter = _Step(channels, width, 9, 1, styles)
            self.down = nn.ModuleList(
                [_Step(width, 2 * width, 3, 2, styles), _Step(2 * width, 4 * width, 3, 2, styles)]
            )
            self.blocks = nn.ModuleList([_Block(4 * width, styles) for _ in range(blocks)])
            self.up = nn.ModuleList([_Step(4 * width, 2 * width, 3, 1, styles), _Step(2 * width, width, 3, 1, styles)])
            self.leave = nn.Conv2d(width, channels, 9)

    def forward(self, images: Tensor, mix: Tensor) -> Tensor:
        height, width = images.shape[2:]
        whole = F.pad(images, (0, -width % STRIDE, 0, -height % STRIDE), mode="replicate")
        x = self.enter(whole - 0.5, mix)
        for step in self.down:
            x = step(x, mix)
        for block in self.blocks:
            x = block(x, mix)
        for step in self.up:
            x = step(F.interpolate(x, scale_factor=2.0, mode="nearest"), mix)
        x = self.leave(F.pad(x, [4] * 4, mode="replicate"))
        return torch.sigmoid(x[:, :, :height, :width])


class _Norm(nn.Module):
    """Each channel of each image to mean 0 and spread 1, then to the scale and shift of the mix of styles."""

    def __init__(self, channels: int, styles: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(styles, channels)), nn.Parameter(torch.zeros(styles, channels))

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        scale, shift = ((mix @ each)[:, :, None, None] for each in (self.scale, self.shift))
        return F.instance_norm(x) * scale + shift if x.shape[2] * x.shape[3] > 1 else x * scale + shift


class _Step(nn.Module):
    """Convolution, normalisation, ReLU."""

    def __init__(self, before: int, after: int, size: int, stride: int, styles: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(before, after, size, stride, bias=False), _Norm(after, styles)

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        pad = self.conv.kernel_size[0] // 2
        return F.relu(self.norm(self.conv(F.pad(x, [pad] * 4, mode="replicate")), mix))


class _Block(nn.Module):
    """What two convolutions add to what goes in."""

    def __init__(self, channels: int, styles: int) -> None:
        super().__init__()
        self.first = _Step(channels, channels, 3, 1, styles)
        self.second, self.norm = nn.Conv2d(channels, channels, 3, bias=False), _Norm(channels, styles)

    def forward(self, x: Tensor, mix: Tensor) -> Tensor:
        y = self.second(F.pad(self.first(x, mix), [1] * 4, mode="replicate"))
        added: Tensor = x + self.norm(y, mix)
        return added
