"""Linear layers and multilayer perceptrons on the ops, with the names of the torch modules they replace."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

import vlmkernels
from vlmkernels.nn._layers import SquaredReLU


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU in OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


_NAMES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    QuickGELU: "quick_gelu",
    SquaredReLU: "squared_relu",
}


def activation_name(module: nn.Module) -> str | None:
    """The name under which the ops know an activation; None where they do not."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _NAMES.get(type(module))


def is_observed(module: nn.Module) -> bool:
    """Whether a hook waits for the call of this module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class Linear(nn.Linear):
    """``x W^T + b``, plus `residual` in the same pass."""

    def forward(
        self,
        x: Tensor,  # [..., K]
        residual: Tensor | None = None,  # [..., O]
    ) -> Tensor:  # [..., O]
        return vlmkernels.linear(x, self.weight, self.bias, residual=residual)


class MLP(nn.Sequential):
    """linear, activation, linear: ``act(x W1^T + b1) W2^T + b2``, plus `residual` in the same pass.

    Its three children may have any names. Where one of them is replaced (by low-rank adaptation, say) or has
    a hook, the children are called one after the other.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [..., K]
        residual: Tensor | None = None,  # [..., O]
    ) -> Tensor:  # [..., O]
        first, activation, last = self
        name = activation_name(activation)
        if name is None or is_observed(activation) or not (_is_plain(first) and _is_plain(last)):
            out = super().forward(x)
            return out if residual is None else residual + out
        return mlp(x, first, last, name, residual)


def mlp(
    x: Tensor,  # [..., K]
    first: nn.Module,
    last: nn.Module,
    activation: str,
    residual: Tensor | None = None,  # [..., O]
) -> Tensor:  # [..., O]
    """``vlmkernels.mlp`` with the weights of two linear layers."""
    first, last = cast(nn.Linear, first), cast(nn.Linear, last)
    weights = (first.weight, first.bias, last.weight, last.bias)
    return vlmkernels.mlp(x, *weights, activation=activation, residual=residual)


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) in (Linear, nn.Linear) and not is_observed(layer)
