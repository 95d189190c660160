"""Learnable scalars within bounds: y = min(max(x, low), high)."""

import math

import torch
from torch import Tensor


def within(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """x clamped to [low, high]; dy/dx is 1 at the bounds, so that a parameter there can leave it again.

    `torch.clamp` has the gradient 1 at its bounds in some releases of torch and 0 in others.
    """
    return torch.where(x < low, low, torch.where(x > high, high, x))
