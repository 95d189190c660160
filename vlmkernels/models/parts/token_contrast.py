"""SimCTG's loss, which spreads a text's hidden states (Su et al. 2022, equation 3).

With u the normalised states of a row, s_ij = <u_i, u_j>, s_ii = 1 and margin r, over all pairs i != j of
tokens of a row that are no padding, in all rows:

    loss = mean max(0, r - s_ii + s_ij),    d loss / d u_i = 2 / pairs * sum_j [r - 1 + s_ij > 0] u_j

A block of similarities exists at a time; the gradient is computed with the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**20  # similarities at a time


class _Spread(torch.autograd.Function):
    """The sum over all pairs."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,  # [B, T, D]
        mask: Tensor,  # [B, T] bool
        margin: float,
    ) -> Tensor:  # []
        batch, length, _ = unit.shape
        columns = max(min(length, BLOCK // max(length, 1)), 1)
        rows = max(BLOCK // max(length * columns, 1), 1)
        needed = ctx.needs_input_grad[0]
        grad = torch.zeros_like(unit) if needed else None
        total = unit.new_zeros(())
        position = torch.arange(length, device=unit.device)
        for at in range(0, batch, rows):
            part, seen = unit[at : at + rows], mask[at : at + rows]
            for column in range(0, length, columns):
                block = slice(column, column + columns)
                excess = part[:, block] @ part.mT + (margin - 1)  # [rows, columns, T]
                counted = seen[:, block, None] & seen[:, None] & (position[block, None] != position)
                excess = excess.clamp_min(0) * counted
                total = total + excess.sum((1, 2)).sum()
                if grad is not None:
                    grad[at : at + rows, block] = 2 * ((excess > 0).to(unit.dtype) @ part)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (grad,) = ctx.saved_tensors
        return None if grad is None else incoming * grad, None, None


def token_contrast(
    hidden: Tensor,  # [B, T, D]
    mask: Tensor,  # [B, T], 0 at padding
    margin: float = 0.5,
) -> tuple[Tensor, Tensor]:  # [], []
    """The mean over all pairs (0 without any) and their number. In float32, float64 for float64 states."""
    work = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    counts = mask.bool().sum(1)
    pairs = (counts * (counts - 1)).sum()
    with torch.autocast(hidden.device.type, enabled=False):
        total: Any = _Spread.apply(F.normalize(work, dim=-1), mask.bool(), margin)
    return total / pairs.clamp_min(1), pairs
