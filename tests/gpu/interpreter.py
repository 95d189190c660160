"""Triton kernels on the CPU, in process: `with interpreting(): kernel[grid](...)` on CPU tensors.

Triton's own interpreter computes bfloat16 and 8-bit floats on the raw bits, truncates where hardware rounds
to nearest even, spreads a NaN where hardware takes the other number for a maximum, and stays switched on once
used. Here every operation on them widens to float32 and rounds
its result, TF32 products drop the bits that tensor cores drop, and leaving the context restores everything,
so that compiling works before and after. `interpreting(sanitize=True)` checks every access: sanitizer.py.
"""

import contextlib
import dataclasses
import inspect
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from .sanitizer import Builder, Handle, Sanitizer

FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
NARROW = {tl.bfloat16, *FP8}


def widen(bits: np.ndarray, dtype=tl.bfloat16) -> np.ndarray:
    """Bits of bfloat16, e4m3 or e5m2 as float32."""
    if dtype == tl.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return torch.from_numpy(np.array(bits)).view(FP8[dtype]).float().numpy()


def narrow(values: np.ndarray, dtype=tl.bfloat16) -> np.ndarray:
    """Values as bits of bfloat16, e4m3 or e5m2, rounded to nearest even; 8 bits saturate, infinities too."""
    values = np.array(values, dtype=np.float32)
    if dtype == tl.bfloat16:
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    largest = torch.finfo(FP8[dtype]).max
    return torch.from_numpy(np.clip(values, -largest, largest)).to(FP8[dtype]).view(torch.uint8).numpy()


