"""Reference architectures, one readable file each; `parts/` has what they share."""

from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.models.decoder import CausalLM, DecoderConfig
from vlmkernels.models.flamingo import Flamingo, FlamingoConfig
from vlmkernels.models.magic import MAGIC
from vlmkernels.models.simvlm import SimVLM, SimVLMConfig
from vlmkernels.models.virtex import VirTex, VirTexConfig
from vlmkernels.models.visualgpt import VisualGPT, VisualGPTConfig

__all__ = [
    "ALIGN",
    "CLIP",
    "MAGIC",
    "AlignConfig",
    "CausalLM",
    "ClipConfig",
    "DecoderConfig",
    "Flamingo",
    "FlamingoConfig",
    "SimVLM",
    "SimVLMConfig",
    "VirTex",
    "VirTexConfig",
    "VisualGPT",
    "VisualGPTConfig",
]
