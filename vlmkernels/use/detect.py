"""Objects of given categories in images, by a trained detector; proposals for the training of another."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw

from vlmkernels._files import write_atomic, write_text
from vlmkernels.data import BrokenImageError
from vlmkernels.data._text import printable
from vlmkernels.data.proposals import write_proposals
from vlmkernels.train import kinds

from .bundle import inference, load_model
from .evaluate import open_data
from .images import find_images, read_files

COLOURS = ((228, 26, 28), (55, 126, 184), (77, 175, 74), (152, 78, 163), (255, 127, 0), (166, 86, 40))
DETECTIONS = "detections.json"


@dataclasses.dataclass(frozen=True)
class Found:
    """An object: its box (left, top, right, bottom) in pixels."""

    category: str
    score: float
    box: tuple[float, float, float, float]


@dataclasses.dataclass(frozen=True)
class DetectResult:
    """The objects of each image, the best first; ``skipped`` has the reason for each unreadable one."""

    objects: dict[str, list[Found]]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for file, objects in self.objects.items():
            lines.append(f"{printable(file)}: {len(objects)} objects")
            for each in objects:
                box = " ".join(f"{number:.0f}" for number in each.box)
                lines.append(f"  {each.score:.3f}  {printable(each.category)}  {box}")
        return "\n".join(lines)


def detect(
    model_folder: str | os.PathLike[str],
    inputs: Iterable[str | os.PathLike[str]],
    categories: Sequence[str],
    *,
    out: str | os.PathLike[str] | None = None,
    threshold: float = 0.3,
    templates: Sequence[str] | None = None,
    device: str = "auto",
) -> DetectResult:
    """Find objects of ``categories`` in images (files, and folders with all below them).

    With ``out`` the folder gets each image with its boxes and masks drawn, and `detections.json`. Objects of
    a score below ``threshold`` are left out. ``templates`` are texts with "{}" for a category, by default the
    category alone. ValueError or FileNotFoundError name what is missing or invalid.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    model, tokenizer, _ = load_model(model_folder, device, fitting=kinds.detectors())
    detector = kinds.of_model(model).detector(model, tokenizer, templates)
    folder = None if out is None else Path(out)
    objects: dict[str, list[Found]] = {}
    skipped: dict[str, str] = {}
    files = find_images(inputs)
    detector.classes(categories)  # before an image is read
    for number, (file, image) in enumerate(read_files(_pixels, files, skipped)):
        with inference(model):
            found = detector(image, categories)
        kept = [i for i, score in enumerate(found.scores.tolist()) if score >= threshold]
        objects[str(file)] = [
            Found(
                categories[int(found.labels[i])],
                round(float(found.scores[i]), 4),
                tuple(round(n, 2) for n in found.boxes[i].tolist()),  # type: ignore[arg-type]
            )
            for i in kept
        ]
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            drawn = _drawn(image, found, kept, categories)
            write_atomic(folder / f"{number:04d}-{file.stem}.png", partial(drawn.save, format="PNG"))
    if folder is not None and objects:
        rows = {file: [dataclasses.asdict(each) for each in found] for file, found in objects.items()}
        write_text(folder / DETECTIONS, json.dumps(rows, indent=2) + "\n")
    return DetectResult(objects, skipped)


@dataclasses.dataclass(frozen=True)
class ProposeResult:
    """What was written: images, and proposals of all of them."""

    path: Path
    images: int
    proposals: int
    skipped: dict[str, str]

    def __str__(self) -> str:
        return f"{self.proposals} proposals of {self.images} images: {printable(self.path)}"


def propose(
    model_folder: str | os.PathLike[str],
    data: Any,
    out: str | os.PathLike[str],
    *,
    most: int = 20,
    device: str = "auto",
) -> ProposeResult:
    """Write the best ``most`` proposals of every image of ``data``, and the embeddings of their crops.

    The proposals are those of the trained detector in ``model_folder``, which are not of classes, the
    embeddings those of its teacher. ``data`` has boxes ("composites[:SPLIT]" or COCO's JSON), which are not
    used. ValueError or FileNotFoundError name what is missing or invalid.
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    dataset = open_data(data)
    model, _, transform = load_model(model_folder, device, fitting=kinds.detectors())
    kind = kinds.of_model(model)
    kind.check_images(dataset)
    found = {}
    for index in range(len(dataset)):
        try:
            sample = dataset[index]
        except BrokenImageError:
            continue
        found[sample["key"]] = kind.propose(model, transform, sample["image"], most)
    if not found:
        raise ValueError(f"data: no sample can be read, {len(dataset.skipped)} skipped")
    write_proposals(out, found, teacher=str(model_folder))
    total = sum(len(boxes) for boxes, _ in found.values())
    return ProposeResult(Path(out), len(found), total, dict(dataset.skipped))


def _pixels(image: Image.Image) -> torch.Tensor:  # [3, H, W]
    return torch.from_numpy(numpy.array(image, dtype=numpy.float32)).permute(2, 0, 1) / 255


def _drawn(image: torch.Tensor, found: Any, kept: Sequence[int], categories: Sequence[str]) -> Image.Image:
    """The image with the masks of the objects tinted, their boxes and names."""
    pixels = image.clone()
    for i in kept:
        if found.masks is not None:
            colour = torch.tensor(COLOURS[int(found.labels[i]) % len(COLOURS)]) / 255
            seen = found.masks[i].cpu() > 0.5
            pixels[:, seen] = 0.6 * pixels[:, seen] + 0.4 * colour[:, None]
    picture = Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
    draw = ImageDraw.Draw(picture)
    for i in kept:
        label = int(found.labels[i])
        left, top, right, bottom = found.boxes[i].tolist()
        colour_of = COLOURS[label % len(COLOURS)]
        draw.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour_of, width=2)
        text = f"{printable(categories[label])} {float(found.scores[i]):.2f}"
        place = (left + 2, max(top - 11, 0))
        draw.rectangle(draw.textbbox(place, text), fill=colour_of)
        draw.text(place, text, fill="white")
    return picture
