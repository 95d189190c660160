"""What a compiled kernel is made of: registers, spills, shared memory, instructions, and its loops.

SASS is read from nvdisasm's text, AMD's assembly from the compiler's. Neither needs a GPU.
"""

import dataclasses
import functools
import itertools
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one multiprocessor offers to the programs that live on it together."""

    shared: int  # bytes
    shared_of_program: int
    warps: int
    programs: int
    reserved: int = 1024  # bytes of shared memory that each program takes beside its own


# CUDA C++ programming guide, "Compute Capabilities"; sm_80 is held to what sm_86 and sm_89 give a program.
LIMITS = {
    "sm_80": Limits(164 << 10, 99 << 10, 64, 32),
    "sm_90": Limits(228 << 10, 227 << 10, 64, 32),
    "sm_100": Limits(228 << 10, 227 << 10, 64, 32),
    "sm_120": Limits(100 << 10, 99 << 10, 48, 24),
    "gfx942": Limits(64 << 10, 64 << 10, 32, 32, 0),  # CDNA3 ISA: four SIMDs of at most eight waves
}


@dataclasses.dataclass(frozen=True)
class Code:
    """The instructions of a kernel in their order, and what it takes of a multiprocessor."""

    target: str
    instructions: tuple[str, ...]
    loops: tuple[frozenset[int], ...]  # places in the body of each
    registers: int
    spilled: int  # registers that AMD's compiler reports; on NVIDIA spills are accesses to local memory
    shared: int
    warps: int
    tensor_memory: int  # columns of the 512 of sm_100

    @functools.cached_property
    def inside(self) -> frozenset[int]:
        """Places inside any loop."""
        return frozenset().union(*self.loops)

    @property
    def innermost(self) -> list[frozenset[int]]:
        return [a for a in self.loops if not any(b < a for b in self.loops)]

    def count(self, pattern: str, places=None) -> int:
        """How many instructions, at `places` or anywhere, begin with `pattern`."""
        found = re.compile(pattern).match
        places = range(len(self.instructions)) if places is None else places
        return sum(found(self.instructions[i]) is not None for i in places)

    @property
    def programs(self) -> int:
        """How many of its programs a multiprocessor holds."""
        limits = LIMITS[self.target]
        if self.target.startswith("gfx"):
            waves = 4 * min(8, 512 // (-(-max(self.registers, 1) // 8) * 8))
            by_registers = waves // self.warps
        else:
            by_registers = 65536 // (-(-self.registers * 32 // 256) * 256 * (-(-self.warps // 4) * 4))
        by_shared = limits.shared // max(self.shared + limits.reserved, 1)
        by_tensor_memory = 512 // max(self.tensor_memory, 1)
        return min(by_registers, by_shared, by_tensor_memory, limits.warps // self.warps, limits.programs)


def loops(successors: list[list[int]]) -> tuple[frozenset[int], ...]:
    """Natural loops of a program that begins at 0: for each header, what reaches a branch back to it."""
    leaders = {0} | {t for i, to in enumerate(successors) for t in to if to != [i + 1]}
    leaders |= {i + 1 for i, to in enumerate(successors) if to != [i + 1]} - {len(successors)}
    first = sorted(leaders)
    blocks = dict(zip(first, itertools.pairwise([*first, len(successors)]), strict=True))
    after = {b: successors[end - 1] for b, (_, end) in blocks.items()}
    order, stack = [], [0]
    while stack:
        if (b := stack.pop()) not in order:
            order.append(b)
            stack += after[b]
    before = {b: [a for a in order if b in after[a]] for b in order}
    dominators = {b: set(order) for b in order} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = {b} | set.intersection(*(dominators[a] for a in before[b]))
            changed |= new != dominators[b]
            dominators[b] = new
    bodies: dict[int, set[int]] = {}
    for b in order:
        for header in set(after[b]) & dominators[b]:
            body, stack = bodies.setdefault(header, {header}), [b]
            while stack:
                if (x := stack.pop()) not in body:
                    body.add(x)
                    stack += before[x]
    return tuple(frozenset(i for b in body for i in range(*blocks[b])) for body in bodies.values())


def _parse(text: str, label: str, instruction: str, branch: str, end: str, always: str):
    """Instructions and loops; `end` ends the program, a branch is taken in any case where it is `always`."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if name := re.match(label, line):
            labels[name[1]] = len(found)
        elif one := re.match(instruction, line):
            found.append((one[1] or "", one[2]))
    successors = []
    for i, (predicate, x) in enumerate(found):
        target = re.match(branch, x)
        to = [labels[target[1]]] if target and target[1] in labels else []
        stops = not predicate and re.match(f"{end}|{always}", x)
        successors.append(to if stops or i + 1 == len(found) else sorted({i + 1, *to}))
    return tuple(x for _, x in found), loops(successors)


def parse_sass(text: str) -> tuple[tuple[str, ...], tuple[frozenset[int], ...]]:
    """Instructions without their predicates, and the loops."""
    return _parse(
        text, r"\s*(\.L_x_\d+):", r"\s*/\*[0-9a-f]+\*/\s+(@\S+\s+)?(\S.*?)\s*;", r"BRA\b.*?(\.L_x_\d+)",
        r"(EXIT|RET\S*)\b", r"BRA `",
    )  # fmt: skip


def parse_amdgcn(text: str) -> tuple[tuple[str, ...], tuple[frozenset[int], ...]]:
    return _parse(
        text.split(".section", 1)[0], r"(\.LBB\w+):", r"\t()([a-z]\w+[^;]*)", r"s_c?branch\w* (\.L\w+)",
        "s_endpgm", "s_branch",
    )  # fmt: skip


def tool(name: str, *arguments) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def machine_code(kernel: CompiledKernel, target: str) -> Code:
    metadata = kernel.metadata
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        notes = {
            k: int(v) for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|agpr_count):\s+(\d+)", text)
        }
        instructions, bodies = parse_amdgcn(text)
        registers, spilled = notes["vgpr_count"], notes["vgpr_spill_count"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            usage = tool("cuobjdump", "-res-usage", cubin.name)
            instructions, bodies = parse_sass(tool("nvdisasm", "-c", cubin.name))
        registers, spilled = int(re.search(r"REG:(\d+)", usage)[1]), 0
    return Code(
        target, instructions, bodies, registers, spilled, metadata.shared, metadata.num_warps,
        getattr(metadata, "tmem_size", 0) or 0,
    )  # fmt: skip
