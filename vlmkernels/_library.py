"""The `vlmkernels` namespace of torch.library: declares ops and registers their kernels per device."""

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlmkernels import _native
from vlmkernels._arguments import dense, known

try:
    from torch.utils.flop_counter import register_flop_formula
except Exception:  # it imports Triton: one that does not work must not stop `import vlmkernels`
    register_flop_formula = None  # type: ignore[assignment]


def _refuse_transforms(name: str, args: tuple) -> None:
    tensors = [x for x in args if isinstance(x, Tensor)]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(f"vlmkernels.{name} has no forward-mode derivative (jvp, dual tensors)")
    if torch._C._are_functorch_transforms_active() and any(x.requires_grad for x in tensors):
        raise RuntimeError(f"vlmkernels.{name} has no derivative under torch.func; use torch.autograd")


LIB = torch.library.Library("vlmkernels", "DEF")
try:
    importlib.import_module("vlmkernels.triton._tiles")  # the kernels that others are made of
    TRITON, WHY_NO_TRITON = True, ""
except Exception as error:  # an installed Triton that does not work must not stop `import vlmkernels`
    TRITON, WHY_NO_TRITON = False, f"{error}: CUDA tensors run the reference"
OPS: list[str] = []
KERNELS: dict[tuple[str, str], str] = {}  # (op, device) -> the kernel that runs


def define(
    schema: str,
    *,
    fake: Callable,
    flops: Callable[..., int],
    reference: Callable | None = None,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: Sequence[str] | None = None,
) -> Any:
    """Declare an op and return its default overload.

    `reference` runs on every device without a kernel. Its results must have the shapes of the kernels',
    since graphs move between installs. ``backward(ctx, needs, *grads)`` is called if any gradient is needed
    and any incoming one is not None; `needs` maps the name of each argument to whether its gradient is
    needed, and the returned mapping has the gradients by name. Without it, a backward through the op raises.
    Under autocast the arguments named in `autocast`, operands of matrix products, are cast unless they are
    float64, and a kernel composed of other ops runs without it. `flops`: see `define_part`.
    """
    name = _declare(schema, flops)
    if reference is not None:
        LIB.impl(name, torch.no_grad()(_checked(name, reference)), "CompositeExplicitAutograd")
        OPS.append(name)
    torch.library.register_fake(f"vlmkernels::{name}", _on_same_device(name, fake), lib=LIB)

    op = getattr(torch.ops.vlmkernels, name).default
    names = [argument.name for argument in op._schema.arguments]

    LIB.impl(name, _differentiable(op, names, setup_context, backward), "Autograd", with_keyset=True)
    if _native.extension is not None:
        build = _native.extension.build()
        for device, language, what in (("CPU", "C++", "isa"), ("CUDA", "CUDA C++", "cuda")):
            if has_kernel(name, device):
                KERNELS[name, device] = f"{language} ({build[what]})"
    for device in ("CPU", "CUDA") if autocast is not None else ():
        operands = [names.index(operand) for operand in autocast or ()]
        LIB.impl(name, _under_autocast(op, device, operands), f"Autocast{device}")
    return op


def _differentiable(
    op: Any, names: Sequence[str], setup_context: Callable | None, backward: Callable | None
) -> Callable:
    """The kernel of `op` above all devices: that of the device, recorded for torch.autograd in reverse.

    As torch.library.register_autograd makes it, with less to do in a call.
    """
    transforms_active, below = torch._C._are_functorch_transforms_active, torch._C._AutoDispatchBelowAutograd
    after_autograd = torch._C._after_autograd_keyset
    whose = op._opname.removesuffix("_bwd")

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, keyset = args  # last, so that ctx.needs_input_grad is in the order of the op's arguments
        with below():
            result = op.redispatch(keyset, *inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, result)
        return result

    def derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if backward is None:
            raise RuntimeError(f"vlmkernels.{whose} has no second derivative")
        needed = ctx.needs_input_grad[:-1]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        given = backward(ctx, dict(zip(names, needed, strict=True)), *grads)
        return *(given.get(name) if need else None for name, need in zip(names, needed, strict=True)), None

    formula = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    recorded: Any = type(f"vlmkernels_{op._opname}", (torch.autograd.Function,), formula)

    def autograd(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or transforms_active():
            _refuse_transforms(whose, args)
        keyset = keyset & after_autograd
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return recorded.apply(*args, keyset)
        with below():
            return op.redispatch(keyset, *args)

    return autograd


def empty_grads(tensors: Iterable[Tensor], needs: Iterable[bool]) -> tuple[Tensor, ...]:
    """Memory for the gradients of some tensors; one that is not needed has size 0."""
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip(tensors, needs, strict=True))


