"""What a ViLD learns from a teacher: embeddings of the names of classes, and of crops of an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlmkernels.models.parts import boxes as box

TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "{}")
WIDER = 1.5  # of the second crop of a box, about its centre

TextEncoder = Callable[[list[str]], Tensor]  # N texts to [N, D]
ImageEncoder = Callable[[list[Image.Image]], Tensor]  # N images to [N, D]


def text_embeddings(
    encoder: TextEncoder, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Tensor:  # [C, D]
    """The normalised mean over `templates`, "{}" being the name, of normalised embeddings of each name.

    ValueError without names or templates, for names twice, and for a template without "{}".
    """
    faults = [
        f"{label} must be a sequence of one text or more, got {given!r}"
        for label, given in (("categories", names), ("templates", templates))
        if isinstance(given, str) or not len(given)
    ]
    if not faults and len(set(names)) < len(names):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        faults.append(f"categories must differ, got {', '.join(twice)} more than once")
    if not faults and (without := [template for template in templates if "{}" not in template]):
        faults.append(f"templates must each have a {{}} for the name, got {without}")
    if faults:
        raise ValueError("ViLD: " + "; ".join(faults))
    texts = [template.replace("{}", name) for name in names for template in templates]
    every = F.normalize(encoder(texts).float(), dim=1).unflatten(0, (len(names), len(templates)))
    return F.normalize(every.mean(1), dim=1)


def wider(boxes: Tensor, size: tuple[int, int]) -> Tensor:  # [P, 4] -> [P, 4]
    """Each box 1.5 times as wide and high, where it is in the image of `size` (height, width)."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    return box.clip(torch.cat([centre - WIDER * half, centre + WIDER * half], 1), size)


def crop_embeddings(encoder: ImageEncoder, image: Image.Image, boxes: Tensor) -> Tensor:  # [P, 4] -> [P, D]
    """The sum of the embeddings of a box and of the box 1.5 times as large, normalised (section 3.3).

    Corners are widened to whole pixels. ValueError for boxes that have no pixel in the image.
    """
    size = (image.height, image.width)
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not len(boxes):
        raise ValueError(f"boxes must be [P, 4], P at least 1, got {list(boxes.shape)}")
    inside = box.clip(boxes.float().cpu(), size)
    if empty := (~box.sides_of_at_least(inside, 1e-3)).nonzero()[:, 0].tolist():
        raise ValueError(f"boxes must overlap the image of {size[1]} x {size[0]}, got none of {empty}")
    crops: list[Any] = [
        image.crop(_pixels(row)) for part in (inside, wider(inside, size)) for row in part.tolist()
    ]
    own, large = encoder(crops).float().chunk(2)
    return F.normalize(own + large, dim=1)


def _pixels(row: Sequence[float]) -> tuple[int, int, int, int]:
    left, top, right, bottom = row
    return int(left), int(top), -int(-right // 1), -int(-bottom // 1)


def relative_encoders(asif: Any) -> tuple[ImageEncoder, TextEncoder]:
    """The two encoders of an ASIF as one teacher: [N, anchors], relative to its anchors."""
    count = sum(len(images) for images, _ in asif.anchors.blocks())
    return (
        lambda images: asif.encode_images(images).dense(count),
        lambda texts: asif.encode_texts(texts).dense(count),
    )
