"""Measures ops against their peers on this machine.

    python -m benchmarks.run                        every op; results go to benchmarks/results/<machine>.json
    python -m benchmarks.run info_nce --case 4096   some cases of one op
    python -m benchmarks.run --long                 the cases of minutes as well
    python -m benchmarks.run --quick                cut sizes, no torch.compile, nothing written
    python -m benchmarks.run --verify               the tests that stored results lack, on what they measured
    python -m benchmarks.run --write-docs           the tables in README.md and docs/ from the stored results
    python -m benchmarks.run --against REV          this tree against an earlier revision, nothing written

The tests of an op run first and a red op is not timed. Results have the hash of the sources that were
measured, and --write-docs takes those alone whose tests were green: what --no-tests measured waits for
--verify.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vlmkernels
from benchmarks import against, measure, report, sources, verdicts
from benchmarks import cases as registry
from benchmarks.cases import Case
from vlmkernels.testing import saved_activation_bytes

ROOT = measure.ROOT
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("open_clip_torch", "transformers", "open-flamingo", "triton")
ISAS = (("avx2", "avx2"), ("avx512f", "avx512"), ("avx512_bf16", "avx512-bf16"), ("amx_bf16", "amx"))
AGREE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-9}


def disagreement(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> str | None:
    """Why the two results are not the same thing, measured by the relative Frobenius error."""
    if ours.shape != theirs.shape:
        return f"gives {tuple(theirs.shape)} where ours gives {tuple(ours.shape)}"
    a, b = ours.detach().double(), theirs.detach().double()
    error = float((a - b).norm() / a.norm().clamp_min(1e-30))
    return None if error <= AGREE[dtype] else f"its result differs from ours by {error:.1e} (relative)"


def measure_case(
    case: Case,
    *,
    device: str,
    seconds: float,
    quick: bool = False,
    memory: Callable[[Case], dict[str, Any]] = lambda case: {},
) -> dict[str, Any]:
    """The rows of one case; a baseline that cannot be imported, fails or disagrees has `why_not`."""
    torch.compiler.reset()
    tensors, dout = case.inputs(device)
    call: dict[str, Callable[[], Any]] = {}
    rows: list[dict[str, Any]] = []
    saved: dict[str, int] = {}
    expected = None
    for name, compiled, make in case.implementations():
        row: dict[str, Any] = {"name": name, "compiled": compiled}
        try:
            fn = make()
            run = lambda fn=fn: measure.step(fn, tensors, dout, case.backward)  # noqa: E731
            if case.long and not compiled:  # one call takes too long to be thrown away
                small, small_dout = case.inputs(device, small=True)
                measure.step(fn, small, small_dout, case.backward)
            else:
                result = run()[0]
                expected = result if expected is None else expected
                why = disagreement(expected, result, case.dtype)
                del result
                if why:
                    raise ArithmeticError(why)
                run()
                if case.memory and case.backward:
                    saved[name] = saved_activation_bytes(partial(fn, **tensors), parameters=tensors.values())
            call[name] = run
        except Exception as error:  # any failure of a peer is the reason given in its row
            if name == registry.OURS:
                raise
            row["why_not"] = str(error) if isinstance(error, ArithmeticError) else measure.reason(error)
        rows.append(row)
    del expected
    ours = call.pop(registry.OURS)
    rounds = (1, 3) if case.long else (3, 3) if quick else (5, 31)
    times, pairs = measure.pairs(
        ours, call, seconds=seconds, rounds=rounds, sync=lambda: measure.synchronize(device)
    )
    peaks = memory(case) if case.memory else {}
    for row in rows:
        name = row["name"]
        if name == registry.OURS:
            row["seconds"] = measure.spread(times)
        elif name in pairs:
            row["seconds"] = measure.spread([theirs for _, theirs in pairs[name]])
            row["ratio"] = measure.spread([theirs / ours for ours, theirs in pairs[name]])
        if "why_not" not in row and peaks:
            row["extra_bytes"] = peaks.get(name, peaks.get(""))
        if name in saved:
            row["saved_bytes"] = saved[name]
    best = min(
        (r for r in rows[1:] if r["compiled"] and "seconds" in r),
        key=lambda r: r["ratio"]["median"],
        default=None,
    )
    return {
        "name": case.name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "sizes": case.sizes,
        "backward": case.backward,
        "headline": case.headline,
        "long": case.long,
        "flops": case.flops,
        "min_flops": case.min_flops,
        "bytes": case.bytes,
        "rounds": max([len(p) for p in pairs.values()], default=len(times)),
        "ours": rows[0],
        "baselines": rows[1:],
        "best_compiled": best["name"] if best else None,
    }


def add_limit(entry: dict[str, Any], limits: dict[str, dict[str, Any]]) -> None:
    """The share of the machine's limit that ours reaches: products or copies at their best rate."""
    needed = {"copy": entry["bytes"] / limits["copy"]["rate"]}
    if entry["flops"]:
        needed["products"] = entry["flops"] / limits[entry["dtype"]]["rate"]
    name = max(needed, key=lambda limit: needed[limit])
    entry["ours"]["limit"], entry["ours"]["of_limit"] = (
        name,
        needed[name] / entry["ours"]["seconds"]["median"],
    )


