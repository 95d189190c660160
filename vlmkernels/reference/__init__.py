"""Every op in plain PyTorch: the default kernel of every device and the oracle of every test."""

from vlmkernels.reference.gated_residual import gated_residual
from vlmkernels.reference.info_nce import info_nce
from vlmkernels.reference.sigmoid_loss import sigmoid_loss

__all__ = ["gated_residual", "info_nce", "sigmoid_loss"]
