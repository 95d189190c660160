"""Modules over the ops."""

from vlmkernels.nn.losses import ClipLoss, InfoNCELoss, SigLipLoss

__all__ = ["ClipLoss", "InfoNCELoss", "SigLipLoss"]
