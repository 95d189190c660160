"""Stochastic depth: in training, branches of a residual network are dropped for whole samples."""

import torch
from torch import Tensor


def drop_branch(x: Tensor, rate: float, training: bool) -> Tensor:  # [B, ...]
    """Stochastic depth (Huang et al. 2016): a sample is 0 with probability rate, else divided by 1 - rate."""
    if not training or rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= rate
    return x * keep.to(x.dtype) / (1.0 - rate)
