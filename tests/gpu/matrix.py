"""Every kernel compiled for every target, and what it may take there.

`python -m tests.gpu.matrix --check` compiles the launches of workloads.py, holds each to the rules below and
compares it with budgets-<triton>.json; `--write` writes that file; `--rank` ranks tiles by the static model.
`--only REGEX` takes those whose name, as in that file, matches, and leaves the others as they are.
The compiler is part of a Triton release, so its output is the same everywhere and has to be equal. A
release without budgets, which the tiles are not chosen for, is held to the rules alone and may spill.
`--triton 3.6.0` runs in a process of its own with that release, installed into build/ on first use.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton

from vlmkernels.triton import _attention, _tiles

from .launches import Launch, recording
from .machine_code import LIMITS, TARGETS, Code, machine_code
from .workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
RELEASES = ("3.5.1", "3.6.0", "3.7.1", "3.9.0")  # of Triton: those of torch 2.9, 2.11, 2.13 and 2.15
BUDGETED = ("3.6.0", "3.7.1")
TENSOR = r"HMMA|HGMMA|UTC\w*MMA|QMMA|v_mfma"
WARPGROUP = {"sm_90": "HGMMA", "sm_100": r"UTC\w*MMA"}
ASYNC = "LDGSTS|UTMALDG|UBLKCP"
WIDE = r"(LDG|STG|LDGSTS)\.E\S*\.128|(global|buffer)_(load|store)_dwordx4"
SPILL = r"LDL|STL|scratch_(load|store)"
MEMORY = 80 << 30  # bytes of a card
FEATURES = ("Q", "H")  # what product kernels multiply
SIZES = ("depth", "width", "value_width", "classes", "size")  # of a row, or of all elements


class Row(NamedTuple):
    """One line of the budgets."""

    tile: str
    registers: int
    spills: int  # accesses to spilled registers; on AMD the registers
    spills_in_loops: int
    shared: int  # bytes
    programs: int  # that a multiprocessor holds
    tensor: int  # instructions that multiply on tensor cores
    copies: int  # asynchronous, from global to shared memory
    wide: int  # accesses of 16 bytes to global memory

    def __str__(self) -> str:
        return f"{self.tile:24}" + ", ".join(
            f"{x} {n.replace('_', ' ')}" for n, x in list(self._asdict().items())[1:]
        )


@contextlib.contextmanager
def on(target: str) -> Iterator[None]:
    """Launchers inside choose for `target`, and do not wait for it, as while a graph is captured."""
    hip = "6.0" if target.startswith("gfx") else None
    with (
        mock.patch.object(torch.version, "hip", hip),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True),
        mock.patch.object(_attention, "architecture", return_value=target),
        mock.patch.object(_tiles, "architecture", return_value=target),
        mock.patch.object(_tiles, "memory", return_value=MEMORY),
    ):
        yield


def launches(workload: str, target: str) -> list[Launch]:
    with on(target), recording() as found:
        WORKLOADS[workload]()
    return found


class Entry(NamedTuple):
    """A launch by its place, so that another process finds it."""

    workload: str
    index: int
    target: str


@functools.cache
def entries(target: str) -> dict[str, Entry]:
    """What is compiled for a target, by `workload: kernel`; launches of equal code count once."""
    out: dict[str, Entry] = {}
    seen = set()
    for workload in WORKLOADS:
        for i, launch in enumerate(launches(workload, target)):
            source, options = launch.source(TARGETS[target])
            code = (launch.name, source.signature, source.constants, source.attrs, options)
            if (key := repr(code)) not in seen:
                seen.add(key)
                name = f"{workload}: {launch.name}"
                same = sum(other == name or other.startswith(f"{name} ") for other in out)
                out[f"{name} {same + 1}" if same else name] = Entry(workload, i, target)
    return out


def row(launch: Launch, code: Code) -> Row:
    blocks = [str(x) for name, x in launch.config.items() if name.startswith(("BLOCK", "ROWS"))]
    options = [
        f"{launch.config[name]}{name[4]}" for name in ("num_warps", "num_stages") if name in launch.config
    ]
    return Row(
        " ".join(["x".join(blocks), *options]), code.registers, code.spilled or code.count(SPILL),
        code.count(SPILL, code.inside), code.shared, code.programs, code.count(TENSOR), code.count(ASYNC),
        code.count(WIDE),
    )  # fmt: skip


def _bytes_a_lane(launch: Launch, target: str) -> float:
    """Of the smallest tile that a program reads: where it is small a lane has less than one wide access."""
    config = launch.config
    floats = {name: x.element_size() for name, x in launch.tensors.items() if x.is_floating_point()}
    sides, size = [x for name, x in config.items() if name.startswith("BLOCK")], max(floats.values())
    if "PRECISION" in config:  # rows of features
        sides = [min(sides), config.get("BLOCK_K", config.get("BLOCK_D"))]
        size = next(size for name, size in floats.items() if name in FEATURES)
    return math.prod(sides) * size / (config["num_warps"] * TARGETS[target].warp_size)


def _product_faults(launch: Launch, code: Code, even: bool) -> Iterator[str]:
    config, amd = launch.config, code.target.startswith("gfx")
    half = any(x.element_size() == 2 for name, x in launch.tensors.items() if name in FEATURES)
    if (amd or half or config["PRECISION"] != "ieee") and not code.count(TENSOR):
        yield "a product without tensor cores"
    strong = WARPGROUP.get(code.target)
    rows = config.get("BLOCK_M", 0) if "_key_grads" not in launch.name else config["BLOCK_N"]
    if half and strong and rows >= 64 and not code.count(strong):
        yield f"no {strong}"
    turns = launch.arguments.get("depth", math.inf) > config.get("BLOCK_K", 0)
    copies = even and turns and not amd and config["num_stages"] > 1
    if copies and not code.count(ASYNC, code.inside):
        yield "no asynchronous copies in a pipelined loop"


def faults(launch: Launch, code: Code) -> Iterator[str]:
    """What no kernel may do, regardless of its budget."""
    limit = LIMITS[code.target].shared_of_program
    if triton.__version__ in BUDGETED and (spills := code.count(SPILL, code.inside)):
        yield f"{spills} accesses to spilled registers in loops"
    if code.shared > limit:
        yield f"{code.shared} bytes of shared memory, {limit} are there"
    elif code.programs == 0:
        yield "no multiprocessor holds a program"
    sizes = [launch.arguments[name] for name in SIZES if name in launch.arguments]
    stepped = launch.config.get("STEP", 1) > 1 and not code.target.startswith("gfx")  # AMD's drops the hint
    even = (bool(sizes) and all(size % 16 == 0 for size in sizes)) or stepped
    if "PRECISION" in launch.config:
        yield from _product_faults(launch, code, even)
    if even and _bytes_a_lane(launch, code.target) >= 16 and not code.count(WIDE):
        yield "no access of 16 bytes"


@functools.cache
def measure(entry: Entry) -> tuple[Row, list[str]]:
    launch = launches(entry.workload, entry.target)[entry.index]
    with on(entry.target):
        code = machine_code(launch.compiled(TARGETS[entry.target]), entry.target)
    return row(launch, code), list(faults(launch, code))


def budgets_file(version: str = triton.__version__) -> Path:
    return Path(__file__).with_name(f"budgets-{version}.json")


def read() -> dict[str, dict[str, Row]]:
    stored = json.loads(budgets_file().read_text()) if budgets_file().exists() else {}
    return {target: {name: Row(*x) for name, x in rows.items()} for target, rows in stored.items()}


def write(budgets: dict[str, dict[str, Row]]) -> None:
    parts = []
    for target, rows in sorted(budgets.items(), key=lambda item: list(TARGETS).index(item[0])):
        lines = [f"  {json.dumps(name)}: {json.dumps(list(x))}" for name, x in rows.items()]
        parts.append(f" {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n }")
    budgets_file().write_text("{\n" + ",\n".join(parts) + "\n}\n")


def changes(target: str, stored: dict[str, Row], found: dict[str, Row]) -> list[str]:
    """Budgets that differ, as a diff that a person reads."""
    out = []
    for name in dict.fromkeys((*stored, *found)):
        if stored.get(name) != found.get(name):
            out.append(f"{target} {name}")
            out += [f"  {sign} {rows[name]}" for sign, rows in (("-", stored), ("+", found)) if name in rows]
    return out


def measured(wanted: Iterable[Entry]) -> list[tuple[Row, list[str]]]:
    """In two processes; BrokenProcessPool if one of them is killed."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(measure, wanted, chunksize=4))


