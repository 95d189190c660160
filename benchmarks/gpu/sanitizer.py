"""NVIDIA's compute-sanitizer over the default cases, in a process of its own for each of its tools."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.workers import Deadline, run_limited

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # besides PATH, CUDA_HOME and NVIDIA's wheels
SUMMARY = re.compile(r"========= (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
FOUND = re.compile(r"========= (?!COMPUTE-SANITIZER|\w+ SUMMARY|Target|LEAK)(\S.*)")


def find() -> str | None:
    home = os.environ.get("CUDA_HOME")
    wheels = importlib.util.find_spec("nvidia")
    packages = [Path(place) for place in (wheels.submodule_search_locations or ())] if wheels else []
    in_wheels = [str(folder) for package in packages for folder in sorted(package.glob("*/bin"))]
    folders = [*([str(Path(home) / "bin")] if home else []), *FOLDERS, *in_wheels]
    path = os.pathsep.join([os.environ.get("PATH", ""), *folders])
    return shutil.which("compute-sanitizer", path=path)


def read(output: str) -> tuple[int | None, dict[str, list[str]]]:
    """How many errors the summary counts (None without one), and what was found in each case."""
    errors, found, case = None, {}, ""
    for line in output.splitlines():
        if line.startswith("case: "):
            case = line.removeprefix("case: ")
        elif summary := SUMMARY.match(line):
            errors = int(summary[1])
        elif one := FOUND.match(line):
            found.setdefault(case, []).append(one[1])
    return errors, found


def run(
    ops: Sequence[str], device: str, deadline: Deadline, *, seconds: float, quick: bool
) -> dict[str, dict[str, Any]]:
    """Of each tool what was found in which case, or why it did not run or come to its end."""
    path = find()
    if path is None or device == "cpu":
        why = "compute-sanitizer is not installed" if path is None else "kernels are interpreted"
        return {tool: {"why_not": why} for tool in TOOLS}
    of_tool = partial(_run, path, ops, device, min(seconds, deadline.left()), quick)
    with ThreadPoolExecutor(len(TOOLS)) as together:  # they keep the host busy and not the card
        return dict(zip(TOOLS, together.map(of_tool, TOOLS), strict=True))


def _run(
    path: str, ops: Sequence[str], device: str, seconds: float, quick: bool, tool: str
) -> dict[str, Any]:
    command = [path, "--tool", tool, "--target-processes", "application-only"]
    command += [*(["--report-api-errors", "no"] if tool == "memcheck" else [])]
    command += [sys.executable, "-m", "benchmarks.gpu", *ops, "--cases-alone", "--device", device]
    command += ["--quick"] * quick
    # One allocation for each tensor, or an access outside of one would be inside its neighbour
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    status, output = run_limited(command, seconds, env)
    errors, found = read(output)
    report = {"cases": output.count("\ncase: ") + output.startswith("case: "), "found": found}
    of_tool = found.pop("", [])  # before the first case
    if (errors and (found or not of_tool)) or (errors == 0 and not status):
        return report | {"errors": errors}
    lines = output.strip().splitlines()
    failed = [line for line in lines if line.startswith("failed: ")]
    why = [*of_tool, *failed, *lines[-1:], "no output"][0][:200]
    return report | {"unfinished": f"no end within {seconds:.0f} s" if status is None else why}
