"""Whether the tests of an op were green for the sources that a run measured.

A run's header has `"tests": {op: {"sources": hash, "green", "said", "on", "date"}}`, the last four once tests
of these sources ran: before the measurement, or later by `python -m benchmarks.run --verify`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import against, report, sources
from benchmarks.measure import ROOT


def run_tests(op: str, root: Path = ROOT) -> tuple[bool, str]:
    """Whether tests/test_<op>.py passes (of a module test_nn_<op>.py, of a model test_models_<op>.py).

    And pytest's last line.
    """
    paths = [root / "tests" / f"test_{kind}{op}.py" for kind in ("", "nn_", "models_")]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return False, f"{paths[0].name} does not exist"
    command = [sys.executable, "-m", "pytest", str(path), "-q", "-x", "-m", "not slow"]
    command += ["-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    return done.returncode == 0, lines[-1].strip("= ")


def verdict(
    op: str, on: str, root: Path = ROOT, tests: Callable[[str, Path], tuple[bool, str]] = run_tests
) -> dict[str, Any]:
    """What the tests of an op say of the sources under `root`, on the machine called `on`."""
    green, said = tests(op, root)
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {
        "sources": sources.digest(sources.of(op, root), root),
        "green": green,
        "said": said,
        "on": on,
        "date": date,
    }


def verify(
    folder: Path,
    on: str,
    ops: Sequence[str] = (),
    *,
    root: Path = ROOT,
    checkout: Callable[[str], Path] = against.checkout,
    tests: Callable[[str, Path], tuple[bool, str]] = run_tests,
) -> Iterator[str]:
    """Run the tests that rows stored in `folder` lack, on what was measured; says what each gave.

    Of all ops, or of `ops`. The tests are those of the tree `root` if their hash is the same, else those of
    the commit that the run names.
    """
    for path in sorted(folder.glob("*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        for op in filter(lambda op: not ops or op in ops, stored["ops"]):
            for run in dict.fromkeys(case["run"] for case in stored["ops"][op]):
                header = stored["runs"][run]
                if report.is_green(header, op):
                    continue
                try:
                    tree = _measured(header, op, root, checkout)
                except ValueError as error:
                    said = str(error)
                else:
                    header["tests"][op] = verdict(op, on, tree, tests)
                    said = header["tests"][op]["said"]
                    text = json.dumps(stored, indent=1, ensure_ascii=False) + "\n"
                    report.write_atomically(path, text)
                yield f"{op} on {stored['machine']}, run {run}: {said}"


def _measured(header: dict[str, Any], op: str, root: Path, checkout: Callable[[str], Path]) -> Path:
    """The tree that a run measured. ValueError where it cannot be had."""
    wanted, commit = header["tests"][op]["sources"], header["commit"]
    if sources.digest(sources.of(op, root), root) == wanted:
        return root
    if header["dirty"]:
        raise ValueError(f"the sources {wanted} had changes that no commit holds, and are not in {root}")
    tree = checkout(commit)
    if (found := sources.digest(sources.of(op, tree), tree)) != wanted:
        raise ValueError(f"the sources {wanted} were measured, commit {commit[:12]} has {found}")
    return tree
