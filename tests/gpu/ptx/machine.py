"""Runs a PTX program, one block of the grid after the other, all its threads at once.

Every instruction is decoded once into a function of the lanes that execute it: None for the whole block, or
one bool a thread. Registers are arrays over the threads. Where threads part, those furthest behind in the
program run first, so they meet again where the branches do.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from . import access, tensor
from .alu import NUMPY, TABLE
from .counters import Counters, class_of
from .memory import Fault, Global, Lanes, Moment, Shared
from .parse import Address, Constant, Instruction, Operand, Program, Register, Special, Symbol, Unsupported

Step = Callable[[np.ndarray | None], None]
CONTROL = {"bra", "bra.uni", "ret", "bar.sync"}
LONGEST = 10_000_000  # instructions of a block; a program that runs longer does not end


class Machine:
    """A program with its registers; `parameters` are the bytes of its arguments, in order."""

    def __init__(
        self,
        program: Program,
        threads: int,
        grid: tuple[int, int, int],
        parameters: Sequence[bytes],
        memory: Global,
        moment: Moment,
        shared_bytes: int = 0,
        counters: Counters | None = None,
    ):
        if threads % 32 or program.threads not in (0, threads):
            raise Unsupported(f"{threads} threads; {program.entry} is compiled for {program.threads}")
        self.program, self.threads, self.grid, self.counters = program, threads, grid, counters
        self.memory, self.moment, self.longest = memory, moment, LONGEST
        self.thread = np.arange(threads)
        self.lane, self.warp = self.thread % 32, self.thread // 32
        self.block = np.zeros(3, np.uint32)
        self.parameters = self._bound(parameters)
        size = program.shared_bytes + shared_bytes  # those of the launch lie behind
        self.shared = Shared(size, access.least_shared_width(program), moment)
        self.copies = access.Copies()
        self._registers: dict[str, np.ndarray] = {}
        self.active: np.ndarray = self.thread  # threads of the running access, for messages
        self.code = [self._decoded(instruction) for instruction in program.instructions]

    def _bound(self, values: Sequence[bytes]) -> Mapping[str, bytes]:
        declared = self.program.parameters
        sizes = [p.size for p in declared]
        if sizes != [len(x) for x in values]:
            raise ValueError(f"parameters: got {[len(x) for x in values]} bytes, want {sizes}")
        return {p.name: value for p, value in zip(declared, values, strict=True)}

    # Operands

    def register(self, name: str) -> np.ndarray:
        if name not in self._registers:
            prefix = name.rstrip("0123456789")
            kind, count = self.program.registers.get(name) or self.program.registers.get(prefix, ("", 0))
            if not kind or (name not in self.program.registers and int(name[len(prefix) :]) >= count):
                raise Unsupported(f"register {name} is not declared")
            self._registers[name] = np.zeros(self.threads, NUMPY[kind])
        return self._registers[name]

    def source(self, operand: Operand, kind: str) -> np.ndarray:
        """The values of an operand as `kind`: a view of a register, or one number."""
        to = np.dtype(NUMPY[kind])
        if isinstance(operand, Register):
            row = self.register(operand.name)
            if row.dtype.itemsize != to.itemsize or (row.dtype.kind == "b") != (kind == "pred"):
                raise Unsupported(f"{operand.name} has not the size of {kind}")
            return row.view(to)
        if isinstance(operand, Constant):
            return self._constant(operand, kind)
        if isinstance(operand, Symbol) and kind[1:] in ("32", "64"):
            return np.array(self._shared_offset(operand), to)
        if isinstance(operand, Special) and kind in ("u32", "b32", "s32"):
            return self._special(operand.name).view(to)
        raise Unsupported(f"{operand} as {kind}")

    def _constant(self, operand: Constant, kind: str) -> np.ndarray:
        to = np.dtype(NUMPY[kind])
        if kind == "pred":
            return np.array(bool(operand.value))
        if operand.kind == "integer" and to.kind == "f":
            raise Unsupported(f"integer {operand.value} as {kind}")
        if operand.kind != "integer" and kind not in (operand.kind, f"b{operand.kind[1:]}"):
            raise Unsupported(f"{operand.kind} constant as {kind}")
        bits = 8 * to.itemsize
        if not -(1 << (bits - 1)) <= operand.value < 1 << bits:
            raise Unsupported(f"{operand.value} does not fit {kind}")
        return np.array(operand.value % (1 << bits), f"u{to.itemsize}").view(to)

    def _special(self, name: str) -> np.ndarray:
        what, axis = name[1:].split(".")
        i = "xyz".index(axis)
        if what == "tid":
            return (self.thread if i == 0 else np.zeros(self.threads)).astype(np.uint32)
        if what == "ctaid":
            return self.block[i : i + 1]
        return np.array([(self.threads, 1, 1)[i] if what == "ntid" else self.grid[i]], np.uint32)

    def _shared_offset(self, symbol: Symbol) -> int:
        if symbol.name not in self.program.shared:
            raise Unsupported(f"symbol {symbol.name}")
        return self.program.shared[symbol.name]

    def target(self, operand: Operand, kind: str) -> np.ndarray | None:
        """The register that takes a result of `kind`; None for the sink `_`."""
        if operand == Register("_"):
            return None
        if not isinstance(operand, Register):
            raise Unsupported(f"{operand} as a result")
        return self.source(operand, kind)

    def holder(self, operand: Operand, size: int) -> np.ndarray:
        """The bits of a register that takes part in a load or store of `size` bytes; it may be wider."""
        if not isinstance(operand, Register):
            raise Unsupported(f"{operand} in a load or store")
        row = self.register(operand.name)
        if row.dtype == bool or row.dtype.itemsize < size:
            raise Unsupported(f"{operand.name} does not hold {size} bytes")
        return row.view(f"u{row.dtype.itemsize}")

    def address(self, operand: Operand, space: str) -> Callable[[], np.ndarray]:
        """The addresses that an operand gives, of all threads."""
        if not isinstance(operand, Address):
            raise Unsupported(f"{operand} as an address")
        base, offset = operand.base, operand.offset
        if space == "shared" and isinstance(base, Symbol):
            fixed = np.full(self.threads, self._shared_offset(base) + offset, np.int64)
            return lambda: fixed
        if not isinstance(base, Register):
            raise Unsupported(f"{operand} as an address in {space}")
        row = self.register(base.name)
        if row.dtype.itemsize != 8 and not (space == "shared" and row.dtype.itemsize == 4):
            raise Unsupported(f"{base.name} as an address in {space}")
        return lambda: row.astype(np.int64) + offset

    # Decoding

    def _decoded(self, instruction: Instruction) -> tuple[str, Step | int, np.ndarray | None, bool]:
        """What kind of step it is, the step or where it leads, and its guard."""
        try:
            guard, negated = None, False
            if instruction.guard is not None:
                name, negated = instruction.guard
                guard = self.source(Register(name), "pred")
            if instruction.opcode in CONTROL:
                return (*self._control(instruction), guard, negated)
            return "step", self._step(instruction), guard, negated
        except Unsupported as error:
            raise Unsupported(f"{error}: {instruction}") from None

    def _control(self, instruction: Instruction) -> tuple[str, int]:
        operands = instruction.operands
        match instruction.opcode, operands:
            case "bra" | "bra.uni", (Symbol(name),):
                return "branch", self.program.labels[name]
            case "ret", ():
                return "exit", 0
            case "bar.sync", (Constant(0),):
                return "barrier", 0
        raise Unsupported(f"operands {operands}")

    def _step(self, instruction: Instruction) -> Step:
        opcode = instruction.opcode
        if opcode in TABLE and not any(isinstance(o, tuple) for o in instruction.operands):
            return self._scalar(instruction)
        if opcode in ("mov.b32", "mov.b64"):
            return self._pack(instruction)
        for decoders in (access.DECODERS, COLLECTIVE):
            if opcode in decoders:
                return decoders[opcode](self, instruction)
        raise Unsupported("unknown instruction")

    def _scalar(self, instruction: Instruction) -> Step:
        op, operands = TABLE[instruction.opcode], instruction.operands
        if len(operands) != 1 + len(op.of):
            raise Unsupported(f"{len(operands)} operands")
        to = self.target(operands[0], op.to)
        sources = [self.source(x, kind) for x, kind in zip(operands[1:], op.of, strict=True)]
        function = op.function
        if to is None:
            raise Unsupported("no result")

        def step(lanes):
            if lanes is None:
                to[...] = function(*sources)
            else:
                np.copyto(to, function(*sources), where=lanes)

        return step

    def _pack(self, instruction: Instruction) -> Step:
        """mov between a register and its two halves, the low one first."""
        whole = instruction.opcode.removeprefix("mov.")
        half = {"b32": "b16", "b64": "b32"}[whole]
        match instruction.operands:
            case ((low, high), Register() as packed):
                parts = [self.target(x, half) for x in (low, high)]
                source = self.source(packed, whole)

                def unpack(lanes):
                    halves = source.copy().view(NUMPY[half]).reshape(-1, 2)
                    for i, to in enumerate(parts):
                        if to is not None:
                            np.copyto(to, halves[:, i], where=True if lanes is None else lanes)

                return unpack
            case (Register() as packed, (low, high)):
                to = self.source(packed, whole)
                sources = [self.source(x, half) for x in (low, high)]

                def join(lanes):
                    halves = np.empty((to.size, 2), NUMPY[half])
                    halves[:, 0], halves[:, 1] = sources
                    np.copyto(to, halves.view(NUMPY[whole])[:, 0], where=True if lanes is None else lanes)

                return join
        raise Unsupported(f"operands {instruction.operands}")

    def whole_warps(self, lanes: np.ndarray | None, members: np.ndarray | None = None) -> None:
        """Refuse a collective that part of a warp executes; `members`: who should, everybody by default."""
        if lanes is None and members is None:
            return
        here = np.ones(self.threads, bool) if lanes is None else lanes
        bad = here.reshape(-1, 32).any(1).repeat(32) & (here != (True if members is None else members))
        if bad.any():
            self.active = self.thread
            raise Lanes(bad, "collective of a warp that part of it does not execute")

    # Running

    def run(self) -> None:
        """All blocks."""
        with np.errstate(all="ignore"):
            for z, y, x in np.ndindex(self.grid[::-1]):
                self.run_block((x, y, z))

    def run_block(self, block: tuple[int, int, int]) -> None:
        self.block[:] = block
        self.moment.block()
        self.shared.clear()
        self.copies.clear()
        for row in self._registers.values():
            row.view(np.uint8)[:] = 0 if row.dtype == bool else 0xFF  # nothing may depend on it
        self.steps, self.exited = 0, np.zeros(self.threads, bool)
        # lanes that run and that wait at a barrier, by where in the program they go on
        self.groups, self.waiting = {0: np.ones(self.threads, bool)}, {}
        try:
            while self.groups or self.waiting:
                if not self.groups:
                    self._release()
                self.at = min(self.groups)
                self._advance(self.groups.pop(self.at), min(self.groups, default=math.inf))
        except Lanes as fault:
            threads = np.asarray(self.active)[fault.lanes]
            raise Fault(
                f"{fault}: {threads.size} lanes, first thread {threads[0]}, "
                f"{self.program.instructions[self.at]}, block {block}"
            ) from None

    def _advance(self, lanes: np.ndarray, horizon: float) -> None:
        """Run lanes from `self.at` on until they meet those at the horizon, part, wait or end."""
        everyone = None if lanes.all() else lanes
        code, size, at, steps = self.code, self.threads, self.at, 0
        while at < horizon:
            if at >= len(code):
                raise Unsupported(f"{self.program.entry} has no end")
            kind, what, guard, negated = code[at]
            self.at = at
            steps += 1
            if steps > 1000:
                self._count(steps)
                steps = 0
            if self.counters is not None:
                name = class_of(self.program.instructions[at].opcode)
                self.counters.instruction(name, everyone, self.warp)
            now = everyone
            if guard is not None:
                now = ~guard if negated else guard.copy()
                if everyone is not None:
                    now &= everyone
                count = int(np.count_nonzero(now))
                if count == size:
                    now = None
                elif count == 0:
                    at += 1
                    continue
            if kind == "step":
                what(now)
                at += 1
                continue
            others = self._others(everyone, now)
            if kind == "branch" and others is None:
                at = what
                continue
            self._count(steps)
            _join(self.groups, at + 1, others)
            here = lanes if others is None else now
            if kind == "branch":
                _join(self.groups, what, here)
            elif kind == "barrier":
                self._arrive(here)
            else:
                self.exited |= here
            return
        self._count(steps)
        _join(self.groups, at, lanes)

    @staticmethod
    def _others(everyone: np.ndarray | None, now: np.ndarray | None) -> np.ndarray | None:
        """Those of everyone that are not of now, if there are any."""
        if now is None or now is everyone:
            return None
        others = ~now if everyone is None else everyone & ~now
        return others if others.any() else None

    def _count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > self.longest:
            self.active = self.thread
            raise Lanes(~self.exited, "kernel that does not end")

    def _arrive(self, lanes: np.ndarray) -> None:
        """At a barrier, for which all lanes of a warp must come together."""
        parts = lanes.reshape(-1, 32)
        torn = (parts.any(1) & ~parts.all(1)).repeat(32)
        if torn.any():
            self.active = self.thread
            raise Lanes(lanes & torn, "divergent barrier: others of the warp are elsewhere")
        _join(self.waiting, self.at + 1, lanes)

    def _release(self) -> None:
        """All that run wait at a barrier: it is one barrier, and everyone is there."""
        self.active = self.thread
        self.at = min(self.waiting) - 1
        if len(self.waiting) > 1:
            raise Lanes(self.waiting[self.at + 1], "divergent barrier: other warps wait at another one")
        if self.exited.any():
            raise Lanes(self.exited, "barrier after threads have exited")
        self.moment.barrier()
        self.groups, self.waiting = self.waiting, {}


def _join(groups: dict[int, np.ndarray], at: int, lanes: np.ndarray | None) -> None:
    if lanes is not None:
        groups[at] = groups[at] | lanes if at in groups else lanes


def _mma(machine: Machine, instruction: Instruction) -> Step:
    product, fma = tensor.MMA[instruction.opcode]
    kinds = ("f32", "b32", "b32", "f32")
    if [len(o) if isinstance(o, tuple) else 0 for o in instruction.operands] != [4, 4, 2, 4]:
        raise Unsupported(f"operands {instruction.operands}")
    rows = zip(instruction.operands, kinds, strict=True)
    to, a, b, c = ([machine.source(x, kind) for x in parts] for parts, kind in rows)

    def step(lanes):
        machine.whole_warps(lanes)
        if machine.counters is not None:
            machine.counters.tensor(fma, lanes, machine.warp)
        for row, value in zip(to, product(a, b, c), strict=True):
            np.copyto(row, value, where=True if lanes is None else lanes)

    return step


def _members(machine: Machine, operand: Operand) -> Callable[[], np.ndarray | None]:
    """Which lanes the member mask of a collective names; None: all."""
    mask = machine.source(operand, "b32")
    if mask.ndim == 0 and mask == 0xFFFFFFFF:
        return lambda: None
    return lambda: (mask >> machine.lane.astype(np.uint32)) & 1 == 1


def _shuffle(machine: Machine, instruction: Instruction) -> Step:
    mode = tensor.SHUFFLES[instruction.opcode]
    if len(instruction.operands) != 5:
        raise Unsupported(f"operands {instruction.operands}")
    result, value, b, c, mask = instruction.operands
    found = None
    if not isinstance(result, Register):
        result, found = result.first, machine.target(result.second, "pred")
    to, of = machine.target(result, "b32"), machine.source(value, "b32")
    step_by, clamp = machine.source(b, "u32"), machine.source(c, "u32")
    members, first = _members(machine, mask), machine.thread - machine.lane

    def step(lanes):
        machine.whole_warps(lanes, members())
        source, inside = tensor.shuffle_source(mode, machine.lane, step_by, clamp)
        source = source + first
        if lanes is not None and not lanes[source[lanes]].all():
            machine.active = machine.thread
            raise Lanes(lanes & ~lanes[source], "shuffle from a lane that does not take part")
        here = True if lanes is None else lanes
        np.copyto(to, of[source], where=here)
        if found is not None:
            np.copyto(found, inside, where=here)

    return step


def _reduction(machine: Machine, instruction: Instruction) -> Step:
    combine, neutral = tensor.REDUCTIONS[instruction.opcode]
    to, of = (machine.source(x, "s32") for x in instruction.operands[:2])
    members = _members(machine, instruction.operands[2])

    def step(lanes):
        machine.whole_warps(lanes, members())
        values = of if lanes is None else np.where(lanes, of, np.int32(neutral))
        result = combine.reduce(values.reshape(-1, 32), axis=1).repeat(32)
        np.copyto(to, result, where=True if lanes is None else lanes)

    return step


def _warp_barrier(machine: Machine, instruction: Instruction) -> Step:
    members = _members(machine, instruction.operands[0])
    return lambda lanes: machine.whole_warps(lanes, members())


COLLECTIVE: dict[str, Callable[[Machine, Instruction], Step]] = (
    dict.fromkeys(tensor.MMA, _mma)
    | dict.fromkeys(tensor.SHUFFLES, _shuffle)
    | dict.fromkeys(tensor.REDUCTIONS, _reduction)
    | {"bar.warp.sync": _warp_barrier}
)
OPCODES = {*CONTROL, *TABLE, *access.DECODERS, *COLLECTIVE}