def check(targets: list[str], store: bool, only: str = "") -> int:
    """Compile for the targets; 1 if a rule is broken or a budget differs that is not to be stored."""
    budgets, wrong, differing = read(), [], []
    every = {target: entries(target) for target in targets}
    wanted = {
        target: {name: x for name, x in found.items() if re.search(only, name)}
        for target, found in every.items()
    }
    results = iter(measured([x for found in wanted.values() for x in found.values()]))
    for target, names in every.items():
        found, stored = {}, budgets.get(target, {})
        for name in names:
            if name in wanted[target]:
                found[name], broken = next(results)
                wrong += [f"{target} {name}: {fault}\n  {found[name]}" for fault in broken]
            elif name in stored:
                found[name] = stored[name]
        if triton.__version__ in BUDGETED:
            differing += changes(target, stored, found)
        budgets[target] = found
    if store:
        write(budgets)
    elif differing:
        differing.append(
            f"If that is meant: python -m tests.gpu.matrix --write --triton {triton.__version__}"
        )
    sys.stdout.write("".join(f"{line}\n" for line in (*differing, *wrong)))
    sys.stdout.write(
        f"Triton {triton.__version__}: {sum(map(len, wanted.values()))} kernels, {len(wrong)} faults\n"
    )
    return int(bool(wrong or (differing and not store)))


def other_release(version: str) -> dict[str, str]:
    """Environment of a process that imports that release of Triton."""
    folder = ROOT / "build" / f"triton-{version}"
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--target", str(folder), f"triton=={version}"], check=True)
    return os.environ | {"PYTHONPATH": f"{folder}:{ROOT}"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.gpu.matrix", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--write", action="store_true")
    action.add_argument("--rank", nargs="?", const="", metavar="KERNEL, WORKLOAD")
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--only", metavar="REGEX", default="")
    parser.add_argument("--triton", default=triton.__version__)
    options = parser.parse_args()
    if options.triton != triton.__version__:
        arguments = [sys.executable, "-m", "tests.gpu.matrix", *sys.argv[1:]]
        return subprocess.run(arguments, env=other_release(options.triton), cwd=ROOT).returncode
    if options.rank is not None:
        from .ranking import rank

        return rank(options.target or ["sm_80", "sm_90"], options.rank)
    return check(options.target or list(TARGETS), options.write, options.only)


if __name__ == "__main__":
    sys.exit(main())
