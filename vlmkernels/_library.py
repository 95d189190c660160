"""The `vlmkernels` namespace of torch.library: what an op is, and which kernel runs it on which device."""

import importlib.util
import platform
from collections.abc import Callable
from typing import Any

import torch

from vlmkernels import _native
from vlmkernels._version import __version__

LIB = torch.library.Library("vlmkernels", "DEF")
TRITON = importlib.util.find_spec("triton") is not None
_ops: list[str] = []
_kernels: dict[tuple[str, str], str] = {}  # (op, device) -> the kernel that runs


def define(
    schema: str,
    *,
    fake: Callable,
    reference: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: int = 0,
) -> Any:
    """Declare an op and return its default overload.

    `reference` runs on every device that has no kernel of its own. Without `backward` the op raises when a gradient through
    it is asked for. Under autocast the first `autocast` arguments, operands of matrix products, are cast; float64 never is.
    """
    name = schema.split("(", 1)[0]
    LIB.define(schema)
    if reference is not None:
        LIB.impl(name, torch.no_grad()(reference), "CompositeExplicitAutograd")
        _ops.append(name)
    torch.library.register_fake(f"vlmkernels::{name}", fake, lib=LIB)

    def refuse(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"vlmkernels.{name.removesuffix('_bwd')} has no second derivative")

    torch.library.register_autograd(f"vlmkernels::{name}", backward or refuse, setup_context=setup_context, lib=LIB)
    if has_kernel(name, "CPU"):
        _kernels[name, "CPU"] = f"C++ ({_native.extension.build()['isa']})"  # type: ignore[union-attr]
    op = getattr(torch.ops.vlmkernels, name).default
    for device in ("CPU", "CUDA") if autocast else ():
        LIB.impl(name, _under_autocast(op, device, autocast), f"Autocast{device}")
    return op


def _under_autocast(op: Any, device: str, operands: int) -> Callable:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device.lower())
        cast = [x if x.dtype == torch.float64 else x.to(dtype) for x in args[:operands]]
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast, *args[operands:])

    return cast_and_call


def has_kernel(name: str, device: str) -> bool:
    """Whether a kernel other than the reference is registered for the dispatch key `device`."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"vlmkernels::{name}", device)


def kernel(name: str, device: str, fn: Callable, label: str) -> None:
    """Run op `name` with `fn` on `device` unless the extension brought a kernel for it; `label` is what info() shows."""
    if not has_kernel(name, device):
        LIB.impl(name, torch.no_grad()(fn), device)
        _kernels[name, device] = label


class Info(dict):
    """What runs where; str() is a table for people."""

    def __str__(self) -> str:
        rows = [("op", *self["devices"]), *((op, *where.values()) for op, where in self["ops"].items())]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        facts = [f"{name}: {value}" for name, value in {**self["versions"], **self["cpu"], **self["notes"]}.items() if value]
        return "\n".join([*table, "", *facts])


def info() -> Info:
    """Per op and device the kernel that runs here, why a faster one does not, the instruction set, and versions."""
    build = _native.extension.build() if _native.extension else {}  # type: ignore[attr-defined]
    devices = ("CPU", "CUDA")
    notes = {"C++ kernels": _native.why_not or "loaded"}
    if not torch.cuda.is_available():
        notes["CUDA"] = "no device here" + ("" if torch.version.cuda else "; this torch has no CUDA")
    if not TRITON:
        notes["Triton"] = "not installed: CUDA tensors run the reference"
    ops = {op: {d: _kernels.get((op, d), "reference") for d in devices} for op in _ops}
    versions = {"vlmkernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    cpu = {"instruction set": build.get("isa", ""), "tile products": build.get("tile_gemm", ""), "threads": str(torch.get_num_threads())}
    return Info(devices=devices, ops=ops, versions=versions, cpu=cpu, notes=notes)
