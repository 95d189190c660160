"""out = act(y) w2^T + b2 + residual, y = x w1^T + b1.

With hidden = act(y) and dy = (dout w2) * act'(y):

    dw2 = dout^T hidden    db2 = sum of dout    dx = dy w1    dw1 = dy^T x    db1 = sum of dy

and dresidual = dout.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vlmkernels.reference._dense import activate, activate_bwd, product_bwd


def mlp(
    x: Tensor,  # [..., K]
    w1: Tensor,  # [H, K]
    b1: Tensor | None,  # [H]
    w2: Tensor,  # [O, H]
    b2: Tensor | None,  # [O]
    *,
    activation: str,
    residual: Tensor | None = None,  # [..., O]
) -> Tensor:  # [..., O]
    """The definition, differentiable by autograd."""
    return mlp_fwd(x, w1, b1, w2, b2, residual, activation, False)[0]


def mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The result and, if `keep`, y for the backward."""
    y = F.linear(x, w1, b1)
    out = F.linear(activate(y, activation), w2, b2)
    out = out if residual is None else out + residual
    return out.contiguous(), y.contiguous() if keep else y.new_empty(0)


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
    need_x, need_w1, need_b1, need_w2, need_b2 = needs
    if y is None:
        assert x is not None
        y = F.linear(x, w1, b1)
    below = need_x or need_w1 or need_b1
    hidden = activate(y, activation) if need_w2 else None
    dhidden, dw2, db2 = product_bwd(dout.to(w2.dtype), hidden, w2, below, need_w2, need_b2)
    dy = activate_bwd(dhidden, y, activation) if below else y
    return *product_bwd(dy, x, w1, need_x, need_w1, need_b1), dw2, db2
