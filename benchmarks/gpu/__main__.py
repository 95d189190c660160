"""Tests, times and compares the kernels on a GPU, or predicts what they may reach without one.

    python -m benchmarks.gpu              correctness, compute-sanitizer, timings against peers, comparison;
                                          into benchmarks/results/gpu/<card>.json
    python -m benchmarks.gpu info_nce     one op
    python -m benchmarks.gpu --predict    benchmarks/gpu/predictions.json and the tables of docs/roofline.md
    python -m benchmarks.gpu --device cpu --quick    every step on small inputs, where there is no GPU

It ends with 1 if a kernel is wrong, which is then not timed, and with 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks import report, run
from benchmarks.gpu import pages, predict, sanitizer, timing, trials
from benchmarks.gpu.cards import CARDS, card_of
from benchmarks.gpu.workloads import workloads

PEERS = ("flash-attn", "memeff", "siglip-kernel", "liger-kernel")
OPS = list(dict.fromkeys(workload.op for workload in workloads()))


def write_predictions(path: Path, *, quick: bool, command: str, say: Callable[[str], None]) -> None:
    predictions = predict.predict(quick=quick, command=command, say=say)
    report.write_atomically(path, json.dumps(predictions, indent=1, ensure_ascii=False) + "\n")
    if path == predict.PREDICTIONS:
        pages.write()


def correctness(
    ops: Sequence[str],
    device: str,
    *,
    quick: bool,
    slow: bool,
    say: Callable[[str], None],
    tests: Callable[[str], tuple[bool, str]],
) -> dict[str, dict[str, Any]]:
    """Of each op: what its tests say, which cases fail on the device, and whether it is red."""
    chosen = trials.cases_for(ops, slow=slow, one_each=quick)
    failed = trials.run(chosen, device, say)
    found: dict[str, dict[str, Any]] = {}
    for op in ops:
        own = [case.name for case in chosen if op in trials.ops_of(case.name)]
        wrong = {name: failed[name] for name in own if name in failed}
        say(f"tests of {op}")
        green, summary = tests(op)
        found[op] = {"tests": summary, "cases": len(own), "failed": wrong, "red": bool(wrong) or not green}
    return found


def mark_unsafe(found: dict[str, dict[str, Any]], reports: dict[str, dict[str, Any]]) -> None:
    """Ops in whose cases the sanitizer found something are red; all of them where it cannot be told."""
    for tool, of_tool in reports.items():
        if of_tool.get("errors"):
            guilty = {op for name in of_tool["found"] for op in trials.ops_of(name)} & set(found)
            for op in guilty or found:
                found[op]["red"] = True
                found[op].setdefault("unsafe", []).append(tool)


def measure(options: argparse.Namespace, command: str, say: Callable[[str], None]) -> int:
    device, quick, ops = options.device, options.quick, options.ops or OPS
    if quick:
        say("quick: small inputs; the times mean nothing")
    machine = run.machine_name(device, torch.get_num_threads())
    name = "cpu" if device == "cpu" else torch.get_device_module(device).get_device_name()
    card = CARDS[options.card] if options.card else card_of(name)
    header = run.header_of(command, device, torch.get_num_threads())
    for package in PEERS:
        try:
            header["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            header["versions"][package] = "absent"
    left_out = {*options.without, *(("tests", "slow-cases") if quick else ())}
    header["correctness"] = found = correctness(
        ops, device, quick=quick, slow="slow-cases" not in left_out, say=say,
        tests=(lambda op: (True, "not run")) if "tests" in left_out else run.run_tests,
    )  # fmt: skip
    if "sanitizer" in left_out:
        reports = {tool: {"why_not": "--without sanitizer"} for tool in sanitizer.TOOLS}
    else:
        reports = sanitizer.run(ops, device, say)
    header["sanitizer"] = reports
    mark_unsafe(found, reports)
    predictions = json.loads(options.predictions.read_text(encoding="utf-8"))
    header["predictions"] = predictions["header"]
    timer = timing.host_timer if device == "cpu" else timing.EventTimer(device)
    declared = workloads(quick=quick, device=device)
    shown = []
    for op in (op for op in ops if not found[op]["red"]):
        entries = []
        for workload in (w for w in declared if w.op == op):
            say(workload.name)
            entries += timing.measure_workload(workload, device, timer, seconds=options.seconds, quick=quick)
        for entry in entries:
            timing.compare(entry, predictions, card.name if card else None)
        if options.results:
            order = [e["name"] for e in entries]
            report.merge(options.results / f"{machine}.json", machine, header, op, entries, order)
        shown += entries
    say("\n" + pages.measured(shown))
    return verdict(found, reports, say)


def verdict(
    found: dict[str, dict[str, Any]], reports: dict[str, dict[str, Any]], say: Callable[[str], None]
) -> int:
    """1 if an op is red or a tool did not come to its end."""
    for tool, of_tool in reports.items():
        state = of_tool.get("why_not") or of_tool.get("unfinished") or f"{of_tool.get('errors')} errors"
        say(f"compute-sanitizer {tool}: {state}")
    for op, of_op in found.items():
        state = "RED, not timed" if of_op["red"] else "correct"
        wrong = [*of_op["failed"], *(f"compute-sanitizer {tool}" for tool in of_op.get("unsafe", ()))]
        say(
            f"{op}: {state}; {of_op['cases']} cases, tests {of_op['tests']}"
            + "".join(f"\n  {x}" for x in wrong)
        )
    unfinished = any("unfinished" in of_tool for of_tool in reports.values())
    return int(unfinished or any(of_op["red"] for of_op in found.values()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=", ".join(OPS))
    parser.add_argument("--predict", action="store_true", help="no measurement: write predictions and page")
    parser.add_argument(
        "--write-docs", action="store_true", help="only write docs/roofline.md from what is stored"
    )
    parser.add_argument("--quick", action="store_true", help="small inputs, few cases, no torch.compile")
    parser.add_argument(
        "--without", action="append", default=[], choices=["tests", "slow-cases", "sanitizer"],
        help="to save time; the stored run says so",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--card", choices=list(CARDS), help="whose predictions to compare with")
    parser.add_argument("--seconds", type=float, default=5.0, help="of rounds for one workload")
    parser.add_argument("--predictions", type=Path, default=predict.PREDICTIONS, metavar="FILE")
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="benchmarks/results/gpu; nothing with --quick"
    )
    parser.add_argument("--cases-alone", action="store_true", help="what compute-sanitizer watches")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.gpu", *words])
    say = partial(print, flush=True)
    if unknown := set(options.ops) - set(OPS):
        parser.error(f"no op {sorted(unknown)}; there are {OPS}")
    if options.predict:
        if options.quick and options.predictions == predict.PREDICTIONS:
            parser.error(
                "--predict --quick needs --predictions FILE, or it would replace those of real sizes"
            )
        write_predictions(options.predictions, quick=options.quick, command=command, say=say)
        return 0
    if options.write_docs:
        pages.write()
        return 0
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu goes with --quick: its kernels are interpreted")
    if options.device != "cpu" and not torch.cuda.is_available():
        print("no GPU that torch can use; --predict and --device cpu --quick need none", file=sys.stderr)
        return 2
    if options.cases_alone:
        chosen = trials.cases_for(options.ops or OPS, slow=False, one_each=options.quick)
        return int(bool(trials.run(chosen, options.device, say)))
    if options.results is None and not options.quick:
        options.results = pages.RESULTS
    return measure(options, command, say)


if __name__ == "__main__":
    sys.exit(main())
