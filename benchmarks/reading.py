"""Whether a Flamingo reads its images: beside its captions those without an image, and with another one.

Chance is what the right captions of the other scenes score.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from vlmkernels.data import Sample, Scenes, load_scenes, slot_accuracy
from vlmkernels.use.evaluate import evaluate

SCENES = 500
OWN, ALONE, OTHER, STYLE = "own", "language_model", "other_images", "unseen_style"
ROWS = {
    OWN: "Flamingo, own images",
    OTHER: "Flamingo, images of other scenes",
    STYLE: "Flamingo, own images in an unseen style",
    ALONE: "language model, no image",
    "chance": "captions of other scenes (chance)",
}
SCORES = ("slots", "objects", "relations", "scenes")
KEPT = 0.1  # of the gain with its own images, what a Flamingo with other images may keep


class OtherImages(Dataset[Sample]):
    """The scenes, each with the image of another one: positions in a random order are rotated by one."""

    def __init__(self, scenes: Scenes, seed: int = 0) -> None:
        self.scenes, self.scene = scenes, scenes.scene
        order = list(range(len(scenes)))
        random.Random(seed).shuffle(order)
        self.image_of = dict(zip(order, order[1:] + order[:1], strict=True))

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        return Sample(**{**self.scenes[index], "image": self.scenes[self.image_of[index]]["image"]})


def chance(scenes: Scenes) -> dict[str, float]:
    """Slots that are right when every scene gets the caption of another one, that of its ``OtherImages``."""
    names, image_of = scenes.names, OtherImages(scenes).image_of
    return slot_accuracy([names[image_of[i]] for i in range(len(names))], names)


def measure(flamingo: Path, language_model: Path, size: int = SCENES) -> dict[str, dict[str, float]]:
    """Slots and perplexity of the captions of ``size`` test scenes for each row but the Flamingo's own."""
    test = load_scenes("test", size=size)
    judged = {
        OTHER: (flamingo, OtherImages(test)),
        STYLE: (flamingo, load_scenes("style-test", size=size)),
        ALONE: (language_model, test),
    }
    found = {}
    for name, (model, data) in judged.items():
        scores = evaluate(model, data, device="cpu").to_dict()
        found[name] = {**scores["slots"], "perplexity": scores["perplexity"]}
    return {**found, "chance": chance(test)}


def reads(result: dict[str, Any]) -> bool:
    """Whether other images keep at most ``KEPT`` of the gain in slots over the language model and chance."""
    slots = {name: found["slots"] for name, found in result["reading"].items()}
    floor = max(slots[ALONE], slots["chance"])
    own = result["evaluation"]["slots"]["slots"]
    return own > floor and slots[OTHER] - floor <= KEPT * (own - floor)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the Flamingos for each row of ``ROWS``."""
    lines = [
        "| captions by | slots | objects | relations | whole scenes | perplexity |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in ROWS.items():
        found = [
            {**result["evaluation"]["slots"], "perplexity": result["evaluation"]["perplexity"]}
            if name == OWN
            else result["reading"][name]
            for result in results
        ]
        cells = [f"{100 * statistics.fmean(each[score] for each in found):.1f} %" for score in SCORES]
        known = "perplexity" in found[0]
        cells.append(f"{statistics.fmean(each['perplexity'] for each in found):.3f}" if known else "–")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)