def _checked(name: str, kernel: Callable) -> Callable:
    """A kernel in Python, which refuses tensors of layouts and dtypes for which it is not defined."""

    def checked(*args: Any) -> Any:
        foreign = {
            i: x for i, x in enumerate(args) if isinstance(x, Tensor) and not (dense(x) and known(x.dtype))
        }
        if foreign:
            declared = getattr(torch.ops.vlmkernels, name).default._schema.arguments
            found = "; ".join(f"{declared[i].name} is {x.layout} of {x.dtype}" for i, x in foreign.items())
            raise ValueError(f"{name}: there is no kernel for these tensors: {found}")
        return kernel(*args)

    return checked


def _on_same_device(name: str, fake: Callable) -> Callable:
    """A shape function. A call with one meta tensor among others is dispatched here and is refused."""

    def checked(*args: Any) -> Any:
        devices = {x.device for x in args if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise ValueError(
                f"{name}: all tensors must be on the same device, got {sorted(map(str, devices))}"
            )
        return fake(*args)

    return checked


def define_part(schema: str, *, flops: Callable[..., int]) -> Any:
    """Declare an op that others are made of and return its default overload.

    It has only kernels: no shape function, no reference, no gradient (python/internal.cpp refuses one).
    `flops` gets the arguments of a call, with shapes instead of tensors, and returns what
    `torch.utils.flop_counter.FlopCounterMode` counts for the plain composition in PyTorch: 2 m n k for each
    matrix product and nothing else. Attention counts as scaled dot-product attention of all keys.
    """
    name = _declare(schema, flops)
    op = getattr(torch.ops.vlmkernels, name).default
    if not has_kernel(name, "Autograd"):
        LIB.impl(name, _without_derivative(op), "Autograd", with_keyset=True)
    return op


def _without_derivative(op: Any) -> Callable:
    """The kernel above all devices of a part that is in Python alone: as python/internal.cpp refuses it."""

    def autograd(keyset: Any, *args: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if recorded or forward_ad._current_level >= 0:
            which = "forward AD " * (not recorded)
            raise RuntimeError(f"{which}derivative for vlmkernels::{op._opname} is not implemented")
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return autograd


def _declare(schema: str, flops: Callable[..., int]) -> str:
    name = schema.split("(", 1)[0]
    LIB.define(schema)
    if register_flop_formula is not None:
        register_flop_formula(getattr(torch.ops.vlmkernels, name))(flops)
    return name


def _under_autocast(op: Any, device: str, operands: Sequence[int]) -> Callable:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}"))

    def cast_and_call(*args: Any) -> Any:
        dtype = torch.get_autocast_dtype(device.lower())
        cast = list(args)
        for i in operands:
            if cast[i] is not None and cast[i].dtype != torch.float64:
                cast[i] = cast[i].to(dtype)
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*cast)

    return cast_and_call


def has_kernel(name: str, device: str) -> bool:
    """Whether a kernel other than the reference is registered for the dispatch key `device`."""
    key = "Meta" if device == "META" else device
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"vlmkernels::{name}", key)


def kernel(name: str, device: str, fn: Callable, label: str) -> None:
    """Run op `name` with `fn` on `device` unless the extension has a kernel for it; info() shows `label`."""
    if not has_kernel(name, device):
        LIB.impl(name, torch.no_grad()(_checked(name, fn)), device)
        KERNELS[name, device] = label
