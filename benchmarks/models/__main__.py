"""Training steps and embedding throughput of whole models against the peers', interleaved in one run.

    python -m benchmarks.models                       all; into benchmarks/results/models/<machine>.json
    python -m benchmarks.models --work 'step.*32'     what matches
    python -m benchmarks.models --quick               tiny models, nothing compiled, nothing written
    python -m benchmarks.models --against REV         this tree against an earlier revision, nothing written
    python -m benchmarks.models --write-docs          docs/model_benchmarks.md and README from stored results

All systems of a line start from the same weights; one whose loss, gradients or embeddings differ from ours
is not timed. A step is forward and backward; the optimizer is timed apart.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import against, measure, report
from benchmarks.run import header_of, machine_name

from . import page
from .systems import OURS, Family, System
from .work import (
    DTYPES,
    Work,
    call_of,
    disagreement,
    family_of,
    flops_of,
    optimizer_step,
    parts_of,
    peak_bytes,
    prepared,
    result_of,
    works,
)

RESULTS = measure.ROOT / "benchmarks" / "results" / "models"


def measured(
    work: Work, family: Family, systems: Sequence[System], options: argparse.Namespace
) -> dict[str, Any]:
    """One line of the results: the rows of all systems, ours first."""
    torch.compiler.reset()
    inputs = family.inputs(work.batch)
    rows: list[dict[str, Any]] = []
    calls: dict[str, Any] = {}
    expected, flops, parts, optimizer = None, 0, {}, {}
    for system in systems:
        row: dict[str, Any] = {"name": system.name}
        rows.append(row)
        try:
            model = prepared(system, work)
            call = call_of(model, work, inputs)
            found = result_of(model, work, call)
            expected = found if expected is None else expected
            if why := disagreement(expected, found, work):
                raise ArithmeticError(why)
            if system.name in (OURS, family.eager):
                parts[system.name] = parts_of(call)
            if system.name == family.eager:
                flops = flops_of(model, work, inputs)
            if work.training and system.name in (OURS, family.eager):
                optimizer[system.name] = _optimizer_seconds(model.module, call)
            call()
            calls[system.name] = call
        except Exception as error:  # any failure of a peer is the reason given in its row
            if system.name == OURS:
                raise
            row["why_not"] = str(error) if isinstance(error, ArithmeticError) else measure.reason(error)
    ours = calls.pop(OURS)
    rounds = (3, 3) if options.quick else (3, 9)
    times, pairs = measure.pairs(ours, calls, seconds=options.seconds, rounds=rounds)
    for row in rows:
        if row["name"] == OURS:
            row["seconds"] = measure.spread(times)
        elif row["name"] in pairs:
            row["seconds"] = measure.spread([theirs for _, theirs in pairs[row["name"]]])
            row["ratio"] = measure.spread([theirs / ours for ours, theirs in pairs[row["name"]]])
        if "why_not" not in row and not options.no_memory:
            row["extra_bytes"] = _peak_in_fresh_process(work, row["name"], options)
    return {
        "name": work.name, "batch": work.batch, "type": work.type, "training": work.training,
        "flops": flops, "rows": rows, "parts": parts, "optimizer": optimizer,
    }  # fmt: skip


def _optimizer_seconds(module: torch.nn.Module, call: Any) -> dict[str, float]:
    """Of torch's fused AdamW, the parameters being put back afterwards."""
    call()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    times, _ = measure.pairs(optimizer_step(module), {}, seconds=1, rounds=(3, 9))
    module.load_state_dict(before)
    return measure.spread(times)


def _peak_in_fresh_process(work: Work, system: str, options: argparse.Namespace) -> int | str:
    command = [sys.executable, "-m", "benchmarks.models", "--peak", work.name, system]
    command += ["--threads", str(options.threads)] + ["--quick"] * options.quick
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(options.threads)}
    try:
        done = subprocess.run(command, cwd=measure.ROOT, env=env, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return "no answer within 900 s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return int(done.stdout.split()[-1])


def _chosen(family: Family, options: argparse.Namespace) -> list[System]:
    compiled = not (options.quick or options.no_compile)
    return [
        s
        for s in family.systems
        if s.name == OURS or ((compiled or not s.compiled) and re.search(options.systems, s.name))
    ]


def _store(path: Path, machine: str, header: dict[str, Any], line: dict[str, Any]) -> None:
    """Put a line into the file, in place of the earlier one of its name."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": {}, "lines": []}
    lines = {old["name"]: old for old in known["lines"]} | {line["name"]: {**line, "run": header["id"]}}
    order = [work.name for work in works(False) if work.name in lines]
    runs = known["runs"] | {header["id"]: header}
    used = {lines[name]["run"] for name in order}
    result = {
        "machine": machine,
        "runs": {key: runs[key] for key in sorted(used)},
        "lines": [lines[name] for name in order],
    }
    report.write_atomically(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.models", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--work", default="", metavar="REGEX", help="only what matches")
    parser.add_argument("--systems", default="", metavar="REGEX", help="only the peers that match")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled peers")
    parser.add_argument("--no-memory", action="store_true", help="without the processes that measure memory")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--seconds", type=float, default=60, help="rounds of a line stop after this, from the third on"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--list", action="store_true", help="only print what there is")
    parser.add_argument("--against", metavar="REV", help="time an earlier revision in place of the peers")
    parser.add_argument("--write-docs", action="store_true", help=f"only write {page.PAGE.name} and README")
    parser.add_argument("--peak", nargs=2, metavar=("WORK", "SYSTEM"), help="only print one peak in bytes")
    options = parser.parse_args(arguments)
    if options.write_docs:
        page.write(options.results)
        return 0
    found = [work for work in works(options.quick) if re.search(options.work, work.name)]
    if not found:
        parser.error(f"--work: nothing matches {options.work!r}; --list prints what there is")
    if options.list:
        print("\n".join(work.name for work in found))
        return 0
    torch.set_num_threads(options.threads)
    if options.peak:
        work = next(work for work in works(options.quick) if work.name == options.peak[0])
        family = family_of(work, options.quick)
        system = next(system for system in family.systems if system.name == options.peak[1])
        print(peak_bytes(work, system, options.quick))
        return 0
    if options.against:
        try:
            return against.main(
                "models",
                [work.name for work in found],
                options.against,
                threads=options.threads,
                quick=options.quick,
                seconds=options.seconds,
                memory=not options.no_memory,
            )
        except ValueError as error:
            parser.error(str(error))
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.models", *words])
    header, machine = header_of(command, "cpu", options.threads), machine_name("cpu", options.threads)
    wrong = False
    for work in found:
        family = family_of(work, options.quick)
        before = measure.limits("cpu", [DTYPES[work.type]], quick=options.quick)
        line = measured(work, family, _chosen(family, options), options)
        limits = measure.better(before, measure.limits("cpu", [DTYPES[work.type]], quick=options.quick))
        header["limits"] = {**limits, **header["limits"]}
        rate = limits[str(DTYPES[work.type]).removeprefix("torch.")]["rate"]
        line["of_limit"] = line["flops"] / rate / line["rows"][0]["seconds"]["median"]
        print(page.text(line), flush=True)
        wrong |= any("differs from ours" in row.get("why_not", "") for row in line["rows"])
        if not options.quick:
            _store(options.results / f"{machine}.json", machine, header, line)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
