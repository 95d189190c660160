"""Reference architectures, one readable file each."""

from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.models.simvlm import SimVLM, SimVLMConfig

__all__ = ["ALIGN", "CLIP", "AlignConfig", "ClipConfig", "SimVLM", "SimVLMConfig"]
