"""Pictures for detectors: emoji at random places on varied backgrounds, with exact boxes and masks.

A fifth of the names are novel: their objects are in training pictures too, but without boxes, as in data
whose annotators had a closed list.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlmkernels.data.emoji import _sheet
from vlmkernels.data.pictures import Picture
from vlmkernels.data.samples import Epoch, Sample, sample_rng
from vlmkernels.data.scenes import OBJECTS, _concept_ids

COMPOSITE_SPLITS = {"train": 2000, "test": 300, "style-test": 300}
SIDES = (0.2, 0.45)  # of an object, of the side of its picture
WHITE = 245  # from this on all channels are the background of an emoji
LEAST_SEEN = 0.6  # of an object that later ones may cover
PLACES = 30  # that are tried for an object
_NOVEL = 0.2

PictureTransform = Callable[[Picture, random.Random, str], Picture]


@lru_cache(maxsize=8)
def novel_names(objects: int = len(OBJECTS)) -> frozenset[str]:
    """A fifth of the first names of `OBJECTS`: those with the smallest SHA-256 of "composites/0/<name>"."""
    order = sorted(
        OBJECTS[:objects], key=lambda name: hashlib.sha256(f"composites/0/{name}".encode()).digest()
    )
    return frozenset(order[: round(_NOVEL * objects)])


class Composites(Dataset[Sample]):
    """Map-style data set; see `load_composites`.

    `base` and `novel` are the names of the classes in a fixed order, `names` all of them, base first: the
    class with label k is ``names[k - 1]``. The image of a sample is a `Picture`, its text the names in it.
    """

    def __init__(
        self,
        split: str,
        *,
        size: int | None,
        image_size: int,
        objects: int,
        transform: PictureTransform | None,
        seed: int,
    ) -> None:
        faults = []
        if split not in COMPOSITE_SPLITS:
            faults.append(f"split must be one of {', '.join(COMPOSITE_SPLITS)}, got {split!r}")
        if size is not None and size < 1:
            faults.append(f"size must be at least 1, got {size}")
        if image_size < 32:
            faults.append(f"image_size must be at least 32, got {image_size}")
        if not 5 <= objects <= len(OBJECTS):
            faults.append(f"objects must be in [5, {len(OBJECTS)}], got {objects}")
        if faults:
            raise ValueError("composites: " + "; ".join(faults))
        self.split, self.image_size, self.objects = split, image_size, objects
        self.size = COMPOSITE_SPLITS[split] if size is None else size
        self.transform, self.seed = transform, seed
        self.novel = tuple(name for name in OBJECTS[:objects] if name in novel_names(objects))
        self.base = tuple(name for name in OBJECTS[:objects] if name not in self.novel)
        self.names = (*self.base, *self.novel)
        self._epoch = Epoch()

    @property
    def skipped(self) -> dict[str, str]:
        """Skipped samples, as for every data set of this package; always empty."""
        return {}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of random augmentation, also in workers that are already running."""
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return self.size

    def picture(self, index: int) -> tuple[Picture, list[str]]:
        """The picture of item `index` with all boxes, and the names; a function of seed, split and index."""
        rng = sample_rng("composites", self.seed, self.split, index)
        styles = ("fluent",) if self.split == "style-test" else ("noto", "twemoji")
        pixels = _background(self.image_size, rng)
        drawn: list[tuple[str, Tensor]] = []
        for _ in range(rng.randint(1, 4)):
            name = rng.choice(self.names)
            side = round(rng.uniform(*SIDES) * self.image_size)
            tile, mask = _cut(name, rng.choice(styles), side)
            place = self._place(mask, [seen for _, seen in drawn], rng)
            if place is None:
                continue
            left, top = place
            whole = torch.zeros(self.image_size, self.image_size, dtype=torch.bool)
            whole[top : top + side, left : left + side] = mask
            pixels[whole] = tile[mask]
            drawn = [(other, seen & ~whole) for other, seen in drawn]
            drawn.append((name, whole))
        masks = torch.stack([seen for _, seen in drawn])
        labels = torch.tensor([1 + self.names.index(name) for name, _ in drawn])
        image = pixels.permute(2, 0, 1).float() / 255
        return Picture(image, _boxes(masks), labels, masks), [name for name, _ in drawn]

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        picture, names = self.picture(index)
        key = f"composites/{self.seed}/{self.split}/{index}"
        if self.split == "train":
            known = picture.labels <= len(self.base)
            picture = Picture(
                picture.image, picture.boxes[known], picture.labels[known], picture.masks[known]
            )
        shown: Any = picture
        if self.transform is not None:
            rng = sample_rng(self.seed, self._epoch.get(), self.split, index)
            shown = self.transform(picture, rng, key)
        return Sample(image=shown, text=", ".join(names), key=key, label=-1, concept=-1)

    def __repr__(self) -> str:
        return f"Composites(split={self.split!r}, samples={len(self)}, classes={len(self.names)})"

    def _place(self, mask: Tensor, before: list[Tensor], rng: random.Random) -> tuple[int, int] | None:
        """A corner where every earlier object stays visible, or None."""
        side = len(mask)
        for _ in range(PLACES):
            left, top = (rng.randint(0, self.image_size - side) for _ in range(2))
            window = slice(top, top + side), slice(left, left + side)
            if all((seen[window] & mask).sum() <= (1 - LEAST_SEEN) * seen.sum() for seen in before):
                return left, top
        return None


