"""Does a small Flamingo read its images? Captions of scenes with combinations it was never trained on.

    python -m benchmarks.flamingo_experiment              seeds 0, 1, 2
    python -m benchmarks.flamingo_experiment --seeds 0    one seed
    python -m benchmarks.flamingo_experiment --quick      seconds, to try the script; numbers mean nothing

For each seed three trainings, each a call of `vlmkernels train`: clip-scenes, lm-scenes, and flamingo-scenes
between these two, which stay frozen. Then the test scenes are captioned by only the language model, by the
Flamingo, and by the Flamingo when every scene gets the image of another one; chance is what the right
captions of those other scenes score. Results are kept in
benchmarks/results/flamingo/, a file for each seed, and the table is made of all that are there.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from benchmarks import experiment
from benchmarks.experiment import train_part
from vlmkernels.data import Sample, Scenes, load_scenes, slot_accuracy
from vlmkernels.use.evaluate import evaluate

NAME = "flamingo"
RESULTS = experiment.results_folder(NAME)
ROWS = {
    "language_model": "language model, no image",
    "own_images": "Flamingo, own images",
    "other_images": "Flamingo, images of other scenes",
    "unseen_style": "Flamingo, own images in an unseen style",
}
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


def run_seed(seed: int, out: Path, scenes: int, quick: bool) -> dict[str, Any]:
    """Train the three models of a seed and judge them on ``scenes`` test scenes, those of seed 0."""
    out = out.absolute()
    folders = {kind: out / f"{kind}-seed{seed}" for kind in ("clip", "lm", "flamingo")}
    parts = ("--vision", str(folders["clip"] / "final"), "--language-model", str(folders["lm"] / "final"))
    trained = {
        kind: train_part(kind, f"{kind}-scenes", seed, folder, quick, *(parts if kind == "flamingo" else ()))
        for kind, folder in folders.items()
    }
    test = load_scenes("test", size=scenes)
    flamingo, start = folders["flamingo"] / "final", time.perf_counter()
    judged = {
        "language_model": evaluate(folders["lm"] / "final", test, device="cpu"),
        "own_images": evaluate(flamingo, test, device="cpu"),
        "other_images": evaluate(flamingo, OtherImages(test), device="cpu"),
        "unseen_style": evaluate(flamingo, load_scenes("style-test", size=scenes), device="cpu"),
    }
    seconds = time.perf_counter() - start
    shown = {name: {**found.to_dict(), "captions": found.captions[:5]} for name, found in judged.items()}
    return {
        "trained": trained,
        "evaluation_seconds": seconds,
        "chance": chance(test),
        "evaluation": shown,
    }


def verdict(run: dict[str, Any]) -> dict[str, bool]:
    """The claims for each seed: images help, and other images do not."""
    judged = run["evaluation"]
    perplexity = {name: result["perplexity"] for name, result in judged.items()}
    slots = {name: result["slots"]["slots"] for name, result in judged.items()}
    alone, own, other = "language_model", "own_images", "other_images"
    floor = max(slots[alone], run["chance"]["slots"])
    return {
        "perplexity is lower with images": perplexity[own] < perplexity[alone],
        "slot accuracy is higher with images": slots[own] > slots[alone],
        "no lower perplexity with other images": perplexity[other] >= perplexity[alone],
        f"at most {KEPT:.0%} of the gain in slots with other images": (
            slots[other] - floor <= KEPT * (slots[own] - floor)
        ),
    }


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds for each row of ``ROWS``, of slots and perplexity also each seed's."""
    lines = [
        "| captions by | perplexity | slots right | objects | relations | whole scenes | CIDEr |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in ROWS.items():
        judged = [result["evaluation"][name] for result in results]
        each = [one["perplexity"] for one in judged]
        cells = [f"{statistics.fmean(each):.3f} ({', '.join(f'{value:.3f}' for value in each)})"]
        for key in ("slots", "objects", "relations", "scenes"):
            each = [100 * one["slots"][key] for one in judged]
            seeds = f" ({', '.join(f'{value:.1f}' for value in each)})" if key == "slots" else ""
            cells.append(f"{statistics.fmean(each):.1f} %{seeds}")
        cells.append(f"{statistics.fmean(one['reference_scores']['CIDEr'] for one in judged):.2f}")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    shares = [
        f"{100 * results[0]['chance'][key]:.1f} %" for key in ("slots", "objects", "relations", "scenes")
    ]
    lines.append(f"| captions of other scenes (chance) | – | {' | '.join(shares)} | – |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether every claim holds."""
    args = experiment.parser_of(NAME, __doc__, scenes=1000).parse_args(arguments)
    scenes = 8 if args.quick else args.scenes
    results, held = experiment.each_seed(
        NAME, arguments, args, lambda seed: run_seed(seed, args.out, scenes, args.quick), verdict
    )
    print(f"{table(results)}\nResults: {experiment.folder_of(NAME, args)}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
