"""The longer run: clip-emoji-long for three seeds, judged on the unseen style, with its time.

    python -m benchmarks.long_run                       seeds 0, 1, 2 with the fused loss
    python -m benchmarks.long_run --loss reference      the same with the plain PyTorch loss, for its time
    python -m benchmarks.long_run --seeds 0 --epochs 5  one seed, fewer epochs

Every seed is one call of `vlmkernels train` in a process of its own. Results are kept in
benchmarks/results/long_run/ by loss and epochs, and a later call prints its times next to those of the other
loss.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
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

from benchmarks import demo
from vlmkernels._files import write_text
from vlmkernels.data import load_emoji3
from vlmkernels.train.config import read_config
from vlmkernels.use.bundle import load_model
from vlmkernels.use.evaluate import evaluate_model

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "long_run"
LOSSES = ("fused", "reference")
CONFIG = "clip-emoji-long"
RECALLS = ("R@1", "R@5", "R@10")


def train_seed(seed: int, loss: str, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train one seed into the folder ``out``, made anew, and judge it.

    The reference loss is what runs on a CPU without the compiled kernels (VLMKERNELS_NATIVE=0). RuntimeError
    when the training fails.
    """
    if (out / "config.yaml").is_file():
        shutil.rmtree(out)
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "vlmkernels", "train", "clip", "--config", CONFIG, "--device", "cpu"]
    command += ["--seed", str(seed), "--out", str(out), "--keep", "1", "--no-tensorboard", *flags]
    env = {**os.environ, **({"VLMKERNELS_NATIVE": "0"} if loss == "reference" else {})}
    start = time.perf_counter()
    done = subprocess.run(command, env=env)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"training with seed {seed} ended with exit status {done.returncode}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    times = [line["time"] for line in lines]
    bundle = load_model(out / "final", "cpu")
    test = load_emoji3("style-test")
    judged = {name: evaluate_model(*bundle, part).to_dict() for name, part in demo.judged_parts(test)}
    return {
        "seed": seed,
        "seconds": seconds,
        "steps": lines[-1]["step"],
        "seconds_per_step": statistics.median(b - a for a, b in itertools.pairwise(times)),
        "last_loss": lines[-1]["loss"],
        "evaluation": judged,
    }


def means(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each part of the unseen style and direction the mean over the seeds of R@1/5/10, with chance."""
    table: dict[str, dict[str, Any]] = {}
    for part in runs[0]["evaluation"]:
        for direction in ("image_to_text", "text_to_image"):
            found = [run["evaluation"][part]["retrieval"][direction] for run in runs]
            table[f"{part}, {direction.replace('_', ' ')}"] = {
                **{k: statistics.fmean(values[k] for values in found) for k in RECALLS},
                "each R@1": [values["R@1"] for values in found],
                "chance": found[0]["chance"],
            }
    return table


def summary(result: dict[str, Any], other: dict[str, Any] | None) -> str:
    """The table for the terminal; ``other`` is the stored result of the other loss, if there is one."""
    seeds = ", ".join(str(run["seed"]) for run in result["runs"])
    lines = [f"{'mean of seeds ' + seeds:52}" + "".join(f"{k:>10}" for k in RECALLS)]
    for name, row in result["means"].items():
        for label, values in ((name, row), ("  chance", row["chance"])):
            lines.append(f"{label:52}" + "".join(f"{100 * values[k]:>8.2f} %" for k in RECALLS))
        lines.append("  R@1 of each seed: " + ", ".join(f"{100 * value:.2f} %" for value in row["each R@1"]))
    lines += [_times(each) for each in (result, other) if each is not None]
    lines.append("The loss is a small part of a step at this batch; no speed-up of the step is claimed.")
    return "\n".join(lines)


def _times(result: dict[str, Any]) -> str:
    runs = result["runs"]
    minutes = statistics.fmean(run["seconds"] for run in runs) / 60
    step = 1e3 * statistics.median(run["seconds_per_step"] for run in runs)
    count = f"mean of {len(runs)}, {runs[0]['steps']} steps"
    return f"{result['loss']} loss: {minutes:.1f} minutes a seed ({count}), median step {step:.1f} ms"


def stored(folder: Path, loss: str, epochs: int, max_steps: int | None) -> Path:
    """The file of a result."""
    steps = f"-{max_steps}steps" if max_steps else ""
    return folder / f"{loss}-{epochs}epochs{steps}.json"


def main(arguments: Sequence[str] | None = None) -> None:
    title = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.long_run", description=title)
    parser.add_argument("--loss", choices=LOSSES, default="fused")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help=f"passes over the data; {CONFIG}.yaml says how many")
    parser.add_argument("--max-steps", type=int, help="stop after this many steps, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs/long"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(arguments)
    options = {name: value for name in ("epochs", "max_steps") if (value := getattr(args, name)) is not None}
    epochs = args.epochs if args.epochs is not None else read_config(CONFIG)["epochs"]
    runs = []
    for seed in args.seeds:
        print(f"{args.loss} loss, seed {seed}", flush=True)
        runs.append(train_seed(seed, args.loss, args.out / f"{args.loss}-seed{seed}", options))
    words = sys.argv[1:] if arguments is None else arguments
    result = {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.long_run", *words]),
        "loss": args.loss,
        "epochs": epochs,
        "machine": demo.machine(),
        "means": means(runs),
        "runs": runs,
    }
    text = json.dumps(result, indent=1) + "\n"
    args.results.mkdir(parents=True, exist_ok=True)
    target = stored(args.results, args.loss, epochs, args.max_steps)
    write_text(target, text)
    other = stored(args.results, LOSSES[1 - LOSSES.index(args.loss)], epochs, args.max_steps)
    print(summary(result, json.loads(other.read_text(encoding="utf-8")) if other.is_file() else None))
    print(f"Result: {target}")


if __name__ == "__main__":
    main()
