"""The layout of the results of attention, whoever computes them."""

from collections.abc import Sequence

from torch import Tensor


def laid_out(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for [B, heads, T, D] in the order [B, T, heads, D]."""
    b, h, t, d = shape
    return like.new_empty((b, t, h, d)).transpose(1, 2)
