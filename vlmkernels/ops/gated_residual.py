"""out = x + tanh(gate) * y."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, kernel
from vlmkernels.reference.gated_residual import gated_residual_bwd, gated_residual_fwd


@arguments.public
def gated_residual(
    x: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,  # 1 or D elements, any shape
    *,
    row_mask: Tensor | None = None,  # [...] bool
) -> Tensor:  # [..., D]
    """Add a branch to the residual stream through a tanh gate: ``x + tanh(gate) * y`` in one pass.

    The gated cross-attention of Flamingo (Alayrac et al. 2022, section 3.1.2): with ``gate = 0`` the result
    equals ``x``.

    Args:
        x: residual stream ``[..., D]``.
        y: branch output, of the shape of ``x``.
        gate: one element, or ``D`` elements for one gate per channel, in any shape.
        row_mask: bool ``x.shape[:-1]``; where it is False the row of ``x`` is returned, even for NaN in
            ``y``, and no gradient flows to ``y`` or ``gate``.

    Returns:
        A new tensor of dtype ``promote_types(x, y)``; the gate's dtype never promotes. Sums run in float32
        (float64 for float64 inputs).

    Raises:
        ValueError: naming every argument of invalid shape, dtype or device.
    """
    tensors = {"x": x, "y": y, "gate": gate}
    faults = []
    if x.dim() == 0 or x.shape != y.shape:
        faults.append(
            f"x and y must have the same shape [..., D], got x {tuple(x.shape)} and y {tuple(y.shape)}"
        )
    elif gate.numel() not in (1, x.shape[-1]):
        faults.append(f"gate must have 1 or D = {x.shape[-1]} elements, got {tuple(gate.shape)}")
    if row_mask is not None and (row_mask.dtype != torch.bool or row_mask.shape != x.shape[:-1]):
        faults.append(
            f"row_mask must be bool {tuple(x.shape[:-1])}, got {row_mask.dtype} {tuple(row_mask.shape)}"
        )
    faults += arguments.dtype_faults(tensors)
    faults += arguments.device_faults({**tensors, "row_mask": row_mask})
    if faults:
        raise ValueError("gated_residual: " + "; ".join(faults))
    return _op(x, y, gate, row_mask)


def _fake(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    torch._check(x.shape == y.shape, lambda: f"x {x.shape} and y {y.shape} differ")
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, y.dtype))


def _fake_bwd(
    dout: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    return empty_grads((y, gate), needs)


def _setup_context(ctx, inputs, output) -> None:
    x, y, gate, row_mask = inputs
    ctx.save_for_backward(y, gate, row_mask)
    ctx.x_dtype = x.dtype


def _backward(ctx, needs, dout):
    grads = {"x": dout.to(ctx.x_dtype) if needs["x"] else None}
    if needs["y"] or needs["gate"]:
        grads["y"], grads["gate"] = _bwd(dout, *ctx.saved_tensors, [needs["y"], needs["gate"]])
    return grads


_op = define(
    "gated_residual(Tensor x, Tensor y, Tensor gate, Tensor? row_mask) -> Tensor",
    reference=gated_residual_fwd,
    fake=_fake,
    flops=lambda *_, **__: 0,
    setup_context=_setup_context,
    backward=_backward,
)
_bwd = define(
    "gated_residual_bwd(Tensor dout, Tensor y, Tensor gate, Tensor? row_mask, bool[2] needs)"
    " -> (Tensor dy, Tensor dgate)",
    reference=gated_residual_bwd,
    fake=_fake_bwd,
    flops=lambda *_, **__: 0,
)

if TRITON:
    from vlmkernels.triton import gated_residual as _cuda

    kernel("gated_residual", "CUDA", _cuda.gated_residual, "Triton")
    kernel("gated_residual_bwd", "CUDA", _cuda.gated_residual_bwd, "Triton")
