"""out = act(x weight^T + bias) + residual: cuBLAS, and one pass each way for the activation (_dense.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels.reference.linear import linear_bwd as reference_bwd
from vlmkernels.reference.linear import linear_fwd as reference_fwd
from vlmkernels.triton import _dense as dense


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    residual: Tensor | None,  # [..., O]
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The result and, when there is an activation and `keep`, y for the backward."""
    if dense.is_double(x, residual):
        return reference_fwd(x, weight, bias, residual, activation, keep)
    shape, rows = (*x.shape[:-1], weight.shape[0]), dense.rows(x)
    added = residual if residual is None else dense.rows(residual)
    if activation == "none" or not keep:
        return dense.layer(rows, weight, bias, activation, added).view(shape), x.new_empty(0)
    y = dense.product(rows, weight, bias)
    return dense.activated(y, activation, residual=added).view(shape), y.view(shape)


def linear_bwd(
    dout: Tensor,  # [..., O]
    x: Tensor | None,  # [..., K], only for dweight and for y
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    y: Tensor | None,  # [..., O], recomputed when absent
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; an output that is not needed has size 0."""
    if weight.dtype == torch.float64:
        return reference_bwd(dout, x, weight, bias, y, activation, needs)
    need_x, need_weight, need_bias = needs
    g, rows = dense.rows(dout), x if x is None else dense.rows(x)
    if activation == "none":
        dx, dweight, dbias = dense.product_bwd(g.to(weight.dtype), rows, weight, *needs)
    else:
        y = dense.kept(y, rows, weight, bias)
        needed = dense.Needs(dy=need_x or need_weight, sums=need_bias)
        dy, _, _, dbias, _ = dense.activated_bwd(g, y, activation, None, needed)
        dx, dweight, _ = dense.product_bwd(dy, rows, weight, need_x, need_weight)
    return dx.view(*dout.shape[:-1], weight.shape[1]) if need_x else dx, dweight, dbias
