"""Regions of an image from a convolutional tower: the cells of its map, or its means over given boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.models.parts.resnet import ResNet

POINTS = 7  # of a box, a side


def pool_boxes(
    features: Tensor,  # [B, C, h, w]
    boxes: Tensor,  # [B, V, 4]
    points: int = POINTS,
) -> Tensor:  # [B, V, C]
    """The mean of a map over each box: left, top, right, bottom as fractions of the image.

    The map is interpolated bilinearly at the centres of `points` x `points` equal parts of the box, as in RoI
    align (He et al. 2017, arXiv:1703.06870, section 3), and continues beyond its border as it is there.
    """
    boxes = boxes.to(features.dtype)
    low, high = boxes[..., None, :2], boxes[..., None, 2:]  # [B, V, 1, 2]
    at = (torch.arange(points, device=boxes.device, dtype=boxes.dtype) + 0.5)[:, None] / points
    x, y = (2 * (low + at * (high - low)) - 1).unbind(-1)  # [B, V, points] each, in [-1, 1]
    wide = (*x.shape[:2], points, points)
    grid = torch.stack([x[..., None, :].expand(wide), y[..., None].expand(wide)], -1)
    sampled = F.grid_sample(features, grid.flatten(2, 3), padding_mode="border", align_corners=False)
    return sampled.mean(-1).transpose(1, 2)  # [B, C, V, points^2] before


class ImageGrid(nn.Module):
    """A ResNet whose map has a learned vector for each position added, so that regions know where they are.

    `blocks`, `width` and `pool` are those of `ResNet`; `channels` is the width of a region, `side` that of
    the map. `image_size` must be a multiple of the network's stride.
    """

    def __init__(self, image_size: int, blocks: Sequence[int], width: int, *, pool: bool = True) -> None:
        super().__init__()
        self.conv_stage = ResNet(blocks, width, pool=pool)
        self.channels, self.image_size = self.conv_stage.channels, image_size
        self.side = image_size // self.conv_stage.stride
        self.position = nn.Parameter(0.02 * torch.randn(self.channels, self.side, self.side))

    def forward(
        self,
        images: Tensor,  # [B, 3, R, R]
        boxes: Tensor | None = None,  # [B, V, 4]
    ) -> Tensor:  # [B, V, C]
        """The regions of `boxes` (`pool_boxes`), or the side^2 cells of the map, row by row."""
        features = self.conv_stage(images)
        features = features + self.position.to(features.dtype)
        return features.flatten(2).transpose(1, 2) if boxes is None else pool_boxes(features, boxes)
