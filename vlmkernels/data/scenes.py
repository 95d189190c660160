"""Scenes of emoji3: two or three emoji on a grid, "a fox to the left of an owl above a key".

The image determines the caption, so that a generated caption can be scored slot by slot. The test splits
contain combinations of objects that do not occur in training scenes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
import re
from collections.abc import Sequence
from functools import lru_cache

from PIL import Image
from torch.utils.data import Dataset

from vlmkernels.data.emoji import _concepts, _sheet
from vlmkernels.data.samples import Epoch, Sample, Transform, apply_transform, sample_rng

SCENE_SPLITS = {"train": 8000, "test": 1000, "style-test": 1000}
RELATIONS = ("to the left of", "above")
OBJECTS = (
    "fox",
    "owl",
    "banana",
    "rocket",
    "zebra",
    "penguin",
    "strawberry",
    "umbrella",
    "frog",
    "crab",
    "carrot",
    "guitar",
    "whale",
    "butterfly",
    "pizza",
    "key",
    "elephant",
    "turtle",
    "doughnut",
    "balloon",
    "lion",
    "snail",
    "pineapple",
    "bicycle",
    "spider",
    "octopus",
    "mushroom",
    "sunflower",
    "hamburger",
    "cactus",
    "trumpet",
    "candle",
)
_HELD_OUT = 0.2
_BETWEEN = re.compile(r"\s+(" + "|".join(RELATIONS) + r")\s+")
_ARTICLE = re.compile(r"^(a|an|the)\s+")


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects from the upper left to the lower right; relation i is that of object i to object i + 1.

    cells: row and column of each object on the grid. styles: the drawing style of each.
    """

    objects: tuple[str, ...]
    relations: tuple[str, ...]
    cells: tuple[tuple[int, int], ...]
    styles: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The caption; `parse_caption` is the inverse."""
        named = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in self.objects]
        return " ".join(itertools.chain(*itertools.zip_longest(named, self.relations, fillvalue=""))).strip()


def parse_caption(text: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Objects and relations of a caption; objects are the words between relations, without the article."""
    parts = _BETWEEN.split(" ".join(text.lower().split()))
    return tuple(_ARTICLE.sub("", name).strip(" .") for name in parts[::2]), tuple(parts[1::2])


