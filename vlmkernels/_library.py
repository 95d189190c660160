"""The `vlmkernels` namespace of torch.library: declares ops and registers their kernels per device."""

import functools
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


_keys_of, _below_autograd = torch._C._dispatch_keys, torch._C._AutoDispatchBelowAutograd
_included, _excluded = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
_in_function_mode, _profiled = torch._C._is_torch_function_mode_enabled, torch._C._autograd._profiler_enabled
LIB = torch.library.Library("vlmkernels", "DEF")
try:
    importlib.import_module("vlmkernels.triton._tiles")  # the kernels that others are made of
    TRITON, WHY_NO_TRITON = True, ""
except Exception as error:  # an installed Triton that does not work must not stop `import vlmkernels`
    TRITON, WHY_NO_TRITON = False, f"{error}: CUDA tensors run the reference"
OPS: list[str] = []
KERNELS: dict[tuple[str, str], str] = {}  # (op, device) -> the kernel that runs
IN_PYTHON: dict[tuple[str, str], Callable] = {}  # (op, device) -> the kernel, if it is in Python


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
    """Declare an op and return what calls it: `_eager`.

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
        for device in ("CPU", "CUDA"):
            if not has_kernel(name, device):
                IN_PYTHON[name, device] = reference
    torch.library.register_fake(f"vlmkernels::{name}", _on_same_device(name, fake), lib=LIB)

    op = getattr(torch.ops.vlmkernels, name).default
    names = [argument.name for argument in op._schema.arguments]

    recorded = _recorded(op, names, setup_context, backward)
    LIB.impl(name, _differentiable(op, recorded), "Autograd", with_keyset=True)
    if _native.extension is not None:
        build = _native.extension.build()
        for device, language, what in (("CPU", "C++", "isa"), ("CUDA", "CUDA C++", "cuda")):
            if has_kernel(name, device):
                KERNELS[name, device] = f"{language} ({build[what]})"
    if autocast is None:
        return _eager(op, recorded)
    operands = [names.index(operand) for operand in autocast]
    for device in ("CPU", "CUDA"):
        LIB.impl(name, _under_autocast(op, device, operands), f"Autocast{device}")
    return _eager(op, recorded, operands)


def _recorded(
    op: Any, names: Sequence[str], setup_context: Callable | None, backward: Callable | None
) -> type[torch.autograd.Function]:
    """The Function of `op`: its inputs are those of the op and, last, what computes it from them."""
    whose = op._opname.removesuffix("_bwd")

    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, run = args  # last, so that ctx.needs_input_grad is in the order of the op's arguments
        with _below_autograd():
            result = run(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, result)
        return result

    def derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if backward is None:
            raise RuntimeError(f"vlmkernels.{whose} has no second derivative")
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        needs = dict(zip(names, ctx.needs_input_grad, strict=False))
        given = backward(ctx, needs, *grads)
        return *[given.get(name) if need else None for name, need in needs.items()], None

    formula = {"forward": staticmethod(forward), "backward": staticmethod(derivative)}
    return type(f"vlmkernels_{op._opname}", (torch.autograd.Function,), formula)


def _differentiable(op: Any, recorded: type[torch.autograd.Function]) -> Callable:
    """The kernel of `op` above all devices: that of the device, recorded for torch.autograd in reverse.

    As torch.library.register_autograd makes it, with less to do in a call.
    """
    transforms_active = torch._C._are_functorch_transforms_active
    after_autograd = torch._C._after_autograd_keyset
    whose = op._opname.removesuffix("_bwd")

    def autograd(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 or transforms_active():
            _refuse_transforms(whose, args)
        run = functools.partial(op.redispatch, keyset & after_autograd)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return recorded.apply(*args, run)
        with _below_autograd():
            return run(*args)

    return autograd


def _eager(
    op: Any, recorded: type[torch.autograd.Function] | None = None, operands: Sequence[int] | None = None
) -> Any:
    """Calls `op`, or what the dispatcher would call if it has nothing to do but to choose the device.

    The dispatcher converts all arguments and results to C++ and back, once for autograd and once for the
    kernel; a kernel in Python is called without it. Whatever else takes part in a call (a compiler, a mode,
    a transform, a profiler, a subclass of Tensor, an argument to convert or to refuse) gets the op itself.
    """
    name = op._opname
    declared = [str(argument.type) for argument in op._schema.arguments]
    places: dict[tuple[type, ...], tuple[int, ...] | None] = {}  # of tensors, by the types of all arguments
    is_compiling, grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled
    any_requires_grad = torch._C._any_requires_grad
    record = None if recorded is None else super(torch.autograd.Function, recorded).apply  # type: ignore[misc]

    def call(*args: Any) -> Any:
        if is_compiling():
            return op(*args)
        types = tuple(map(type, args))
        try:
            at = places[types]
        except KeyError:
            at = places[types] = _tensors_of(types, declared)
        device = _device_of(args, at)
        if device is None or (under_autocast := _autocast_of_plain_eager()) is None:
            return op(*args)
        if operands is not None and device in under_autocast:
            return under[device](*args)
        run = IN_PYTHON.get((name, device), op)
        if grad_enabled():
            if any_requires_grad(*args):
                return op(*args) if record is None else record(*args, run)
            with torch.no_grad(), _below_autograd():
                return run(*args)
        with _below_autograd():
            return run(*args)

    under = {device: _under_autocast(call, device, operands or ()) for device in ("CPU", "CUDA")}
    return call


_TYPES: dict[str, tuple[type, ...]] = {  # of the arguments that the dispatcher passes on as they are
    "Tensor": (Tensor, torch.nn.Parameter),
    "Optional[Tensor]": (Tensor, torch.nn.Parameter, type(None)),
    "bool": (bool,),
    "Optional[bool]": (bool, type(None)),
    "int": (int,),
    "float": (float,),
    "Optional[float]": (float, type(None)),
    "str": (str,),
    "List[bool]": (list,),
}


def _tensors_of(types: Sequence[type], declared: Sequence[str]) -> tuple[int, ...] | None:
    """Which of the arguments are tensors; None if the types are not exactly those that are declared."""
    if len(types) != len(declared):
        return None
    if not all(given in _TYPES[wanted] for given, wanted in zip(types, declared, strict=True)):
        return None
    return tuple(i for i, given in enumerate(types) if given in _TYPES["Tensor"])


def _device_of(args: Sequence[Any], tensors: Sequence[int] | None) -> str | None:
    """The dispatch key that all tensors have in common; None if one has others, or a dtype of no kernel."""
    found = None
    for i in tensors or ():
        device = _DEVICES.get(_keys_of(args[i]).raw_repr())
        if device is None or (found is not None and device != found) or not known(args[i].dtype):
            return None
        found = device
    return found


def _keys(*names: str) -> Any:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys


# Dense tensors have the second of these sets of keys; those made in inference mode have the first
_INFERENCE = {device: _keys(device, f"Autocast{device}") for device in ("CPU", "CUDA")}
_TRAINING = {
    device: keys | _keys(f"Autograd{device}", "ADInplaceOrView") for device, keys in _INFERENCE.items()
}
_DEVICES = {keys.raw_repr(): device for of in (_INFERENCE, _TRAINING) for device, keys in of.items()}
# Keys that a thread adds to those of the tensors, and those of a tensor that it leaves out, autocast aside
_PLAIN = {
    _keys("BackendSelect", "ADInplaceOrView").raw_repr(): 0,
    _keys("BackendSelect").raw_repr(): _keys("AutogradFunctionality").raw_repr(),  # in inference mode
}


def _autocast_of_plain_eager() -> frozenset[str] | None:
    """The devices under autocast; None if anything else takes part in the calls of this thread."""
    if forward_ad._current_level >= 0 or _in_function_mode() or _profiled():
        return None
    return _autocast_of(_included().raw_repr(), _excluded().raw_repr())


@functools.lru_cache
def _autocast_of(included: int, excluded: int) -> frozenset[str] | None:
    of_tensors = torch._C.DispatchKeySet.from_raw_repr(excluded) & (_TRAINING["CPU"] | _TRAINING["CUDA"])
    autocast = {device: _keys(f"Autocast{device}") for device in _TRAINING}
    rest = of_tensors - autocast["CPU"] - autocast["CUDA"]
    if _PLAIN.get(included) != rest.raw_repr():
        return None
    return frozenset(
        device for device, keys in autocast.items() if (of_tensors & keys).raw_repr() != keys.raw_repr()
    )


def unknown_size() -> Any:
    """In a shape function: a size that the numbers decide."""
    return torch.library.get_ctx().new_dynamic_size()


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
    """Declare an op that others are made of and return what calls it: `_eager`.

    It has only kernels: no shape function, no reference, no gradient (python/internal.cpp refuses one).
    `flops` gets the arguments of a call, with shapes instead of tensors, and returns what
    `torch.utils.flop_counter.FlopCounterMode` counts for the plain composition in PyTorch: 2 m n k for each
    matrix product and nothing else. Attention counts as scaled dot-product attention of all keys.
    """
    name = _declare(schema, flops)
    op = getattr(torch.ops.vlmkernels, name).default
    if not has_kernel(name, "Autograd"):
        LIB.impl(name, _without_derivative(op), "Autograd", with_keyset=True)
    return _eager(op)


def _without_derivative(op: Any) -> Callable:
    """The kernel above all devices of a part that is in Python alone: as python/internal.cpp refuses it."""

    def autograd(keyset: Any, *args: Any) -> Any:
        recorded = torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
        if recorded or forward_ad._current_level >= 0:
            which = "forward AD " * (not recorded)
            raise RuntimeError(f"{which}derivative for vlmkernels::{op._opname} is not implemented")
        with _below_autograd():
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
        IN_PYTHON[name, device] = fn
