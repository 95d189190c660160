"""Reference architectures, one readable file each."""

from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.clip import CLIP, ClipConfig

__all__ = ["ALIGN", "CLIP", "AlignConfig", "ClipConfig"]
