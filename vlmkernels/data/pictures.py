"""Images with boxes: augmentation that moves the image, its boxes, masks and proposals together."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

LEAST = 1.0  # pixels a side of a box that stays after a crop
SCALES = (0.1, 2.0)  # of large-scale jitter


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image and what is known of it; boxes are (left, top, right, bottom) in its pixels.

    `proposals` are boxes of any kind with the `embeddings` of their crops, which no augmentation changes.
    """

    image: Tensor  # [3, H, W] float32 in [0, 1]
    boxes: Tensor  # [G, 4] float32
    labels: Tensor  # [G] int64
    masks: Tensor  # [G, H, W] bool
    proposals: Tensor | None = None  # [P, 4] float32
    embeddings: Tensor | None = None  # [P, D]

    def __post_init__(self) -> None:
        count, size = len(self.boxes), self.image.shape[1:]
        faults = [
            f"{name} must be {wanted}, got {list(given.shape)}"
            for name, given, wanted, fits in (
                ("image", self.image, "[3, H, W]", self.image.dim() == 3 and len(self.image) == 3),
                ("boxes", self.boxes, "[G, 4]", self.boxes.shape == (count, 4)),
                ("labels", self.labels, f"[G] = [{count}]", self.labels.shape == (count,)),
                ("masks", self.masks, [count, *size], self.masks.shape == (count, *size)),
            )
            if not fits
        ]
        proposals, embeddings = self.proposals, self.embeddings
        if (proposals is None) != (embeddings is None):
            faults.append("proposals and embeddings must be given together")
        if proposals is not None and embeddings is not None and proposals.shape != (len(embeddings), 4):
            got = f"{list(proposals.shape)} and {list(embeddings.shape)}"
            faults.append(f"proposals and embeddings must be [P, 4] and [P, D], got {got}")
        if faults:
            raise ValueError("Picture: " + "; ".join(faults))

    def flipped(self) -> Picture:
        """Mirrored, left for right."""
        width = self.image.shape[2]

        def mirror(boxes: Tensor) -> Tensor:
            left, top, right, bottom = boxes.unbind(1)
            return torch.stack([width - right, top, width - left, bottom], 1)

        return self._moved(self.image.flip(2), self.masks.flip(2), mirror)

    def resized(self, size: tuple[int, int]) -> Picture:
        """To (height, width), averaging where it becomes smaller."""
        old = self.image.shape[1:]
        factor = self.boxes.new_tensor([size[1] / old[1], size[0] / old[0]] * 2)
        options = {"mode": "bilinear", "align_corners": False, "antialias": True}
        image = F.interpolate(self.image[None], size, **options)[0].clamp(0, 1)  # type: ignore[arg-type]
        masks = self.masks.new_zeros(0, *size)
        if len(self.masks):
            masks = F.interpolate(self.masks[:, None].float(), size, mode="nearest-exact")[:, 0] > 0.5
        return self._moved(image, masks, lambda boxes: boxes * factor)

    def window(self, left: int, top: int, side: int) -> Picture:
        """The square with this corner, black where the image ends. Boxes are cut, and go with their last
        pixel; proposals that are cut keep their embeddings.
        """
        height, width = self.image.shape[1:]
        right, bottom = min(left + side, width), min(top + side, height)
        pad = (0, side - (right - left), 0, side - (bottom - top))
        image, masks = (F.pad(x[:, top:bottom, left:right], pad) for x in (self.image, self.masks))
        corner = self.boxes.new_tensor([left, top, left, top])
        limit = self.boxes.new_tensor([right - left, bottom - top] * 2)
        return self._moved(image, masks, lambda boxes: (boxes - corner).clamp_min(0).minimum(limit))

    def jittered(
        self, side: int, rng: random.Random, *, scales: tuple[float, float] = SCALES, flip: bool = True
    ) -> Picture:
        """A square of `side`: a random flip, size and part of the image (large-scale jitter).

        Ghiasi et al. 2021 (arXiv:2012.07177): the image is resized to a factor in `scales` of what fits into
        the square, then cut at random or padded.
        """
        picture = self.flipped() if flip and rng.random() < 0.5 else self
        height, width = self.image.shape[1:]
        factor = rng.uniform(*scales) * side / max(height, width)
        size = max(round(height * factor), 1), max(round(width * factor), 1)
        picture = picture.resized(size)
        top, left = (rng.randint(0, max(extent - side, 0)) for extent in size)
        return picture.window(left, top, side)

    def to_pil(self) -> Image.Image:
        """The image alone."""
        return Image.fromarray((self.image * 255).round().byte().permute(1, 2, 0).cpu().numpy())

    def target(self) -> dict[str, Tensor]:
        """What a detector is trained with; `proposals` and `embeddings` only if there are some."""
        found = {"boxes": self.boxes, "labels": self.labels, "masks": self.masks}
        if self.proposals is not None and self.embeddings is not None:
            found |= {"proposals": self.proposals, "embeddings": self.embeddings}
        return found

    def _moved(self, image: Tensor, masks: Tensor, move: Callable[[Tensor], Tensor]) -> Picture:
        """The one place where boxes move: those of objects and the proposals by the same function."""
        boxes = move(self.boxes)
        kept = _large(boxes)
        proposals, embeddings = self.proposals, self.embeddings
        if proposals is not None and embeddings is not None:
            proposals = move(proposals)
            seen = _large(proposals)
            proposals, embeddings = proposals[seen], embeddings[seen]
        return Picture(image, boxes[kept], self.labels[kept], masks[kept], proposals, embeddings)


def _large(boxes: Tensor) -> Tensor:  # [N, 4] -> [N] bool
    return (boxes[:, 2:] - boxes[:, :2] >= LEAST).all(1)
