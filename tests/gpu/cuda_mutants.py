"""Seeded faults of the CUDA C++ kernels: patches of csrc/cuda, each with a case that must see it.

`python -m tests.gpu.cuda_mutants --write` runs all of them on every rung and writes the table of
docs/gpu_testing.md.
"""

import argparse
import contextlib
import dataclasses
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import cuda, cuda_ptx
from .mutations import UNSEEN, row, table, write
from .sanitizer import Violation
from .trials_cuda import CASES

SECTION = "cuda mutations"
CRASH = "ends with an error"
SOURCE, LAUNCHERS = "gated_residual.cuh", "gated_residual.cu"
FORWARD, BACKWARD, FINISH = (f"gated_residual.{name}" for name in ("forward", "backward", "finish"))
GATED, WIDE = "float32, one gate", "float32, gate per channel, wide"
CHANNEL, ODD = "float32, gate per channel", "float32, gate per channel, odd"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """`old`, which occurs `count` times in csrc/cuda/<file>, becomes `new`."""

    kernel: str
    fault: str
    case: str  # of trials_cuda.CASES: the one that must fail; float32 and bfloat16 alone
    old: str
    new: str
    file: str = SOURCE
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.fault}"


MUTANTS = [
    Mutation(
        FORWARD, "row mask dropped", GATED,
        "if (!row_mask || row_mask[r]) {", "{",
    ),
    Mutation(
        FORWARD, "bound of the channels off by one", ODD,
        "row < tiling.rows && channel < d", "row < tiling.rows && channel <= d",
    ),
    Mutation(
        FORWARD, "rows of the result as far apart as those of x", GATED,
        "store(sum, out + r * d, my.group)", "store(sum, out + r * x.stride, my.group)",
    ),
    Mutation(
        FORWARD, "wide accesses to rows that are not aligned to them", "float32, rows misaligned",
        "% (v * size_of(m.type)) == 0 && m.stride % v == 0", "% (v * size_of(m.type)) == 0", LAUNCHERS,
    ),
    Mutation(
        FORWARD, "blocks of columns counted as blocks of rows", "bfloat16, gate per channel",
        "step(int64_t(gridDim.x / tiling.col_blocks)", "step(int64_t(gridDim.x)",
    ),
    Mutation(
        BACKWARD, "threads beyond the rows of a block take part", GATED,
        "return row < tiling.rows && channel < d;", "return channel < d;",
    ),
    Mutation(
        BACKWARD, "row mask dropped", GATED,
        "const bool kept = !row_mask || row_mask[r];", "const bool kept = true;",
    ),
    Mutation(
        BACKWARD, "channels past the end summed", ODD,
        "r = inside ? my.first : rows", "r = my.row < tiling.rows ? my.first : rows",
    ),
    Mutation(
        BACKWARD, "strides of the operands swapped", GATED,
        "kept) {\n      load(y.data + r * y.stride", "kept) {\n      load(y.data + r * dout.stride",
    ),
    Mutation(
        BACKWARD, "barrier of the sum over rows dropped", CHANNEL,
        "    __syncthreads();\n    if (row + half", "    if (row + half",
    ),
    Mutation(
        BACKWARD, "barrier of the sum over warps dropped", GATED,
        "  __syncthreads();\n  if (warp == 0)", "  if (warp == 0)",
    ),
    Mutation(
        BACKWARD, "shuffle under a mask of half the lanes", GATED,
        "__shfl_down_sync(0xffffffff", "__shfl_down_sync(0x0000ffff", count=2,
    ),
    Mutation(
        BACKWARD, "last lanes of a warp left out of its sum", GATED,
        "int offset = kWarp / 2; offset > 0", "int offset = kWarp / 2; offset > 1", count=2,
    ),
    Mutation(
        BACKWARD, "blocks of columns store one sum", "bfloat16, one gate, wide",
        "partial[blockIdx.x] = all", "partial[my.block] = all",
    ),
    Mutation(
        BACKWARD, "middle row of an odd number left out", CHANNEL,
        "half = (rows + 1) / 2;", "half = rows / 2;",
    ),
    Mutation(
        FINISH, "one part too many", WIDE,
        "channel < channels && part < parts", "channel < channels && part <= parts",
    ),
    Mutation(
        FINISH, "parts beyond one a row left out", WIDE,
        "part += rows)", "part += kThreads)",
    ),
    Mutation(
        FINISH, "barrier of the sum over rows dropped", WIDE,
        "    __syncthreads();\n    if (row + half", "    if (row + half",
    ),
    Mutation(
        FINISH, "every row stores its sum", WIDE,
        "if (row == 0 && channel < channels)", "if (channel < channels)",
    ),
    Mutation(
        FINISH, "bound of the channels dropped", ODD,
        "if (row == 0 && channel < channels)", "if (row == 0)",
    ),
]  # fmt: skip


