"""Linear layers and MLPs on `vlmkernels.linear`, `mlp` and `gated_mlp`.

A layer with hooks, a parametrization or quantized weights is always called: the layers then run one by one.
On an accelerator torch's own products are used.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels._activations import activation_of
from vlmkernels._modules import are_plain, can_be_fused, must_be_called
from vlmkernels.integrations._chains import chain_of, gated_of
from vlmkernels.integrations._swap import Rule

_ALL = ("*",)  # every child, in order


def fits(x: Any, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether our ops support the operands: plain tensors on the CPU, of the same dtype outside autocast."""
    if not (
        x is not None
        and are_plain(x, weight, *others)
        and x.is_cpu
        and x.layout == torch.strided
        and not x.is_nested
        and x.dim() > 0
        and x.is_floating_point()
        and x.shape[-1] == weight.shape[-1]
    ):
        return False
    if torch.is_autocast_enabled("cpu"):
        return True
    dtype = x.dtype
    for tensor in (weight, *others):  # noqa: SIM110 - a generator takes as long as everything above
        if tensor is not None and tensor.dtype != dtype:
            return False
    return True


class LinearRule(Rule):
    patch_needs = frozenset({"linear"})


class TorchLinear(LinearRule):
    """torch.nn.Linear."""

    patch_runs = "vlmkernels.linear"

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        never_called = nn.modules.linear.NonDynamicallyQuantizableLinear  # in torch.nn.MultiheadAttention
        return isinstance(module, nn.Linear) and type(module) is not never_called

    @classmethod
    def patch_refuses(cls, module: Any) -> str | None:
        if type(module) is not nn.Linear:
            return "a subclass of torch.nn.Linear with its own forward"
        return None if are_plain(module.weight) else "its weight is a subclass of Tensor"

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # read once: a parametrization computes them
        if fits(x, weight, bias):
            return vlmkernels.linear(x, weight, bias)
        return F.linear(x, weight, bias)


class MLP(LinearRule):
    """torch.nn.Sequential, and classes whose forward calls their children one after the other.

    Linear, activation and Linear become one op, Linear and activation another; nn.Identity and an inactive
    Dropout are skipped.
    """

    patch_runs = "vlmkernels.mlp, or linear with the activation"
    patch_steps: ClassVar[tuple[str, ...]]

    @classmethod
    def patch_facts(cls, original: type[nn.Module]) -> dict[str, Any]:
        return {"patch_steps": _names(original)}

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        return bool(_activated(module))

    @classmethod
    def patch_refuses(cls, module: nn.Module) -> str | None:
        pairs = _activated(module)
        hooked = [type(m).__name__ for pair in pairs for m in pair if must_be_called(m)]
        if hooked:
            return f"hooks on {' and '.join(hooked)}: it runs layer by layer"
        unknown = [type(activation).__name__ for _, activation in pairs if activation_of(activation) is None]
        return f"there is no kernel for {' and '.join(unknown)}" if len(unknown) == len(pairs) else None

    def forward(self, x: Any) -> Any:  # type: ignore[override]
        steps = _steps(self)
        while steps:
            layer, activation, second = (*steps[:3], None, None)[:3]
            word, first, then = _word(activation), _tensors(layer), _tensors(second)
            if word is not None and first is not None and then is not None and fits(x, *first, *then):
                x, steps = vlmkernels.mlp(x, *first, *then, activation=word), steps[3:]
            elif word is not None and first is not None and fits(x, *first):
                x, steps = vlmkernels.linear(x, *first, activation=word), steps[2:]
            else:
                x, steps = layer(x), steps[1:]
        return x


class GatedMLP(LinearRule):
    """Classes whose forward is down(activation(gate(x)) * up(x))."""

    patch_runs = "vlmkernels.gated_mlp"
    patch_steps: ClassVar[tuple[str, str, str, str]]

    @classmethod
    def patch_facts(cls, original: type[nn.Module]) -> dict[str, Any]:
        return {"patch_steps": gated_of(original)}

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        names = gated_of(type(module))
        if names is None:
            return False
        down, activation, *both = (getattr(module, name, None) for name in names)
        return isinstance(activation, nn.Module) and all(isinstance(m, nn.Linear) for m in (down, *both))

    @classmethod
    def patch_refuses(cls, module: nn.Module) -> str | None:
        names = gated_of(type(module))
        assert names is not None
        hooked = [name for name in names if must_be_called(getattr(module, name))]
        if hooked:
            return f"hooks on {' and '.join(hooked)}: it runs layer by layer"
        activation = getattr(module, names[1])
        return None if activation_of(activation) else f"there is no kernel for {type(activation).__name__}"

    def forward(self, x: Any) -> Any:  # type: ignore[override]
        down, activation, gate, up = (getattr(self, name) for name in self.patch_steps)
        word, layers = _word(activation), [_tensors(layer) for layer in (gate, up, down)]
        if word is None or None in layers:
            return super().forward(x)
        weights, biases = zip(*layers, strict=True)
        if not fits(x, *weights, *biases):
            return super().forward(x)
        b_gate, b_up, b_down = biases
        return vlmkernels.gated_mlp(x, *weights, b_gate=b_gate, b_up=b_up, b_down=b_down, activation=word)


def _steps(module: nn.Module) -> list[Any]:
    """The modules that the forward calls one after the other; empty if it does anything else."""
    names: Any = module.patch_steps if isinstance(module, MLP) else _names(type(module))
    names = list(module._modules) if names == _ALL else names
    return [step for step in (getattr(module, name, None) for name in names) if not _passes(step)]


def _names(cls: type[nn.Module]) -> tuple[str, ...]:
    return _ALL if cls.forward is nn.Sequential.forward else chain_of(cls) or ()


def _passes(step: Any) -> bool:
    """Whether a step does nothing and can be skipped unobserved."""
    idle = type(step) is nn.Identity or (type(step) is nn.Dropout and not (step.training and step.p > 0))
    return idle and not must_be_called(step)


def _tensors(step: Any) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer that does not have to be called; None for all other steps."""
    free = isinstance(step, nn.Linear) and can_be_fused(step, nn.Linear)
    return (step.weight, step.bias) if free else None


def _word(step: Any) -> str | None:
    """The ops' name of the step, if it is an activation that does not have to be called."""
    return activation_of(step) if isinstance(step, nn.Module) and not must_be_called(step) else None


def _activated(module: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """The linear layers of a chain with the activations that follow them."""
    steps = _steps(module)
    return [(a, b) for a, b in pairwise(steps) if isinstance(a, nn.Linear) and _is_activation(b)]


def _is_activation(step: Any) -> bool:
    return isinstance(step, nn.Module) and (
        activation_of(step) is not None
        or type(step).__module__.rpartition(".")[2] in ("activation", "activations")
    )


LINEAR: tuple[type[LinearRule], ...] = (TorchLinear, MLP, GatedMLP)
