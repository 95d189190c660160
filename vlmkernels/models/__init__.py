"""Reference architectures, one readable file each; `parts/` has what they share."""

from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.asif import ASIF
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.models.decoder import CausalLM, DecoderConfig
from vlmkernels.models.detector import Detector, DetectorConfig
from vlmkernels.models.flamingo import Flamingo, FlamingoConfig
from vlmkernels.models.magic import MAGIC
from vlmkernels.models.parts.anchors import AnchorFolder, AnchorTensors
from vlmkernels.models.simvlm import SimVLM, SimVLMConfig
from vlmkernels.models.vild import ViLD, ViLDConfig, ViLDDetector
from vlmkernels.models.virtex import VirTex, VirTexConfig
from vlmkernels.models.visualbert import VisualBERT, VisualBertConfig
from vlmkernels.models.visualgpt import VisualGPT, VisualGPTConfig

__all__ = [
    "ALIGN",
    "ASIF",
    "CLIP",
    "MAGIC",
    "AlignConfig",
    "AnchorFolder",
    "AnchorTensors",
    "CausalLM",
    "ClipConfig",
    "DecoderConfig",
    "Detector",
    "DetectorConfig",
    "Flamingo",
    "FlamingoConfig",
    "SimVLM",
    "SimVLMConfig",
    "ViLD",
    "ViLDConfig",
    "ViLDDetector",
    "VirTex",
    "VirTexConfig",
    "VisualBERT",
    "VisualBertConfig",
    "VisualGPT",
    "VisualGPTConfig",
]
