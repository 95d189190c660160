"""Triton kernels on the CPU, in process: `with interpreting(): kernel[grid](...)` on CPU tensors.

Triton's own interpreter computes bfloat16 on the raw bits, truncates where hardware rounds to nearest even,
and stays switched on once used. Here every bfloat16 operation widens to float32 and rounds its result, TF32
products drop the bits that tensor cores drop, and leaving the context restores everything, so that compiling
works before and after.

`interpreting(sanitize=True)` also checks each access of a kernel against the views it was launched with:
accesses outside a view (the padding of a strided tensor included), misaligned ones, reads of memory that
nothing wrote since torch.empty, and two programs of one launch touching the same byte without atomics. Signed
overflow of integers and `tl.device_assert` are checked too.
"""

import contextlib
import dataclasses
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

Builder = stock.InterpreterBuilder
Handle = stock.TensorHandle


class Violation(AssertionError):
    """A kernel touched memory in a way that a GPU does not forgive."""


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """Values as bfloat16 bits, rounded to nearest even."""
    bits = np.array(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


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


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle) -> np.ndarray:
    return widen(handle.data) if _is_bf16(handle) else handle.data


def _handle(values: np.ndarray, dtype):
    dtype = dtype.scalar
    data = narrow(values) if dtype == tl.bfloat16 else np.asarray(values).astype(stock._get_np_dtype(dtype))
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
        if not _is_bf16(lhs) or op in _BITWISE:
            return original["binary_op"](self, lhs, rhs, op)
        return _handle(op(_values(lhs), _values(rhs)), lhs.dtype)

    def unary_op(self, arg, op):
        return _handle(op(_values(arg)), arg.dtype) if _is_bf16(arg) else original["unary_op"](self, arg, op)

    def ternary_op(self, first, second, third, op):
        if not _is_bf16(third) or op is np.where:  # a selection moves bits
            return original["ternary_op"](self, first, second, third, op)
        return _handle(op(_values(first), _values(second), _values(third)), third.dtype)

    def create_fma(self, x, y, z):
        exact = np.longdouble if z.dtype.scalar == tl.float64 else np.float64
        return _handle(_values(x).astype(exact) * _values(y) + _values(z), z.dtype)

    def cast_impl(self, src, dst_type):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar):
            return _handle(_values(src), dst_type)
        return original["cast_impl"](self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding):
        if tl.bfloat16 in (src.dtype.scalar, dst_type.scalar) and rounding != stock._ir.ROUNDING_MODE.RTZ:
            return _handle(_values(src), dst_type)
        return fp_to_fp(self, src, dst_type, rounding)

    def create_dot(self, a, b, acc, precision, *rest):
        x, y = _values(a), _values(b)
        if acc.dtype.scalar not in (tl.float32, tl.float64) or x.dtype.kind != "f":
            return dot(self, a, b, acc, precision, *rest)
        if tf32 and x.dtype == np.float32 and not _is_bf16(a):
            if precision == stock._ir.INPUT_PRECISION.TF32x3:
                return Handle(multiply_tf32x3(x, y) + acc.data, acc.dtype.scalar)
            if precision == stock._ir.INPUT_PRECISION.TF32:
                x, y = truncate_to_tf32(x), truncate_to_tf32(y)
        x, y = (torch.from_numpy(np.array(v, dtype=acc.data.dtype, order="C")) for v in (x, y))
        return Handle((x @ y).numpy() + acc.data, acc.dtype.scalar)

    methods = (binary_op, unary_op, ternary_op, create_fma, cast_impl, create_fp_to_fp, create_dot)
    return {method.__name__: method for method in methods}


def _reductions():
    """Reductions and scans of bfloat16 tensors run in float32."""
    original = stock.ReduceScanOpInterface.apply

    def cast(tensor, dtype):
        shaped = tensor.type.with_element_ty(dtype) if tensor.type.is_block() else dtype
        return tl.tensor(_handle(_values(tensor.handle), dtype), shaped)

    def apply(self, tensors):
        if not isinstance(tensors, tuple):
            return apply(self, (tensors,))[0]
        narrowed = [t.dtype.scalar == tl.bfloat16 for t in tensors]
        wide = tuple(cast(t, tl.float32) if n else t for t, n in zip(tensors, narrowed, strict=True))
        pairs = zip(original(self, wide), narrowed, strict=True)
        return tuple(cast(t, tl.bfloat16) if n and t.dtype.scalar == tl.float32 else t for t, n in pairs)

    return apply


