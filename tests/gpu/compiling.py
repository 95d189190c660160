"""Compiling Triton kernels without a GPU: their machine code, and the registers it spills."""

import re
import subprocess
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Pointers to the dtype of the inputs
FEATURES = {"Q", "K", "V", "K2", "V2", "X", "Y", "H", "W", "DX", "DQ", "DK", "DV", "DY", "DOUT", "OUT"}
INT64 = {"POSITIVES", "QUERY_IDS", "KEY_IDS", "INDEX", "FIRST"}
TYPES = {"MASK": "*u8", "PARTIAL": "*fp64", "START": "*i32", "END": "*i32", "RANGES": "*i32", "scale": "fp32"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def argument_type(name: str, dtype: str) -> str:
    if name in TYPES:
        return TYPES[name]
    if name.islower():
        return "i32"
    if name in FEATURES:
        return f"*{dtype}"
    return "*i64" if name in INT64 else "*fp32"


def compiled(kernel, dtype: str, options: dict, constants: dict, target: GPUTarget):
    """A kernel whose pointers and sizes are divisible by 16, as real features have them."""
    names = kernel.arg_names
    constants = {k: v for k, v in options.items() if k not in OPTIONS} | constants
    constants = {k: v for k, v in constants.items() if k in names}
    types = {n: "constexpr" if n in constants else argument_type(n, dtype) for n in names}
    divisible = [i for i, n in enumerate(names) if n not in constants and types[n] != "fp32"]
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(names.index(k),): v for k, v in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in divisible},
    )
    return triton.compile(source, target=target, options={k: v for k, v in options.items() if k in OPTIONS})


def sass(kernel, dtype: str, options: dict, constants: dict, arch: int, tmp_path) -> str:
    """Machine code for NVIDIA's compute capability `arch`."""
    binary = compiled(kernel, dtype, options, constants, GPUTarget("cuda", arch, 32))
    assert binary.metadata.shared <= 99 * 1024  # what every GPU since sm_80 offers a program
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    return subprocess.run(
        [TOOLS / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
    ).stdout


def spills_on_amd(kernel, dtype: str, options: dict, constants: dict) -> int:
    """Registers that the kernel spills on an MI300."""
    binary = compiled(kernel, dtype, options, constants, GPUTarget("hip", "gfx942", 64))
    assert binary.metadata.shared <= 64 * 1024
    return int(re.search(r"\.vgpr_spill_count:\s+(\d+)", binary.asm["amdgcn"])[1])


def spills_in_loops(code: str) -> int:
    """Accesses to spilled registers between a label and a later branch back to it."""
    labels, instructions = {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            instructions.append(instruction[1])
    inside = set()
    for i, instruction in enumerate(instructions):
        target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction)
        if target and labels.get(target[1], i + 1) < i:  # a branch to itself ends the program
            inside.update(range(labels[target[1]], i + 1))
    return sum(bool(re.search(r"\b(LDL|STL)\b", instructions[i])) for i in inside)