@contextlib.contextmanager
def mutated(mutation: Mutation) -> Iterator[Path]:
    """A copy of csrc with the fault in it, and without the types that its case has no use for."""
    with tempfile.TemporaryDirectory() as folder:
        csrc = Path(folder, "csrc")
        for part in ("include", "cuda"):
            shutil.copytree(cuda.CSRC / part, csrc / part)
        patch(csrc / "cuda" / mutation.file, mutation.old, mutation.new, mutation.count)
        for unused in ("double", "f16", *(["bf16"] if mutation.case.startswith("float32") else [])):
            patch(csrc / "cuda" / "device.cuh", f"return f({unused}());", "return f(float());")
        yield csrc


def patch(path: Path, old: str, new: str, count: int = 1) -> None:
    text = path.read_text()
    if text.count(old) != count:
        raise ValueError(f"{path.name}: {old!r} occurs {text.count(old)} times, not {count}")
    path.write_text(text.replace(old, new))


def in_order(order: str) -> Callable:
    return lambda requests, csrc: cuda.run(cuda.program("plain", csrc), requests, order)


def under(sanitizer: str) -> Callable:
    return lambda requests, csrc: cuda.run(cuda.program(sanitizer, csrc), requests)


RUNGS: dict[str, Callable] = {
    "threads in order": in_order("forward"),
    "in reverse": in_order("reverse"),
    "at random": in_order("7"),
    "ASan, UBSan": under("address"),
    "TSan": under("thread"),
    "PTX simulator": cuda_ptx.run,
}


def verdict(mutation: Mutation, run: Callable) -> str | None:
    """What the case of a mutation says of it on a rung, or None where it says nothing."""
    torch.manual_seed(0)
    trial = CASES[mutation.case]()
    requests = trial.requests()
    with mutated(mutation) as csrc:
        try:
            run(requests, csrc)
            trial.check(requests)
        except cuda.Fault as error:
            return told(str(error))
        except Violation as error:
            return re.split(r": \d+ lanes| \(", str(error))[0]
        except AssertionError as error:
            return "wrong " + re.split(r":|\n", str(error))[0]
    return None


def told(report: str) -> str:
    """The fault that the runtime or a sanitizer has found, in a few words."""
    for pattern in (
        r"vlmk: (.*), block", r"(misaligned address)", r"AddressSanitizer: ([\w-]+)",
        r"ThreadSanitizer: ([\w ]+)",
    ):  # fmt: skip
        if found := re.search(pattern, report):
            return found[1].strip()
    return CRASH


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.gpu.cuda_mutants", description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table of docs/gpu_testing.md")
    options = parser.parse_args()
    rows = []
    for mutation in MUTANTS:
        rows.append(row(mutation, *(verdict(mutation, run) for run in RUNGS.values())))
        sys.stdout.write(" | ".join(rows[-1]) + "\n")
        sys.stdout.flush()
    if options.write:
        write(table(rows, RUNGS), SECTION)
    sys.exit(any(set(verdicts) == {UNSEEN} for _, _, *verdicts in rows))


if __name__ == "__main__":
    main()
