"""Fused kernels for vision-language models, exposed as torch ops."""

from vlmkernels._library import info
from vlmkernels.ops import gated_residual, info_nce, sigmoid_loss

__version__ = "0.1.0"
__all__ = ["gated_residual", "info", "info_nce", "sigmoid_loss"]
