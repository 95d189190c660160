"""The layout of attention's results, the same for every kernel and the reference."""

from collections.abc import Sequence

from torch import Tensor


def empty_heads_merged(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for [B, heads, T, D] in the order [B, T, heads, D], so that merging the heads copies nothing."""
    b, h, t, d = shape
    return like.new_empty((b, t, h, d)).transpose(1, 2)
