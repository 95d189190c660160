"""Norms, projections and feed-forward layers that save little more than their input for the backward.

The outputs of norms and activations are recomputed in the backward from tensors that are saved anyway.
Modules that have to be called (a LoRA layer, for example, or a layer with a forward hook) are called, and
save what PyTorch saves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import vlmkernels
from vlmkernels import _activations as activations
from vlmkernels._arguments import product_dtype
from vlmkernels._modules import (
    can_be_fused,
    is_exactly,
    is_fused_by_compiler,
    is_transformed,
    must_be_called,
)
from vlmkernels.reference._dense import activate
from vlmkernels.reference.linear import linear_bwd, linear_fwd


class SwiGLU(nn.Module):
    """silu(a) b for the two halves [a; b] of the last dimension (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:  # [..., 2 K] -> [..., K]
        a, b = x.chunk(2, -1)
        return F.silu(a) * b


NORMS: dict[str, type[nn.LayerNorm | nn.RMSNorm]] = {"layernorm": nn.LayerNorm, "rmsnorm": nn.RMSNorm}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{name: activations.ACTIVATIONS[name].module for name in ("gelu", "relu", "squared_relu")},
    "swiglu": SwiGLU,
}


def option_faults(**given: Any) -> list[str]:
    """Errors in constructor arguments: sizes must be positive, options known, heads divisible."""
    known = {
        "norm": tuple(NORMS),
        "activation": tuple(ACTIVATIONS),
        "gate": ("scalar", "vector"),
        "empty_row": ("zero", "uniform", "all"),
    }
    faults = []
    for name, value in given.items():
        if name in known and value not in known[name]:
            faults.append(f"{name} must be one of {', '.join(known[name])}, got {value!r}")
        elif name not in known and (not isinstance(value, (int, float)) or value <= 0):
            faults.append(f"{name} must be a positive number, got {value!r}")
    if not faults and given["heads"] % given["kv_heads"]:
        faults.append(f"heads must be a multiple of kv_heads, got {given['heads']} and {given['kv_heads']}")
    return faults


def norm_linear_can_be_fused(norm: nn.Module, *linears: nn.Module) -> bool:
    """Whether no module has to be called: torch's own norm, with weights, and linear layers without bias."""
    if is_transformed() or not can_be_fused(norm, nn.LayerNorm, nn.RMSNorm) or norm.eps is None:
        return False
    for parameter in norm._parameters.values():
        if parameter is None:
            return False
    for linear in linears:
        if not can_be_fused(linear, nn.Linear) or linear._parameters.get("bias", True) is not None:
            return False
    return True


def head_norm(norm: Any, x: Tensor) -> Tensor:  # [..., Dh]
    """The norm of a query or key, if any, in the dtype of `x`; under autocast it runs in its own dtype."""
    if is_exactly(norm, nn.Identity) and not must_be_called(norm):
        return x
    weight = getattr(norm, "weight", x)
    return norm(x.to(weight.dtype)).to(x.dtype)


def norm_linear(x: Tensor, norm: nn.Module, *linears: nn.Module) -> tuple[Tensor, ...]:
    """``linear(norm(x))`` for each linear layer; `x` is saved for the backward, the normalised x is not."""
    if not norm_linear_can_be_fused(norm, *linears):
        normed = norm(x)
        return tuple(linear(normed) for linear in linears)
    dtype = product_dtype(x)
    weights = (linear.weight.to(dtype) for linear in linears)
    return _NormLinear.apply(x, norm.weight, getattr(norm, "bias", None), norm.eps, *weights)


def add_linear(
    x: Tensor,  # [..., D]
    h: Tensor,  # [..., K]
    linear: nn.Module,
    gate: Tensor | None,  # 1 or D elements
    row_mask: Tensor | None = None,  # [...] bool
) -> Tensor:  # [..., D]
    """``x + tanh(gate) * linear(h)``; the output of the linear layer is not stored."""
    if gate is None or not can_be_fused(linear, nn.Linear) or linear.bias is not None:
        return add_gated(x, linear(h), gate, row_mask)
    weight, h = linear.weight.to(product_dtype(x)), h.to(product_dtype(x))
    return vlmkernels.gated_linear_residual(x, h, weight, gate, row_mask=row_mask)


def add_gated(
    x: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor | None,  # 1 or D elements
    row_mask: Tensor | None = None,  # [...] bool
) -> Tensor:  # [..., D]
    """``x + tanh(gate) * y``, or ``x + y`` without a gate."""
    return x + y if gate is None else vlmkernels.gated_residual(x, y, gate, row_mask=row_mask)


class FeedForward(nn.Sequential):
    """norm, linear, activation, linear, without biases; parameter names as in open_flamingo: 0, 1 and 3.

    A call computes the branch only; `add_feed_forward` adds it to the residual stream.
    """

    def __init__(self, dim: int, hidden: int, *, activation: str, norm: str, eps: float) -> None:
        width = 2 * hidden if activation == "swiglu" else hidden
        super().__init__(
            NORMS[norm](dim, eps=eps),
            nn.Linear(dim, width, bias=False),
            ACTIVATIONS[activation](),
            nn.Linear(hidden, dim, bias=False),
        )


