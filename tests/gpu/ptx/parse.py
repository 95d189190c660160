"""PTX text as a program: parameters, shared memory, and instructions with decoded operands.

Nothing is guessed: a line that is no directive, label or instruction of a known form is an error.
"""

import dataclasses
import re
from collections.abc import Iterator

import numpy as np

SIZES = {"pred": 1} | {f"{kind}{bits}": bits // 8 for kind in "bsuf" for bits in (8, 16, 32, 64)}


class Unsupported(NotImplementedError):
    """PTX that the simulator does not know; it never guesses."""


@dataclasses.dataclass(frozen=True)
class Register:
    name: str


@dataclasses.dataclass(frozen=True)
class Special:
    """%tid, %ntid, %ctaid or %nctaid of one axis."""

    name: str


@dataclasses.dataclass(frozen=True)
class Constant:
    """An integer, or the bits of a floating-point constant of `kind` f32 or f64."""

    value: int
    kind: str = "integer"


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A label, a parameter or a variable in shared memory."""

    name: str


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two results, `%r1|%p1`."""

    first: Register
    second: Register


@dataclasses.dataclass(frozen=True)
class Address:
    base: Register | Symbol | Constant
    offset: int


Operand = Register | Special | Constant | Symbol | Pair | Address | tuple


@dataclasses.dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None  # predicate, and whether it is negated
    line: int  # of the PTX
    place: str  # in the source

    def __str__(self) -> str:
        return f"{self.opcode} at {self.place}, PTX line {self.line}"


@dataclasses.dataclass(frozen=True)
class Parameter:
    name: str
    size: int


@dataclasses.dataclass
class Program:
    """One kernel."""

    entry: str
    parameters: list[Parameter]
    threads: int  # of a block, as compiled; 0 where the text does not say
    registers: dict[str, tuple[str, int]]  # name -> type and count of numbered ones, 0 if it is one itself
    shared: dict[str, int]  # variable -> offset in shared memory
    shared_bytes: int  # of the variables with a size
    instructions: list[Instruction]
    labels: dict[str, int]


_NAME = r"[$%_a-zA-Z][\w$]*"
_ENTRY = re.compile(rf"\.entry\s+({_NAME})\s*\((.*?)\)\s*([^{{]*)\{{", re.DOTALL)
_PARAMETER = re.compile(
    rf"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?\s+({_NAME})(?:\[(\d+)\])?$"
)
_SHARED = re.compile(rf"\.shared\s+\.align\s+(\d+)\s+\.b8\s+({_NAME})\[(\d*)\]\s*;?$")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+?)(?:<(\d+)>)?;$")
_LABEL = re.compile(rf"({_NAME}):$")
_STATEMENT = re.compile(r"(?:@(!?)(%\w+)\s+)?([a-z]\w*(?:\.\w+|::\w+)*)(?:\s+(.+))?$")
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+")
_FILE = re.compile(r'\.file\s+(\d+)\s+"(.*?)"')


def _split(text: str) -> Iterator[str]:
    """Operands: what commas part outside of brackets."""
    depth, start = 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    yield text[start:].strip()


