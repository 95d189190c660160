"""out = x + tanh(gate) * (h weight^T)."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.reference.gated_linear_residual import gated_linear_residual_bwd, gated_linear_residual_fwd


@arguments.public
def gated_linear_residual(
    x: Tensor,  # [..., D]
    h: Tensor,  # [..., K]
    weight: Tensor,  # [D, K]
    gate: Tensor,  # 1 or D elements, any shape
    *,
    row_mask: Tensor | None = None,  # [...] bool
) -> Tensor:  # [..., D]
    """The last linear layer of a gated branch and its residual: ``x + tanh(gate) * (h @ weight.T)``.

    The output projection of Flamingo's gated cross-attention and feed-forward layers (Alayrac et al. 2022,
    section 3.1.2 and figure 4). The branch ``[..., D]`` is never stored, neither here nor for the backward.

    Args:
        x: residual stream ``[..., D]``.
        h: what the linear layer reads, ``[..., K]``: attention output or hidden layer.
        weight: ``[D, K]``, as in ``torch.nn.Linear``; dtype and device of ``h``.
        gate: one element, or ``D`` elements for one gate per channel, in any shape, which its gradient has.
        row_mask: bool ``x.shape[:-1]``; where it is False the row of ``x`` is returned whatever ``h`` holds,
            and nothing flows to ``h``, ``weight`` or ``gate``.

    Returns:
        A new tensor of dtype ``promote_types(x, h)``; the gate's dtype never promotes. Products and sums run
        in float32 (float64 for float64 inputs) and the branch is not rounded before it joins ``x``. Autocast
        casts ``h`` and ``weight`` only.

    Raises:
        ValueError: naming every argument whose shape, dtype or device does not fit.
    """
    tensors = {"x": x, "h": h, "weight": weight, "gate": gate}
    faults = []
    if x.dim() == 0 or h.dim() == 0 or x.shape[:-1] != h.shape[:-1]:
        faults.append(
            f"x [..., D] and h [..., K] must have the same rows, got {tuple(x.shape)} and {tuple(h.shape)}"
        )
    elif weight.shape != (x.shape[-1], h.shape[-1]):
        wanted = (x.shape[-1], h.shape[-1])
        faults.append(f"weight must be [D, K] = {wanted}, got {tuple(weight.shape)}")
    if x.dim() and gate.numel() not in (1, x.shape[-1]):
        faults.append(f"gate must have 1 or D = {x.shape[-1]} elements, got {tuple(gate.shape)}")
    if row_mask is not None and (row_mask.dtype != torch.bool or row_mask.shape != x.shape[:-1]):
        faults.append(
            f"row_mask must be bool {tuple(x.shape[:-1])}, got {row_mask.dtype} {tuple(row_mask.shape)}"
        )
    faults += arguments.dtype_faults(tensors, {"h": h, "weight": weight})
    faults += arguments.device_faults({**tensors, "row_mask": row_mask})
    if faults:
        raise ValueError("gated_linear_residual: " + "; ".join(faults))
    return _op(h, weight, x, gate, row_mask)


def _fake(h: Tensor, weight: Tensor, x: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    torch._check(x.shape[:-1] == h.shape[:-1], lambda: f"rows of x {x.shape} and h {h.shape} differ")
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, h.dtype))


def _fake_bwd(dout, h, weight, gate, row_mask, need_h, need_weight, need_gate):
    return tuple(
        t.new_empty(t.shape if need else 0)
        for t, need in ((h, need_h), (weight, need_weight), (gate, need_gate))
    )


def _flops(h, weight, *_, **__):
    return 2 * h.numel() * weight[0]


def _flops_bwd(dout, h, weight, gate, row_mask, need_h, need_weight, need_gate, **_):
    return 2 * h.numel() * weight[0] * (need_h + need_weight)


def _setup_context(ctx, inputs, output) -> None:
    h, weight, x, gate, row_mask = inputs
    ctx.save_for_backward(h, weight, gate, row_mask)
    ctx.x_dtype = x.dtype


def _backward(ctx, dout):
    need_h, need_weight, need_x, need_gate, _ = ctx.needs_input_grad
    needs = (need_h, need_weight, need_gate)
    grads = _bwd(dout, *ctx.saved_tensors, *needs) if any(needs) else (None, None, None)
    dh, dweight, dgate = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dh, dweight, dout.to(ctx.x_dtype) if need_x else None, dgate, None


_op = define(
    "gated_linear_residual(Tensor h, Tensor weight, Tensor x, Tensor gate, Tensor? row_mask) -> Tensor",
    reference=gated_linear_residual_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=2,
)
_bwd = define(
    "gated_linear_residual_bwd(Tensor dout, Tensor h, Tensor weight, Tensor gate, Tensor? row_mask,"
    " bool need_h, bool need_weight, bool need_gate) -> (Tensor dh, Tensor dweight, Tensor dgate)",
    reference=gated_linear_residual_bwd,
    fake=_fake_bwd,
    flops=_flops_bwd,
)

if TRITON:
    from vlmkernels.triton import gated_linear_residual as _cuda

    kernel("gated_linear_residual", "CUDA", _cuda.gated_linear_residual, "Triton")
    kernel("gated_linear_residual_bwd", "CUDA", _cuda.gated_linear_residual_bwd, "Triton")
