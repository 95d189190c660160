"""ResNets of bottleneck blocks: the plain one, of any number of stages, and CLIP's ModifiedResNet.

He et al. 2016 (arXiv:1512.03385), with the stride in the 3x3 convolution; parameter names are torchvision's,
and openai/CLIP's (MIT), which are the same except for the shortcut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models.parts.stochastic_depth import drop_branch


class FrozenBatchNorm(nn.Module):
    """BatchNorm2d by statistics, weight and bias that training leaves as they are; all four are buffers."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)  # type: ignore[arg-type]


class Bottleneck(nn.Module):
    """1x1 -> 3x3 (stride) -> 1x1 with 4 times the channels, plus the shortcut.

    With `average_pool` both paths are averaged instead of strided, as in CLIP. `widen` multiplies the width
    inside the block, not that of its result, as in wide ResNets. `norm` makes the layer after a convolution.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        stride: int,
        *,
        average_pool: bool = False,
        widen: int = 1,
        stochastic_depth: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.stochastic_depth = stochastic_depth
        step = 1 if average_pool else stride
        inner = widen * width
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, step, padding=1, bias=False)
        self.bn2 = norm(inner)
        self.avgpool = nn.AvgPool2d(stride) if stride > step else nn.Identity()
        self.conv3 = nn.Conv2d(inner, 4 * width, 1, bias=False)
        self.bn3 = norm(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * width:
            pool = [("-1", nn.AvgPool2d(stride))] if average_pool else []
            conv = nn.Conv2d(channels, 4 * width, 1, step, bias=False)
            self.downsample = nn.Sequential(OrderedDict([*pool, ("0", conv), ("1", norm(4 * width))]))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4 * width, H / stride, W / stride]
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = drop_branch(self.bn3(self.conv3(self.avgpool(y))), self.stochastic_depth, self.training)
        return F.relu(y + self.downsample(x))


def _stage(channels: int, width: int, blocks: int, stride: int, **options: Any) -> nn.Sequential:
    first = Bottleneck(channels, width, stride, **options)
    return nn.Sequential(first, *(Bottleneck(4 * width, width, 1, **options) for _ in range(blocks - 1)))


def map_stride(blocks: Sequence[int], *, pool: bool) -> int:
    """Pixels a side of a position of the map of `ResNet(blocks, width, pool=pool)`."""
    return 2 ** (max(len(blocks), 1) + pool)


class ResNet(nn.Module):
    """Stem and stages, `layer1` and on, without a head: images to the map of the last stage.

    n stages give 2^(n + 1) * width `channels` at `stride` 2^(n + 1), half of it without the pooling of the
    stem (`pool=False`). The weights of torchvision's ResNets load unchanged, except those of layers that are
    not here; those of its wide_resnet50_2 with `widen=2`. `norm` makes the layer after a convolution.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int,
        *,
        pool: bool = True,
        widen: int = 1,
        stochastic_depth: float = 0.0,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
        self.channels, self.stride = width, map_stride(blocks, pool=pool)
        self.stages = [f"layer{1 + index}" for index in range(len(blocks))]
        for index, name in enumerate(self.stages):
            inner, stride = width * 2**index, 1 if index == 0 else 2
            options = {"widen": widen, "stochastic_depth": stochastic_depth, "norm": norm}
            self.add_module(name, _stage(self.channels, inner, blocks[index], stride, **options))
            self.channels = 4 * inner
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck) and isinstance(module.bn3, nn.BatchNorm2d):
                nn.init.zeros_(module.bn3.weight)  # every block starts as its shortcut

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, channels, H / stride, W / stride]
        return self.maps(images)[-1]

    def maps(self, images: Tensor) -> list[Tensor]:  # [B, 3, H, W]
        """The map of every stage, the largest first."""
        # With channels last the result, as tokens [B, h * w, C], needs no copy, and oneDNN is faster.
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        found = []
        for name in self.stages:
            x = self.get_submodule(name)(x)
            found.append(x)
        return found


class Trunk(ResNet):
    """A ResNet that gives the map of every stage."""

    def forward(self, images: Tensor) -> list[Tensor]:  # type: ignore[override]
        return self.maps(images)


class AttentionPool(nn.Module):
    """Multi-head attention with one query, the mean of all positions, which is also a key and a value."""

    def __init__(self, grid: int, width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, output_dim]
        tokens = x.flatten(2).transpose(1, 2)  # [B, HW, C]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        query, key, value = (
            projection(part).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, 1 or HW + 1, Dh]
            for projection, part in (
                (self.q_proj, tokens[:, :1]),
                (self.k_proj, tokens),
                (self.v_proj, tokens),
            )
        )
        return self.c_proj(F.scaled_dot_product_attention(query, key, value).flatten(1))


class ModifiedResNet(nn.Module):
    """The image tower of CLIP's RN50 ... RN50x64: images [B, 3, R, R] to embeddings [B, output_dim].

    Radford et al. 2021, section 2.4: three convolutions in the stem, pooling by averages, and by attention.
    """

    def __init__(
        self, layers: tuple[int, int, int, int], width: int, heads: int, image_size: int, output_dim: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = _stage(width, width, layers[0], 1, average_pool=True)
        self.layer2 = _stage(4 * width, 2 * width, layers[1], 2, average_pool=True)
        self.layer3 = _stage(8 * width, 4 * width, layers[2], 2, average_pool=True)
        self.layer4 = _stage(16 * width, 8 * width, layers[3], 2, average_pool=True)
        self.attnpool = AttentionPool(image_size // 32, 32 * width, heads, output_dim)
        self._initialise()

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, R, R] -> [B, output_dim]
        x = images.contiguous(memory_format=torch.channels_last)  # oneDNN is faster, and so are the norms
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.avgpool(x)))))
        return self.attnpool(x)

    def _initialise(self) -> None:
        pool = self.attnpool
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        for module in self.modules():
            if isinstance(module, Bottleneck) and isinstance(module.bn3, nn.BatchNorm2d):
                nn.init.zeros_(module.bn3.weight)  # every block starts as its shortcut
