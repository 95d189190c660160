"""Every op in plain PyTorch: the default kernel of every device and the oracle of every test."""

from vlmkernels.reference.contrastive_distillation import contrastive_distillation
from vlmkernels.reference.contrastive_search_score import contrastive_search_score
from vlmkernels.reference.distillation import distillation
from vlmkernels.reference.embedding_distillation import embedding_distillation
from vlmkernels.reference.gated_linear_residual import gated_linear_residual
from vlmkernels.reference.gated_mlp import gated_mlp
from vlmkernels.reference.gated_residual import gated_residual
from vlmkernels.reference.info_nce import info_nce
from vlmkernels.reference.interval_attention import interval_attention
from vlmkernels.reference.linear import linear
from vlmkernels.reference.linear_cross_entropy import linear_cross_entropy
from vlmkernels.reference.linear_distillation import linear_distillation
from vlmkernels.reference.mine_hard_negatives import mine_hard_negatives
from vlmkernels.reference.mlp import mlp
from vlmkernels.reference.nms import nms
from vlmkernels.reference.perceiver_attention import perceiver_attention
from vlmkernels.reference.relative_representation import relative_representation
from vlmkernels.reference.relative_similarity import relative_similarity
from vlmkernels.reference.retrieval_ranks import retrieval_ranks
from vlmkernels.reference.roi_align import roi_align
from vlmkernels.reference.sigmoid_loss import sigmoid_loss
from vlmkernels.reference.srau import srau
from vlmkernels.reference.topk_similarity import topk_similarity

__all__ = [
    "contrastive_distillation",
    "contrastive_search_score",
    "distillation",
    "embedding_distillation",
    "gated_linear_residual",
    "gated_mlp",
    "gated_residual",
    "info_nce",
    "interval_attention",
    "linear",
    "linear_cross_entropy",
    "linear_distillation",
    "mine_hard_negatives",
    "mlp",
    "nms",
    "perceiver_attention",
    "relative_representation",
    "relative_similarity",
    "retrieval_ranks",
    "roi_align",
    "sigmoid_loss",
    "srau",
    "topk_similarity",
]