def slot_accuracy(captions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Fractions of exactly right slots in generated captions: slots, objects, relations, scenes.

    Slot i of a caption is compared with slot i of its reference; a slot that only one of them has is wrong.
    `slots` counts objects and relations together, `scenes` captions with every slot right. ValueError for
    lists of different lengths or none.
    """
    if len(captions) != len(references) or not captions:
        raise ValueError(f"captions and references must pair up, got {len(captions)} and {len(references)}")
    right, total, whole = [0, 0], [0, 0], 0
    for caption, reference in zip(captions, references, strict=True):
        pairs = list(zip(parse_caption(caption), parse_caption(reference), strict=True))
        whole += all(found == wanted for found, wanted in pairs)
        for kind, (found, wanted) in enumerate(pairs):
            right[kind] += sum(a == b for a, b in zip(found, wanted, strict=False))
            total[kind] += max(len(found), len(wanted))
    return {
        "slots": sum(right) / sum(total),
        "objects": right[0] / max(total[0], 1),
        "relations": right[1] / max(total[1], 1),
        "scenes": whole / len(captions),
    }


@lru_cache(maxsize=1)
def _concept_ids() -> dict[str, int]:
    return {concept.label: i for i, concept in enumerate(_concepts())}


@lru_cache(maxsize=8)
def held_out_pairs(objects: int = 24) -> frozenset[frozenset[str]]:
    """A fifth of the pairs of the first names: those with the smallest SHA-256 of "scenes/0/<a>/<b>"."""
    pairs = sorted(
        itertools.combinations(sorted(OBJECTS[:objects]), 2),
        key=lambda pair: hashlib.sha256("/".join(["scenes", "0", *pair]).encode()).digest(),
    )
    return frozenset(frozenset(pair) for pair in pairs[: round(_HELD_OUT * len(pairs))])


class Scenes(Dataset[Sample]):
    """Map-style data set; see `load_scenes`. `scene(i)` is the scene of item i, `names` all captions."""

    def __init__(
        self,
        split: str,
        *,
        size: int | None,
        image_size: int,
        grid: int,
        objects: int,
        transform: Transform | None,
        seed: int,
        images: bool,
    ) -> None:
        faults = []
        if split not in SCENE_SPLITS:
            faults.append(f"split must be one of {tuple(SCENE_SPLITS)}, got {split!r}")
        if size is not None and size < 1:
            faults.append(f"size must be at least 1, got {size}")
        if grid not in (2, 3):
            faults.append(f"grid must be 2 or 3, got {grid}")
        elif image_size < 4 * grid:
            faults.append(f"image_size must be at least {4 * grid} for a grid of {grid}, got {image_size}")
        if not 12 <= objects <= len(OBJECTS):
            faults.append(f"objects must be in [12, {len(OBJECTS)}], got {objects}")
        if faults:
            raise ValueError("; ".join(faults))
        self.split, self.size = split, SCENE_SPLITS[split] if size is None else size
        self.image_size, self.grid, self.objects = image_size, grid, OBJECTS[:objects]
        self.transform, self.seed, self.has_images = transform, seed, images
        held_out = held_out_pairs(objects)
        self._partners = {
            a: [b for b in self.objects if b != a and (frozenset((a, b)) in held_out) == (split != "train")]
            for a in self.objects
        }
        self._epoch = Epoch()

    @property
    def names(self) -> list[str]:
        """The captions, in item order."""
        return [self.scene(i).caption for i in range(len(self))]

    @property
    def skipped(self) -> dict[str, str]:
        """Skipped samples, as for every data set of this package; always empty."""
        return {}

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of random augmentation, also in workers that are already running."""
        self._epoch.set(epoch)

    def scene(self, index: int) -> Scene:
        """The scene of item ``index``, a function of seed, split and index."""
        return self._draw(sample_rng("scenes", self.seed, self.split, index))

    def _draw(self, rng: random.Random) -> Scene:
        count = rng.choice((2, 3))
        chain = [rng.choice(self.objects)]
        while len(chain) < count:
            others = [name for name in self._partners[chain[-1]] if name not in chain]
            if self.split == "train":  # in training scenes every pair is a combination to learn from
                others = [name for name in others if all(name in self._partners[had] for had in chain)]
            if not others:
                chain = [rng.choice(self.objects)]
                continue
            chain.append(rng.choice(others))
        cells, relations = self._place(count, rng)
        styles = ("fluent",) if self.split == "style-test" else ("noto", "twemoji")
        drawn = tuple(rng.choice(styles) for _ in chain)
        return Scene(tuple(chain), relations, cells, drawn)

    def _place(self, count: int, rng: random.Random) -> tuple[tuple[tuple[int, int], ...], tuple[str, ...]]:
        """Cells, each to the right of or below the previous one, drawn until all are on the grid."""
        while True:
            cells = [(rng.randrange(self.grid), rng.randrange(self.grid))]
            relations = tuple(rng.choice(RELATIONS) for _ in range(count - 1))
            for relation in relations:
                row, column = cells[-1]
                step = rng.randrange(1, self.grid)
                cells.append((row, column + step) if relation == RELATIONS[0] else (row + step, column))
            if max(cells[-1]) < self.grid:
                return tuple(cells), relations

    def _paint(self, scene: Scene, rng: random.Random) -> Image.Image:
        """The image: each object 3/4 to 1 of its cell wide, at a random position in the cell, on white."""
        picture = Image.new("RGB", (self.image_size, self.image_size), "white")
        cell = self.image_size // self.grid
        for name, (row, column), style in zip(scene.objects, scene.cells, scene.styles, strict=True):
            side = rng.randint(-(-3 * cell // 4), cell)
            corner = (column * cell + rng.randint(0, cell - side), row * cell + rng.randint(0, cell - side))
            tile = Image.fromarray(_sheet(style)[_concept_ids()[name]].numpy())
            picture.paste(tile.resize((side, side), Image.Resampling.BICUBIC), corner)
        return picture

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        scene = self.scene(index)
        view, text = None, scene.caption
        if self.has_images:
            image = self._paint(scene, sample_rng("paint", self.seed, self.split, index))
            rng = sample_rng(self.seed, self._epoch.get(), self.split, index)
            view, text = apply_transform(self.transform, image, text, rng)
        return Sample(
            image=view,
            text=text,
            key=f"scenes/{self.split}/{index}",
            label=-1,
            concept=-1,
        )

    def __repr__(self) -> str:
        return f"Scenes(split={self.split!r}, samples={len(self)}, objects={len(self.objects)})"


def load_scenes(
    split: str = "train",
    *,
    size: int | None = None,
    image_size: int = 48,
    grid: int = 2,
    objects: int = 24,
    transform: Transform | None = None,
    seed: int = 0,
    images: bool = True,
) -> Scenes:
    """Scenes of two or three emoji as a map-style `torch.utils.data.Dataset` of `Sample`.

    split: "train" (8,000 scenes, Noto and Twemoji), "test" (1,000, the same styles) or "style-test" (1,000,
        Fluent). A fifth of the pairs of objects is held out: no training scene contains such a pair, and in
        the test splits every two adjacent objects of a caption are one.
    size: number of scenes, by default that of the split; the first scenes do not depend on it.
    image_size: side of the images. grid: cells per side, 2 or 3. objects: number of names of `OBJECTS` to
        use, 12 to 32.
    transform: applied to the RGB `PIL.Image`. seed: of all scenes; the epoch changes augmentation only.
    images: False leaves them out, for language models.

    Raises ValueError naming every invalid argument.
    """
    return Scenes(
        split,
        size=size,
        image_size=image_size,
        grid=grid,
        objects=objects,
        transform=transform,
        seed=seed,
        images=images,
    )
