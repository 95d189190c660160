"""Scalar instructions: `TABLE` maps each accepted opcode to its types and to what it computes on arrays.

Rounding is that of the instruction set where that defines it. The approximate ones (ex2, rcp, sqrt, div.full)
give the nearest number here; hardware may be off by two units in the last place.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# PTX types and the numpy types of their values; 16-bit floats are bits.
NUMPY: dict[str, type] = {
    "pred": np.bool_,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
LEAST_NORMAL = np.finfo(np.float32).tiny


@dataclasses.dataclass(frozen=True)
class Op:
    to: str
    of: tuple[str, ...]
    function: Callable[..., np.ndarray]


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal float32 as zeros of their sign, as .ftz has it."""
    return np.where(np.abs(x) < LEAST_NORMAL, np.copysign(np.float32(0), x), x)


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b, rounded, and what that lost."""
    total = np.asarray(a + b)
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def to_odd(total: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """The neighbour of total + lost with an odd last bit, which a second rounding does not take for a tie."""
    bits = total.view(np.int64)
    inexact = (lost != 0) & (bits & 1 == 0) & np.isfinite(total)
    return (bits + np.where(inexact, np.where((lost > 0) == (total > 0), 1, -1), 0)).view(np.float64)


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once."""
    product, addend = np.multiply(a, b, dtype=np.float64), np.asarray(c, np.float64)  # the product is exact
    total = np.asarray(product + addend)
    tie = total.view(np.int64) & 0x1FFFFFFF == 0x10000000
    if (tie | ((np.abs(total) < LEAST_NORMAL) & (total != 0))).any():
        total = to_odd(*two_sum(product, addend))
    return total.astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c, rounded once (Boldo and Melquiond, 2008)."""

    def halves(x):
        big = x * 134217729.0  # 2^27 + 1
        high = big - (big - x)
        return high, x - high

    product = np.asarray(a * b)
    (a1, a0), (b1, b0) = halves(a), halves(b)
    lost = a0 * b0 - (((product - a1 * b1) - a0 * b1) - a1 * b0)
    high, low = two_sum(c, lost)
    total, rest = two_sum(product, high)
    exact = total + to_odd(*two_sum(low, rest))
    return np.where(np.isfinite(exact) & (exact != 0), exact, product + c)


def extreme(choose: np.ufunc, of_zeros: np.ufunc) -> Callable:
    """min or max of floats: the number where the other is NaN, and -0 is less than +0."""

    def function(a, b):
        out = choose(a, b)
        zeros = (a == 0) & (b == 0)
        if zeros.any():
            bits = f"u{out.dtype.itemsize}"
            out = np.where(zeros, of_zeros(a.view(bits), b.view(bits)).view(out.dtype), out)
        return out

    return function


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits, np.uint32) << 16).view(np.float32)


def to_f16(x: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16)).astype(np.uint16)


def from_f16(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, the nearest, ties away from zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + 0x1000) & 0xFFFFE000, bits).astype(np.uint32)


def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return high.astype(np.uint32) << 16 | low


def shift_left(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    bits = x.dtype.itemsize * 8
    return np.where(n < bits, x << (n % bits).astype(x.dtype), 0).astype(x.dtype)


def shift_right(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Of a signed number, the sign comes in."""
    bits = x.dtype.itemsize * 8
    if x.dtype.kind == "i":
        return x >> np.minimum(n, bits - 1).astype(x.dtype)
    return np.where(n < bits, x >> (n % bits).astype(x.dtype), 0).astype(x.dtype)


