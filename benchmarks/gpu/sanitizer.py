"""NVIDIA's compute-sanitizer over the default cases, in a process of its own for each of its tools."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")  # beside PATH, CUDA_HOME and NVIDIA's wheels
SECONDS = 1800.0  # for one tool
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


def run(ops: Sequence[str], device: str, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Of each tool its number of errors and what was found in which case, or why it did not run."""
    path = find()
    if path is None or device == "cpu":
        why = "compute-sanitizer is not installed" if path is None else "kernels are interpreted"
        return {tool: {"why_not": why} for tool in TOOLS}
    report = {}
    for tool in TOOLS:
        say(f"compute-sanitizer: {tool}")
        command = [path, "--tool", tool, "--target-processes", "application-only"]
        command += [*(["--report-api-errors", "no"] if tool == "memcheck" else [])]
        command += [sys.executable, "-m", "benchmarks.gpu", *ops, "--cases-alone", "--device", device]
        env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # or neighbours would share an allocation
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            report[tool] = {"unfinished": f"no end within {SECONDS:.0f} s"}
            continue
        errors, found = read(done.stdout)
        if errors is None:
            lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
            report[tool] = {"unfinished": lines[-1][:200]}
        else:
            report[tool] = {"errors": errors, "found": found}
    return report
