"""Boxes (left, top, right, bottom) of detectors: anchors, codes, overlaps, matching, sampling, pooling.

Ren et al. 2015 (arXiv:1506.01497); levels of a pyramid by Lin et al. 2017 (arXiv:1612.03144, equation 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

import vlmkernels

BELOW, BETWEEN = -1, -2  # what `match` finds for boxes without a partner
LARGEST_CODE = math.log(1000 / 16)  # exp of it is the most that a side grows
SAMPLES = 2  # a side of a cell of `pool`
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4  # a box of this side is pooled from the map of stride 2^4


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:  # [..., 4], (height, width) -> [..., 4]
    """The part of each box inside of an image."""
    height, width = size
    x, y = boxes[..., 0::2].clamp(0, width), boxes[..., 1::2].clamp(0, height)
    return torch.stack([x, y], -1).flatten(-2)


def rescale(boxes: Tensor, size: Sequence[int], new: Sequence[int]) -> Tensor:  # [N, 4] -> [N, 4]
    """The boxes of an image of `size` (height, width) after it is resized to `new`."""
    old, wanted = (torch.tensor(sides, dtype=torch.float32, device="cpu") for sides in (size, new))
    y, x = wanted / old
    return boxes * torch.stack([x, y, x, y]).to(boxes)


def areas(boxes: Tensor) -> Tensor:  # [N, 4] -> [N]
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def overlaps(
    first: Tensor,  # [G, 4]
    second: Tensor,  # [N, 4]
) -> Tensor:  # [G, N]
    """Intersection over union."""
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    return shared / (areas(first)[:, None] + areas(second) - shared)


def sides_of_at_least(boxes: Tensor, least: float) -> Tensor:  # [N, 4] -> [N] bool
    return (boxes[:, 2:] - boxes[:, :2] >= least).all(-1)


def encode(
    targets: Tensor,  # [N, 4]
    boxes: Tensor,  # [N, 4]
    weights: Sequence[float],
) -> Tensor:  # [N, 4]
    """What `decode` needs to make `targets` of `boxes`: shifts of the centre and logarithms of the sides."""
    side, wanted = boxes[:, 2:] - boxes[:, :2], targets[:, 2:] - targets[:, :2]
    shift = targets[:, :2] + 0.5 * wanted - (boxes[:, :2] + 0.5 * side)
    return torch.cat([shift / side, torch.log(wanted / side)], 1) * boxes.new_tensor(weights)


def decode(
    codes: Tensor,  # [N, C, 4]
    boxes: Tensor,  # [N, 4]
    weights: Sequence[float],
) -> Tensor:  # [N, C, 4]
    """Boxes from codes relative to `boxes`."""
    codes = codes / codes.new_tensor(weights)
    boxes = boxes[:, None]
    side = boxes[..., 2:] - boxes[..., :2]
    centre = codes[..., :2] * side + (boxes[..., :2] + 0.5 * side)
    half = 0.5 * torch.exp(codes[..., 2:].clamp_max(LARGEST_CODE)) * side
    return torch.cat([centre - half, centre + half], -1)


def anchors(
    grids: Sequence[tuple[int, int]],
    size: tuple[int, int],
    sides: Sequence[int],
    ratios: Sequence[float],
    like: Tensor,
) -> list[Tensor]:  # of each grid, [h w A, 4]
    """Boxes of each side (one for each grid) and every ratio of height to width, at every cell of a grid.

    Those of a cell are around its top left corner; cells of a grid [h, w] are `size` // grid apart.
    """
    root = torch.tensor(ratios, dtype=torch.float32, device="cpu").sqrt()
    found = []
    for (height, width), side in zip(grids, sides, strict=True):
        half = torch.stack([1 / root * side, root * side], 1) / 2
        cell = torch.cat([-half, half], 1).round().to(like)
        y = torch.arange(height, device=like.device) * (size[0] // height)
        x = torch.arange(width, device=like.device) * (size[1] // width)
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).view(-1, 1, 2)
        found.append((places.repeat(1, 1, 2) + cell).view(-1, 4))
    return found


def match(
    quality: Tensor,  # [G, N]
    high: float,
    low: float,
    *,
    rescue: bool = False,
) -> Tensor:  # [N] int64
    """The target of each of N boxes: the one of best quality, BELOW `low` none, and BETWEEN `low` and `high`.

    With `rescue` the best boxes of each target, ties included, have a target if they overlap one at all.
    """
    if not len(quality):
        return torch.full((quality.shape[1],), BELOW, device=quality.device)
    best, found = quality.max(0)
    result = torch.where(best < high, torch.where(best < low, BELOW, BETWEEN), found)
    if rescue and quality.shape[1]:
        saved = ((quality == quality.max(1, keepdim=True).values) & (quality > 0)).any(0)
        result = torch.where(saved, found, result)
    return result


def sample(
    labels: Tensor,  # [N]
    count: int,
    share: float,
    generator: torch.Generator | None = None,
) -> Tensor:  # [n] int64, n <= count
    """Random places in ascending order: up to `share` of `count` of labels above 0, the others of label 0."""
    positive, negative = (labels >= 1).nonzero()[:, 0], (labels == 0).nonzero()[:, 0]
    first = _some(positive, int(count * share), generator)
    second = _some(negative, count - len(first), generator)
    return torch.cat([first, second]).sort().values


def _some(places: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    device = places.device if generator is None else generator.device
    order = torch.randperm(len(places), generator=generator, device=device)
    return places[order[:most].to(places.device)]


def pool(
    maps: Sequence[Tensor],  # [B, C, h, w] each
    strides: Sequence[int],
    boxes: Sequence[Tensor],  # [k, 4] of each image
    side: int,
) -> Tensor:  # [K, C, side, side]
    """RoI align of each box from the map whose stride suits its size; maps are each half of the one before.

    As torchvision, without the half pixel of `aligned`.
    """
    counts = torch.tensor([len(part) for part in boxes], device=maps[0].device)
    image = torch.repeat_interleave(torch.arange(len(boxes), device=maps[0].device), counts)
    every = torch.cat(list(boxes))
    rows = torch.cat([image[:, None].to(every), every], 1)
    lowest = strides[0].bit_length() - 1
    size = areas(every).sqrt()
    level = torch.floor(CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIDE) + 1e-6)
    level = level.clamp(lowest, lowest + len(maps) - 1) - lowest
    chosen = [(level == index).nonzero()[:, 0] for index in range(len(maps))]
    pooled = [
        vlmkernels.roi_align(
            each, rows[places], side, spatial_scale=1 / stride, sampling_ratio=SAMPLES, aligned=False
        )
        for each, stride, places in zip(maps, strides, chosen, strict=True)
    ]
    return torch.cat(pooled).index_select(0, torch.cat(chosen).argsort())


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
