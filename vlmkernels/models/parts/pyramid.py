"""A feature pyramid over the stages of a network (Lin et al. 2017, arXiv:1612.03144), torchvision's names."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


def convolution(
    channels: int, width: int, side: int, *, norm: bool = False, relu: bool = False
) -> nn.Sequential:
    """A convolution that keeps the size of a map, BatchNorm instead of a bias, and ReLU."""
    parts: list[nn.Module] = [nn.Conv2d(channels, width, side, padding=side // 2, bias=not norm)]
    parts += [nn.BatchNorm2d(width)] if norm else []
    return nn.Sequential(*parts, *([nn.ReLU()] if relu else []))


class RowNorm(nn.BatchNorm1d):
    """BatchNorm of rows [K, F]; one row alone, which has no statistics, is normalised by the running ones."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) == 1:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


class Pyramid(nn.Module):
    """Maps of one width from those of the stages, each with what the smaller know, and one half the last."""

    def __init__(self, channels: Sequence[int], width: int, norm: bool) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(convolution(each, width, 1, norm=norm) for each in channels)
        self.layer_blocks = nn.ModuleList(convolution(width, width, 3, norm=norm) for _ in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:  # [B, C_i, h_i, w_i] -> [B, width, h_i, w_i]
        sides = [block(x) for block, x in zip(self.inner_blocks, maps, strict=True)]
        for index in range(len(sides) - 1, 0, -1):
            size = sides[index - 1].shape[-2:]
            sides[index - 1] = sides[index - 1] + F.interpolate(sides[index], size, mode="nearest")
        found = [block(x) for block, x in zip(self.layer_blocks, sides, strict=True)]
        return [*found, found[-1][..., ::2, ::2]]
