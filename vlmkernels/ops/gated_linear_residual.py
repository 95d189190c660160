"""out = x + tanh(gate) * (h weight^T)."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, kernel
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
        h: input of the linear layer, ``[..., K]``: attention output or hidden layer.
        weight: ``[D, K]``, as in ``torch.nn.Linear``; dtype and device of ``h``.
        gate: one element, or ``D`` elements for one gate per channel, in any shape.
        row_mask: bool ``x.shape[:-1]``; where it is False the row of ``x`` is returned, even for NaN in
            ``h``, and no gradient flows to ``h``, ``weight`` or ``gate``.

    Returns:
        A new tensor of dtype ``promote_types(x, h)``; the gate's dtype never promotes. Products and sums run
        in float32 (float64 for float64 inputs) and the branch is not rounded before it is added to ``x``.
        Autocast casts ``h`` and ``weight`` only.

    Raises:
        ValueError: naming every argument of invalid shape, dtype or device.
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
    return _op(x, h, weight, gate, row_mask)


def _fake(x: Tensor, h: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    torch._check(x.shape[:-1] == h.shape[:-1], lambda: f"rows of x {x.shape} and h {h.shape} differ")
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, h.dtype))


def _fake_bwd(dout, h, weight, gate, row_mask, needs):
    return empty_grads((h, weight, gate), needs)


def _flops(x, h, weight, *_, **__):
    return 2 * h.numel() * weight[0]


def _flops_bwd(dout, h, weight, gate, row_mask, needs, **_):
    need_h, need_weight, _ = needs
    return 2 * h.numel() * weight[0] * (need_h + need_weight)


def _setup_context(ctx, inputs, output) -> None:
    x, h, weight, gate, row_mask = inputs
    ctx.save_for_backward(h, weight, gate, row_mask)
    ctx.x_dtype = x.dtype


def _backward(ctx, needs, dout):
    grads = {"x": dout.to(ctx.x_dtype) if needs["x"] else None}
    wanted = [needs[name] for name in ("h", "weight", "gate")]
    if any(wanted):
        grads["h"], grads["weight"], grads["gate"] = _bwd(dout, *ctx.saved_tensors, wanted)
    return grads


_op = define(
    "gated_linear_residual(Tensor x, Tensor h, Tensor weight, Tensor gate, Tensor? row_mask) -> Tensor",
    reference=gated_linear_residual_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("h", "weight"),
)
_bwd = define(
    "gated_linear_residual_bwd(Tensor dout, Tensor h, Tensor weight, Tensor gate, Tensor? row_mask,"
    " bool[3] needs) -> (Tensor dh, Tensor dweight, Tensor dgate)",
    reference=gated_linear_residual_bwd,
    fake=_fake_bwd,
    flops=_flops_bwd,
)

if TRITON:
    from vlmkernels.triton import gated_linear_residual as _cuda

    kernel("gated_linear_residual", "CUDA", _cuda.gated_linear_residual, "Triton")
    kernel("gated_linear_residual_bwd", "CUDA", _cuda.gated_linear_residual_bwd, "Triton")
