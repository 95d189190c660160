"""Modules over the ops."""

from .losses import ClipLoss, InfoNCELoss, SigLipLoss

__all__ = ["ClipLoss", "InfoNCELoss", "SigLipLoss"]
