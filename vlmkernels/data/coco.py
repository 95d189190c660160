"""Data sets of boxes in COCO's JSON format: images, annotations with boxes and masks, categories."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from vlmkernels._files import write_text
from vlmkernels.data.composites import PictureTransform
from vlmkernels.data.images import BrokenImageError, read_image
from vlmkernels.data.pictures import Picture
from vlmkernels.data.samples import Epoch, Sample, SkipLog, sample_rng


def runs_of(mask: Tensor) -> dict[str, Any]:
    """A mask [H, W] in COCO's uncompressed run lengths, column by column, the first run of zeros."""
    flat = mask.T.reshape(-1).bool()
    change = (flat[1:] != flat[:-1]).nonzero()[:, 0] + 1
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), change, torch.tensor([len(flat)])])
    counts = edges.diff().tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if len(flat) and flat[0] else counts}


def mask_of(segmentation: Any, size: tuple[int, int]) -> Tensor:  # [H, W] bool
    """The mask of polygons or of uncompressed run lengths. ValueError for anything else."""
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), list):
        counts, shape = torch.tensor(segmentation["counts"]), tuple(segmentation["size"])
        if shape != size or int(counts.sum()) != size[0] * size[1] or (counts < 0).any():
            raise ValueError(f"run lengths must fill an image of {size}, got size {shape}")
        values = (torch.arange(len(counts)) % 2).bool()
        return values.repeat_interleave(counts).view(size[1], size[0]).T.contiguous()
    if isinstance(segmentation, list):
        canvas = Image.new("1", (size[1], size[0]))
        for polygon in segmentation:
            ImageDraw.Draw(canvas).polygon([float(number) for number in polygon], fill=1)
        return torch.from_numpy(numpy.array(canvas))
    raise ValueError("segmentation must be polygons or uncompressed run lengths")


def write_coco(
    folder: str | os.PathLike[str], pictures: Sequence[tuple[str, Picture]], names: Sequence[str]
) -> Path:
    """Writes the images as PNG files and `annotations.json`, which is returned.

    pictures: (file name, picture); label k is ``names[k - 1]``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, (file, picture) in enumerate(pictures, 1):
        picture.to_pil().save(folder / file)
        height, width = picture.image.shape[1:]
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        for box, label, mask in zip(picture.boxes, picture.labels, picture.masks, strict=True):
            left, top, right, bottom = box.tolist()
            annotations.append(
                {
                    "id": 1 + len(annotations),
                    "image_id": number,
                    "category_id": int(label),
                    "bbox": [left, top, right - left, bottom - top],
                    "area": float(mask.sum()),
                    "segmentation": runs_of(mask),
                    "iscrowd": 0,
                }
            )
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    document = {"images": images, "annotations": annotations, "categories": categories}
    write_text(folder / "annotations.json", json.dumps(document))
    return folder / "annotations.json"


class CocoPictures(Dataset[Sample]):
    """Map-style data set of a JSON file in COCO's format.

    path: the file; images are in `images`, by default its own folder. base: names of the classes with boxes
    in training, the others are novel; None: all are base. Classes are numbered base first, in the order of
    the file: the class with label k is ``names[k - 1]``. Crowds are left out, and boxes without area.
    transform, seed: as in `load_composites`. The image of a sample is a `Picture`, its key the name of the
    file.

    FileNotFoundError; ValueError for a file that is no such JSON, naming what is missing.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        images: str | os.PathLike[str] | None = None,
        base: Sequence[str] | None = None,
        transform: PictureTransform | None = None,
        seed: int = 0,
    ) -> None:
        self.path = Path(path)
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            categories = {each["id"]: str(each["name"]) for each in document["categories"]}
            self._images = [
                (each["id"], str(each["file_name"]), int(each["height"]), int(each["width"]))
                for each in document["images"]
            ]
            rows: dict[Any, list[dict[str, Any]]] = defaultdict(list)
            for each in document["annotations"]:
                left, top, width, height = (float(number) for number in each["bbox"])
                if width > 0 and height > 0 and not each.get("iscrowd", 0):
                    box = [left, top, left + width, top + height]
                    name = categories[each["category_id"]]
                    rows[each["image_id"]].append(
                        {"box": box, "name": name, "mask": each.get("segmentation")}
                    )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{self.path} is not a file in COCO's format ({reason})") from error
        known = list(dict.fromkeys(categories.values()))
        chosen = known if base is None else list(base)
        if unknown := sorted(set(chosen) - set(known)):
            raise ValueError(f"base must be names of {self.path}, got {', '.join(unknown)}")
        self.base = tuple(name for name in known if name in chosen)
        self.novel = tuple(name for name in known if name not in chosen)
        self.names = (*self.base, *self.novel)
        self._rows, self._folder = rows, self.path.parent if images is None else Path(images)
        self.transform, self.seed = transform, seed
        self._epoch, self._skips = Epoch(), SkipLog()

    @property
    def skipped(self) -> dict[str, str]:
        """Images that could not be read, with the reason."""
        return self._skips.items()

    def set_epoch(self, epoch: int) -> None:
        self._epoch.set(epoch)

    def __len__(self) -> int:
        return len(self._images)

    def picture(self, index: int) -> tuple[Picture, list[str]]:
        """The picture of item `index` and the names in it. BrokenImageError if it cannot be read."""
        number, file, height, width = self._images[index]
        try:
            image = read_image(self._folder / file)
            if (image.height, image.width) != (height, width):
                raise BrokenImageError(f"must be {width} x {height} as in the JSON, got {image.size}")
            pixels = torch.from_numpy(numpy.array(image, dtype=numpy.float32)).permute(2, 0, 1) / 255
            masks = [self._mask(row, (height, width)) for row in self._rows[number]]
        except (BrokenImageError, OSError, ValueError) as error:
            self._skips.add(file, str(error))
            raise BrokenImageError(str(error), key=file) from error
        names = [row["name"] for row in self._rows[number]]
        boxes = torch.tensor([row["box"] for row in self._rows[number]]).view(-1, 4)
        labels = torch.tensor([1 + self.names.index(name) for name in names], dtype=torch.int64)
        stacked = torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)
        return Picture(pixels, boxes, labels, stacked), names

    def __getitem__(self, index: int) -> Sample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        index %= len(self)
        shown: Any
        shown, names = self.picture(index)
        file = self._images[index][1]
        if self.transform is not None:
            shown = self.transform(shown, sample_rng(self.seed, self._epoch.get(), file), file)
        return Sample(image=shown, text=", ".join(names), key=file, label=-1, concept=-1)

    def __repr__(self) -> str:
        return f"CocoPictures({str(self.path)!r}, samples={len(self)}, classes={len(self.names)})"

    @staticmethod
    def _mask(row: dict[str, Any], size: tuple[int, int]) -> Tensor:
        if row["mask"]:
            return mask_of(row["mask"], size)
        left, top, right, bottom = row["box"]
        mask = torch.zeros(size, dtype=torch.bool)
        mask[int(top) : -int(-bottom // 1), int(left) : -int(-right // 1)] = True
        return mask
