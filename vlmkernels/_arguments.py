"""Checks of the arguments of public functions: their types, and the dtypes that kernels support."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import numpy
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGRAL = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_KNOWN = frozenset(FLOATS + INTEGRAL)
FLOATS_LISTED = "float32, float64, bfloat16 or float16"

_Function = TypeVar("_Function", bound=Callable)
_ALSO: dict[type, tuple[type, ...]] = {  # what counts as a type
    int: (Integral, torch.SymInt),
    float: (Real, torch.SymInt, torch.SymFloat),
    bool: (int, numpy.bool_, torch.SymBool),
}


def public(op: _Function) -> _Function:
    """A failing call of `op` raises a TypeError that names the arguments of a wrong type."""

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return op(*args, **kwargs)
        except Exception as error:
            faults = [] if str(error).startswith(f"{op.__name__}: ") else _kind_faults(op, args, kwargs)
            if not faults:
                raise
            raise TypeError(f"{op.__name__}: " + "; ".join(faults))

    return call  # type: ignore[return-value]


def is_number(value: object) -> bool:
    return isinstance(value, (float, *_ALSO[float]))


def dense(t: Tensor) -> bool:
    return t.layout is torch.strided and not t.is_nested


def known(dtype: torch.dtype) -> bool:
    """Whether kernels support it for some argument."""
    return dtype in _KNOWN


def dtype_faults(tensors: Mapping[str, Tensor], operands: Mapping[str, Tensor] | None = None) -> list[str]:
    """Errors unless kernels support all dtypes, and `operands` have the same or get it from autocast."""
    for t in tensors.values():
        if t.dtype not in FLOATS:
            return [f"{_listed(tensors)} must be {FLOATS_LISTED}, got {_dtypes(tensors)}"]
    first = None
    for t in operands.values() if operands else ():
        if first is None:
            first = t
        elif t.dtype != first.dtype and not under_autocast(t.device.type):
            return [f"{_listed(operands or {})} must have the same dtype, got {_dtypes(operands or {})}"]
    return []


def device_faults(tensors: Mapping[str, Tensor | None]) -> list[str]:
    first = None
    for t in tensors.values():
        if t is None:
            continue
        if first is None:
            first = t.device
        elif t.device != first:
            devices = sorted({str(t.device) for t in tensors.values() if t is not None})
            return [f"all tensors must be on the same device, got {devices}"]
    return []


def int64_faults(name: str, value: int) -> list[str]:
    return [] if -(2**63) <= value < 2**63 else [f"{name} must fit in int64, got {value}"]


def _listed(names: Mapping[str, object]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _dtypes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which the ops form products of `x`: autocast's if enabled, otherwise that of `x`."""
    device = x.device.type
    if device not in ("cpu", "cuda") or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return x.dtype
    return torch.get_autocast_dtype(device)


def under_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _kind_faults(op: Callable, args: tuple, kwargs: dict[str, Any]) -> list[str]:
    try:
        given = inspect.signature(op).bind(*args, **kwargs).arguments
    except TypeError:  # Python's own message names them
        return []
    hints = get_type_hints(op)
    return [
        f"{name} must be {_type_text(hints[name])}, got {_value_text(value)}"
        for name, value in given.items()
        if not _is_of(value, hints[name])
    ]


def _is_of(value: object, hint: Any) -> bool:
    if get_origin(hint) is UnionType:
        return any(_is_of(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        parts = get_args(hint)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_is_of, value, parts))
    if get_origin(hint) is Sequence:
        (part,) = get_args(hint)
        return isinstance(value, (list, tuple)) and all(_is_of(each, part) for each in value)
    return isinstance(value, (hint, *_ALSO.get(hint, ()))) and (not isinstance(value, Tensor) or dense(value))


def _type_text(hint: Any) -> str:
    if get_origin(hint) is UnionType:
        return " or ".join(map(_type_text, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"({', '.join(map(_type_text, get_args(hint)))})"
    if get_origin(hint) is Sequence:
        return f"list of {', '.join(map(_type_text, get_args(hint)))}"
    return {Tensor: "dense Tensor", NoneType: "None"}.get(hint, hint.__name__)


def _value_text(value: object) -> str:
    if isinstance(value, list) and value:
        return f"list of {' and '.join(sorted(set(map(_value_text, value))))}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_value_text, value))})"
    if isinstance(value, Tensor) and not dense(value):
        return f"a tensor that is {'nested' if value.is_nested else value.layout}"
    return type(value).__name__
