"""Which modules can be fused: their weights are used without calling them, and the result is the same."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

# Other subclasses (distributed, quantized) define torch's operations themselves.
_TENSORS = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor, type(None)})

# torch's own: some programs replace the forward of a whole class.
_REPLACEABLE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.ReLU, nn.SiLU)
_FORWARDS: dict[type[nn.Module], object] = {cls: cls.forward for cls in _REPLACEABLE}


def must_be_called(module: nn.Module) -> bool:
    """Whether the module has hooks or a replaced forward, which a computation from its weights would skip."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or torch_module._has_any_global_hook()
    )


def is_exactly(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether the module is of one of these classes and no subclass, patched or not."""
    cls = type(module)
    if cls not in classes:
        if getattr(cls, "patch_class", None) is not cls:
            return False
        cls = cls.patch_origin[0]  # which `integrations.patch` replaced
    return cls in classes and has_own_forward(cls)


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether the forward of one of torch's classes has not been replaced."""
    return cls.forward is _FORWARDS.get(cls, cls.forward)


def can_be_fused(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether the result of a module of one of these classes can be computed from its weights instead.

    False for a subclass or a wrapper, for a module whose hooks, replaced forward, parametrization or
    offloading need its call, and for weights that are not plain tensors.
    """
    if not is_exactly(module, *classes) or must_be_called(module):
        return False
    return are_plain(*module._parameters.values())


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether none of the tensors is of a subclass with its own implementation of operations."""
    for tensor in tensors:  # noqa: SIM110 - a generator costs as much as the rest of a small call's checks
        if type(tensor) not in _TENSORS:
            return False
    return True


def is_transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are active, or a tracer that records only ops."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.compiler._is_exporting_flag  # torch 2.9 to 2.11 compile is_exporting() as true
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_traced() -> bool:
    """Whether the call is traced, so that control flow must not depend on the values of tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_fused_by_compiler(x: Tensor) -> bool:
    """Whether a product with elementwise operations is left to a compiler, which fuses them with others.

    An op of the library would be closed to it: on a CPU that is the faster way, on other devices it is not.
    """
    return torch.compiler.is_compiling() and x.device.type != "cpu"
