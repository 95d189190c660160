"""Images of any size as the batch of a detector, and its boxes and masks as those of the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.models.parts import boxes as box

BORDER = 1  # cells around a mask, so that it ends smoothly


class Batch(NamedTuple):
    """Normalised images, resized, with 0 to their right and below."""

    pixels: Tensor  # [B, 3, H, W]
    sizes: list[tuple[int, int]]  # (height, width) of each in `pixels`
    originals: list[tuple[int, int]]


class Detections(NamedTuple):
    """What was found in an image, the best first; `masks` are probabilities."""

    boxes: Tensor  # [n, 4]
    scores: Tensor  # [n]
    labels: Tensor  # [n] int64
    masks: Tensor | None  # [n, H, W]


def faults_of(images: Sequence[Tensor], like: Tensor) -> list[str]:
    """Why these are no images for a model with the parameter `like`."""
    if not len(images):
        return ["images must be one or more, got none"]
    for number, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or not image.is_floating_point() or not image.numel():
            got = f"{image.dtype} {list(image.shape)}"
            return [f"images must be floating [3, H, W], got {got} as number {number}"]
        if image.device != like.device and not like.is_meta:  # a weight that is fetched when it is used
            return [f"images must be on {like.device}, where the model is, got {image.device}"]
    return []


def size_for(size: tuple[int, int], least: int, most: int) -> tuple[int, int]:
    """(height, width) with a shorter side of `least`, or a longer one of `most` if that is smaller."""
    scale = min(least / min(size), most / max(size))
    return max(int(size[0] * scale), 1), max(int(size[1] * scale), 1)


def batch(images: Sequence[Tensor], config: Any, multiple: int, dtype: torch.dtype) -> Batch:
    """Images [3, H, W] in [0, 1] as one tensor whose sides are a multiple of `multiple`."""
    mean, std = (
        images[0].new_tensor(numbers)[:, None, None] for numbers in (config.image_mean, config.image_std)
    )
    originals = [(image.shape[1], image.shape[2]) for image in images]
    sizes = [size_for(size, config.min_size, config.max_size) for size in originals]
    height, width = (-(-max(sides) // multiple) * multiple for sides in zip(*sizes, strict=True))
    pixels = images[0].new_zeros(len(images), 3, height, width, dtype=dtype)
    for row, (image, size) in enumerate(zip(images, sizes, strict=True)):
        image = (image - mean) / std
        if size != image.shape[1:]:
            image = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        pixels[row, :, : size[0], : size[1]] = image
    return Batch(pixels, sizes, originals)


def resize_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:  # [G, H, W] -> [G, h, w] float32
    """Masks of an image that is resized to `size`, by the nearest pixel."""
    if not len(masks) or masks.shape[1:] == size:
        return masks.new_zeros(len(masks), *size, dtype=torch.float32) if not len(masks) else masks.float()
    return F.interpolate(masks[:, None].float(), size)[:, 0]


def paste(
    masks: Tensor,  # [n, m, m]
    boxes: Tensor,  # [n, 4]
    size: tuple[int, int],
) -> Tensor:  # [n, H, W]
    """Masks of boxes as masks of the image, 0 outside of the boxes; corners are whole pixels."""
    side, (height, width) = masks.shape[-1], size
    masks = F.pad(masks, (BORDER,) * 4)
    centre, half = (boxes[:, :2] + boxes[:, 2:]) * 0.5, (boxes[:, 2:] - boxes[:, :2]) * 0.5
    half = half * ((side + 2 * BORDER) / side)
    corners = torch.cat([centre - half, centre + half], 1).to(torch.int64).tolist()
    out = masks.new_zeros(len(masks), height, width)
    for image, mask, (left, top, right, bottom) in zip(out, masks, corners, strict=True):
        mask = F.interpolate(
            mask[None, None],
            (max(bottom - top + 1, 1), max(right - left + 1, 1)),
            mode="bilinear",
            align_corners=False,
        )[0, 0]
        x0, x1, y0, y1 = max(left, 0), min(right + 1, width), max(top, 0), min(bottom + 1, height)
        image[y0:y1, x0:x1] = mask[y0 - top : y1 - top, x0 - left : x1 - left]
    return out


def target_faults(target: Any, size: tuple[int, int], classes: int, masks: bool) -> list[str]:
    """Why a mapping is not the target of an image of this size."""
    missing = [name for name in ("boxes", "labels", *(["masks"] if masks else [])) if name not in target]
    if missing:
        return [f"must have {', '.join(missing)}, got {', '.join(target)}"]
    given, labels = target["boxes"], target["labels"]
    faults = []
    if given.dim() != 2 or given.shape[1] != 4 or not given.is_floating_point():
        faults.append(f"boxes must be floating [G, 4], got {given.dtype} {list(given.shape)}")
    elif not ((given[:, 2:] > given[:, :2]).all() and given.isfinite().all()):
        faults.append("boxes must have positive sides, left < right and top < bottom")
    if labels.shape != given.shape[:1] or labels.dtype != torch.int64:
        wanted = list(given.shape[:1])
        faults.append(f"labels must be int64 [G] = {wanted}, got {labels.dtype} {list(labels.shape)}")
    elif len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) < classes:
        found = f"{int(labels.min())} to {int(labels.max())}"
        faults.append(f"labels must be in [1, {classes}), 0 being the background, got {found}")
    if masks and target["masks"].shape != (len(given), *size):
        faults.append(f"masks must be {[len(given), *size]}, got {list(target['masks'].shape)}")
    return faults


def resized_target(target: Any, old: tuple[int, int], new: tuple[int, int], masks: bool) -> dict[str, Tensor]:
    """The target of an image after it is resized; what else is in it stays."""
    found = dict(target)
    for name in ("boxes", "proposals"):
        if name in found:
            found[name] = box.rescale(found[name], old, new)
    if masks:
        found["masks"] = resize_masks(found["masks"], new)
    return found
