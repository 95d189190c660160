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

import argparse
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from benchmarks import demo
from vlmkernels._files import write_text
from vlmkernels.data import Sample, Scenes, load_scenes, slot_accuracy
from vlmkernels.use.evaluate import evaluate

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "flamingo"
COMMAND = "python -m benchmarks.flamingo_experiment"
ROWS = {
    "language_model": "language model, no image",
    "own_images": "Flamingo, own images",
    "other_images": "Flamingo, images of other scenes",
    "unseen_style": "Flamingo, own images in an unseen style",
}
QUICK = ("--max-steps", "2", "--batch-size", "8")
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


def train_part(kind: str, config: str, seed: int, out: Path, quick: bool, *flags: str) -> dict[str, Any]:
    """One training in a process of its own, into the folder ``out``, made anew; its time, steps and loss."""
    if (out / "config.yaml").is_file():
        shutil.rmtree(out)
    command = [sys.executable, "-m", "vlmkernels", "train", kind, "--config", config, *flags]
    command += ["--seed", str(seed), "--out", str(out), "--keep", "1", "--device", "cpu", "--no-tensorboard"]
    command += QUICK if quick else ()
    start, cpu = time.perf_counter(), _cpu_seconds()
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"training {kind} with seed {seed} ended with exit status {done.returncode}")
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": _cpu_seconds() - cpu}
    return {**seconds, "steps": last["step"], "loss": last["loss"]}


def _cpu_seconds() -> float:
    """Processor time of the finished child processes, all cores together."""
    times = os.times()
    return times.children_user + times.children_system


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
        "seed": seed,
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


def stored(folder: Path) -> list[dict[str, Any]]:
    """The results of a folder, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("seed-*.json")]
    return sorted(found, key=lambda result: result["seed"])


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
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=1000, help="test scenes of each kind")
    parser.add_argument("--quick", action="store_true", help="a few steps and scenes, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/flamingo"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the result files")
    args = parser.parse_args(arguments)
    folder = args.results or (args.out if args.quick else RESULTS)
    words = sys.argv[1:] if arguments is None else arguments
    held = True
    for seed in args.seeds:
        print(f"seed {seed}", flush=True)
        run = run_seed(seed, args.out, 8 if args.quick else args.scenes, args.quick)
        run["verdict"] = verdict(run)
        for claim, holds in run["verdict"].items():
            print(f"  {'yes' if holds else 'NO '} {claim}", flush=True)
            held = held and holds
        result = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "benchmarks.flamingo_experiment", *words]),
            "machine": demo.machine(),
            **run,
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"seed-{seed}.json", json.dumps(result, indent=1) + "\n")
    print(f"{table(stored(folder))}\nResults: {folder}")
    return held


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
