"""What the cases of tests/gpu, the op tests and compute-sanitizer say of each op on the device."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import trials
from benchmarks.gpu.results import GREEN, RED, UNTESTED
from benchmarks.gpu.workers import Deadline, Failure, outcomes, run_limited
from benchmarks.measure import ROOT

CASE_SECONDS = 120.0  # for one case, with what it compiles
WORKERS = min(os.cpu_count() or 1, 12)
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)(?: - (.*))?$", re.MULTILINE)
NOT_RUN: dict[str, Any] = {"said": "op tests not run", "failed": {}}
Say = Callable[[str], None]


def op_tests(op: str, deadline: Deadline, folder: Path = ROOT / "tests") -> dict[str, Any] | None:
    """What the tests of an op say that run it on CUDA tensors; None if they came to no end."""
    if importlib.util.find_spec("pytest") is None:
        return NOT_RUN | {"said": "op tests not run, pytest is not installed"}
    command = [sys.executable, "-m", "pytest", str(folder / f"test_{op}.py"), "-q", "-k", "cuda"]
    command += ["-m", "not slow", "--tb=line", "-p", "no:cacheprovider"]
    if WORKERS > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(WORKERS)]
    status, output = run_limited(command, deadline.left(), os.environ | {"COLUMNS": "250"})
    if status is None:
        return None
    last = (output.strip() or "no output").splitlines()[-1].strip("= ")
    failed = dict.fromkeys(["the run of the tests"], last) if status else {}
    return {"said": last, "failed": dict(FAILED.findall(output)) or failed}


def by_tests(
    ops: Sequence[str],
    device: str,
    deadline: Deadline,
    *,
    quick: bool,
    slow: bool,
    say: Say,
    tests: Callable[[str, Deadline], dict[str, Any] | None] = op_tests,
) -> Iterator[dict[str, Any]]:
    """A verdict on each op as soon as its cases and tests came to their end, or if one failed before."""
    chosen = trials.cases_for(ops, slow=slow, one_each=quick)
    own = {op: [case.name for case in chosen if op in trials.ops_of(case.name)] for op in ops}
    said: dict[str, Any] = {}
    waiting = list(ops)
    say(f"{len(chosen)} cases in {WORKERS} processes")

    def verdict(op: str, found: dict[str, Any]) -> dict[str, Any]:
        failed = {name: said[name].why for name in own[op] if isinstance(said.get(name), Failure)}
        failed |= found["failed"]
        state = RED if failed else GREEN
        return {"op": op, "slow": slow, "state": state, "said": found["said"], "failed": failed}

    run = partial(trials.run_named, device=device)
    every = dict.fromkeys(name for of_op in own.values() for name in of_op)
    far = {case.name for case in chosen if case.far}  # one at a time, for their memory
    for names, workers in (
        ([x for x in every if x in far], 1),
        ([x for x in every if x not in far], WORKERS),
    ):
        for name, result in outcomes(run, names, workers=workers, limit=CASE_SECONDS, deadline=deadline):
            said[name] = result
            if isinstance(result, Failure):
                say(f"failed: {name}: {result.why}")
            for op in [op for op in waiting if all(name in said for name in own[op])]:
                found = NOT_RUN if device == "cpu" else tests(op, deadline)
                if found is not None:
                    waiting.remove(op)
                    say(f"{op}: {len(own[op])} cases, {found['said']}")
                    yield verdict(op, found)
    for op in waiting:
        if (found := verdict(op, {"said": "no end", "failed": {}}))["state"] == RED:
            yield found


def by_sanitizer(ops: Sequence[str], reports: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Ops in whose cases a tool found something are red; all of them where it cannot be told."""
    said = {tool: summary(of_tool) for tool, of_tool in reports.items()}
    ended = all("errors" in of_tool for of_tool in reports.values())
    failed: dict[str, dict[str, Any]] = {op: {} for op in ops}
    for tool, of_tool in reports.items():
        if of_tool.get("errors") or any(of_tool.get("found", ())):
            guilty = {op for name in of_tool["found"] for op in trials.ops_of(name)} & set(ops)
            for op in guilty or ops:
                cases = {name: x for name, x in of_tool["found"].items() if op in trials.ops_of(name)}
                failed[op][f"compute-sanitizer {tool}"] = cases or of_tool["found"]
    for op in ops:
        state = RED if failed[op] else GREEN if ended else UNTESTED
        yield {"op": op, "state": state, "said": said, "failed": failed[op]}


def summary(of_tool: Mapping[str, Any]) -> str:
    said = of_tool.get("why_not") or of_tool.get("unfinished") or f"{of_tool['errors']} errors"
    return f"{said}; {of_tool['cases']} cases" if "cases" in of_tool else said
