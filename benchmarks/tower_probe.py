"""What the patch tokens of a frozen tower hold about scenes: which object is in a cell, where a patch is.

A linear classifier of one cell's tokens names the object in the cell, or none; one of a single token names
its place. What it reads may still be a small part of what the tokens are: `share` is the part of their
variance that lies between the places, and between the objects.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.data import Scenes, load_scenes
from vlmkernels.use.bundle import load_bundle
from vlmkernels.use.probe import Examples, linear_probe

SCENES = 1500, 500  # to train a classifier on, and to test it on
KINDS = {"object": "the object in a cell, or none", "place": "the place of a patch"}
PLACED = 150  # of which the places of all tokens are read


@torch.no_grad()
def tokens_of(bundle: Any, scenes: Scenes) -> Tensor:  # [N, v, D]
    """The patch tokens of all scenes."""
    images = torch.stack([bundle.transform(scenes[index]["image"]) for index in range(len(scenes))])
    return torch.cat([bundle.model.visual.patch_tokens(part) for part in images.split(250)])


def objects_of(scenes: Scenes) -> Tensor:  # [N, cells]
    """The object in each cell, row by row, by its number; the number of objects for an empty cell."""
    found = torch.full((len(scenes), scenes.grid**2), len(scenes.objects))
    for index, row in enumerate(found):
        scene = scenes.scene(index)
        for name, (y, x) in zip(scene.objects, scene.cells, strict=True):
            row[y * scenes.grid + x] = scenes.objects.index(name)
    return found


def by_cell(tokens: Tensor, grid: int) -> Tensor:  # [N, v, D] -> [N, cells, v / cells, D]
    """The tokens of each cell."""
    side = math.isqrt(tokens.shape[1])
    cells = tokens.unflatten(1, (grid, side // grid, grid, side // grid)).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)


def examples(features: Tensor, classes: Tensor, count: int) -> Examples:  # [..., D], [...]
    return Examples(features.double().flatten(0, -2), F.one_hot(classes.flatten(), count).double())


def share(tokens: Tensor, classes: Tensor) -> float:  # [M, D], [M]
    """The part of the variance that lies between the means of the classes."""
    centred = tokens.double() - tokens.double().mean(0)
    of = F.one_hot(classes).double()  # [M, C]
    means = of.T @ centred / of.sum(0).clamp_min(1)[:, None]
    return ((of @ means).square().sum() / centred.square().sum()).item()


def probe_tower(folder: Path, scenes: tuple[int, int] = SCENES) -> dict[str, float]:
    """Accuracies on test scenes and shares of variance, of the image tower of the CLIP in ``folder``."""
    bundle = load_bundle(folder)
    bundle.model.eval()
    data = [load_scenes(split, size=size) for split, size in zip(("train", "test"), scenes, strict=True)]
    tokens, objects = [tokens_of(bundle, part) for part in data], [objects_of(part) for part in data]
    names, grid = len(data[0].objects) + 1, data[0].grid
    cells = [by_cell(part, grid) for part in tokens]
    named = [examples(x.mean(2), y, names) for x, y in zip(cells, objects, strict=True)]
    places = [torch.arange(part.shape[1]).expand(len(part[:PLACED]), -1) for part in tokens]
    placed = [examples(x[:PLACED], y, tokens[0].shape[1]) for x, y in zip(tokens, places, strict=True)]
    each = objects[0][..., None].expand(cells[0].shape[:-1])
    return {
        "object": linear_probe(*named)["score"],
        "place": linear_probe(*placed)["score"],
        "object_share": share(cells[0].flatten(0, 2)[:20000], each.flatten()[:20000]),
        "place_share": share(tokens[0][:PLACED].flatten(0, 1), places[0].flatten()),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: what is read right and its share of the variance, means over the towers of the Flamingos."""
    lines = ["| of the frozen tower's tokens | read right | share of the variance |", "|---|---|---|"]
    for kind, title in KINDS.items():
        cells = [
            100 * statistics.fmean(result["tower"][key] for result in results)
            for key in (kind, f"{kind}_share")
        ]
        lines.append(f"| {title} | {cells[0]:.1f} % | {cells[1]:.1f} % |")
    return "\n".join(lines)
