"""Times this tree against an earlier revision of it, both interleaved in one run.

The revision is checked out and built under build/against/. Each tree runs in a process of its own, since one
process can hold one `vlmkernels`; they take turns, call by call, on the same inputs, and their results are
compared first. `python -m benchmarks.run --against REV` does ops, `python -m benchmarks.models --against REV`
whole models.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure, report
from vlmkernels import _native

TREES = measure.ROOT / "build" / "against"
SLOWER = 0.97  # median ratio below which a case is called slower, if four pairs in five say so as well
NEW = "there is no such case in the earlier tree"
AGREE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}


def checkout(revision: str, root: Path = measure.ROOT) -> Path:
    """A folder with the tree of a revision, its extension built where this tree has one."""
    asked = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    found = subprocess.run(asked, cwd=root, capture_output=True, text=True)
    if found.returncode:
        raise ValueError(f"--against must name a commit of the repository in {root}, got {revision!r}")
    commit, native = found.stdout.strip(), _native.extension is not None
    tree = TREES / f"{commit[:12]}-torch{torch.__version__}{'' if native else '-reference'}"
    if tree.exists():
        return tree
    TREES.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=TREES, prefix=tree.name, suffix=".part"))
    try:
        archive = subprocess.run(["git", "archive", commit], cwd=root, capture_output=True, check=True)
        subprocess.run(["tar", "-x"], cwd=part, input=archive.stdout, check=True)
        if native:
            build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(build, cwd=part, check=True, stdout=subprocess.DEVNULL)
        part.rename(tree)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return tree


class Worker:
    """A process that runs cases of one tree."""

    def __init__(self, tree: Path, **environment: str) -> None:
        script = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(tree)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ChildProcessError(f"the process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildProcessError(answer["error"])
        return answer["value"]

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def _worker(tree: Path, settings: dict[str, Any], **environment: str) -> Iterator[tuple[Worker, list[str]]]:
    worker = Worker(tree, OMP_NUM_THREADS=str(settings["threads"]), **environment)
    try:
        try:
            names = worker.ask("start", **settings)
        except ChildProcessError as error:
            raise ValueError(f"the cases in {tree} cannot be run: {error}") from None
        yield worker, names
    finally:
        worker.close()


def _compared(now: Worker, then: Worker, name: str, folder: Path, seconds: float, quick: bool) -> dict:
    """One row: seconds per call of both and their ratio."""
    results = []
    for side, worker in (("now", now), ("then", then)):
        worker.ask("prepare", name=name, result=str(folder / side))
        results.append(torch.load(folder / side).double())
    dtype = torch.load(folder / "now").dtype
    if results[0].shape != results[1].shape:
        raise ArithmeticError(f"gives {tuple(results[0].shape)}, gave {tuple(results[1].shape)}")
    error = float((results[0] - results[1]).norm() / results[1].norm().clamp_min(1e-30))
    if not error <= AGREE[dtype]:
        raise ArithmeticError(f"its result moved by {error:.1e} (relative)")
    times, pairs = measure.pairs(
        now,
        {"then": then},
        seconds=seconds,
        rounds=(3, 3) if quick else (7, 51),
        sample=lambda worker, repeats: worker.ask("sample", repeats=repeats),
    )
    ratio = measure.spread([before / after for after, before in pairs["then"]])
    return {
        "seconds": measure.spread(times),
        "before": measure.spread([before for _, before in pairs["then"]]),
        "ratio": ratio,
        "slower": ratio["median"] < SLOWER and ratio["p80"] < 1,
    }


def _peak(tree: Path, settings: dict[str, Any], name: str) -> int | str:
    with _worker(tree, settings, MALLOC_MMAP_THRESHOLD_="65536") as (worker, _):
        try:
            return worker.ask("peak", name=name)
        except ChildProcessError as error:
            return str(error)


def compare(
    kind: str,
    names: Sequence[str],
    trees: tuple[Path, Path],
    *,
    threads: int,
    device: str = "cpu",
    quick: bool = False,
    seconds: float = 12.0,
    memory: bool = True,
) -> Iterator[dict[str, Any]]:
    """A row for each case of `kind` ("ops" or "models"), the first tree against the second, earlier one."""
    settings = {"kind": kind, "quick": quick, "device": device, "threads": threads}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (now, _), (then, known) = (stack.enter_context(_worker(tree, settings)) for tree in trees)
        for name in names:
            row: dict[str, Any] = {"name": name}
            if name not in known:
                yield {**row, "why_not": NEW}
                continue
            try:
                row |= _compared(now, then, name, folder, seconds, quick)
                if memory:
                    row["extra_bytes"], row["before_bytes"] = (_peak(tree, settings, name) for tree in trees)
            except (ChildProcessError, ArithmeticError) as error:
                row["why_not"] = str(error)
            yield row


HEADING = (
    "| case | before | now | before / now: median (p20–p80) | memory before | now | |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | --- |"
)


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    name = row["name"].replace("|", "\\|")
    if "why_not" in row:
        return f"| {name} | – | – | not compared: {row['why_not']} | | | |"
    ratio = "{median:.2f} ({p20:.2f}–{p80:.2f})".format(**row["ratio"])
    before, now = report.duration(row["before"]["median"]), report.duration(row["seconds"]["median"])
    memory = report.size(row.get("before_bytes")), report.size(row.get("extra_bytes"))
    verdict = "**slower**" if row["slower"] else ""
    return f"| {name} | {before} | {now} | {ratio} | {memory[0]} | {memory[1]} | {verdict} |"


def main(kind: str, names: Sequence[str], revision: str, **options: Any) -> int:
    """Prints the table; 1 where a case is slower, fails, or gives something else."""
    trees = measure.ROOT, checkout(revision)
    bad = 0
    print(HEADING, flush=True)
    for row in compare(kind, names, trees, **options):
        print(line(row), flush=True)
        bad += row.get("slower", False) or ("why_not" in row and row["why_not"] != NEW)
    return int(bad > 0)
