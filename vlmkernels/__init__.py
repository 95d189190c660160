"""Fused kernels for vision-language models, exposed as torch ops."""

from vlmkernels import intervals
from vlmkernels._info import info
from vlmkernels._version import __version__
from vlmkernels.inference import prepare_for_inference
from vlmkernels.ops import (
    contrastive_distillation,
    distillation,
    embedding_distillation,
    gated_linear_residual,
    gated_mlp,
    gated_residual,
    info_nce,
    interval_attention,
    linear,
    linear_cross_entropy,
    linear_distillation,
    mlp,
    perceiver_attention,
    sigmoid_loss,
    srau,
    topk_similarity,
)

__all__ = [
    "__version__",
    "contrastive_distillation",
    "distillation",
    "embedding_distillation",
    "gated_linear_residual",
    "gated_mlp",
    "gated_residual",
    "info",
    "info_nce",
    "interval_attention",
    "intervals",
    "linear",
    "linear_cross_entropy",
    "linear_distillation",
    "mlp",
    "perceiver_attention",
    "prepare_for_inference",
    "sigmoid_loss",
    "srau",
    "topk_similarity",
]
