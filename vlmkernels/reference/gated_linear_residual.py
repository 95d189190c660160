"""out = x + tanh(gate) * (h weight^T), rows where the mask is False keep x.

With t = tanh(gate), dout = dL/dout and sums over the rows the mask keeps:

    dx = dout        dh = (t * dout) weight        dweight = t[:, None] * products,  products = dout^T h

The gate's gradient (1 - t^2) * sum(dout * (h weight^T)) does not need the branch: for a gate of D elements,
element d is (1 - t_d^2) * sum_k products_dk weight_dk; for a gate of one the sum runs over d as well, and is
also <dout weight, h>.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def gated_linear_residual(
    x: Tensor,  # [..., D]
    h: Tensor,  # [..., K]
    weight: Tensor,  # [D, K]
    gate: Tensor,  # 1 or D elements
    *,
    row_mask: Tensor | None = None,  # [...] bool
) -> Tensor:  # [..., D]
    """The definition, differentiable by autograd."""
    return gated_linear_residual_fwd(x, h, weight, gate, row_mask)


def gated_linear_residual_fwd(
    x: Tensor, h: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None
) -> Tensor:
    dtype = torch.promote_types(x.dtype, h.dtype)
    work = torch.promote_types(dtype, torch.float32)
    if row_mask is not None:
        h = torch.where(row_mask[..., None], h, 0)
    branch = h.to(work) @ weight.to(work).T  # [..., D]
    return (x.to(work) + gate.to(work).reshape(-1).tanh() * branch).to(dtype).contiguous()


def gated_linear_residual_bwd(
    dout: Tensor,  # [..., D]
    h: Tensor,  # [..., K]
    weight: Tensor,  # [D, K]
    gate: Tensor,
    row_mask: Tensor | None,  # [...]
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dweight and dgate; an output that is not needed has size 0. dx is dout itself."""
    need_h, need_weight, need_gate = needs
    work = torch.promote_types(torch.promote_types(dout.dtype, h.dtype), torch.float32)
    dh, dweight, dgate = h.new_empty(0), weight.new_empty(0), gate.new_empty(0)
    t = gate.to(work).reshape(-1).tanh()
    if row_mask is not None:
        dout = torch.where(row_mask[..., None], dout, 0)
        h = torch.where(row_mask[..., None], h, 0)
    g, w = dout.to(work), weight.to(work)
    if need_h:
        dh = h.new_empty(h.shape).copy_((t * g) @ w)
    if need_weight or need_gate:
        rows = h.shape[:-1].numel()
        products = g.reshape(rows, w.shape[0]).T @ h.to(work).reshape(rows, w.shape[1])  # [D, K]
        if need_weight:
            dweight = weight.new_empty(weight.shape).copy_(t[:, None] * products)
        if need_gate:
            total = (products * w).sum(1)  # [D]
            total = total if t.numel() == w.shape[0] else total.sum()
            dgate = gate.new_empty(gate.shape).copy_(((1 - t * t) * total).reshape(gate.shape))
    return dh, dweight, dgate
