"""ALIGN's image tower: see `parts/efficientnet.py`."""

from vlmkernels.models.parts.efficientnet import COEFFICIENTS, EfficientNet

__all__ = ["COEFFICIENTS", "EfficientNet"]