def cpu_info() -> tuple[str, str]:
    """Model name, and the widest instruction set: baseline, avx2, avx512, avx512-bf16, amx."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    flags = set((re.search(r"flags\s*:\s*(.+)", text) or ["", ""])[1].split())
    widest = "baseline"
    for flag, isa in ISAS:
        widest = isa if flag in flags else widest
    return (name[1].strip() if name else platform.processor() or platform.machine()), widest


def machine_name(device: str, threads: int) -> str:
    """The stem of the results file: processor, instruction set and threads, or the name of the GPU."""
    if device != "cpu":
        parts = [torch.get_device_module(device).get_device_name()]
    else:
        parts = [*cpu_info(), f"{threads}t"]
    words = re.sub(r"\((R|TM|tm|r)\)|CPU|Processor|@.*?GHz", " ", " ".join(parts))
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def git(*words: str) -> str:
    """What git says of this tree; nothing without git, or where the tree is a copy without its repository."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def header_of(command: str, device: str, threads: int) -> dict[str, Any]:
    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "absent"

    generated = (":!benchmarks/results", ":!docs/benchmarks.md", ":!README.md")
    info = vlmkernels.info()
    cpu, isa = cpu_info()
    used = info["cpu"].get("instruction set") if device == "cpu" else ""
    date = datetime.now(timezone.utc)
    return {
        "id": date.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command,
        "date": date.strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", *generated)),
        "cpu": cpu,
        "isa": f"{isa} (kernels: {used})" if used else isa,
        "gpu": torch.get_device_module(device).get_device_name() if device != "cpu" else "",
        "threads": threads,
        "versions": {
            "vlmkernels": vlmkernels.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: version(package) for package in PEERS},
        },
        "kernels": {op: where[device.upper()] for op, where in info["ops"].items()},
        "load": [os.getloadavg()[0]],
        "tests": {},
        "limits": {},
    }


def machine_of(header: dict[str, Any]) -> str:
    """The machine of a run in words."""
    return ", ".join(filter(None, (header["cpu"], header["gpu"], header["isa"])))


