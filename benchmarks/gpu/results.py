"""What was measured and tested on a machine, in one file that is written after every change.

`<machine>.json` is `{"machine", "runs": {id: header}, "rows", "verdicts", "ceilings", "sweeps"}`. A row is
the time of a workload in one direction, a verdict what the tests or the sanitizer say of the sources of an
op, ceilings are the rates of products and copies, a sweep the times of the tiles of a kernel. Each entry has
a name, so that a later one replaces an earlier one, and the run that made it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.measure import ROOT
from benchmarks.report import write_atomically
from benchmarks.sources import digest, of_python
from vlmkernels._library import KERNELS

TABLES = ("rows", "verdicts", "ceilings", "sweeps")
UNTESTED, GREEN, RED = "untested", "green", "red"


def sources(op: str) -> set[Path]:
    """The files that an op is made of on a GPU."""
    header = f"csrc/include/vlmkernels/{op}_cuda.h"
    in_cuda = ("csrc/cuda/device.cuh", f"csrc/cuda/{op}.*", header, f"python/cuda/{op}.cpp")
    return of_python(op) | {path for pattern in in_cuda for path in ROOT.glob(pattern)}


@functools.cache
def fingerprint(op: str) -> str:
    """A hash of an op's sources, of the versions that compile them, and of the kernel that runs."""
    compilers = f"{torch.__version__} {triton.__version__} {KERNELS.get((op, 'CUDA'))}"
    return digest(sources(op), ROOT, also=compilers)


def row_name(op: str, form: str, type: str, direction: str) -> str:
    return f"{op}, {form}, {type}, {direction}"


def state(row: dict[str, Any], verdicts: Iterable[dict[str, Any]]) -> str:
    """The result of the tests for the sources with which a row was measured."""
    said = {v["state"] for v in verdicts if (v["op"], v["sources"]) == (row["op"], row["sources"])}
    if RED in said or "error" in row:
        return RED
    return GREEN if GREEN in said else UNTESTED


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} contains no results: {error}") from error


class Results:
    """Without a folder they are kept only in memory."""

    def __init__(self, folder: Path | None, machine: str):
        self.path = folder / f"{machine}.json" if folder is not None else None
        self.why_behind = ""  # the error of the last write
        self._lacking: dict[str, dict[str, Any]] = {table: {} for table in TABLES}  # not in the file
        self.stored: dict[str, Any] = {"machine": machine, "runs": {}, **{table: {} for table in TABLES}}
        if self.path is not None and self.path.exists():
            self.stored |= read(self.path)

    def add(self, new: dict[str, Any]) -> None:
        """Entries and their runs, in the form of the file; of two with the same name the later stays."""
        runs = self.stored["runs"] | new["runs"]
        for table in TABLES:
            mine = self.stored[table]
            for name, entry in new.get(table, {}).items():
                if name not in mine or mine[name]["run"] <= entry["run"]:
                    mine[name] = self._lacking[table][name] = entry
        for row in self.stored["rows"].values():
            row["state"] = state(row, self.stored["verdicts"].values())
        used = {entry["run"] for table in TABLES for entry in self.stored[table].values()}
        self.stored["runs"] = {run: header for run, header in sorted(runs.items()) if run in used}
        self.write()

    def lacking(self) -> dict[str, Any]:
        """What the file lacks, in its form."""
        runs = {entry["run"] for entries in self._lacking.values() for entry in entries.values()}
        headers = {run: header for run, header in self.stored["runs"].items() if run in runs}
        return {"machine": self.stored["machine"], "runs": headers, **self._lacking}

    def write(self) -> None:
        """On a full disk the older file stays, and the next write has everything."""
        if self.path is None:
            return
        try:
            write_atomically(self.path, json.dumps(self.stored, indent=1, ensure_ascii=False) + "\n")
            self.why_behind, self._lacking = "", {table: {} for table in TABLES}
        except OSError as error:
            self.why_behind = f"{self.path} is not written: {error.strerror or error}"
