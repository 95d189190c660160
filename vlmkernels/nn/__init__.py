"""Modules on top of the ops."""

from vlmkernels.nn.clip_distillation import ClipDistillLoss, ClipKDLoss
from vlmkernels.nn.cross_attention import GatedCrossAttentionBlock, MaskedCrossAttention
from vlmkernels.nn.losses import (
    ClipLoss,
    InfoNCELoss,
    KnowledgeDistillationLoss,
    LinearCrossEntropyLoss,
    SigLipLoss,
)
from vlmkernels.nn.media_cache import MediaCache
from vlmkernels.nn.perceiver import PerceiverResampler

__all__ = [
    "ClipDistillLoss",
    "ClipKDLoss",
    "ClipLoss",
    "GatedCrossAttentionBlock",
    "InfoNCELoss",
    "KnowledgeDistillationLoss",
    "LinearCrossEntropyLoss",
    "MaskedCrossAttention",
    "MediaCache",
    "PerceiverResampler",
    "SigLipLoss",
]