def run_ops(
    cases: Sequence[Case],
    header: dict[str, Any],
    *,
    device: str = "cpu",
    quick: bool = False,
    seconds: float = 12.0,
    tests: Callable[[str, Path], tuple[bool, str]] | None = verdicts.run_tests,
    memory: Callable[[Case], dict[str, Any]] = lambda case: {},
    store: Callable[[str, dict[str, Any], list[dict[str, Any]]], None] = lambda op, header, entries: None,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Test, measure and store op by op; returns the red ones, which are neither timed nor stored."""
    red = []
    dtypes = list(dict.fromkeys(case.dtype for case in cases if case.flops))
    for op in dict.fromkeys(case.op for case in cases):
        if tests is None:
            header["tests"][op] = {"sources": sources.digest(sources.of(op))}
        else:
            say(f"{op}: tests")
            found = header["tests"][op] = verdicts.verdict(op, machine_of(header), tests=tests)
            if not found["green"]:
                say(f"{op}: not timed, its tests are red: {found['said']}")
                red.append(op)
                continue
        limits = measure.limits(device, dtypes, quick=quick)
        entries = []
        for case in (c for c in cases if c.op == op):
            say(f"{case.id}")
            entries.append(measure_case(case, device=device, seconds=seconds, quick=quick, memory=memory))
            found = measure.limits(device, [case.dtype] if case.flops else [], quick=quick)
            limits = measure.better(limits, found)
            header["limits"] = measure.better(header["limits"], limits) if header["limits"] else limits
            header["load"] = [header["load"][0], os.getloadavg()[0]]
            for entry in entries:
                add_limit(entry, limits)
            store(op, header, entries)  # after each case: an interrupted run keeps what it has
        say("\n" + report.table(entries))
    if header["limits"]:
        say(report.provenance(header))
    return red


def select(cases: Iterable[Case], ops: Sequence[str], pattern: str, *, long: bool) -> list[Case]:
    """The cases of `ops` and those that run with them (all when empty) whose name matches `pattern`.

    Long ones only if requested.
    """
    cases = list(cases)
    unknown = set(ops) - {case.op for case in cases}
    if unknown:
        raise ValueError(
            f"no benchmark for {sorted(unknown)}; there are {sorted({case.op for case in cases})}"
        )
    wanted = set(ops)
    chosen = [
        c
        for c in cases
        if (not wanted or wanted & {c.op, *c.runs_with})
        and re.search(pattern, c.name)
        and (long or not c.long)
    ]
    if not chosen:
        raise ValueError(f"no case matches {pattern!r}{'' if long else ' without --long'}")
    return chosen


def against_revision(cases: Sequence[Case], args: argparse.Namespace) -> int:
    """The cases of ops whose tests are green, against those of an earlier revision; 1 if any got worse."""
    ops = dict.fromkeys(case.op for case in cases)
    red = set()
    for op in () if args.no_tests else ops:
        green, summary = verdicts.run_tests(op)
        print(f"{op}: {summary}" if green else f"{op}: not timed, its tests are red: {summary}", flush=True)
        red |= set() if green else {op}
    worse = against.main(
        "ops",
        [case.id for case in cases if case.op not in red],
        args.against,
        threads=args.threads,
        device=args.device,
        quick=args.quick,
        seconds=args.seconds,
    )
    return 1 if red else worse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Measure ops against their peers."
    )
    parser.add_argument("ops", nargs="*", metavar="op")
    parser.add_argument("--case", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--long", action="store_true", help="the cases of minutes as well")
    parser.add_argument(
        "--quick", action="store_true", help="cut sizes, no torch.compile, 3 rounds, nothing written"
    )
    parser.add_argument(
        "--no-tests", action="store_true", help="time without testing first; --verify can test later"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--seconds", type=float, default=12.0, help="rounds of a case stop after this, from the fifth on"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument(
        "--verify", action="store_true", help="only run the tests that stored results lack, on their sources"
    )
    parser.add_argument(
        "--write-docs", action="store_true", help="only write the tables in README.md and docs/"
    )
    parser.add_argument("--headline", action="store_true", help="only the cases of README's table")
    parser.add_argument("--against", metavar="REV", help="time an earlier revision in place of the peers")
    parser.add_argument("--list", action="store_true", help="only print the cases")
    args = parser.parse_args(arguments)
    if args.verify:
        if args.case or args.headline or args.list:
            parser.error("--verify takes ops, but no --case, --headline or --list: a run is tested whole")
        if not args.results.is_dir():
            parser.error(f"--results must be a folder, got {args.results}")
        here = machine_of(header_of("", args.device, args.threads))
        for line in verdicts.verify(args.results, here, args.ops):
            print(line, flush=True)
        return 1 if report.unverified(report.load_results(args.results)) else 0
    if args.write_docs:
        documents = [
            path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if path.exists()
        ]
        for path in report.write_docs(args.results, documents):
            print(path.relative_to(ROOT))
        lacking = report.unverified(report.load_results(args.results))
        for line in lacking:
            print(f"left out: {line}: no green tests of the sources that were measured; try --verify")
        return 1 if lacking else 0
    declared = registry.all_cases(quick=args.quick, device=args.device)
    offered = [case for case in declared if case.headline or not args.headline]
    if args.list:
        print("\n".join(case.id + (" (long)" if case.long else "") for case in offered))
        return 0
    try:
        chosen = select(offered, args.ops, args.case, long=args.long)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    if args.against:
        try:
            return against_revision(chosen, args)
        except ValueError as error:
            parser.error(str(error))
    command = shlex.join(
        ["python", "-m", "benchmarks.run", *(sys.argv[1:] if arguments is None else arguments)]
    )
    header = header_of(command, args.device, args.threads)
    machine = machine_name(args.device, args.threads)

    def memory(case: Case) -> dict[str, Any]:
        return measure.memory_of(case.id, quick=args.quick, threads=args.threads, device=args.device)

    def store(op: str, header: dict[str, Any], entries: list[dict[str, Any]]) -> None:
        if not args.quick:
            names = [case.name for case in declared if case.op == op]
            report.merge(args.results / f"{machine}.json", machine, header, op, entries, names)

    if args.quick:
        print(f"quick: every size is cut to {registry.QUICK_SIZE}, nothing is written")
    red = run_ops(
        chosen,
        header,
        device=args.device,
        quick=args.quick,
        seconds=args.seconds,
        tests=None if args.no_tests else verdicts.run_tests,
        memory=memory,
        store=store,
        say=partial(print, flush=True),
    )
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