@lru_cache(maxsize=1 << 13)  # of all names, styles and sides that a picture of 160 pixels has
def _cut(name: str, style: str, side: int) -> tuple[Tensor, Tensor]:
    """An emoji [side, side, 3] uint8, and the pixels that are not its white ground [side, side]."""
    tile = Image.fromarray(_sheet(style)[_concept_ids()[name]].numpy())
    pixels = torch.from_numpy(numpy.array(tile.resize((side, side), Image.Resampling.BICUBIC)))
    return pixels, ~_reached((pixels >= WHITE).all(2))


def _reached(free: Tensor) -> Tensor:  # [H, W] bool -> [H, W] bool
    """What of the free pixels is connected to the border."""
    found = torch.zeros_like(free)
    found[0], found[-1], found[:, 0], found[:, -1] = free[0], free[-1], free[:, 0], free[:, -1]
    while True:
        padded = torch.nn.functional.pad(found, (1, 1, 1, 1))
        near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        grown = found | (near & free)
        if grown.equal(found):
            return found
        found = grown


def _background(side: int, rng: random.Random) -> Tensor:  # [side, side, 3] uint8
    """A plain colour, a gradient, stripes or smooth noise, with grain."""
    generator = numpy.random.default_rng(rng.getrandbits(63))
    first, second = generator.uniform(60, 255, (2, 3))
    y, x = numpy.mgrid[:side, :side] / side
    kind, angle = rng.choice(("plain", "gradient", "stripes", "noise")), rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    if kind == "plain":
        share = numpy.zeros_like(x)
    elif kind == "gradient":
        share = (along - along.min()) / max(float(numpy.ptp(along)), 1e-9)
    elif kind == "stripes":
        share = (numpy.sin(2 * math.pi * along * rng.uniform(2, 10)) > 0).astype(float)
    else:
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5), dtype=numpy.uint8))
        share = numpy.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / 255
    pixels = first + share[..., None] * (second - first) + generator.normal(0, 4, (side, side, 1))
    return torch.from_numpy(pixels.clip(0, 255).astype(numpy.uint8))


def _boxes(masks: Tensor) -> Tensor:  # [G, H, W] bool -> [G, 4]
    """The smallest boxes around the masks."""
    rows, columns = masks.any(2), masks.any(1)
    low = torch.stack([columns.int().argmax(1), rows.int().argmax(1)], 1)
    high = [each.shape[1] - each.flip(1).int().argmax(1) for each in (columns, rows)]
    return torch.cat([low, torch.stack(high, 1)], 1).float()


def load_composites(
    split: str = "train",
    *,
    size: int | None = None,
    image_size: int = 160,
    objects: int = len(OBJECTS),
    transform: PictureTransform | None = None,
    seed: int = 0,
) -> Composites:
    """One to four emoji on a background, as a map-style `torch.utils.data.Dataset` of `Sample`.

    split: "train" (2,000 pictures, Noto and Twemoji; objects of novel classes have no boxes), "test" (300,
        the same styles, all boxes) or "style-test" (300, Fluent, all boxes).
    size: number of pictures, by default that of the split; the first do not depend on it.
    image_size: side of the pictures. objects: number of names of `OBJECTS`, 5 to 32; a fifth are novel.
    transform: called with the `Picture`, a random.Random and the key of the sample, for its image.
    seed: of all pictures; the epoch changes augmentation only.

    Raises ValueError naming every invalid argument.
    """
    return Composites(
        split, size=size, image_size=image_size, objects=objects, transform=transform, seed=seed
    )