def _operand(text: str) -> Operand:
    if text.startswith("{") and text.endswith("}"):
        return tuple(_operand(part) for part in _split(text[1:-1].strip()))
    if text.startswith("[") and text.endswith("]"):
        base, _, offset = (part.strip() for part in text[1:-1].partition("+"))
        return Address(_operand(base), int(offset, 0) if offset else 0)
    if re.fullmatch(r"%(n?tid|n?ctaid)\.[xyz]", text):
        return Special(text)
    if match := re.fullmatch(r"(%\w+)\|(%\w+)", text):
        return Pair(Register(match[1]), Register(match[2]))
    if re.fullmatch(r"%\w+|_", text):
        return Register(text)
    if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return Constant(int(match[1], 16), "f32")
    if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        return Constant(int(match[1], 16), "f64")
    if match := re.fullmatch(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?", text):
        return Constant(int(match[1], 0))
    if text in ("true", "false"):
        return Constant(int(text == "true"))
    if re.fullmatch(_NAME, text):
        return Symbol(text)
    raise Unsupported(f"operand {text!r}")


def _aligned(offset: int, to: int) -> int:
    return -(-offset // to) * to


def parse(text: str, entry: str | None = None) -> Program:
    """The kernel `entry` of a PTX module, or its only one."""
    files = {number: path.rpartition("/")[2] for number, path in _FILE.findall(text)}
    clean = re.sub(r"//[^\n]*", "", text)
    entries = [m for m in _ENTRY.finditer(clean) if entry in (None, m[1])]
    if len(entries) != 1:
        found = [m[1] for m in _ENTRY.finditer(clean)]
        raise ValueError(f"entry: {entry} should name one kernel, there are {found}")
    head = entries[0]
    parameters = []
    for part in filter(None, (p.strip() for p in head[2].split(","))):
        match = _PARAMETER.match(part)
        if match is None:
            raise Unsupported(f"parameter {part!r} of {head[1]}")
        parameters.append(Parameter(match[2], SIZES[match[1]] * int(match[3] or 1)))
    block = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)((?:\s*,\s*\d+)*)", head[3])
    threads = int(np.prod([int(x) for x in re.findall(r"\d+", block[0])])) if block else 0
    program = Program(head[1], parameters, threads, {}, {}, 0, [], {})
    for extern in re.findall(r"\.extern\s+(\.shared[^;]+;)", clean[: head.start()]):
        _declare_shared(program, *_SHARED.match(extern).groups())
    _body(program, clean, head.end(), files)
    for name in {o.name for i in program.instructions if i.opcode.startswith("bra") for o in i.operands}:
        if name not in program.labels:
            raise Unsupported(f"label {name} of {program.entry} is nowhere")
    program.shared.update({name: program.shared_bytes for name, at in program.shared.items() if at < 0})
    return program


def _declare_shared(program: Program, align: str, name: str, size: str) -> None:
    if not size:  # its size comes with the launch, so it lies behind all others
        program.shared[name] = -1
        return
    program.shared[name] = _aligned(program.shared_bytes, int(align))
    program.shared_bytes = program.shared[name] + int(size)
    program.shared_bytes = _aligned(program.shared_bytes, 16)


def _body(program: Program, text: str, start: int, files: dict[str, str]) -> None:
    line, depth, place, statement = text.count("\n", 0, start) + 1, 1, "?", ""
    for raw in text[start:].split("\n"):
        for piece in re.split(r"(?<=;)|(?<=:)(?=\s|$)", raw) if "{" not in raw or ";" in raw else [raw]:
            statement = f"{statement} {piece.strip()}".strip()
            if statement in ("", "{", "}"):
                depth += (statement == "{") - (statement == "}")
                statement = ""
                if depth == 0:
                    return
            elif statement.startswith((".loc", ".file", ".pragma")):
                if match := _LOCATION.match(statement):
                    place = f"{files.get(match[1], '?')}:{match[2]}"
                statement = ""
            elif match := _LABEL.match(statement):
                program.labels[match[1]] = len(program.instructions)
                statement = ""
            elif statement.endswith(";"):
                _statement(program, statement, line, place)
                statement = ""
        line += 1
    raise Unsupported(f"{program.entry} does not end")


def _statement(program: Program, statement: str, line: int, place: str) -> None:
    if match := _REGISTERS.match(statement):
        kind, name, count = match.groups()
        if program.registers.setdefault(name, (kind, int(count or 0))) != (kind, int(count or 0)):
            raise Unsupported(f"{name} declared twice, PTX line {line}")
        return
    if match := _SHARED.match(statement):
        _declare_shared(program, *match.groups())
        return
    match = _STATEMENT.match(statement[:-1].strip())
    if match is None:
        raise Unsupported(f"{statement!r}, PTX line {line}")
    negated, guard, opcode, operands = match.groups()
    opcode = opcode.replace(".shared::cta", ".shared")  # the same: ::cta is the default of PTX
    try:
        decoded = tuple(_operand(o) for o in _split(operands)) if operands else ()
    except Unsupported as error:
        raise Unsupported(f"{error} of {statement!r}, PTX line {line}") from None
    program.instructions.append(
        Instruction(opcode, decoded, (guard, bool(negated)) if guard else None, line, place)
    )
