"""The steps of a run on a card: each stores what it finds at once and begins where an earlier run stopped."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import run
from benchmarks.gpu import pages, sanitizer
from benchmarks.gpu import sweep as sweeps
from benchmarks.gpu.cards import CARDS, Card, card_of
from benchmarks.gpu.ceilings import measure_ceilings, shown
from benchmarks.gpu.results import RED, UNTESTED, Results, fingerprint, read, row_name
from benchmarks.gpu.timing import Settings, compare, measure_named
from benchmarks.gpu.verdicts import WORKERS, by_sanitizer, by_tests, summary
from benchmarks.gpu.workers import Deadline, Failure, outcomes
from benchmarks.gpu.workloads import workloads
from benchmarks.measure import ROOT

PEERS = ("flash-attn", "memeff", "siglip-kernel", "liger-kernel")
OPS = list(dict.fromkeys(workload.op for workload in workloads()))
SWEPT = sweeps.OPS
STEPS = ("ceilings", "timing", "tests", "sanitizer")
ROW_SECONDS = 240.0  # for one row, with what its peers compile
TILE_SECONDS = 60.0
Say = Callable[[str], None]


def install(wheels: Path, say: Say) -> None:
    """Unpacks wheels onto the path of this process and its children; skips those that cannot be installed."""
    target = ROOT / "build" / "gpu-wheels"
    shutil.rmtree(target, ignore_errors=True)
    for wheel in sorted(wheels.glob("*.whl")):
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*pip, "--target", str(target), str(wheel)], capture_output=True, text=True)
        if done.returncode:
            say(f"{wheel.name} is skipped: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])


def take(folder: Path, into: Path, say: Say) -> int:
    """Add the results in another folder, of each machine to its own."""
    behind = []
    paths = sorted(folder.glob("*.json"))
    if not paths:
        say(f"no results in {folder}")
    for path in paths:
        try:
            theirs = read(path)
        except ValueError as error:
            behind.append(str(error))
            continue
        mine = Results(into, path.stem)
        mine.add(theirs)
        say(f"{path.stem}: {len(theirs['rows'])} rows, {len(mine.stored['rows'])} with those that were here")
        behind += [mine.why_behind] if mine.why_behind else []
    for why in behind:
        say(why)
    return int(bool(behind))


class Day:
    """One run."""

    def __init__(self, options: argparse.Namespace, command: str, say: Say):
        self.options, self.say = options, say
        self.device, self.quick = options.device, options.quick
        self.deadline = Deadline(options.minutes)
        if options.wheels is not None:
            install(options.wheels, say)
        if self.quick:
            say("quick: small inputs; the times mean nothing")
        threads = torch.get_num_threads()
        machine = run.machine_name(self.device, threads) + "-quick" * self.quick
        name = "cpu" if self.device == "cpu" else torch.get_device_module(self.device).get_device_name()
        self.own_card = card_of(name)
        self.header = run.header_of(command, self.device, threads)
        if self.header["commit"] == "unknown":
            say("no commit is known here: the hash of their sources tells rows apart")
        self.header["versions"] |= {package: _version(package) for package in PEERS}
        self.predictions = json.loads(options.predictions.read_text(encoding="utf-8"))
        self.header["predictions"] = self.predictions["header"]
        self.results = Results(options.results, machine)
        self.left: list[str] = []  # not done for lack of time

    def run(self) -> int:
        steps = self.options.only or STEPS
        if self.options.sweep:
            self.sweep()
        else:
            for step in STEPS:
                if step in steps or (step == "ceilings" and "timing" in steps):
                    self.say(f"-- {step}")
                    getattr(self, step)()
        return self.end()

    def add(self, table: str, name: str, entry: dict[str, Any]) -> None:
        run = self.header["id"]
        self.results.add({"runs": {run: self.header}, table: {name: entry | {"run": run}}})

    def known(self, table: str, name: str, op: str) -> dict[str, Any]:
        """The stored result for the present sources; empty if there is none or it is to be measured again."""
        found = self.results.stored[table].get(name, {})
        return found if found.get("sources") == fingerprint(op) and not self.options.again else {}

    def each(
        self, function: Callable[[Any], Any], tasks: Mapping[Any, str], *, workers: int, seconds: float
    ) -> Iterator[tuple[Any, Any]]:
        """Tasks, each with the name that is said, and their results."""
        left = dict(tasks)
        for task, result in outcomes(function, tasks, workers=workers, limit=seconds, deadline=self.deadline):
            del left[task]
            if isinstance(result, Failure):
                self.say(f"{tasks[task]}: {result.why}")
            yield task, result
        self.left += left.values()

    def ceilings(self) -> None:
        measure = partial(measure_ceilings, quick=self.quick)
        for _, found in self.each(measure, {self.device: "ceilings"}, workers=1, seconds=ROW_SECONDS):
            if not isinstance(found, Failure):
                self.add("ceilings", "", found)
                self.say(shown(found))

    def card(self) -> Card | None:
        """The card of the predictions, with the ceilings that were measured on it."""
        if self.options.card:
            return CARDS[self.options.card]
        measured = self.results.stored["ceilings"].get("")
        return self.own_card.measured(measured) if self.own_card and measured else self.own_card

    def timing(self) -> None:
        compiled = not (self.options.no_compile or self.quick)
        settings = Settings(self.device, self.quick, compiled, self.options.seconds)
        tasks, facts = {}, {}
        for w in workloads(quick=self.quick, device=self.device):
            for direction in w.directions:
                name = row_name(w.op, w.form, w.type, direction)
                row = self.known("rows", name, w.op)
                done = row and row["sizes"] == dict(w.sizes) and row["compiled"] >= compiled
                if w.op in self.options.ops and self.options.form.search(name) and not done:
                    tasks[w.name, direction] = name
                    facts[w.name, direction] = {
                        "op": w.op, "form": w.form, "type": w.type, "direction": direction,
                        "sizes": dict(w.sizes), "sources": fingerprint(w.op), "compiled": compiled,
                    }  # fmt: skip
        failed = {}
        for task, found in self._measured(tasks, settings):
            if isinstance(found, Failure):
                failed[task] = found.why
            else:
                self._add_row(facts[task] | found)
        # Whether it was ours: a peer that brings down the process, or does not compile in time, is no fault
        for task, found in self._measured({task: tasks[task] for task in failed}, settings.ours_alone()):
            if isinstance(found, Failure):
                self.add("rows", tasks[task], facts[task] | {"error": found.why})
            else:
                peers = [{"name": "all of them", "why_not": failed[task]}]
                self._add_row(facts[task] | found | {"peers": peers})

    def _measured(self, tasks: Mapping[Any, str], settings: Settings) -> Iterator[tuple[Any, Any]]:
        return self.each(partial(measure_named, settings=settings), tasks, workers=1, seconds=ROW_SECONDS)

    def _add_row(self, row: dict[str, Any]) -> None:
        compare(row, self.predictions, self.card())
        self.add("rows", row_name(row["op"], row["form"], row["type"], row["direction"]), row)
        self.say(pages.line(row))

    def tests(self) -> None:
        options = self.options
        ops = [op for op in options.ops if not self._judged(op, "tests", slow=options.slow_cases)]
        found = by_tests(
            ops, self.device, self.deadline, quick=self.quick, slow=options.slow_cases, say=self.say
        )
        self._judge(ops, "tests", found)

    def sanitizer(self) -> None:
        ops = [op for op in self.options.ops if not self._judged(op, "sanitizer")]
        self._judge(ops, "sanitizer", self._watched(ops))

    def _watched(self, ops: Iterable[str]) -> Iterator[dict[str, Any]]:
        seconds = 60 * self.options.sanitizer_minutes
        for op in ops:
            if not self.deadline.left():
                return
            reports = sanitizer.run([op], self.device, self.deadline, seconds=seconds, quick=self.quick)
            for tool, report in reports.items():
                self.say(f"{op}, compute-sanitizer {tool}: {summary(report)}")
            yield from by_sanitizer([op], reports)

    def _judged(self, op: str, by: str, slow: bool = False) -> bool:
        found = self.known("verdicts", f"{op} {fingerprint(op)} {by}", op)
        return found.get("state", UNTESTED) != UNTESTED and found.get("slow", True) >= slow

    def _judge(self, ops: Iterable[str], by: str, found: Iterable[dict[str, Any]]) -> None:
        left = dict.fromkeys(ops)
        for verdict in found:
            op = verdict["op"]
            del left[op]
            self.add("verdicts", f"{op} {fingerprint(op)} {by}", verdict | {"sources": fingerprint(op)})
            self.say(f"{op}: {verdict['state']} by {by}")
        self.left += [f"{by} of {op}" for op in left]

    def sweep(self) -> None:
        target = None if self.device == "cpu" else triton.runtime.driver.active.get_current_target()
        card = f"sm_{target.arch}" if target else "sm_80"
        for op in self.options.ops:
            self._sweep(op, card, target)

    def _sweep(self, op: str, card: str, target: Any) -> None:
        """Times the tiles of an op, except those with stored times."""
        tasks: dict[sweeps.Task, str] = {}
        times: dict[int, dict[str, Any]] = {}
        waiting: Counter[int] = Counter()
        for place, sweep in enumerate(sweeps.SWEEPS):
            if sweeps.op_of(sweep) != op:
                continue
            name = sweeps.name_of(sweep, card)
            times[place] = dict(self.known("sweeps", name, op).get("times", {}))
            for tile in sweeps.candidates(sweep, card, quick=self.quick):
                if sweeps.shown(tile) not in times[place]:
                    tasks[place, tile] = f"{name}, {sweeps.shown(tile)}"
                    waiting[place] += 1
        if target is not None and tasks:
            self.say(f"{op}: {len(tasks)} tiles are compiled")
            compile = partial(sweeps.compile_tile, target=target)
            for _ in self.each(compile, tasks, workers=WORKERS, seconds=TILE_SECONDS):
                pass  # a tile that does not compile says so again when it is timed
        measure = partial(sweeps.measure_tile, device=self.device, quick=self.quick, target=card)
        for (place, tile), result in self.each(measure, tasks, workers=1, seconds=TILE_SECONDS):
            name = sweeps.name_of(sweeps.SWEEPS[place], card)
            times[place][sweeps.shown(tile)] = (
                {"why_not": result.why} if isinstance(result, Failure) else result
            )
            waiting[place] -= 1
            self.add("sweeps", name, {"sources": fingerprint(op), "times": times[place]})
        for place, of_tiles in times.items():
            if not waiting[place]:
                self.say(sweeps.difference(sweeps.SWEEPS[place], card, of_tiles))

    def end(self) -> int:
        """Shows what this run found; 1 if an op is red or the results are not in their file."""
        stored, run = self.results.stored, self.header["id"]
        rows = [row for row in pages.in_order(stored["rows"]) if row["run"] == run]
        if rows:
            self.say("\n" + pages.measured(rows))
        red = {row["op"] for row in rows if row["state"] == RED}
        for verdict in stored["verdicts"].values():
            if (verdict["run"], verdict["state"]) == (run, RED):
                red.add(verdict["op"])
                wrong = "".join(f"\n  {name}: {why}" for name, why in verdict["failed"].items())
                self.say(f"RED {verdict['op']}:{wrong}")
        if left := list(dict.fromkeys(self.left)):
            names = "; ".join(left[:20]) + "; and others" * (len(left) > 20)
            self.say(f"no time was left for {len(left)}: {names}")
        if self.results.why_behind:
            self.say(f"{self.results.why_behind}; it lacks\n{json.dumps(self.results.lacking())}")
        return int(bool(red or self.results.why_behind))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
