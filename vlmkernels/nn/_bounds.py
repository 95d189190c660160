"""Learnable scalars within bounds: y = min(max(x, low), high)."""

import math

import torch
from torch import Tensor


def within(x: Tensor, low: float = -math.inf, high: float = math.inf) -> Tensor:
    """x within [low, high]; dy/dx is 1 at the bounds, so that a parameter put there can leave them again.

    The gradient of `torch.clamp` at its bounds is 1 in some releases of torch and 0 in others.
    """
    return torch.where(x < low, low, torch.where(x > high, high, x))