def _scalars_as_indices():
    """Loop bounds from tensors of one element, which numpy 2.4 refuses to Triton 3.6."""
    original = stock._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch


def _view_offsets(tensor: torch.Tensor) -> np.ndarray:
    """Byte offsets of the elements in the storage."""
    offsets = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(size) * stride
    return (offsets.reshape(-1).numpy() + tensor.storage_offset()) * tensor.element_size()


class _Buffer:
    """One storage during one launch; programs are numbered, -1 is nobody and -2 several."""

    def __init__(self, storage: torch.UntypedStorage, written: np.ndarray | None):
        self.low, size = storage.data_ptr(), storage.nbytes()
        self.high = self.low + size
        self.in_view = np.zeros(size, bool)
        self.written = np.ones(size, bool) if written is None else written
        self.writer = np.full(size, -1, np.int64)
        self.reader = np.full(size, -1, np.int64)

    def add_view(self, tensor: torch.Tensor) -> None:
        self.in_view[(_view_offsets(tensor)[:, None] + np.arange(tensor.element_size())).ravel()] = True

    def touch(self, kind: str, at: np.ndarray, program: int) -> None:
        """Check and note an access to the bytes `at`."""
        self._refuse(~self.in_view[at], at, f"{kind} outside the view", program)
        if kind != "store":
            self._refuse(~self.written[at], at, f"{kind} of uninitialised memory", program)
        if kind == "atomic":
            return
        others = (self.writer[at] != -1) & (self.writer[at] != program)
        if kind == "load":
            self._refuse(others, at, "race: load of what another program stores", program)
            self.reader[at] = np.where(np.isin(self.reader[at], (-1, program)), program, -2)
        else:
            self._refuse(others, at, "race: two programs store", program)
            others = (self.reader[at] != -1) & (self.reader[at] != program)
            self._refuse(others, at, "race: store to what another program loads", program)
            if np.unique(at).size != at.size:
                raise Violation(f"race: two lanes of one store hit the same byte (program {program})")
            self.writer[at], self.written[at] = program, True

    @staticmethod
    def _refuse(bad: np.ndarray, at: np.ndarray, what: str, program: int) -> None:
        if bad.any():
            raise Violation(
                f"{what}, {int(bad.sum())} bytes, first at offset {int(at[bad][0])} (program {program})"
            )


