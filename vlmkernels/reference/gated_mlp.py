"""out = (act(gate) * up) w_down^T + b_down + residual, gate = x w_gate^T + b_gate, up = x w_up^T + b_up.

With hidden = act(gate) * up and dhidden = dout w_down:

    dw_down = dout^T hidden    dgate = dhidden * up * act'(gate)    dup = dhidden * act(gate)
    dx = dgate w_gate + dup w_up    dw_gate = dgate^T x    dw_up = dup^T x

The gradients of the biases are the sums of dgate, dup and dout over the rows; dresidual = dout.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vlmkernels.reference._dense import activate, activate_bwd, product_bwd


def gated_mlp(
    x: Tensor,  # [..., K]
    w_gate: Tensor,  # [H, K]
    w_up: Tensor,  # [H, K]
    w_down: Tensor,  # [O, H]
    *,
    b_gate: Tensor | None = None,  # [H]
    b_up: Tensor | None = None,  # [H]
    b_down: Tensor | None = None,  # [O]
    activation: str = "silu",
    residual: Tensor | None = None,  # [..., O]
) -> Tensor:  # [..., O]
    """The definition, differentiable by autograd."""
    return gated_mlp_fwd(x, w_gate, w_up, w_down, b_gate, b_up, b_down, residual, activation, False)[0]


def gated_mlp_fwd(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The result and, if `keep`, gate and up for the backward."""
    gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    out = F.linear(activate(gate, activation) * up, w_down, b_down)
    out = (out if residual is None else out + residual).contiguous()
    return (out, gate.contiguous(), up.contiguous()) if keep else (out, x.new_empty(0), x.new_empty(0))


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
    need_x, need_w_gate, need_w_up, need_w_down, need_b_gate, need_b_up, need_b_down = needs
    if gate is None or up is None:
        assert x is not None
        gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
    by_gate, by_up = need_x or need_w_gate or need_b_gate, need_x or need_w_up or need_b_up
    act = activate(gate, activation)
    dhidden, dw_down, db_down = product_bwd(
        dout.to(w_down.dtype), act * up, w_down, by_gate or by_up, need_w_down, need_b_down
    )
    dgate = activate_bwd(dhidden * up, gate, activation) if by_gate else gate
    dup = dhidden * act if by_up else up
    dx, dw_gate, db_gate = product_bwd(dgate, x, w_gate, need_x, need_w_gate, need_b_gate)
    dx_up, dw_up, db_up = product_bwd(dup, x, w_up, need_x, need_w_up, need_b_up)
    return dx + dx_up if need_x else dx, dw_gate, dw_up, dw_down, db_gate, db_up, db_down