def truncate_to_tf32(values: np.ndarray) -> np.ndarray:
    """What a tensor core reads of a float32: ten bits of mantissa."""
    return (np.array(values, dtype=np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def multiply_tf32x3(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """What Triton makes of "tf32x3": factors in two parts each, every product of parts but the least."""

    def split(values):  # nearest, ties away from zero
        high = ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
        high = np.where(np.isfinite(values), high, values)
        return (torch.from_numpy(part) for part in (high, truncate_to_tf32(values - high)))

    (a, a_low), (b, b_low) = split(np.ascontiguousarray(x)), split(np.ascontiguousarray(y))
    low = a_low @ b + a @ b_low
    return (low.where(~low.isnan(), 0) + a @ b).numpy()


def _is_narrow(*handles) -> bool:
    return any(x.dtype.scalar in NARROW for x in handles)


def _values(handle) -> np.ndarray:
    return widen(handle.data, handle.dtype.scalar) if _is_narrow(handle) else handle.data


def _handle(values: np.ndarray, dtype):
    dtype = dtype.scalar
    data = narrow(values, dtype) if dtype in NARROW else np.asarray(values).astype(stock._get_np_dtype(dtype))
    return Handle(data, dtype)


_COMPARE = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}
_BITWISE = {np.bitwise_and, np.bitwise_or, np.bitwise_xor}


def _numerics(tf32: bool) -> dict:
    """Methods of the interpreter's builder with the arithmetic of the hardware."""
    original = {name: getattr(Builder, name) for name in ("binary_op", "unary_op", "ternary_op", "cast_impl")}
    fp_to_fp, dot = Builder.create_fp_to_fp, Builder.create_dot

    def binary_op(self, lhs, rhs, op):
        if op in _COMPARE:
            return Handle(op(_values(lhs), _values(rhs)), tl.int1)
        if not _is_narrow(lhs) or op in _BITWISE:
            return original["binary_op"](self, lhs, rhs, op)
        return _handle(op(_values(lhs), _values(rhs)), lhs.dtype)

    def unary_op(self, arg, op):
        if not _is_narrow(arg):
            return original["unary_op"](self, arg, op)
        return _handle(op(_values(arg)), arg.dtype)

    def ternary_op(self, first, second, third, op):
        if not _is_narrow(third) or op is np.where:  # a selection moves bits
            return original["ternary_op"](self, first, second, third, op)
        return _handle(op(_values(first), _values(second), _values(third)), third.dtype)

    def create_fma(self, x, y, z):
        exact = np.longdouble if z.dtype.scalar == tl.float64 else np.float64
        return _handle(_values(x).astype(exact) * _values(y) + _values(z), z.dtype)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def cast_impl(self, src, dst_type):
        if _is_narrow(src) or dst_type.scalar in NARROW:
            return _handle(_values(src), dst_type)
        return original["cast_impl"](self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding):
        if rounding == stock._ir.ROUNDING_MODE.RTZ:
            return fp_to_fp(self, src, dst_type, rounding)
        return _handle(_values(src), dst_type)

    def create_dot(self, a, b, acc, precision, *rest):
        x, y = _values(a), _values(b)
        if acc.dtype.scalar not in (tl.float32, tl.float64) or x.dtype.kind != "f":
            return dot(self, a, b, acc, precision, *rest)
        if tf32 and x.dtype == np.float32 and not _is_narrow(a, b):
            if precision == stock._ir.INPUT_PRECISION.TF32x3:
                return Handle(multiply_tf32x3(x, y) + acc.data, acc.dtype.scalar)
            if precision == stock._ir.INPUT_PRECISION.TF32:
                x, y = truncate_to_tf32(x), truncate_to_tf32(y)
        x, y = (torch.from_numpy(np.array(v, dtype=acc.data.dtype, order="C")) for v in (x, y))
        return Handle((x @ y).numpy() + acc.data, acc.dtype.scalar)

    arithmetic = (binary_op, unary_op, ternary_op, create_fma, create_minnumf, create_maxnumf, create_dot)
    return {method.__name__: method for method in (*arithmetic, cast_impl, create_fp_to_fp)}


def _reductions():
    """Reductions and scans of bfloat16 and 8 bits run in float32."""
    original = stock.ReduceScanOpInterface.apply

    def cast(tensor, dtype):
        shaped = tensor.type.with_element_ty(dtype) if tensor.type.is_block() else dtype
        return tl.tensor(_handle(_values(tensor.handle), dtype), shaped)

    def apply(self, tensors):
        if not isinstance(tensors, tuple):
            return apply(self, (tensors,))[0]
        wide = tuple(cast(t, tl.float32) if t.dtype.scalar in NARROW else t for t in tensors)
        given = (t.dtype.scalar for t in tensors)
        return tuple(
            cast(out, dtype) if dtype in NARROW and out.dtype.scalar == tl.float32 else out
            for out, dtype in zip(original(self, wide), given, strict=True)
        )

    return apply


def _scalars_as_indices():
    """Loop bounds from tensors of one element, which numpy 2.4 refuses to Triton 3.6 and before."""
    original = stock._patch_lang_tensor

    def patch(tensor, *scope):
        original(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    return patch


@contextlib.contextmanager
def _language() -> Iterator[None]:
    """Triton's language as the interpreter patches it, until the end of the context.

    Triton takes back what it patches at a launch from release 3.6 on, and nowhere what it patches for device
    functions.
    """
    types_of = ("tensor", "dtype", "condition", "tensor_descriptor_base")
    places = [tl, tl.core, tl.math, *(getattr(tl.core, name) for name in types_of if hasattr(tl.core, name))]
    before = [(place, dict(vars(place))) for place in places]
    try:
        stock._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        yield
    finally:
        for place, names in before:
            for name in set(vars(place)) - set(names):
                delattr(place, name)
            for name, value in names.items():
                if vars(place)[name] is not value:
                    setattr(place, name, value)


_compiled_run = JITFunction.run
# Globals of the module of a kernel, by identity, and the names that the interpreter needs there
_borrowed: dict[int, tuple[dict, dict]] = {}


def _rewritten(fn):
    """The kernel as the interpreter runs it."""
    if fn in stock.InterpretedFunction.rewritten_fn:
        return stock.InterpretedFunction.rewritten_fn[fn]
    before = set(fn.__globals__)
    out = stock.InterpretedFunction(fn).rewrite()
    added = {name: fn.__globals__[name] for name in set(fn.__globals__) - before}
    if added:  # a later kernel adds what has come to Triton's module meanwhile, like a registry of warnings
        _borrowed.setdefault(id(fn.__globals__), (fn.__globals__, {}))[1].update(added)
    return out


@contextlib.contextmanager
def interpreting(*, sanitize: bool = False, tf32: bool = True) -> Iterator[None]:
    """Run Triton kernels launched inside on the CPU; `tf32=False` keeps all bits where TF32 is allowed."""
    if JITFunction.run is not _compiled_run:
        raise RuntimeError("interpreting() does not nest")

    def call(self, *args, **kwargs):
        return _rewritten(self.fn)(*args, **kwargs)

    def run(self, *args, grid, warmup=False, **kwargs):
        fn, builder = _rewritten(self.fn), stock.interpreter_builder
        given = {name: value for name, value in kwargs.items() if name in self.arg_names}
        arguments = inspect.getcallargs(fn, *args, **given)
        constants = {p.name for p in self.params if p.is_constexpr}
        values = {n: x if n in constants else stock._implicit_cvt(x) for n, x in arguments.items()}
        grid = (*(grid(arguments) if callable(grid) else grid), 1, 1)[:3]
        builder.set_grid_dim(*grid)
        watched = sanitizer.launch(arguments) if sanitizer else contextlib.nullcontext()
        with watched, np.errstate(all="ignore"):
            for program in np.ndindex(grid):
                builder.set_grid_idx(*program)
                fn(**values)

    sanitizer = Sanitizer() if sanitize else None
    with contextlib.ExitStack() as stack:
        for borrowed, names in _borrowed.values():
            borrowed.update(names)
        stack.callback(_give_back)
        methods = _numerics(tf32) | (sanitizer.methods() if sanitizer else {})
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(Builder, name, method))
        stack.enter_context(mock.patch.object(stock.ReduceScanOpInterface, "apply", _reductions()))
        stack.enter_context(mock.patch.object(stock, "_patch_lang_tensor", _scalars_as_indices()))
        stack.enter_context(_language())
        stack.enter_context(mock.patch.object(JITFunction, "__call__", call))
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        if sanitizer:
            options = dataclasses.replace(stock.interpreter_builder.options, debug=True)
            stack.enter_context(mock.patch.object(stock.interpreter_builder, "options", options))
            stack.enter_context(sanitizer)
        yield


def _give_back() -> None:
    for borrowed, names in _borrowed.values():
        for name in names:
            borrowed.pop(name, None)
