"""SimVLM's conv stage: stem and first three stages of a ResNet, images [B, 3, H, W] -> [B, 16 * width, h, w].

He et al. 2016 (arXiv:1512.03385), bottleneck blocks with the stride in the 3x3 convolution; SimVLM (Wang et
al. 2021, section 3.2) puts it in place of ViT's patch projection. Parameter names are torchvision's, so the
weights of its ResNets without `layer4` and `fc` load as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models.parts.efficientnet import drop_branch


class Bottleneck(nn.Module):
    """1x1 -> 3x3 (stride) -> 1x1 with 4 times the channels, plus the shortcut."""

    def __init__(self, channels: int, width: int, stride: int, stochastic_depth: float) -> None:
        super().__init__()
        self.stochastic_depth = stochastic_depth
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or channels != 4 * width:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, 4 * width, H / stride, W / stride]
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = drop_branch(self.bn3(self.conv3(y)), self.stochastic_depth, self.training)
        return F.relu(y + self.downsample(x))


class ConvStage(nn.Module):
    """Stem, `layer1`, `layer2`, `layer3`: stride 16, or 8 without the pooling of the stem (`pool=False`)."""

    def __init__(
        self, blocks: tuple[int, int, int], width: int, *, pool: bool = True, stochastic_depth: float = 0.0
    ) -> None:
        super().__init__()
        self.channels, self.stride = 16 * width, 16 if pool else 8
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if pool else nn.Identity()
        self.layer1 = _stage(width, width, blocks[0], 1, stochastic_depth)
        self.layer2 = _stage(4 * width, 2 * width, blocks[1], 2, stochastic_depth)
        self.layer3 = _stage(8 * width, 4 * width, blocks[2], 2, stochastic_depth)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Bottleneck):
                nn.init.zeros_(module.bn3.weight)  # every block starts as its shortcut

    def forward(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, 16 * width, H / stride, W / stride]
        # With channels last the result, as tokens [B, h * w, C], needs no copy, and oneDNN is faster.
        images = images.contiguous(memory_format=torch.channels_last)
        x = self.maxpool(F.relu(self.bn1(self.conv1(images))))
        return self.layer3(self.layer2(self.layer1(x)))


def _stage(channels: int, width: int, blocks: int, stride: int, stochastic_depth: float) -> nn.Sequential:
    first = Bottleneck(channels, width, stride, stochastic_depth)
    rest = (Bottleneck(4 * width, width, 1, stochastic_depth) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