def add_feed_forward(
    x: Tensor,  # [..., D]
    feed_forward: Any,
    gate: Tensor | None = None,  # 1 or D elements
    *,
    branch: tuple[Tensor, nn.Module, Tensor] | None = None,  # h [..., K], linear layer, its gate
    row_mask: Tensor | None = None,  # [...] bool
    recompute: bool = False,
) -> Tensor:  # [..., D]
    """``x + tanh(gate) * feed_forward(x)``, or ``x + feed_forward(x)`` without a gate; masked rows keep x.

    With ``branch = (h, linear, gate_h)``, x is replaced by ``x + tanh(gate_h) * linear(h)``, which is
    recomputed in the backward. Saved for the backward: x, h, and the pre-activation unless `recompute`.
    """
    if not is_exactly(feed_forward, FeedForward) or len(feed_forward) != 4 or must_be_called(feed_forward):
        x = x if branch is None else add_linear(x, *branch)
        return add_gated(x, feed_forward(x), gate, row_mask)
    norm, w1, activation, w2 = feed_forward
    name = _name(activation)
    linears = (w1, w2) if branch is None else (w1, w2, branch[1])
    if name is None or not norm_linear_can_be_fused(norm, *linears):
        x = x if branch is None else add_linear(x, *branch)
        return add_linear(x, activation(w1(norm(x))), w2, gate, row_mask)
    dtype = product_dtype(x)
    first: tuple[Any, ...] = (None, None, None)
    if branch is not None:
        h, linear, gate_h = branch
        first = h.to(dtype), linear.weight.to(dtype), gate_h
    weights = (norm.weight, getattr(norm, "bias", None), w1.weight.to(dtype), w2.weight.to(dtype))
    return _AddFeedForward.apply(x, *first, *weights, gate, row_mask, norm.eps, name, recompute)


def _name(activation: nn.Module) -> str | None:
    """The name of an activation of `ACTIVATIONS` or of the ops; None where it has to be called."""
    if must_be_called(activation):
        return None
    return "swiglu" if type(activation) is SwiGLU else activations.activation_of(activation)


def _linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [O, K]
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """act(x W^T) and, with an activation, x W^T."""
    op = linear_fwd if is_fused_by_compiler(x) else torch.ops.vlmkernels.linear
    return op(x, weight, None, None, activation, activation != "none")


