"""What the experiments share: trainings in processes of their own, results kept in files, seed by seed."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import demo
from vlmkernels._files import write_text

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--max-steps", "2", "--batch-size", "8")

Result = dict[str, Any]


def results_folder(name: str) -> Path:
    """Where the results of an experiment are kept in the repository."""
    return ROOT / "benchmarks" / "results" / name


def command_of(name: str) -> str:
    """The command that runs an experiment."""
    return f"python -m benchmarks.{name}_experiment"


def train_part(kind: str, config: str, seed: int, out: Path, quick: bool, *flags: str) -> Result:
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


def once(file: Path, make: Callable[[], Result]) -> Result:
    """The result in ``file``; unless an earlier call wrote it, that of ``make``, which is written."""
    if not file.is_file():
        write_result(file, make())
    return json.loads(file.read_text(encoding="utf-8"))


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, atomically, in a folder that is created."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result, indent=1) + "\n")


def stored(folder: Path, pattern: str = "seed-*.json") -> list[Result]:
    """The results of a folder, by seed."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(pattern)]
    return sorted(found, key=lambda result: result["seed"])


def parser_of(
    name: str, document: str | None, *, seeds: Sequence[int] = (0, 1, 2), scenes: int | None = None
) -> argparse.ArgumentParser:
    """The options of an experiment; ``scenes``, the number of test scenes, only of those that have any."""
    parser = argparse.ArgumentParser(prog=command_of(name), description=(document or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    if scenes is not None:
        parser.add_argument("--scenes", type=int, default=scenes, help="test scenes of each kind")
    parser.add_argument("--quick", action="store_true", help="a few steps and scenes, to try the script")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the result files")
    return parser


def folder_of(name: str, args: argparse.Namespace) -> Path:
    """The folder of the result files: those of a quick run are not kept in the repository."""
    return args.results or (args.out / "results" if args.quick else results_folder(name))


def origin(name: str, arguments: Sequence[str] | None) -> Result:
    """When, by which command and on which machine a result was measured; where its files went is left out."""
    places = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    places.add_argument("--out")
    places.add_argument("--results")
    _, words = places.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*command_of(name).split(), *words]),
        "machine": demo.machine(),
    }


def each_seed(
    name: str,
    arguments: Sequence[str] | None,
    args: argparse.Namespace,
    run_seed: Callable[[int], Result],
    verdict: Callable[[Result], dict[str, bool]] | None = None,
    folder: Path | None = None,
) -> tuple[list[Result], bool]:
    """Run every seed and keep its result; all that are there, and whether every claim about these runs held.

    A ``verdict`` judges each seed for itself and is kept with it.
    """
    folder = folder or folder_of(name, args)
    held = True
    for seed in args.seeds:
        print(f"seed {seed}", flush=True)
        result = run_seed(seed)
        if verdict is not None:
            result["verdict"] = verdict(result)
            held = show(result["verdict"]) and held
        write_result(folder / f"seed-{seed}.json", {**origin(name, arguments), "seed": seed, **result})
    return stored(folder), held


def seeds_or_page(
    name: str,
    arguments: Sequence[str] | None,
    args: argparse.Namespace,
    run_seed: Callable[[int], Result],
    verdict: Callable[[Result], dict[str, bool]],
    page: Path,
    with_table: Callable[[str, Sequence[Result]], str],
) -> tuple[list[Result], bool]:
    """As `each_seed`; with --write-docs what is stored, which the page shows then."""
    if not args.write_docs:
        return each_seed(name, arguments, args, run_seed, verdict)
    results = stored(folder_of(name, args))
    write_text(page, with_table(page.read_text(encoding="utf-8"), results))
    return results, True


def between(page: str, marks: tuple[str, str], text: str) -> str:
    """The page with a text between two markers. ValueError if it has not these markers."""
    before, found, rest = page.partition(marks[0])
    if not found or marks[1] not in rest:
        raise ValueError(f"the page must have the markers {' and '.join(marks)}")
    return f"{before}{marks[0]}\n\n{text}\n\n{marks[1]}{rest.partition(marks[1])[2]}"


def show(claims: Mapping[str, bool]) -> bool:
    """Print each claim with whether it holds; whether all do."""
    for claim, holds in claims.items():
        print(f"  {'yes' if holds else 'NO '} {claim}", flush=True)
    return all(claims.values())
