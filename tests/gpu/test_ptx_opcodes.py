"""Each scalar instruction that the simulator accepts, against exact arithmetic of Python and torch."""

import itertools
import math
import operator
import random
import struct
from fractions import Fraction

import pytest
import torch

pytest.importorskip("triton")

from .ptx import Unsupported, parse, run
from .ptx.alu import TABLE
from .ptx.assembly import HEAD, element, execute, kernel

INTEGERS = {
    bits: [0, 1, 2, 3, 7, 31, 32, 33, 64, 255, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 7, 2**bits - 1]
    for bits in (16, 32, 64)
}
FLOATS = [
    0.0, -0.0, 1.0, -1.0, 1.5, -2.5, 0.5, 3.0, 0.1, -1 / 3, 1e-40, -1e-45, 1.1754944e-38, 3e38, -3.4e38,
    16777217.0, 65519.0, 65520.0, 1.00390625, 1.01171875, 1 + 2**-11, 1 + 3 * 2**-11, 6.1e-5, 3e-8,
    math.inf, -math.inf, math.nan,
]  # fmt: skip
SIZE = {f"{kind}{bits}": bits // 8 for kind in "busf" for bits in (16, 32, 64)} | {"pred": 4}
DTYPE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def rounded(x: float | Fraction, kind: str) -> float:
    """Nearest number of a float type, ties to even; what is no fraction stays."""
    if x == 0 or (isinstance(x, float) and not math.isfinite(x)):
        return float(x)
    digits, least = (24, -149) if kind == "f32" else (53, -1074)
    x = Fraction(x)
    exponent = math.floor(math.log2(abs(x))) if 2**-1000 < abs(x) < 2**1000 else 0
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    step = Fraction(2) ** max(exponent - digits + 1, least)
    out = round(x / step) * step  # Python rounds ties to even
    if abs(out) >= Fraction(2) ** (128 if kind == "f32" else 1024):
        return math.copysign(math.inf, x)
    return math.copysign(float(out), x)


def bits_of(x, kind: str) -> int:
    if kind == "pred":
        return int(bool(x))
    if kind[0] == "f":
        return int.from_bytes(struct.pack("<f" if kind == "f32" else "<d", x), "little")
    return x % (1 << 8 * SIZE[kind])


def value_of(bits: int, kind: str):
    if kind == "pred":
        return bool(bits)
    size = SIZE[kind]
    bits %= 1 << 8 * size
    if kind[0] == "f":
        return struct.unpack("<f" if size == 4 else "<d", bits.to_bytes(size, "little"))[0]
    return bits - (1 << 8 * size) if kind[0] == "s" and bits >> (8 * size - 1) else bits


def tensor_of(values: list[int], size: int) -> torch.Tensor:
    half = 1 << (8 * size - 1)
    return torch.tensor([v - 2 * half if v >= half else v for v in values], dtype=DTYPE[size])


def names(kind: str, i: int) -> str:
    return {2: f"%rs{i}", 4: f"%r{i}", 8: f"%rd{i}"}[SIZE[kind]]


def apply(opcode: str, kinds: list[str], to: str, rows: list[tuple]) -> list:
    """Results of an instruction for rows of operands, each in a thread of its own."""
    rows = rows + rows[:1] * (-len(rows) % 32)
    tensors, lines, operands = [], [], []
    for i, kind in enumerate(kinds):
        size, register = SIZE[kind], names(kind, 1 + i)
        tensors.append(tensor_of([bits_of(row[i], kind) for row in rows], size))
        lines += [element("%rd40", i, size), f"ld.global.b{8 * size} {register}, [%rd40];"]
        if kind == "pred":
            lines.append(f"setp.ne.b32 %p{1 + i}, {register}, 0;")
            register = f"%p{1 + i}"
        operands.append(register)
    size, result = SIZE[to], "%p9" if to == "pred" else names(to, 9)
    lines.append(f"{opcode} {', '.join([result, *operands])};")
    if to == "pred":
        lines.append("selp.b32 %r9, 1, 0, %p9;")
    lines += [element("%rd40", len(kinds), size), f"st.global.b{8 * size} [%rd40], {names(to, 9)};"]
    out = torch.zeros(len(rows), dtype=DTYPE[size])
    execute("\n".join(lines), *tensors, out, threads=len(rows))
    return [value_of(int(x), to) for x in out.tolist()]


def samples(kinds: list[str], limit: int = 480) -> list[tuple]:
    """All combinations of special values, or some."""
    choices = [
        [True, False] if k == "pred"
        else [rounded(x, k) for x in FLOATS] if k[0] == "f"
        else [value_of(x, k) for x in INTEGERS[8 * SIZE[k]]]
        for k in kinds
    ]  # fmt: skip
    rows = list(itertools.product(*choices))
    return rows if len(rows) <= limit else random.Random(0).sample(rows, limit)


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def floats(function):
    """An exact result of finite operands; IEEE's where one is not."""

    def exact(*x):
        if all(math.isfinite(v) for v in x):
            out = function(*map(Fraction, x))
            return float(function(*x)) if out == 0 else out  # with the sign of the zero
        return float(function(*x))

    return exact


def quotient(a: float, b: float):
    if math.isnan(a) or math.isnan(b) or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    sign = math.copysign(1, a) * math.copysign(1, b)
    if b == 0 or math.isinf(a):
        return sign * math.inf
    return sign * 0.0 if a == 0 or math.isinf(b) else Fraction(a) / Fraction(b)


def toward_zero(x: float, bits: int) -> int:
    most = 2 ** (bits - 1)
    return 0 if math.isnan(x) else int(max(-most, min(x, most - 1)))


def root(x: float):
    return math.sqrt(x) if not x < 0 else math.nan


def extremum(choose):
    def of(a, b):
        if math.isnan(a) or math.isnan(b):
            return b if math.isnan(a) else a
        return choose(a, b, key=lambda x: (x, math.copysign(1, x)))

    return of


def flush(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2**-126 else x


def exp2(x: float) -> float:
    if math.isnan(x) or math.isinf(x):
        return x if x != -math.inf else 0.0
    return 0.0 if x < -200 else math.inf if x >= 128 else math.exp2(x)


def bfe(signed: bool):
    def of(a, position, length):
        position, length, bits = position & 255, length & 255, a % (1 << 32)
        sign = (bits >> min(position + length - 1, 31) & 1) if signed and length else 0
        out = [bits >> (position + i) & 1 if position + i < 32 else sign for i in range(min(length, 32))]
        out += [sign] * (32 - len(out))
        return sum(bit << i for i, bit in enumerate(out))

    return of


def prmt(a, b, selector):
    taken = (a | b << 32).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = taken[nibble & 7]
        out |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return out


def sixteen(dtype):
    """Bits of the nearest 16-bit float by torch; of NaN, those of hardware."""

    def of(x):
        return 0x7FFF if math.isnan(x) else int(torch.tensor(x).to(dtype).view(torch.int16)) & 0xFFFF

    return of


def of_sixteen(dtype):
    return lambda bits: float(torch.tensor(value_of(bits, "s16"), dtype=torch.int16).view(dtype))


def of_halves(function):
    half = of_sixteen(torch.float16)
    return lambda a, b: function(half(a), half(b))


def tf32(x):
    if not math.isfinite(x):
        return bits_of(x, "f32")
    step = Fraction(2) ** (math.frexp(x)[1] - 11) if abs(x) >= 2**-126 else Fraction(2) ** (-126 - 10)
    units = abs(Fraction(x)) / step
    out = math.floor(units + Fraction(1, 2)) * step  # ties away from zero
    return bits_of(math.copysign(float(out), x), "f32")


def packed(dtype):
    return lambda high, low: sixteen(dtype)(high) << 16 | sixteen(dtype)(low)


ROWS: dict[str, tuple] = {}  # opcode -> kinds of operands, kind of the result, function


def rows(opcodes: str, kinds: str, function, *, operands: int = 0, to: str = "") -> None:
    for opcode in opcodes.split():
        last = opcode.rpartition(".")[2]
        of = kinds.split() if kinds else [last] * operands
        ROWS[opcode] = (of, to or last, function)


def ordered(compare, or_unordered=False):
    return lambda a, b: or_unordered if a != a or b != b else compare(a, b)


rows("add.s32 add.s64 add.f32 add.f64 add.rn.f32 add.rn.f64", "", floats(operator.add), operands=2)
rows("sub.s32 sub.s64 sub.f32 sub.f64 sub.rn.f32 sub.rn.f64", "", floats(operator.sub), operands=2)
rows("mul.f32 mul.f64 mul.rn.f32 mul.rn.f64", "", floats(operator.mul), operands=2)
rows("add.s16 add.s32 add.s64", "", operator.add, operands=2)
rows("sub.s16 sub.s32 sub.s64", "", operator.sub, operands=2)
rows("mul.lo.s32 mul.lo.s64", "", operator.mul, operands=2)
rows("mad.lo.s32 mad.lo.s64", "", lambda a, b, c: a * b + c, operands=3)
rows("min.s32 min.s64", "", min, operands=2)
rows("max.s32 max.s64", "", max, operands=2)
rows("min.f32", "", extremum(min), operands=2)
rows("max.f32", "", extremum(max), operands=2)
rows("div.s32 div.u32 div.u64", "", truncated, operands=2)
rows("rem.s32 rem.u32", "", lambda a, b: a - truncated(a, b) * b, operands=2)
rows("div.full.f32 div.rn.f32 div.rn.f64", "", quotient, operands=2)
rows("neg.s32 neg.f32 neg.f64", "", operator.neg, operands=1)
rows("abs.s32 abs.f32 abs.f64", "", abs, operands=1)
rows("abs.ftz.f32", "", lambda x: abs(flush(x)), operands=1)
rows("copysign.f32 copysign.f64", "", lambda sign, x: math.copysign(x, sign), operands=2)
rows("fma.rn.f32 fma.rn.f64", "", floats(lambda a, b, c: a * b + c), operands=3)
rows("ex2.approx.f32", "", exp2, operands=1)
rows("ex2.approx.ftz.f32", "", lambda x: flush(exp2(flush(x))), operands=1)
rows("sqrt.approx.ftz.f32", "", lambda x: root(flush(x)), operands=1)
rows("rcp.approx.ftz.f32", "", lambda x: flush(rounded(quotient(1.0, flush(x)), "f32")), operands=1)
rows("rcp.approx.ftz.f64", "", lambda x: quotient(1.0, x), operands=1)
for s in "su":
    rows(f"mul.wide.{s}32", f"{s}32 {s}32", operator.mul, to=f"{s}64")
    rows(f"mul.hi.{s}32", "", lambda a, b: a * b >> 32, operands=2)
    rows(f"mad.wide.{s}32", f"{s}32 {s}32 {s}64", lambda a, b, c: a * b + c, to=f"{s}64")
for name, function in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
    rows(f"{name}.pred {name}.b16 {name}.b32 {name}.b64", "", function, operands=2)
rows("not.b16 not.b32 not.b64", "", operator.invert, operands=1)
rows("not.pred", "", operator.not_, operands=1)
for b in (16, 32, 64):
    rows(f"shl.b{b}", f"b{b} u32", lambda x, n, b=b: x << n if n < b else 0)
    rows(f"shr.u{b}", f"u{b} u32", lambda x, n, b=b: x >> n if n < b else 0)
    rows(f"shr.s{b}", f"s{b} u32", lambda x, n, b=b: x >> min(n, b))
rows("bfe.s32", "s32 u32 u32", bfe(True))
rows("bfe.u32", "u32 u32 u32", bfe(False))
rows("popc.b32", "", int.bit_count, operands=1)
rows("prmt.b32", "", prmt, operands=3)
rows("shf.l.wrap.b32", "", lambda low, high, n: (high << 32 | low) << n % 32 >> 32, operands=3)
for kind in ("b16", "b32", "b64", "s32", "f32", "f64"):
    rows(f"selp.{kind}", f"{kind} {kind} pred", lambda a, b, p: a if p else b)
for name in ("eq", "ne", "lt", "le", "gt", "ge"):
    compare = getattr(operator, name)
    kinds = [f"{k}{b}" for k in "su" for b in (16, 32, 64)] + ["b16", "b32", "b64"] * (name in ("eq", "ne"))
    for kind in kinds:
        rows(f"setp.{name}.{kind}", f"{kind} {kind}", compare, to="pred")
    rows(f"setp.{name}.f16", "b16 b16", of_halves(ordered(compare)), to="pred")
    for kind in ("f32", "f64"):
        rows(f"setp.{name}.{kind}", f"{kind} {kind}", ordered(compare), to="pred")
        rows(f"setp.{name}u.{kind}", f"{kind} {kind}", ordered(compare, True), to="pred")
for kind in ("f32", "f64"):
    rows(f"setp.num.{kind}", f"{kind} {kind}", ordered(lambda a, b: True), to="pred")
    rows(f"setp.nan.{kind}", f"{kind} {kind}", ordered(lambda a, b: False, True), to="pred")
rows("mov.pred " + " ".join(f"mov.{k}{b}" for k in "bus" for b in (16, 32, 64)), "", lambda x: x, operands=1)
rows("mov.f32 mov.f64", "", lambda x: x, operands=1)
rows("cvta.to.global.u64", "", lambda x: x, operands=1)
for pair in ("s64.s32", "u64.u32", "u32.u64", "u32.u16", "u16.u32", "s32.s16", "s32.s64", "s64.s16"):
    to, of = pair.split(".")
    rows(f"cvt.{pair}", of, lambda x: x, to=to)
rows("cvt.s16.s8", "b16", lambda x: (x & 127) - (x & 128), to="s16")
rows("cvt.f64.f32", "f32", lambda x: x, to="f64")
rows("cvt.rn.f32.f64", "f64", lambda x: x, to="f32")
rows("cvt.rn.f32.s32", "s32", lambda x: Fraction(x), to="f32")
rows("cvt.rni.f32.f32", "f32", lambda x: math.copysign(round(x), x) if math.isfinite(x) else x)
rows("cvt.rn.f32.u32", "u32", lambda x: Fraction(x), to="f32")
rows("cvt.rzi.f32.f32", "f32", lambda x: math.copysign(math.trunc(x), x) if math.isfinite(x) else x)
rows("cvt.rzi.s32.f32", "f32", lambda x: toward_zero(x, 32), to="s32")
rows("cvt.rzi.s64.f32", "f32", lambda x: toward_zero(x, 64), to="s64")
rows("cvt.f32.bf16", "b16", of_sixteen(torch.bfloat16), to="f32")
rows("cvt.f32.f16", "b16", of_sixteen(torch.float16), to="f32")
rows("cvt.rn.bf16.f32", "f32", sixteen(torch.bfloat16), to="b16")
rows("cvt.rn.f16.f32", "f32", sixteen(torch.float16), to="b16")
rows("cvt.rn.bf16x2.f32", "f32 f32", packed(torch.bfloat16), to="b32")
rows("cvt.rn.f16x2.f32", "f32 f32", packed(torch.float16), to="b32")
rows("cvt.rna.tf32.f32", "f32", tf32, to="b32")
ROWS["fma.rn.ftz.f32"] = (
    ["f32"] * 3,
    "f32",
    lambda a, b, c: flush(rounded(floats(lambda x, y, z: x * y + z)(flush(a), flush(b), flush(c)), "f32")),
)


# Relative errors: the first gives 20 bits of mantissa, the others those of math.exp2
APPROXIMATE = {"rcp.approx.ftz.f64": 2**-20, "ex2.approx.f32": 2**-23, "ex2.approx.ftz.f32": 2**-23}


def test_every_scalar_instruction_has_a_row():
    assert set(ROWS) == set(TABLE)


@pytest.mark.parametrize("opcode", ROWS)
def test_results(opcode):
    kinds, to, function = ROWS[opcode]
    rows = samples(kinds)
    if opcode.startswith(("div.s", "div.u", "rem")):
        low = -(1 << 8 * SIZE[kinds[0]] - 1)
        rows = [row for row in rows if row[1] != 0 and row != (low, -1)]
    if opcode == "rcp.approx.ftz.f64":
        rows = [row for row in rows if row[0] == 0 or abs(row[0]) > 1e-300]
    for row, got in zip(rows, apply(opcode, kinds, to, rows), strict=False):
        want = function(*row)
        if to[0] != "f":
            assert bits_of(got, to) == bits_of(want, to), row
            continue
        want = rounded(want, to)
        if math.isnan(want):
            assert math.isnan(got), row
        elif opcode in APPROXIMATE and math.isfinite(want):
            assert abs(got - want) <= APPROXIMATE[opcode] * abs(want) + 2**-149, row
        else:
            assert bits_of(got, to) == bits_of(want, to), (row, got, want)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_fma_rounds_once(kind):
    near = random.Random(1)
    step = 2.0**-23 if kind == "f32" else 2.0**-52
    rows = [(1 + step, 1 - step, -1.0), (1 + step, 1 + step, -1 - 2 * step), (step / 2, 1 + step, 1.0)]
    rows += [(1 + step * near.randrange(99), near.choice([1, -1]) * step / 2, 1.0) for _ in range(61)]
    for row, got in zip(rows, apply(f"fma.rn.{kind}", [kind] * 3, kind, rows), strict=True):
        assert got == rounded(Fraction(row[0]) * Fraction(row[1]) + Fraction(row[2]), kind), row


@pytest.mark.parametrize("size", [32, 64])
def test_halves_of_a_register(size):
    whole, half = {32: ("%r", "%rs"), 64: ("%rd", "%r")}[size]
    out = torch.zeros(32, dtype=DTYPE[size // 8])
    value = 0x1234567890ABCDEF % (1 << size)
    body = f"""mov.u{size} {whole}1, {value};
        mov.b{size} {{{half}1, {half}2}}, {whole}1;
        mov.b{size} {{_, {half}3}}, {whole}1;
        xor.b{size // 2} {half}1, {half}1, {half}3;
        mov.b{size} {whole}2, {{{half}2, {half}1}};
        {element("%rd40", 0, size // 8)}
        st.global.b{size} [%rd40], {whole}2;"""
    execute(body, out)
    low, high = value % (1 << size // 2), value >> size // 2
    assert value_of(int(out[5]), f"u{size}") == (low ^ high) << size // 2 | high


def test_a_signed_parameter_fills_a_wider_register_with_its_sign():
    out, number = torch.zeros(2, dtype=torch.int64), (-100).to_bytes(4, "little", signed=True)
    body = """ld.param.u64 %rd1, [A];
        ld.param.s32 %rd2, [N];
        ld.param.u32 %rd3, [N];
        st.global.b64 [%rd1], %rd2;
        st.global.b64 [%rd1+8], %rd3;"""
    text = HEAD.format(parameters=".param .u64 A, .param .u32 N", threads=32, shared=16, body=body)
    run(parse(text), (1, 1, 1), 32, [out.data_ptr().to_bytes(8, "little"), number], {"A": out})
    assert out.tolist() == [-100, 2**32 - 100]


def test_special_registers():
    out = torch.zeros(2 * 3 * 64 * 4, dtype=torch.int32)
    body = """mov.u32 %r1, %ctaid.x;
        mov.u32 %r2, %ctaid.y;
        mov.u32 %r3, %nctaid.x;
        mov.u32 %r4, %ntid.x;
        mad.lo.s32 %r5, %r2, %r3, %r1;
        mad.lo.s32 %r5, %r5, %r4, %r63;
        mul.wide.s32 %rd1, %r5, 16;
        add.s64 %rd1, %rd1, %rd50;
        st.global.v4.b32 [%rd1], {%r1, %r2, %r63, %r4};"""
    execute(body, out, threads=64, grid=(2, 3, 1))
    want = [[x, y, t, 64] for y in range(3) for x in range(2) for t in range(64)]
    assert out.view(-1, 4).tolist() == want


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r1, %r2, %r3;",
        "add.rz.f32 %r1, %r2, %r3;",
        "brev.b32 %r1, %r2;",
        "setp.lt.and.s32 %p1, %r1, %r2, %p2;",
        "ld.volatile.global.b32 %r1, [%rd1];",
        "ld.global.v8.b32 {%r1, %r2}, [%rd1];",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%r1}, {%r2}, {%r3}, {%r4};",
        "cp.async.bulk.commit_group;",
        "bar.sync 1;",
        "bar.sync 0, 64;",
        "add.s32 %r1, %r2;",
        "add.s32 %r1, %r2, %rd3;",
        "add.f32 %r1, %r2, 3;",
        "add.f32 %r1, %r2, 0d3FF0000000000000;",
        "add.s32 %r1, %r2, 0x123456789;",
        "add.s32 %r1, %r64, 1;",
        "mov.u32 %r1, %clock;",
        "mov.u32 %r1, unknown;",
        "mov.u32 %r1, %laneid;",
        "ld.global.b32 %r1, [%r2];",
        "ld.global.b32 {%r1, %r2}, [%rd2];",
        "ld.global.b32 %rs1, [%rd2];",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31;",
        "cp.async.ca.shared.global [%r1], [%rd1], 2, %r2;",
        "bra somewhere;",
        "@%p64 ret;",
    ],
)
def test_unknown_forms_are_refused(line):
    with pytest.raises(Unsupported):
        execute(line, torch.zeros(32))


@pytest.mark.parametrize(
    "line", ["add.s32 %r1, %r2, -;", "add.s32 %r1 %r2;", "ADD %r1;", "{ ret; ret;", ".reg .b64 %r<64>;"]
)
def test_text_that_is_no_ptx_is_refused(line):
    with pytest.raises(Unsupported):
        parse(kernel(line, 1))


def test_registers_hold_no_zeros_at_first():
    out = torch.zeros(32)
    execute(element("%rd1", 0, 4) + "\nst.global.b32 [%rd1], %r1;", out)
    assert out.isnan().all()
