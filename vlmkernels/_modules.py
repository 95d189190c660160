"""Which modules may be passed over: their weights used without a call of theirs, and nobody notices."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

# Other subclasses (distributed, quantized) say themselves what an operation of torch's on them is.
_TENSORS = frozenset({Tensor, nn.Parameter, FakeTensor, FunctionalTensor, type(None)})

# As torch has them: some programs replace the forward of a whole class.
_REPLACEABLE = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.GELU, nn.ReLU, nn.SiLU)
_FORWARDS: dict[type[nn.Module], object] = {cls: cls.forward for cls in _REPLACEABLE}


def must_be_called(module: nn.Module) -> bool:
    """Whether a hook waits for the module's call, or somebody replaced its forward."""
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
    """Whether nobody replaced the forward of one of torch's classes."""
    return cls.forward is _FORWARDS.get(cls, cls.forward)


def passable(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """Whether what a module of one of these classes computes can be computed from its weights instead.

    Not so where it is a subclass or a wrapper, where hooks, a replaced forward, a parametrization or an
    offloading library wait for its call, or where its weights are no plain tensors.
    """
    if not is_exactly(module, *classes) or must_be_called(module):
        return False
    return are_plain(*module._parameters.values())


def are_plain(*tensors: Tensor | None) -> bool:
    """Whether none of the tensors is a subclass that computes in a way of its own."""
    for tensor in tensors:  # noqa: SIM110 - a generator costs as much as the rest of a small call's checks
        if type(tensor) not in _TENSORS:
            return False
    return True


def is_transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are at work, or a recorder that knows only ops."""
    return (
        torch._C._get_tracing_state() is not None
        or torch.compiler._is_exporting_flag  # torch 2.9 to 2.11 compile is_exporting() as true
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_traced() -> bool:
    """Whether the code runs to be recorded: what the data holds must not decide what is done."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
