"""Shared by the references of dense layers: activations and their derivatives, gradients of a product."""

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "squared_relu")


def activate(y: Tensor, activation: str) -> Tensor:
    """gelu: y Phi(y); gelu_tanh: its tanh form; quick_gelu: y sigmoid(1.702 y); silu: y sigmoid(y)."""
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "quick_gelu":
        work = y.to(torch.promote_types(y.dtype, torch.float32))
        return (work * torch.sigmoid(1.702 * work)).to(y.dtype)
    if activation == "silu":
        return F.silu(y)
    if activation == "relu":
        return F.relu(y)
    if activation == "squared_relu":
        y = F.relu(y)
        return y * y  # a power becomes float32 under autocast
    _check(activation)
    return y


def activate_bwd(grad: Tensor, y: Tensor, activation: str) -> Tensor:
    """grad times the derivative of the activation at y, in the dtype of y."""
    grad = grad.to(y.dtype)
    if activation in ("gelu", "gelu_tanh"):
        form = "tanh" if activation == "gelu_tanh" else "none"
        return torch.ops.aten.gelu_backward(grad, y, approximate=form)
    if activation == "quick_gelu":
        work = y.to(torch.promote_types(y.dtype, torch.float32))
        s = torch.sigmoid(1.702 * work)
        return (grad * (s + 1.702 * work * s * (1 - s))).to(y.dtype)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, y)
    if activation == "relu":
        return torch.where(y > 0, grad, 0)
    if activation == "squared_relu":
        return grad * (2 * F.relu(y))
    _check(activation)
    return grad


def _check(activation: str) -> None:
    if activation != "none":
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def product_bwd(
    g: Tensor, x: Tensor | None, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x weight^T + bias under g [..., O]."""
    dx, dweight, dbias = (weight.new_empty(0) for _ in range(3))
    rows = g.reshape(g.shape[:-1].numel(), weight.shape[0])
    if need_x:
        dx = (g @ weight).contiguous()
    if need_weight:
        assert x is not None
        dweight = rows.T @ x.reshape(rows.shape[0], weight.shape[1])
    if need_bias:
        dbias = rows.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(g.dtype)
    return dx, dweight.contiguous(), dbias