class _Sanitizer(TorchDispatchMode):
    """Knows which bytes torch.empty left unwritten, and watches the accesses of the running launch."""

    def __init__(self) -> None:
        super().__init__()
        self.unwritten: dict[
            int, tuple[torch.Tensor, np.ndarray]
        ] = {}  # storage -> owner kept alive, written bytes
        self.buffers: list[_Buffer] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.buffers is not None:  # the interpreter's own bookkeeping
            return out
        name = func._schema.name.removeprefix("aten::")
        if name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided") and out.numel():
            storage = out.untyped_storage()
            self.unwritten[storage.data_ptr()] = (out, np.zeros(storage.nbytes(), bool))
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in value if isinstance(value, list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor):
                    self.unwritten.pop(tensor.untyped_storage().data_ptr(), None)
        return out

    @contextlib.contextmanager
    def launch(self, arguments) -> Iterator[None]:
        found: dict[int, _Buffer] = {}
        self.buffers = []
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                key = storage.data_ptr()
                if key not in found:
                    found[key] = _Buffer(storage, self.unwritten[key][1] if key in self.unwritten else None)
                found[key].add_view(tensor)
        self.buffers = list(found.values())
        try:
            yield
        finally:
            self.buffers = None

    def access(self, kind: str, pointers, mask) -> None:
        builder = stock.interpreter_builder
        x, y, z = builder.grid_idx
        program = (x * builder.grid_dim[1] + y) * builder.grid_dim[2] + z
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        on = np.broadcast_to(np.asarray(mask.data, dtype=bool), pointers.data.shape)
        addresses = pointers.data[on].astype(np.int64)
        if (addresses % size).any():
            raise Violation(f"misaligned {kind} of {size} bytes (program {program})")
        left = np.ones(addresses.size, bool)
        for buffer in self.buffers or ():
            inside = (addresses >= buffer.low) & (addresses + size <= buffer.high)
            if inside.any():
                at = (addresses[inside][:, None] - buffer.low + np.arange(size)).ravel()
                buffer.touch(kind, at, program)
                left &= ~inside
        if left.any():
            raise Violation(
                f"{kind} out of bounds of every argument, {int(left.sum())} lanes (program {program})"
            )

    def methods(self) -> dict:
        load, store = Builder.create_masked_load, Builder.create_masked_store
        rmw, cas = Builder.create_atomic_rmw, Builder.create_atomic_cas
        everywhere = Handle(np.array([True]), tl.int1)

        def create_masked_load(builder, pointers, mask, *rest, **options):
            self.access("load", pointers, mask)
            return load(builder, pointers, mask, *rest, **options)

        def create_masked_store(builder, pointers, value, mask, *rest, **options):
            self.access("store", pointers, mask)
            return store(builder, pointers, value, mask, *rest, **options)

        def create_atomic_rmw(builder, op, pointers, value, mask, *rest):
            self.access("atomic", pointers, mask)
            return rmw(builder, op, pointers, value, mask, *rest)

        def create_atomic_cas(builder, pointers, *rest):
            self.access("atomic", pointers, everywhere)
            return cas(builder, pointers, *rest)

        patched = (create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas)
        return {method.__name__: method for method in patched}


_compiled_run = JITFunction.run
_borrowed: dict[
    int, tuple[dict, dict]
] = {}  # globals of a kernel's module -> the names the interpreter needs there


def _rewritten(fn):
    """The kernel as the interpreter runs it."""
    if fn in stock.InterpretedFunction.rewritten_fn:
        return stock.InterpretedFunction.rewritten_fn[fn]
    before = set(fn.__globals__)
    out = stock.InterpretedFunction(fn).rewrite()
    added = {name: fn.__globals__[name] for name in set(fn.__globals__) - before}
    if added:
        _borrowed[id(fn.__globals__)] = (fn.__globals__, added)
    return out


@contextlib.contextmanager
def interpreting(*, sanitize: bool = False, tf32: bool = True) -> Iterator[None]:
    """Run Triton kernels launched inside on the CPU; `tf32=False` keeps all bits where TF32 is allowed."""
    if JITFunction.run is not _compiled_run:
        raise RuntimeError("interpreting() does not nest")

    def call(self, *args, **kwargs):
        return _rewritten(self.fn)(*args, **kwargs)

    def run(self, *args, grid, warmup=False, **kwargs):
        _rewritten(self.fn)
        interpreted = stock.InterpretedFunction(self.fn)
        watched = sanitizer.launch([*args, *kwargs.values()]) if sanitizer else contextlib.nullcontext()
        try:
            with watched, np.errstate(all="ignore"):
                return interpreted.run(*args, grid=grid, warmup=warmup, **kwargs)
        except stock.InterpreterError as error:
            raise (error.__cause__ if isinstance(error.__cause__, Violation) else error) from None

    sanitizer = _Sanitizer() if sanitize else None
    with contextlib.ExitStack() as stack:
        for borrowed, names in _borrowed.values():
            borrowed.update(names)
        stack.callback(_give_back)
        methods = _numerics(tf32) | (sanitizer.methods() if sanitizer else {})
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(Builder, name, method))
        stack.enter_context(mock.patch.object(stock.ReduceScanOpInterface, "apply", _reductions()))
        stack.enter_context(mock.patch.object(stock, "_patch_lang_tensor", _scalars_as_indices()))
        # Triton patches its language at a launch, and for device functions without undoing it: once is enough
        stack.callback(
            stock._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})).restore
        )
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
