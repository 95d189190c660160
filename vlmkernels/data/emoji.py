"""emoji3: 1,852 emoji in three drawing styles with names and tags, embedded in the package."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlmkernels.data.samples import Epoch, Sample, Transform, apply_transform, sample_rng

SPLITS = ("style-train", "style-test", "concept-train", "concept-test")
CAPTIONS = ("label", "tags", "label_tags")
_ALIASES = {"train": "style-train", "test": "style-test"}
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Concept:
    """One emoji: hex code, name, search tags, group index (0-8) and subgroup name."""

    hexcode: str
    label: str
    tags: tuple[str, ...]
    group: int
    subgroup: str


@lru_cache(maxsize=1)
def _document() -> dict[str, Any]:
    folder = resources.files("vlmkernels.data") / "emoji3"
    return json.loads(gzip.decompress((folder / "concepts.json.gz").read_bytes()))


@lru_cache(maxsize=1)
def _concepts() -> tuple[Concept, ...]:
    return tuple(
        Concept(row["hex"], row["label"], tuple(row["tags"]), row["group"], row["subgroup"])
        for row in _document()["concepts"]
    )


@lru_cache(maxsize=3)
def _sheet(style: str) -> Tensor:
    """All images of a style, uint8 [1852, 48, 48, 3]."""
    document = _document()
    tile, columns, count = document["tile"], document["columns"], len(document["concepts"])
    with (resources.files("vlmkernels.data") / "emoji3" / f"{style}.webp").open("rb") as file:
        pixels = np.array(Image.open(file).convert("RGB"))
    rows = pixels.shape[0] // tile
    tiles = pixels.reshape(rows, tile, columns, tile, 3).transpose(0, 2, 1, 3, 4).reshape(-1, tile, tile, 3)
    return torch.from_numpy(np.ascontiguousarray(tiles[:count]))


@lru_cache(maxsize=1)
def _held_out() -> frozenset[int]:
    """The 20 % of the concepts (370) with the smallest SHA-256 of "emoji3/0/<hex code>"."""
    concepts = _concepts()
    order = sorted(
        range(len(concepts)),
        key=lambda i: hashlib.sha256(f"emoji3/0/{concepts[i].hexcode}".encode()).digest(),
    )
    return frozenset(order[: round(_HELD_OUT * len(order))])


class Emoji3(Dataset[Sample]):
    """Map-style data set; see `load_emoji3`.

    One entry per item, in item order: `names`, `tags`, `groups`, `styles`, `hexcodes`, `concept_ids`
    (0-1851). Of the whole set: `group_names` (9) and `concepts` (1,852).
    """

    def __init__(
        self,
        split: str,
        *,
        image_size: int,
        caption: str,
        max_tags: int,
        transform: Transform | None,
        seed: int,
    ) -> None:
        split = _ALIASES.get(split, split)
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS} (or 'train', 'test'), got {split!r}")
        if caption not in CAPTIONS:
            raise ValueError(f"caption must be one of {CAPTIONS}, got {caption!r}")
        if max_tags < 1:
            raise ValueError(f"max_tags must be at least 1, got {max_tags}")
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1, got {image_size}")
        self.split, self.image_size, self.caption, self.max_tags = split, image_size, caption, max_tags
        self.transform, self.seed = transform, seed
        self.concepts = _concepts()
        self.group_names: tuple[str, ...] = tuple(_document()["group_names"])
        styles = ("fluent",) if split.endswith("test") else ("noto", "twemoji")
        if split.startswith("style"):
            chosen = list(range(len(self.concepts)))
        else:
            chosen = [i for i in range(len(self.concepts)) if (i in _held_out()) == (split == "concept-test")]
        self.concept_ids = chosen * len(styles)
        self.styles = [style for style in styles for _ in chosen]
        self._epoch = Epoch()

    @property
    def names(self) -> list[str]:
        return [self.concepts[i].label for i in self.concept_ids]

    @property
    def tags(self) -> list[tuple[str, ...]]:
        return [self.concepts[i].tags for i in self.concept_ids]

    @property
    def groups(self) -> list[int]:
        return [self.concepts[i].group for i in self.concept_ids]

    @property
    def hexcodes(self) -> list[str]:
        return [self.concepts[i].hexcode for i in self.concept_ids]

    @property
    def skipped(self) -> dict[str, str]:
        """Skipped samples, as for every data set of this package; always empty."""
        return {}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of random captions and augmentation, also in workers that are already running."""
        self._epoch.set(epoch)

    def pixels(self) -> Tensor:
        """All images at 48 x 48, uint8 [N, 3, 48, 48], in item order."""
        parts = [
            _sheet(style)[[c for c, s in zip(self.concept_ids, self.styles, strict=True) if s == style]]
            for style in dict.fromkeys(self.styles)
        ]
        return torch.cat(parts).permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.concept_ids)

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        concept_id, style = self.concept_ids[index], self.styles[index]
        concept = self.concepts[concept_id]
        rng = sample_rng(self.seed, self._epoch.get(), concept.hexcode, style)
        text = self._caption(concept, rng)
        image = Image.fromarray(_sheet(style)[concept_id].numpy())
        if self.image_size != image.width:
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        view, text = apply_transform(self.transform, image, text, rng)
        return Sample(
            image=view,
            text=text,
            key=f"{style}/{concept.hexcode}",
            label=concept.group,
            concept=concept_id,
        )

    def _caption(self, concept: Concept, rng: Any) -> str:
        if self.caption == "label":
            return concept.label
        tags = [tag for tag in concept.tags if tag != concept.label] or [concept.label]
        chosen = rng.sample(tags, rng.randint(1, min(self.max_tags, len(tags))))
        return ", ".join([concept.label, *chosen] if self.caption == "label_tags" else chosen)

    def __repr__(self) -> str:
        return f"Emoji3(split={self.split!r}, samples={len(self)}, caption={self.caption!r})"


def load_emoji3(
    split: str = "train",
    *,
    image_size: int = 48,
    caption: str = "label",
    max_tags: int = 2,
    transform: Transform | None = None,
    seed: int = 0,
) -> Emoji3:
    """The embedded emoji images as a map-style `torch.utils.data.Dataset` of `Sample`.

    split: "style-train" (alias "train"; Noto and Twemoji, all 1,852 concepts, 3,704 samples), "style-test"
        (alias "test"; Fluent, all concepts), "concept-train" (Noto and Twemoji, 1,482 concepts),
        "concept-test" (Fluent, the other 370 concepts). The country flags of the Fluent package have Noto's
        design: exclude group 8 where the style must be unseen.
    image_size: side of the images; sizes other than 48 are resized (bicubic).
    caption: "label" ("grinning face"), "tags" (one to `max_tags` tags drawn at random) or "label_tags" (the
        label and such tags). The draw depends on seed, epoch (`set_epoch`) and image only, not on workers or
        order.
    transform: applied to the RGB `PIL.Image`; an `ImageTransform` gets the same deterministic random numbers.

    Raises ValueError naming the invalid argument.
    """
    return Emoji3(
        split, image_size=image_size, caption=caption, max_tags=max_tags, transform=transform, seed=seed
    )
