"""The CUDA C++ kernels compiled for every NVIDIA target, and what they may take there.

`python -m tests.gpu.cuda_matrix` compiles them, holds each to the rules below and compares it with
cuda_budgets.json; `--write` stores what it finds there. Registers depend on the compiler, so the file has one
part for each release of nvcc, and another release is held to the rules alone.
"""

import argparse
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import cuda
from .machine_code import LIMITS, Code, parse_sass, tool

BUDGETS = Path(__file__).with_name("cuda_budgets.json")
TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
WARPS = 8  # of a block
RESIDENT = 32  # warps at least that a multiprocessor holds: by them loads from memory are hidden
BYTES = {"double": 8, "float": 4, "bf16": 2, "f16": 2}


class Row(NamedTuple):
    """One line of the budgets."""

    registers: int
    spills: int  # accesses to local memory
    shared: int  # bytes
    blocks: int  # that a multiprocessor holds
    loads: list[int]  # widths in bits of the loads from global memory in loops
    stores: list[int]

    def __str__(self) -> str:
        return ", ".join(f"{value} {name}" for name, value in self._asdict().items())


def release() -> str:
    """Of the nvcc that is here, as 13.0.88."""
    said = subprocess.run([cuda.find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V(\d+\.\d+\.\d+)", said)[1]


def short(mangled: Sequence[str]) -> list[str]:
    """Names as `forward<4, float, bf16>`."""
    names = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True).stdout
    return [
        re.search(r"\w+<[^(]*>", name)[0]
        for name in names.replace("vlmk::cuda::", "").replace("vlmk::", "").splitlines()
    ]


def kernels(target: str, csrc: Path = cuda.CSRC) -> dict[str, Code]:
    """The machine code of every kernel."""
    cubin = cuda.compiled("cubin", target, csrc)
    usage = tool("cuobjdump", "-res-usage", cubin)
    sections = re.split(r"//-+ \.text\.", tool("nvdisasm", "-c", cubin))[1:]
    names = [section.split()[0] for section in sections]
    out = {}
    for name, label, section in zip(names, short(names), sections, strict=True):
        taken = usage.partition(f" {name}:")[2]
        registers, shared = (int(re.search(rf"{what}:(\d+)", taken)[1]) for what in ("REG", "SHARED"))
        shared -= LIMITS[target].reserved if shared and target != "sm_80" else 0  # which cuobjdump counts in
        instructions, loops = parse_sass(section)
        out[label] = Code(target, instructions, loops, registers, 0, shared, WARPS, 0)
    return dict(sorted(out.items()))


def widths(code: Code, access: str) -> list[int]:
    """Bits of the accesses in loops, each width once."""
    found = (re.match(rf"{access}\b[.\w]*", code.instructions[i]) for i in code.inside)
    named = ((re.search(r"\.[US]?(8|16|64|128)\b", x[0]) or (None, 32))[1] for x in found if x)
    return sorted({int(bits) for bits in named})


def row(code: Code) -> Row:
    spills, blocks = code.count("LDL|STL"), code.programs
    return Row(code.registers, spills, code.shared, blocks, widths(code, "LDG"), widths(code, "STG"))


@functools.cache
def measured(target: str, csrc: Path = cuda.CSRC) -> dict[str, Row]:
    return {name: row(code) for name, code in kernels(target, csrc).items()}


def faults(name: str, found: Row) -> Iterator[str]:
    """What no kernel may do, regardless of its budget."""
    if found.spills:
        yield f"{found.spills} accesses to spilled registers"
    if found.blocks * WARPS < RESIDENT:
        yield f"{found.blocks} blocks on a multiprocessor"
    kernel, vector, wide, narrow = re.match(r"(\w+)<(\w+)(?:, (\w+), (\w+))?>", name).groups()
    if kernel == "finish" or vector == "1":
        return
    loads = {8 * int(vector) * BYTES[t] for t in (wide, narrow)}
    store = 8 * int(vector) * BYTES[wide if kernel == "forward" else narrow]
    if max(loads) != 128:
        yield f"accesses of {max(loads)} bits are meant"
    if not loads <= set(found.loads) or store not in found.stores:
        yield f"loads of {found.loads} bits and stores of {found.stores}, wanted {sorted(loads)} and {store}"


def read() -> dict[str, dict[str, dict[str, Row]]]:
    """Release -> target -> kernel -> row."""
    stored = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    return {
        nvcc: {target: {name: Row(*x) for name, x in rows.items()} for target, rows in targets.items()}
        for nvcc, targets in stored.items()
    }


def write(budgets: dict[str, dict[str, dict[str, Row]]]) -> None:
    parts = []
    for nvcc, targets in sorted(budgets.items()):
        blocks = []
        for target, rows in targets.items():
            lines = [f"   {json.dumps(name)}: {json.dumps(x)}" for name, x in rows.items()]
            blocks.append(f'  "{target}": {{\n' + ",\n".join(lines) + "\n  }")
        parts.append(f' "{nvcc}": {{\n' + ",\n".join(blocks) + "\n }")
    BUDGETS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def changes(stored: dict[str, Row], found: dict[str, Row]) -> list[str]:
    """Budgets that differ, as a diff that a person reads."""
    out = []
    for name in dict.fromkeys((*stored, *found)):
        if stored.get(name) != found.get(name):
            out += [
                name,
                *(f"  {sign} {rows[name]}" for sign, rows in (("-", stored), ("+", found)) if name in rows),
            ]
    return out


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.gpu.cuda_matrix", description=__doc__)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    budgets, nvcc = read(), release()
    found = {target: {name: row(code) for name, code in kernels(target).items()} for target in TARGETS}
    wrong = [
        f"{t} {name}: {fault}" for t in TARGETS for name, x in found[t].items() for fault in faults(name, x)
    ]
    if options.write:
        write(budgets | {nvcc: found})
    elif nvcc in budgets:
        wrong += [f"{t} {line}" for t in TARGETS for line in changes(budgets[nvcc][t], found[t])]
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.stdout.write(f"nvcc {nvcc}: {sum(map(len, found.values()))} kernels\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