def _linear_grads(
    dout: Tensor,  # [..., O]
    x: Tensor,  # [..., K]
    weight: Tensor,  # [O, K]
    need_x: bool,
    need_weight: bool,
    preactivation: Tensor | None = None,  # [..., O]
    activation: str = "none",
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x and weight in act(x W^T), None where not needed."""
    op = linear_bwd if is_fused_by_compiler(dout) else torch.ops.vlmkernels.linear_bwd
    dx, dweight, _ = op(
        dout.to(weight.dtype), x, weight, None, preactivation, activation, [need_x, need_weight, False]
    )
    return dx if need_x else None, dweight if need_weight else None


class _NormLinear(torch.autograd.Function):
    """y_i = norm(x) W_i^T."""

    @staticmethod
    def forward(ctx, x, gain, shift, eps, *weights):
        ctx.save_for_backward(x, gain, shift, *weights)
        ctx.eps = eps
        normed = _norm(x, gain, shift, eps).to(weights[0].dtype)
        return tuple(_linear(normed, weight)[0] for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, gain, shift, *weights = ctx.saved_tensors
        needs = ctx.needs_input_grad
        normed, stats = _recompute_norm(x, gain, shift, ctx.eps)
        normed = normed.to(weights[0].dtype)
        dnormeds, dweights = zip(
            *(
                _linear_grads(dy, normed, weight, any(needs[:3]), need)
                for dy, weight, need in zip(dys, weights, needs[4:], strict=True)
            ),
            strict=True,
        )
        dx = dgain = dshift = None
        if any(needs[:3]):
            dnormed = functools.reduce(torch.add, dnormeds)
            dx, dgain, dshift = _norm_backward(dnormed, x.dtype, stats, gain, shift, needs[:3])
        return dx, dgain, dshift, None, *dweights


class _AddFeedForward(torch.autograd.Function):
    """y + tanh(gate) (act(norm(y) W1^T) W2^T), y = x + tanh(gate_h) (h W0^T) or x."""

    @staticmethod
    def forward(ctx, x, h, w0, gate_h, gain, shift, w1, w2, gate, row_mask, eps, activation, recompute):
        y = x if h is None else vlmkernels.gated_linear_residual(x, h, w0, gate_h)
        hidden, pre = _hidden(_norm(y, gain, shift, eps).to(w1.dtype), w1, activation)
        kept = None if recompute else pre
        ctx.save_for_backward(x, h, w0, gate_h, gain, shift, w1, w2, gate, row_mask, kept)
        ctx.eps, ctx.activation = eps, activation
        if gate is None:
            return vlmkernels.linear(hidden, w2, residual=y)
        return vlmkernels.gated_linear_residual(y, hidden, w2, gate, row_mask=row_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        x, h, w0, gate_h, gain, shift, w1, w2, gate, row_mask, pre = ctx.saved_tensors
        need_x, *need_first, need_gain, need_shift, need_w1, need_w2, need_gate = ctx.needs_input_grad[:9]
        need_norm = (need_x or any(need_first), need_gain, need_shift)
        y = x if h is None else vlmkernels.gated_linear_residual(x, h, w0, gate_h)
        normed, stats = _recompute_norm(y, gain, shift, ctx.eps)
        normed = normed.to(w1.dtype)
        if pre is None:
            hidden, pre = _hidden(normed, w1, ctx.activation)
        else:
            hidden = _activate(pre, ctx.activation)
        needs = (need_w1 or any(need_norm), need_w2, need_gate)
        dhidden, dw2, dgate = _linear_backward(dout, hidden, w2, gate, row_mask, *needs)
        dx = dgain = dshift = dw1 = None
        if dhidden is not None:
            name = ctx.activation
            if name == "swiglu":
                dhidden, pre, name = _swiglu_backward(dhidden, pre), None, "none"
            dnormed, dw1 = _linear_grads(dhidden, normed, w1, any(need_norm), need_w1, pre, name)
            if any(need_norm):
                dx, dgain, dshift = _norm_backward(dnormed, y.dtype, stats, gain, shift, need_norm)
        first = (None, None, None)
        if need_norm[0]:
            dx = dx + dout.to(dx.dtype)
            if any(need_first):
                first = _linear_backward(dx, h, w0, gate_h, None, *need_first)
            dx = dx.to(x.dtype) if need_x else None
        return dx, *first, dgain, dshift, dw1, dw2, dgate, None, None, None, None


def _linear_backward(dout, hidden, weight, gate, row_mask, need_hidden, need_weight, need_gate):
    """Gradients of hidden, weight and gate in x + tanh(gate) (hidden weight^T), whose gate may be None."""
    if gate is not None:
        needs = (need_hidden, need_weight, need_gate)
        grads = torch.ops.vlmkernels.gated_linear_residual_bwd(dout, hidden, weight, gate, row_mask, needs)
        return tuple(grad if need else None for grad, need in zip(grads, needs, strict=True))
    return *_linear_grads(dout, hidden, weight, need_hidden, need_weight), None


def _norm(x: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, or RMSNorm when there is no shift."""
    x = x.to(torch.promote_types(x.dtype, gain.dtype))
    if shift is None:
        return F.rms_norm(x, x.shape[-1:], gain, eps)
    return F.layer_norm(x, x.shape[-1:], gain, shift, eps)


def _recompute_norm(x, gain, shift, eps):
    """The norm in at least float32, and the inputs of its gradient: x in that precision, mean, 1 / std."""
    work = torch.promote_types(x.dtype, torch.promote_types(gain.dtype, torch.float32))
    wide, gain = x.to(work), gain.to(work)
    if shift is not None:
        normed, mean, rstd = torch.native_layer_norm(wide, wide.shape[-1:], gain, shift.to(work), eps)
        return normed, (wide, mean, rstd)
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    return wide * rstd * gain, (wide, None, rstd)


def _norm_backward(dy, dtype, stats, gain, shift, needs):
    """Gradients of x, in `dtype`, gain and shift."""
    wide, mean, rstd = stats
    g, wide_gain = dy.to(wide.dtype), gain.to(wide.dtype)
    if shift is not None:
        dx, dgain, dshift = torch.ops.aten.native_layer_norm_backward(
            g, wide, wide.shape[-1:], mean, rstd, wide_gain, shift.to(wide.dtype), needs
        )
    else:
        unit = wide * rstd
        dgain = (g * unit).reshape(-1, g.shape[-1]).sum(0)
        g = g * wide_gain
        dx, dshift = rstd * (g - unit * (g * unit).mean(-1, keepdim=True)), None
    return (
        dx.to(dtype) if needs[0] else None,
        dgain.to(gain.dtype) if needs[1] else None,
        dshift.to(shift.dtype) if needs[2] else None,
    )


def _hidden(normed: Tensor, w1: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """act(normed W1^T) and the pre-activation."""
    if activation != "swiglu":
        return _linear(normed, w1, activation)
    pre = _linear(normed, w1)[0]
    return _activate(pre, activation), pre


def _activate(pre: Tensor, activation: str) -> Tensor:
    return SwiGLU()(pre) if activation == "swiglu" else activate(pre, activation)


def _swiglu_backward(dy: Tensor, pre: Tensor) -> Tensor:
    a, b = pre.chunk(2, -1)
    return torch.cat([torch.ops.aten.silu_backward(dy * b, a), dy * F.silu(a)], -1)
