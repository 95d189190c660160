"""What do image features learn from captions, and does the second direction help?

    python -m benchmarks.virtex_experiment              seeds 0, 1, 2
    python -m benchmarks.virtex_experiment --seeds 0    one seed
    python -m benchmarks.virtex_experiment --quick      seconds, to try the script; numbers mean nothing

For each seed `vlmkernels train virtex --config virtex-scenes` is run with a smaller network on 4,800 smaller
scenes of 12 objects for 1,200 steps, with both directions (bicaptioning) and with the forward one alone on the
same batches. The probe of `vlmkernels probe` then measures the features of both, and of the same network with
random weights of the seed: it is trained on the first scenes of the training split and tested on scenes whose
combinations of objects no training scene has. A training whose result is in --out is not repeated. Results
are kept in benchmarks/results/virtex/, a file for each seed, and the table is made of all that are there.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import demo
from benchmarks.flamingo_experiment import stored, train_part
from vlmkernels._files import write_text
from vlmkernels.data import Scenes, load_scenes
from vlmkernels.use.probe import probe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "virtex"
COMMAND = "python -m benchmarks.virtex_experiment"
CONFIG = "virtex-scenes"
TASKS = ("bicaptioning", "captioning")
ROWS = {
    "untrained": "random weights",
    "captioning": "captions, forward only",
    "bicaptioning": "captions, both directions",
}
SCENES = {"objects": 12, "image_size": 32}
PROBED, JUDGED = 800, 500  # scenes to train the probe on, and to test it on
NETWORK = {"image_size": 32, "conv_pool": True, "width": 64, "heads": 2, "vocab_size": 2050}
SETTINGS = {"epochs": 8, "batch-size": 32, "lr": 2e-3, "data-options": json.dumps({**SCENES, "size": 4800})}


def scenes(quick: bool) -> tuple[Scenes, Scenes]:
    """What the probe is trained on, and tested on."""
    probed, judged = (60, 40) if quick else (PROBED, JUDGED)
    return load_scenes("train", size=probed, **SCENES), load_scenes("test", size=judged, **SCENES)


def run_task(task: str, seed: int, out: Path, quick: bool) -> dict[str, Any]:
    """Train and probe one model, unless an earlier call has."""
    folder = out.absolute() / f"{task}-{seed}"
    result = folder.with_suffix(".json")
    if not result.is_file():
        settings = {**SETTINGS, "model-options": json.dumps({**NETWORK, "task": task})}
        flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        trained = train_part("virtex", CONFIG, seed, folder, quick, *flags)
        scores = probe(folder / "final", *scenes(quick), device="cpu").to_dict()
        write_text(result, json.dumps({**trained, "probe": scores}, indent=1) + "\n")
    return json.loads(result.read_text(encoding="utf-8"))


def run_seed(seed: int, out: Path, quick: bool) -> dict[str, Any]:
    """Trainings and probes of a seed."""
    found = {task: run_task(task, seed, out, quick) for task in TASKS}
    folder = out.absolute() / f"{TASKS[0]}-{seed}" / "final"
    untrained = probe(folder, *scenes(quick), untrained=True, seed=seed, device="cpu").to_dict()
    return {**found, "untrained": {"probe": untrained}}


def scores_of(results: Sequence[dict[str, Any]], row: str) -> list[float]:
    """Mean average precision of each seed."""
    return [result[row]["probe"]["score"] for result in results]


def verdict(results: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """The claims: captions teach features in every seed, and both directions teach more on average."""
    untrained = scores_of(results, "untrained")
    claims = {
        f"{ROWS[task]}: better than random weights in every seed": all(
            mine > other for mine, other in zip(scores_of(results, task), untrained, strict=True)
        )
        for task in TASKS
    }
    both, forward = (statistics.fmean(scores_of(results, task)) for task in TASKS)
    return {**claims, "both directions better than the forward one on average": both > forward}


def table(results: Sequence[dict[str, Any]]) -> str:
    """Markdown: means over the seeds and each seed, the gap to random weights, the cost of training."""
    lines = [
        "| features of | steps | CPU time | mean average precision, held-out scenes | above random weights |",
        "|---|---|---|---|---|",
    ]
    untrained = scores_of(results, "untrained")
    for row, title in ROWS.items():
        cells = ["", ""]
        if row in TASKS:
            seconds = statistics.fmean(result[row]["cpu_seconds"] for result in results)
            cells = [str(results[0][row]["steps"]), f"{seconds:.0f} s"]
        scores = scores_of(results, row)
        gaps = [100 * (mine - other) for mine, other in zip(scores, untrained, strict=True)]
        each = ", ".join(f"{100 * score:.1f}" for score in scores)
        cells.append(f"{100 * statistics.fmean(scores):.1f} % ({each})")
        cells.append(f"{statistics.fmean(gaps):+.1f}" if row in TASKS else "")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    chance = statistics.fmean(result["untrained"]["probe"]["chance"] for result in results)
    return "\n".join(lines) + f"\n\nChance, the mean share of the objects: {100 * chance:.1f} %."


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the experiment; returns whether captions teach features in every seed."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="a few steps, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/virtex"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the result files")
    args = parser.parse_args(arguments)
    folder = args.results or (args.out / "results" if args.quick else RESULTS)
    words = sys.argv[1:] if arguments is None else arguments
    for seed in args.seeds:
        print(f"seed {seed}", flush=True)
        result = {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", "-m", "benchmarks.virtex_experiment", *words]),
            "machine": demo.machine(),
            "seed": seed,
            **run_seed(seed, args.out, args.quick),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"seed-{seed}.json", json.dumps(result, indent=1) + "\n")
    claims = verdict(stored(folder))
    for claim, holds in claims.items():
        print(f"  {'yes' if holds else 'NO '} {claim}")
    print(f"{table(stored(folder))}\nResults: {folder}")
    return all(holds for claim, holds in claims.items() if "random weights" in claim)


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