def extract(x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe: `length` bits from `position` on, with the sign of the last one if x is signed."""
    wide = x.astype(np.int64) >> (position & 0xFF).clip(max=63).astype(np.int64)
    drop = 64 - (length & 0xFF).clip(max=32).astype(np.int64)
    dropped = wide << (drop % 64)
    if x.dtype.kind == "u":
        dropped = dropped.view(np.uint64) >> (drop % 64).astype(np.uint64)
    else:
        dropped = dropped >> (drop % 64)
    return np.where(drop == 64, 0, dropped).astype(x.dtype)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """prmt: each nibble of the selector picks a byte of {b, a}; its high bit spreads the byte's sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros(np.broadcast_shapes(both.shape, selector.shape), np.uint32)
    for i in range(4):
        nibble = (selector >> (4 * i)) & 15
        byte = ((both >> ((nibble & 7) * 8).astype(np.uint64)) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(nibble & 8, (byte >> 7) * 0xFF, byte).astype(np.uint32)
        out |= byte << (8 * i)
    return out


def funnel_left(low: np.ndarray, high: np.ndarray, n: np.ndarray) -> np.ndarray:
    """shf.l.wrap: the upper half of {high, low} after a shift by n modulo 32."""
    both = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    return (both << (n & 31).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of integers, towards zero."""
    if a.dtype.kind == "u":
        return a // b
    return np.trunc(a.astype(np.float64) / b).astype(np.int64).astype(a.dtype)


def exp2(x: np.ndarray) -> np.ndarray:
    return np.exp2(x.astype(np.float64)).astype(np.float32)


def reciprocal_high(x: np.ndarray) -> np.ndarray:
    """rcp.approx.ftz.f64: the upper half of the bits."""
    return ((1.0 / x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


def wide(to: type) -> Callable:
    return lambda a, b: np.multiply(a, b, dtype=to)


def high(to: type) -> Callable:
    return lambda a, b: (np.multiply(a, b, dtype=to) >> 32).astype(a.dtype)


def convert(to: type, of: type | None = None) -> Callable:
    """`of`: the narrow type in the wider register."""
    return lambda x: (x if of is None else x.astype(of)).astype(to)


def toward_zero(to: type) -> Callable:
    """Whole numbers of `to`: the nearest one for what lies outside, 0 for NaN."""
    low, high = np.iinfo(to).min, np.iinfo(to).max

    def convert(x: np.ndarray) -> np.ndarray:
        inside = (x >= np.float64(low)) & (x < np.float64(high))
        beyond = np.where(x > 0, high, np.where(x < 0, low, 0))
        return np.where(inside, np.where(inside, x, 0).astype(to), beyond).astype(to)

    return convert


def same(x: np.ndarray) -> np.ndarray:
    return x


def _uniform(names: str, types: str, function: Callable, sources: int):
    for name in names.split():
        for kind in types.split():
            yield f"{name}.{kind}", Op(kind, (kind,) * sources, function)


def _arithmetic():
    yield from _uniform("add", "s16 s32 s64 f32 f64", np.add, 2)
    yield from _uniform("sub", "s16 s32 s64 f32 f64", np.subtract, 2)
    yield from _uniform("mul", "f32 f64", np.multiply, 2)
    yield from _uniform("mul.lo", "s32 s64", np.multiply, 2)
    yield from _uniform("mad.lo", "s32 s64", lambda a, b, c: a * b + c, 3)
    yield from _uniform("min", "s32 s64", np.minimum, 2)
    yield from _uniform("max", "s32 s64", np.maximum, 2)
    yield from _uniform("min", "f32", extreme(np.fmin, np.bitwise_or), 2)
    yield from _uniform("max", "f32", extreme(np.fmax, np.bitwise_and), 2)
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        yield from _uniform(f"{name}.rn", "f32 f64", function, 2)
    yield from _uniform("div", "s32 u32 u64", divide, 2)
    yield from _uniform("rem", "s32 u32", np.fmod, 2)
    yield from _uniform("div.full", "f32", np.divide, 2)
    yield from _uniform("div.rn", "f32 f64", np.divide, 2)
    yield from _uniform("neg", "s32 f32 f64", np.negative, 1)
    yield from _uniform("abs", "s32 f32 f64", np.abs, 1)
    yield from _uniform("abs.ftz", "f32", lambda x: flushed(np.abs(x)), 1)
    yield from _uniform("copysign", "f32 f64", lambda sign, x: np.copysign(x, sign), 2)
    yield from _uniform("fma.rn", "f32", fma32, 3)
    yield from _uniform("fma.rn", "f64", fma64, 3)
    ftz = lambda a, b, c: flushed(fma32(flushed(a), flushed(b), flushed(c)))  # noqa: E731
    yield from _uniform("fma.rn.ftz", "f32", ftz, 3)
    yield from _uniform("ex2.approx", "f32", exp2, 1)
    yield from _uniform("ex2.approx.ftz", "f32", lambda x: flushed(exp2(flushed(x))), 1)
    yield from _uniform("sqrt.approx.ftz", "f32", lambda x: np.sqrt(flushed(x)), 1)
    yield from _uniform("rcp.approx.ftz", "f32", lambda x: flushed(np.float32(1) / flushed(x)), 1)
    yield from _uniform("rcp.approx.ftz", "f64", reciprocal_high, 1)
    for sign, to in (("s", np.int64), ("u", np.uint64)):
        narrow, double = f"{sign}32", f"{sign}64"
        product = wide(to)
        yield f"mul.wide.{narrow}", Op(double, (narrow, narrow), product)
        yield f"mul.hi.{narrow}", Op(narrow, (narrow, narrow), high(to))
        yield (
            f"mad.wide.{narrow}",
            Op(double, (narrow, narrow, double), lambda a, b, c, product=product: product(a, b) + c),
        )


def _logic():
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        yield from _uniform(name, "pred b16 b32 b64", function, 2)
    yield from _uniform("not", "pred b16 b32 b64", np.invert, 1)
    yield "popc.b32", Op("b32", ("b32",), lambda x: np.bitwise_count(x).astype(np.uint32))
    for kind in ("b16", "b32", "b64"):
        yield f"shl.{kind}", Op(kind, (kind, "u32"), shift_left)
    for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
        yield f"shr.{kind}", Op(kind, (kind, "u32"), shift_right)
    for kind in ("s32", "u32"):
        yield f"bfe.{kind}", Op(kind, (kind, "u32", "u32"), extract)
    yield "prmt.b32", Op("b32", ("b32",) * 3, permute)
    yield "shf.l.wrap.b32", Op("b32", ("b32",) * 3, funnel_left)


def _choice():
    for kind in ("b16", "b32", "b64", "s32", "f32", "f64"):
        yield f"selp.{kind}", Op(kind, (kind, kind, "pred"), lambda a, b, p: np.where(p, a, b))
    compare = {
        "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
        "ge": np.greater_equal,
    }  # fmt: skip
    for name, function in compare.items():
        signs = "sub" if name in ("eq", "ne") else "su"
        for kind in (*(f"{sign}{bits}" for sign in signs for bits in (16, 32, 64)), "f32", "f64"):
            yield f"setp.{name}.{kind}", Op("pred", (kind, kind), _ordered(function, name, kind))
        yield f"setp.{name}.f16", Op("pred", ("b16", "b16"), _of_halves(_ordered(function, name, "f16")))
        for kind in ("f32", "f64"):
            either = lambda a, b, f=function: f(a, b) | unordered(a, b)  # noqa: E731
            yield f"setp.{name}u.{kind}", Op("pred", (kind, kind), either)
    for kind in ("f32", "f64"):
        yield f"setp.nan.{kind}", Op("pred", (kind, kind), unordered)
        yield f"setp.num.{kind}", Op("pred", (kind, kind), lambda a, b: ~unordered(a, b))


def _of_halves(function: Callable) -> Callable:
    return lambda a, b: function(from_f16(a), from_f16(b))


def _ordered(function: Callable, name: str, kind: str) -> Callable:
    """Comparisons of a NaN are false; numpy's "not equal" is not."""
    if name == "ne" and kind[0] == "f":
        return lambda a, b: function(a, b) & ~unordered(a, b)
    return function


def _moves():
    for kind in NUMPY:
        yield f"mov.{kind}", Op(kind, (kind,), same)
    yield "cvta.to.global.u64", Op("u64", ("u64",), same)
    for pair in ("s64.s32", "u64.u32", "u32.u64", "u32.u16", "u16.u32", "s32.s16", "s32.s64", "s64.s16"):
        to, of = pair.split(".")
        yield f"cvt.{to}.{of}", Op(to, (of,), convert(NUMPY[to]))
    yield "cvt.s16.s8", Op("s16", ("b16",), convert(np.int16, np.int8))
    yield "cvt.f64.f32", Op("f64", ("f32",), convert(np.float64))
    yield "cvt.rn.f32.f64", Op("f32", ("f64",), convert(np.float32))
    yield "cvt.rn.f32.s32", Op("f32", ("s32",), convert(np.float32))
    yield "cvt.rn.f32.u32", Op("f32", ("u32",), convert(np.float32))
    yield "cvt.rni.f32.f32", Op("f32", ("f32",), np.rint)
    yield "cvt.rzi.f32.f32", Op("f32", ("f32",), np.trunc)
    for to in ("s32", "s64"):
        yield f"cvt.rzi.{to}.f32", Op(to, ("f32",), toward_zero(NUMPY[to]))
    yield "cvt.f32.bf16", Op("f32", ("b16",), from_bf16)
    yield "cvt.f32.f16", Op("f32", ("b16",), from_f16)
    yield "cvt.rn.bf16.f32", Op("b16", ("f32",), to_bf16)
    yield "cvt.rn.f16.f32", Op("b16", ("f32",), to_f16)
    yield "cvt.rn.bf16x2.f32", Op("b32", ("f32", "f32"), lambda a, b: pack(to_bf16(a), to_bf16(b)))
    yield "cvt.rn.f16x2.f32", Op("b32", ("f32", "f32"), lambda a, b: pack(to_f16(a), to_f16(b)))
    yield "cvt.rna.tf32.f32", Op("b32", ("f32",), to_tf32)


TABLE: dict[str, Op] = {}
for _part in (_arithmetic, _logic, _choice, _moves):
    TABLE.update(_part())
