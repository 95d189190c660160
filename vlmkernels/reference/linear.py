"""out = act(y) + residual, y = x weight^T + bias.

With g = dout * act'(y), which is dout itself without an activation:

    dx = g weight        dweight = g^T x        dbias = sum over the rows of g        dresidual = dout
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from vlmkernels.reference._dense import activate, activate_bwd, product_bwd


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None = None,  # [O]
    *,
    activation: str = "none",
    residual: Tensor | None = None,  # [..., O]
) -> Tensor:  # [..., O]
    """The definition, differentiable by autograd."""
    out = activate(F.linear(x, weight, bias), activation)
    return out if residual is None else out + residual


def linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """The result and, when there is an activation and `keep`, y for the backward."""
    y = F.linear(x, weight, bias)
    out = activate(y, activation)
    kept = y if keep and activation != "none" else y.new_empty(0)
    return (out if residual is None else out + residual).contiguous(), kept.contiguous()


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
    if activation != "none" and y is None:
        assert x is not None
        y = F.linear(x, weight, bias)
    g = dout.to(weight.dtype) if y is None else activate_bwd(dout, y, activation)
    return product_bwd(g, x, weight, *needs)
