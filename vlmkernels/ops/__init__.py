"""The ops: public function, schema, shape function, gradient, and which kernel runs where."""

from vlmkernels.ops.contrastive_distillation import contrastive_distillation
from vlmkernels.ops.contrastive_search_score import contrastive_search_score
from vlmkernels.ops.distillation import distillation
from vlmkernels.ops.embedding_distillation import embedding_distillation
from vlmkernels.ops.gated_linear_residual import gated_linear_residual
from vlmkernels.ops.gated_mlp import gated_mlp
from vlmkernels.ops.gated_residual import gated_residual
from vlmkernels.ops.info_nce import info_nce
from vlmkernels.ops.interval_attention import interval_attention
from vlmkernels.ops.linear import linear
from vlmkernels.ops.linear_cross_entropy import linear_cross_entropy
from vlmkernels.ops.linear_distillation import linear_distillation
from vlmkernels.ops.mine_hard_negatives import mine_hard_negatives
from vlmkernels.ops.mlp import mlp
from vlmkernels.ops.nms import nms
from vlmkernels.ops.perceiver_attention import perceiver_attention
from vlmkernels.ops.relative_representation import relative_representation
from vlmkernels.ops.relative_similarity import relative_similarity
from vlmkernels.ops.retrieval_ranks import retrieval_ranks
from vlmkernels.ops.roi_align import roi_align
from vlmkernels.ops.sigmoid_loss import sigmoid_loss
from vlmkernels.ops.srau import srau
from vlmkernels.ops.topk_similarity import topk_similarity

# Code shared by the ops of a family is in files named after the family, in every folder.
FAMILIES = {
    "attention": ("interval_attention", "perceiver_attention"),
    "dense": ("gated_linear_residual", "gated_mlp", "linear", "mlp"),
    "detection": ("nms", "roi_align"),
    "pairwise": (
        "contrastive_distillation",
        "info_nce",
        "linear_cross_entropy",
        "linear_distillation",
        "sigmoid_loss",
    ),
    "residual": ("gated_residual", "srau"),
    "retrieval": (
        "contrastive_search_score",
        "mine_hard_negatives",
        "relative_representation",
        "relative_similarity",
        "retrieval_ranks",
        "topk_similarity",
    ),
    "rows": ("distillation", "embedding_distillation"),
}

# Their results are indices, ranks and scores.
WITHOUT_GRADIENTS = ("nms", *FAMILIES["retrieval"])

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
