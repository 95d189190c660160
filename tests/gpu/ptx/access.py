"""Instructions that touch memory: ld, st, cp.async and ldmatrix."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .memory import WORDS
from .parse import SIZES, Address, Constant, Instruction, Program, Register, Symbol, Unsupported
from .tensor import LDMATRIX, matrix_registers, matrix_rows

if TYPE_CHECKING:
    from .machine import Machine, Step

KINDS = ("b8", "b16", "b32", "b64", "u8", "u16", "u32", "f32", "f64")
VECTORS = ("", "v2.", "v4.")
LOADS, STORES = (
    {
        f"{name}.{space}.{vector}{kind}"
        for space in ("global", "shared")
        for vector in VECTORS
        for kind in KINDS
        if not (vector == "v4." and SIZES[kind] == 8)
    }
    for name in ("ld", "st")
)
PARAMETERS = {f"ld.param.{kind}" for kind in ("b32", "s32", "u32", "f32", "b64", "u64", "v4.u8")}
ASYNC = {"cp.async.ca.shared.global": (4, 8, 16), "cp.async.cg.shared.global": (16,)}


def _shape(opcode: str) -> tuple[str, int, int]:
    """Space, bytes of a word, words."""
    _, space, *vector, kind = opcode.split(".")
    return space, SIZES[kind], int(vector[0][1]) if vector else 1


def least_shared_width(program: Program) -> int:
    """The largest unit in which a program always touches shared memory."""
    widths = [16]
    for instruction in program.instructions:
        opcode = instruction.opcode
        if opcode in ASYNC:
            widths += [x.value for x in instruction.operands[2:3] if isinstance(x, Constant)]
        elif opcode in LOADS | STORES and ".shared." in opcode:
            _, width, count = _shape(opcode)
            widths.append(width * count)
    return min(widths)


class Copies:
    """cp.async of a block: those of the group that is open, and the groups that are on their way."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.open: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # addresses, words, threads
        self.groups: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = []


def _words(operand) -> tuple:
    return operand if isinstance(operand, tuple) else (operand,)


def _here(machine: "Machine", lanes: np.ndarray | None) -> np.ndarray:
    """The threads of an access."""
    machine.active = machine.thread if lanes is None else np.flatnonzero(lanes)
    return machine.active


def _load(machine: "Machine", instruction: Instruction) -> "Step":
    space, width, count = _shape(instruction.opcode)
    to, source = instruction.operands
    registers = [machine.holder(x, width) for x in _words(to)]
    if len(registers) != count:
        raise Unsupported(f"{len(registers)} registers")
    addresses = machine.address(source, space)
    memory = machine.memory if space == "global" else machine.shared

    def step(lanes):
        threads = _here(machine, lanes)
        at = addresses()[threads]
        words = memory.load(at, width, count, machine.warp[threads])
        _count(machine, space, "loads", at, width * count, threads)
        for row, word in zip(registers, words, strict=True):
            row[threads] = word

    return step


def _store(machine: "Machine", instruction: Instruction) -> "Step":
    space, width, count = _shape(instruction.opcode)
    to, source = instruction.operands
    registers = [machine.holder(x, width) for x in _words(source)]
    if len(registers) != count:
        raise Unsupported(f"{len(registers)} registers")
    addresses = machine.address(to, space)
    memory = machine.memory if space == "global" else machine.shared

    def step(lanes):
        threads = _here(machine, lanes)
        at = addresses()[threads]
        words = np.stack([row[threads].astype(WORDS[width]) for row in registers])
        memory.store(at, words, machine.warp[threads])
        _count(machine, space, "stores", at, width * count, threads)

    return step


def _count(machine: "Machine", space: str, name: str, at: np.ndarray, width: int, threads: np.ndarray):
    counters = machine.counters
    if counters is None:
        return
    if space == "global":
        counters.traffic(getattr(counters, f"global_{name}"), at, width, machine.warp[threads])
    else:
        counters.wavefronts(getattr(counters, f"shared_{name}"), at, width, threads)


