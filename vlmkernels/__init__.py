"""Fused kernels for vision-language models, exposed as torch ops."""

from vlmkernels import intervals
from vlmkernels._info import info
from vlmkernels._version import __version__
from vlmkernels.inference import prepare_for_inference
from vlmkernels.ops import (
    contrastive_distillation,
    contrastive_search_score,
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
    mine_hard_negatives,
    mlp,
    perceiver_attention,
    relative_representation,
    relative_similarity,
    retrieval_ranks,
    sigmoid_loss,
    srau,
    topk_similarity,
)

__all__ = [
    "__version__",
    "contrastive_distillation",
    "contrastive_search_score",
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
    "mine_hard_negatives",
    "mlp",
    "perceiver_attention",
    "prepare_for_inference",
    "relative_representation",
    "relative_similarity",
    "retrieval_ranks",
    "sigmoid_loss",
    "srau",
    "topk_similarity",
]
