"""How well the demo's model finds what it never saw: clip-emoji-demo for three seeds, with their mean.

    python -m benchmarks.demo_experiment             seeds 0, 1, 2, each the training of `make demo`
    python -m benchmarks.demo_experiment --seeds 1   one seed; the mean is of all seeds that are kept
    python -m benchmarks.demo_experiment --table     trains nothing, makes the table of what is kept
    python -m benchmarks.demo_experiment --quick     seconds, to try the script

Results are kept in benchmarks/results/demo/, one file for each seed, and the table of README.md is made of
them; with another --results it stays. They also say at which place the ten texts of the demo's report, evenly
spaced over the concepts, have their picture.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import demo, experiment
from vlmkernels._files import write_text
from vlmkernels.data import load_emoji3
from vlmkernels.use.bundle import load_model
from vlmkernels.use.evaluate import evaluate_model

NAME = "demo"
WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}
RECALLS = ("R@1", "R@5", "R@10")
README, MARKS = experiment.ROOT / "README.md", ("<!-- demo -->", "<!-- /demo -->")
GOAL = 0.22  # R@10 without flags, both ways


def run_seed(seed: int, out: Path, quick: bool) -> experiment.Result:
    """Train and judge one seed."""
    training = experiment.train_part("clip", demo.CONFIG, seed, out, quick)
    bundle = load_model(out / "final", "cpu")
    parts = demo.judged_parts(load_emoji3("style-test"))
    judged = {name: evaluate_model(*bundle, part).to_dict() for name, part in parts}
    shown = demo.pictures(bundle, quick)["texts"]
    return {
        "training": training,
        "evaluation": judged,
        "places": {text["text"]: text["place"] for text in shown},
    }


def means(runs: Sequence[experiment.Result]) -> dict[str, dict[str, float]]:
    """R@1/5/10 of each part of the unseen style and direction, the mean over the seeds, and chance."""
    rows: dict[str, dict[str, float]] = {}
    for part in runs[0]["evaluation"]:
        for way, label in WAYS.items():
            found = [run["evaluation"][part]["retrieval"][way] for run in runs]
            rows[f"{part}, {label}"] = {
                name: statistics.fmean(one[name] for one in found) for name in RECALLS
            }
            rows[f"{part}, {label}"]["chance of R@10"] = found[0]["chance"]["R@10"]
    return rows


def summary(runs: Sequence[experiment.Result]) -> str:
    """The table for the terminal."""
    columns = (*RECALLS, "chance of R@10")
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines = [f"{'mean of seeds ' + seeds:52}" + "".join(f"{name:>16}" for name in columns)]
    for label, row in means(runs).items():
        lines.append(f"{label:52}" + "".join(f"{100 * row[name]:>14.2f} %" for name in columns))
    for run in runs:
        places = sorted(run["places"].values())
        hits = sum(place <= demo.SHOWN for place in places)
        minutes, cpu = (run["training"][name] / 60 for name in ("seconds", "cpu_seconds"))
        lines.append(
            f"seed {run['seed']}: {hits} of {len(places)} texts with their picture among the first "
            f"{demo.SHOWN}, places {places}; trained in {minutes:.1f} minutes, {cpu:.1f} of processor time"
        )
    return "\n".join(lines)


def table(runs: Sequence[experiment.Result]) -> str:
    """Markdown: the means, and what was run where."""
    columns = (*RECALLS, "chance of R@10")
    lines = [f"| {' | '.join(('', *columns))} |", "|---|" + "---:|" * len(columns)]
    for label, row in means(runs).items():
        cells = " | ".join(f"{100 * row[name]:.{2 if name not in RECALLS else 1}f} %" for name in columns)
        lines.append(f"| {label} | {cells} |")
    seeds = ", ".join(str(run["seed"]) for run in runs)
    places = [sum(place <= demo.SHOWN for place in run["places"].values()) for run in runs]
    cpu = statistics.fmean(run["training"]["cpu_seconds"] for run in runs) / 60
    machines = sorted({run["machine"]["processor"] for run in runs})
    whole = next(iter(runs[0]["evaluation"]))
    groups = statistics.fmean(run["evaluation"][whole]["zero_shot"]["captions"]["top1"] for run in runs)
    note = (
        f"`{experiment.command_of(NAME)}`, mean of seeds {seeds}, {runs[0]['training']['steps']} steps each, "
        f"{cpu:.1f} minutes of processor time ({', '.join(machines)}). Of the report's {demo.TEXTS} texts "
        f"{', '.join(map(str, places))} have their picture among the first {demo.SHOWN}. Zero-shot "
        f"classification into the 9 groups of emoji, described by their training names: {100 * groups:.1f} %."
    )
    return "\n".join([*lines, "", note])


def with_table(page: str, text: str) -> str:
    """The page with the table between its markers."""
    return experiment.between(page, MARKS, text)


def verdict(runs: Sequence[experiment.Result]) -> dict[str, bool]:
    """The claims about the mean, and that the report of every seed shows hits."""
    rows = means(runs)
    last = list(runs[0]["evaluation"])[-1]
    claims = {
        f"{last}, {label}: R@10 is at least {100 * GOAL:.0f} %": rows[f"{last}, {label}"]["R@10"] >= GOAL
        for label in WAYS.values()
    }
    claims["every report shows hits among its ten texts"] = all(
        min(run["places"].values()) <= demo.SHOWN for run in runs
    )
    return claims


def main(arguments: Sequence[str] | None = None) -> bool:
    """Runs the seeds; returns whether every claim about all that are kept holds."""
    parser = experiment.parser_of(NAME, __doc__)
    parser.add_argument("--table", action="store_true", help="train nothing, make the table of what is kept")
    args: Any = parser.parse_args(arguments)
    folder = experiment.folder_of(NAME, args)
    if args.table:
        runs = experiment.stored(folder)
    else:
        runs, _ = experiment.each_seed(
            NAME,
            arguments,
            args,
            lambda seed: run_seed(seed, args.out / f"experiment-seed{seed}", args.quick),
        )
    if not runs:
        raise ValueError(f"results must hold a seed, got the folder {folder} without any")
    if folder == experiment.results_folder(NAME):
        write_text(README, with_table(README.read_text(encoding="utf-8"), table(runs)))
    print(summary(runs))
    return experiment.show(verdict(runs))


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
