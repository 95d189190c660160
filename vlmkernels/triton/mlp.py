"""out = act(x w1^T + b1) w2^T + b2 + residual: cuBLAS, and one pass each way between (_dense.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels.reference.mlp import mlp_bwd as reference_bwd
from vlmkernels.reference.mlp import mlp_fwd as reference_fwd
from vlmkernels.triton import _dense as dense


def mlp(
    x: Tensor,  # [..., K]
    w1: Tensor,  # [H, K]
    b1: Tensor | None,  # [H]
    w2: Tensor,  # [O, H]
    b2: Tensor | None,  # [O]
    residual: Tensor | None,  # [..., O]
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The result and, if `keep`, y for the backward."""
    if dense.is_double(x, residual):
        return reference_fwd(x, w1, b1, w2, b2, residual, activation, keep)
    before, rows = x.shape[:-1], dense.rows(x)
    added = residual if residual is None else dense.rows(residual)
    if keep:
        y = dense.product(rows, w1, b1)
        hidden, y = dense.activated(y, activation), y.view(*before, w1.shape[0])
    else:
        hidden, y = dense.layer(rows, w1, b1, activation), x.new_empty(0)
    return dense.layer(hidden, w2, b2, "none", added).view(*before, w2.shape[0]), y


def mlp_bwd(
    dout: Tensor,  # [..., O]
    x: Tensor | None,  # [..., K], only for dw1 and for y
    w1: Tensor,  # [H, K]
    b1: Tensor | None,  # [H]
    w2: Tensor,  # [O, H]
    y: Tensor | None,  # [..., H], recomputed when absent
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, db1, dw2 and db2; an output that is not needed has size 0."""
    if w1.dtype == torch.float64:
        return reference_bwd(dout, x, w1, b1, w2, y, activation, needs)
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    g, rows = dense.rows(dout).to(w2.dtype), x if x is None else dense.rows(x)
    y = dense.kept(y, rows, w1, b1)
    below = need_x or need_w1 or need_b1
    dhidden, _, db2 = dense.product_bwd(g, None, w2, below, False, need_b2)
    if below:
        needed = dense.Needs(dy=need_x or need_w1, hidden=need_w2, sums=need_b1)
        dy, _, hidden, db1, _ = dense.activated_bwd(dhidden, y, activation, None, needed)
    else:
        dy = db1 = w1.new_empty(0)
        hidden = dense.activated(y, activation) if need_w2 else dy
    _, dw2, _ = dense.product_bwd(g, hidden, w2, False, need_w2)
    dx, dw1, _ = dense.product_bwd(dy, rows, w1, need_x, need_w1)
    return dx.view(*dout.shape[:-1], w1.shape[1]) if need_x else dx, dw1, db1, dw2, db2