def _parameter(machine: "Machine", instruction: Instruction) -> "Step":
    _, width, count = _shape(instruction.opcode)
    to, source = instruction.operands
    if not (isinstance(source, Address) and isinstance(source.base, Symbol)):
        raise Unsupported(f"{source} as a parameter")
    value = machine.parameters.get(source.base.name, b"")[source.offset : source.offset + width * count]
    registers = [machine.holder(x, width) for x in _words(to)]
    if len(value) != width * count or len(registers) != count:
        raise Unsupported(f"{source} as a parameter of {width * count} bytes")
    signed = instruction.opcode == "ld.param.s32"  # the sign fills a wider register
    words = np.frombuffer(value, np.int32 if signed else WORDS[width])

    def step(lanes):
        for row, word in zip(registers, words, strict=True):
            np.copyto(row, word.astype(row.dtype), where=True if lanes is None else lanes)

    return step


def _async(machine: "Machine", instruction: Instruction) -> "Step":
    match instruction.operands:
        case (Address() as to, Address() as source, Constant(width), Register() as size):
            given = machine.source(size, "u32")
        case (Address() as to, Address() as source, Constant(width)):
            given = np.full(machine.threads, width, np.uint32)
        case _:
            raise Unsupported(f"operands {instruction.operands}")
    if width not in ASYNC[instruction.opcode]:
        raise Unsupported(f"copies of {width} bytes")
    into, out_of = machine.address(to, "shared"), machine.address(source, "global")

    def step(lanes):
        threads = _here(machine, lanes)
        to_here, brought = into()[threads], given[threads]
        if not np.isin(brought, (0, width)).all():
            raise Unsupported(f"{instruction} of a part of its {width} bytes")
        words = np.zeros((width // 4, threads.size), np.uint32)
        machine.shared.expect(to_here, width, machine.warp[threads])
        _count(machine, "shared", "stores", to_here, width, threads)
        real = np.flatnonzero(brought)
        if real.size:
            machine.active = threads[real]
            at = out_of()[machine.active]
            words[:, real] = machine.memory.load(at, 4, width // 4, machine.warp[machine.active])
            _count(machine, "global", "loads", at, width, machine.active)
        machine.copies.open.append((to_here, words, threads))

    return step


def _everyone(machine: "Machine", lanes: np.ndarray | None, instruction: Instruction) -> None:
    """Groups of copies belong to a thread; here they belong to the block, which must do the same."""
    if lanes is not None and not (lanes | machine.exited).all():
        raise Unsupported(f"{instruction} by some of the threads")


def _commit(machine: "Machine", instruction: Instruction) -> "Step":
    if instruction.operands:
        raise Unsupported(f"operands {instruction.operands}")

    def step(lanes):
        _everyone(machine, lanes, instruction)
        machine.copies.groups.append(machine.copies.open)
        machine.copies.open = []

    return step


def _wait(machine: "Machine", instruction: Instruction) -> "Step":
    match instruction.operands:
        case (Constant(most),):
            pass
        case _:
            raise Unsupported(f"operands {instruction.operands}")

    def step(lanes):
        _everyone(machine, lanes, instruction)
        while len(machine.copies.groups) > most:
            for addresses, words, threads in machine.copies.groups.pop(0):
                machine.active = threads
                machine.shared.arrive(addresses, words, machine.warp[threads])

    return step


def _matrices(machine: "Machine", instruction: Instruction) -> "Step":
    count, transposed = LDMATRIX[instruction.opcode]
    to, source = instruction.operands
    registers = [machine.source(x, "b32") for x in _words(to)]
    if len(registers) != count:
        raise Unsupported(f"{len(registers)} registers")
    addresses = machine.address(source, "shared")
    holders = matrix_rows(machine.thread, count)  # threads that hold the address of a row

    def step(lanes):
        machine.whole_warps(lanes)
        threads = holders if lanes is None else holders[lanes[holders]]
        machine.active = threads
        at = addresses()[threads]
        rows = machine.shared.load(at, 4, 4, machine.warp[threads])
        _count(machine, "shared", "loads", at, 16, threads)
        here = slice(None) if lanes is None else np.flatnonzero(lanes)
        values = matrix_registers(rows, threads.size // (8 * count), count, transposed)
        for row, value in zip(registers, values, strict=True):
            row[here] = value

    return step


DECODERS: dict[str, Callable[["Machine", Instruction], "Step"]] = (
    dict.fromkeys(LOADS, _load)
    | dict.fromkeys(STORES, _store)
    | dict.fromkeys(PARAMETERS, _parameter)
    | dict.fromkeys(ASYNC, _async)
    | dict.fromkeys(LDMATRIX, _matrices)
    | {"cp.async.commit_group": _commit, "cp.async.wait_group": _wait}
)
