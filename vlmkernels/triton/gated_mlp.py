"""out = (act(gate) * up) w_down^T + b_down + residual: cuBLAS, and one pass each way between (_dense.py)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmkernels.reference.gated_mlp import gated_mlp_bwd as reference_bwd
from vlmkernels.reference.gated_mlp import gated_mlp_fwd as reference_fwd
from vlmkernels.triton import _dense as dense


def gated_mlp(
    x: Tensor,  # [..., K]
    w_gate: Tensor,  # [H, K]
    w_up: Tensor,  # [H, K]
    w_down: Tensor,  # [O, H]
    b_gate: Tensor | None,  # [H]
    b_up: Tensor | None,  # [H]
    b_down: Tensor | None,  # [O]
    residual: Tensor | None,  # [..., O]
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result and, if `keep`, gate and up for the backward."""
    if dense.is_double(x, residual):
        return reference_fwd(x, w_gate, w_up, w_down, b_gate, b_up, b_down, residual, activation, keep)
    before, rows = x.shape[:-1], dense.rows(x)
    added = residual if residual is None else dense.rows(residual)
    gate, up = dense.product(rows, w_gate, b_gate), dense.product(rows, w_up, b_up)
    hidden = dense.activated(gate, activation, up=up, in_place=not keep)
    out = dense.layer(hidden, w_down, b_down, "none", added).view(*before, w_down.shape[0])
    if not keep:
        return out, x.new_empty(0), x.new_empty(0)
    return out, gate.view(*before, w_gate.shape[0]), up.view(*before, w_up.shape[0])


def gated_mlp_bwd(
    dout: Tensor,  # [..., O]
    x: Tensor | None,  # [..., K], only for the gradients of w_gate and w_up, and for gate and up
    w_gate: Tensor,  # [H, K]
    w_up: Tensor,  # [H, K]
    w_down: Tensor,  # [O, H]
    b_gate: Tensor | None,  # [H]
    b_up: Tensor | None,  # [H]
    gate: Tensor | None,  # [..., H], recomputed when absent, like up
    up: Tensor | None,  # [..., H]
    activation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """dx, dw_gate, dw_up, dw_down, db_gate, db_up and db_down; one that is not needed has size 0."""
    if w_gate.dtype == torch.float64:
        return reference_bwd(dout, x, w_gate, w_up, w_down, b_gate, b_up, gate, up, activation, needs)
    need_x, need_w_gate, need_w_up, need_w_down, need_b_gate, need_b_up, need_b_down = needs
    g, rows = dense.rows(dout).to(w_down.dtype), x if x is None else dense.rows(x)
    if gate is None or up is None:
        gate = up = None
    gate, up = dense.kept(gate, rows, w_gate, b_gate), dense.kept(up, rows, w_up, b_up)
    needed = dense.Needs(need_x or need_w_gate, need_x or need_w_up, need_w_down, need_b_gate, need_b_up)
    below = any((*needed[:2], *needed[3:]))
    dhidden, _, db_down = dense.product_bwd(g, None, w_down, below, False, need_b_down)
    if below:
        dgate, dup, hidden, db_gate, db_up = dense.activated_bwd(dhidden, gate, activation, up, needed)
    else:
        dgate = dup = db_gate = db_up = w_gate.new_empty(0)
        hidden = dense.activated(gate, activation, up=up) if need_w_down else dgate
    _, dw_down, _ = dense.product_bwd(g, hidden, w_down, False, need_w_down)
    dx, dw_gate, _ = dense.product_bwd(dgate, rows, w_gate, need_x, need_w_gate)
    _, dw_up, _ = dense.product_bwd(dup, rows, w_up, False, need_w_up)
    if need_x:
        dx = dx.addmm_(dup, w_up).view(*dout.shape[:-1], w_up.shape[1])
    return dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down
