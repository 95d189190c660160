"""ALIGN's image tower: see `parts/efficientnet.py`."""

from vlmkernels.models.parts.efficientnet import (
    COEFFICIENTS,
    EfficientNet,
    StridedPad,
    round_channels,
    round_repeats,
)

__all__ = ["COEFFICIENTS", "EfficientNet", "StridedPad", "round_channels", "round_repeats"]
