"""out = x + tanh(gate) * y, rows where the mask is False keep x.

With t = tanh(gate) and dout = dL/dout, over the rows the mask keeps:

    dx = dout        dy = t * dout        dgate = (1 - t^2) * sum(dout * y)

the sum running over the rows for a gate of D elements, over everything for a gate of one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gated_residual(
    x: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,  # 1 or D elements
    *,
    row_mask: Tensor | None = None,  # [...] bool
) -> Tensor:  # [..., D]
    """The definition, differentiable by autograd."""
    return gated_residual_fwd(x, y, gate, row_mask)


def gated_residual_fwd(x: Tensor, y: Tensor, gate: Tensor, row_mask: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, y.dtype)
    work = torch.promote_types(dtype, torch.float32)
    if row_mask is not None:
        y = torch.where(row_mask[..., None], y, 0)
    return (x.to(work) + gate.to(work).reshape(-1).tanh() * y.to(work)).to(dtype).contiguous()


def gated_residual_bwd(
    dout: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,
    row_mask: Tensor | None,  # [...]
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """dy and dgate; an output that is not needed has size 0. dx is dout itself."""
    need_y, need_gate = needs
    work = torch.promote_types(torch.promote_types(dout.dtype, y.dtype), torch.float32)
    g, t = dout.to(work), gate.to(work).reshape(-1).tanh()
    if row_mask is not None:
        g, y = torch.where(row_mask[..., None], g, 0), torch.where(row_mask[..., None], y, 0)
    dy, dgate = y.new_empty(0), gate.new_empty(0)
    if need_y:
        dy = y.new_empty(y.shape).copy_(t * g)
    if need_gate:
        products = g * y.to(work)  # [..., D]
        total = products.sum_to_size(y.shape[-1:]) if t.numel() == y.shape[-1] else products.sum()
        dgate = gate.new_empty(gate.shape).copy_(((1 - t * t) * total).reshape(gate.shape))
    return dy, dgate
