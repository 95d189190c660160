"""Raw ops refuse, by name, every argument whose memory a kernel would read or write beyond its end."""

import itertools

import pytest
import torch

from vlmkernels import _native
from vlmkernels.ops import FAMILIES

from .fuzz import raw

ops = torch.ops.vlmkernels
native = pytest.mark.skipif(_native.extension is None, reason="the reference kernels take no pointers")
COMPOSED = {f"{op}{end}" for op in FAMILIES["pairwise"] for end in ("", "_bwd")}  # of others, in Python
ones, zeros = torch.ones, torch.zeros
ALL = [True] * 7
X = H = F = ones(4, 3)
GATED = ones(4, 2), None, ones(6, 3), ones(6, 3), ones(2, 6)
IDS = zeros(4, dtype=torch.int64)
Q = ones(1, 2, 5, 4)
LONG = ones(1, 2, 1, 4).expand(1, 2, 2**31, 4)
BOUNDS = zeros(5, dtype=torch.int32)
SCALE, UNKNOWN = (1.0, None, 0, 0, None, None, None), (None, None, None)
LSE = zeros(1, 2, 5)
SAVED = Q, None, Q, Q, Q, BOUNDS, BOUNDS, Q
PAIR = F, F, ones(1), None, None
PAIR_AND_BIAS = F, F, ones(1), ones(1), None, None
MANY = ones(200_000, 1), ones(2, 1), ones(1)
STATS = *[ones(4)] * 7, None, None
NO_BIAS = None, None
DISTILLED = F, F, ones(1), ones(4, 2), ones(4, 2), ones(1)
SOFTMAXES = ones(5, 4), ones(5, 4), ones(4), ones(4)
MOST = [ones(()).expand(2**40, 2**20)] * 2
W, LAYER, SOFT = ones(6, 3), (ones(4, 2), ones(6, 2)), (1.0, "jsd", 0.5, 0.0)
TOP = ones(4, 2), torch.tensor([[1, 5]] * 4)
STATES = ones(4, 3, 2), ones(4, 5, 2)
FEATURES, BOXES, ROI = ones(1, 2, 4, 5), zeros(3, 5), (1.0, 0, True)
KL, L1 = (1.0, "forward_kl", 0.5, 0.0, -100), ("l1", True)
CALLS = [  # the op, its arguments, and what the error says
    (
        "gated_residual",
        [ones(4096, 4096), ones(1), ones(1), None],
        r"y must be .*\[4096, 4096\].*got float32 \[1\]",
    ),
    (
        "gated_residual",
        [ones(4, 3), ones(4, 3), ones(2), None],
        r"gate must have 1 or 3 elements, got sizes \[2\]",
    ),
    ("gated_residual", [ones(4, 3), ones(4, 3), ones(1), ones(4)], r"row_mask must be .*\[4\] of bool"),
    ("gated_residual", [ones(()), ones(()), ones(1), None], r"x must be .*\[\.\.\., \*\]"),
    ("gated_residual_bwd", [ones(4, 3), ones(4, 2), ones(1), None, ALL[:2]], r"y must be .*\[4, 3\]"),
    ("srau", [X, ones(2, 4, 2), X, None, 0.2, "code"], r"visual must be .*\[2, 4, 3\]"),
    ("srau", [X, X, ones(1, 4, 3), None, 0.2, "code"], r"gate_logits must be .*\[4, 3\]"),
    ("srau", [X, X, X, ones(4), 0.2, "code"], r"row_mask must be .*\[4\] of bool"),
    ("srau", [X, zeros(0, 4, 3), zeros(0, 4, 3), None, 0.2, "code"], r"at least one level"),
    ("srau", [X, X, X, None, 0.6, "code"], r"tau must be in \[0, 0.5\], got 0.6"),
    ("srau", [X, X, X, None, 0.2, "Code"], r"orientation must be .*got 'Code'"),
    ("srau", [MOST[0], *MOST, None, 0.2, "code"], r"too large for one call"),
    ("srau_bwd", [ones(4, 2), X, X, X, None, 0.2, "code", ALL[:3]], r"dout must be .*\[4, 3\]"),
    ("gated_linear_residual", [ones(4, 2), H, ones(2, 4), ones(1), None], r"weight must be .*\[\*, 3\]"),
    ("gated_linear_residual", [ones(3, 2), H, ones(2, 3), ones(1), None], r"x must be .*\[4, 2\]"),
    ("gated_linear_residual_bwd", [H, H, ones(2, 3), ones(1), None, ALL[:3]], r"dout must be .*\[4, 2\]"),
    ("linear", [X, ones(4096, 3), None, ones(1), "none", False], r"residual must be .*\[4, 4096\]"),
    ("linear", [X.char(), X.char(), *NO_BIAS, "none", False], r"x must be .*float32.*got int8 \[4, 3\]"),
    ("linear", [X, X.char(), *NO_BIAS, "none", False], r"weight must be .*float32.*got int8 \[4, 3\]"),
    ("linear", [X, X, ones(3), None, "none", False], r"bias must be .*\[4\]"),
    ("linear", [X, X, *NO_BIAS, "GELU", False], r"activation must be one of none, gelu, .*got 'GELU'"),
    ("linear", [zeros(2**40, 0), zeros(2**40, 0), *NO_BIAS, "none", False], r"too large for one call"),
    ("linear_bwd", [ones(4, 5), X, ones(5, 2), *NO_BIAS, "none", ALL[:3]], r"x must be .*\[4, 2\]"),
    ("linear_bwd", [ones(4, 5), None, ones(5, 2), *NO_BIAS, "none", ALL[:3]], r"gradient of weight needs x"),
    (
        "linear_bwd",
        [ones(4, 5), None, ones(5, 2), *NO_BIAS, "gelu", [True, False, False]],
        r"activation needs x",
    ),
    ("linear_bwd", [X, X, ones(3, 3), None, ones(3), "none", ALL[:3]], r"preactivation must be .*\[4, 3\]"),
    ("mlp", [X, ones(6, 3), None, ones(2, 5), *NO_BIAS, "none", True], r"w2 must be .*\[\*, 6\]"),
    (
        "mlp_bwd",
        [ones(4, 2), None, ones(6, 3), None, ones(2, 6), None, "none", ALL[:5]],
        r"gradient of w1 needs x",
    ),
    (
        "gated_mlp",
        [X, ones(6, 3), ones(6, 2), ones(2, 6), *[None] * 4, "silu", True],
        r"w_up must be .*\[6, 3\]",
    ),
    (
        "gated_mlp_bwd",
        [*GATED, *NO_BIAS, ones(4, 6), None, "silu", [False] * 7],
        r"x, or both gate and up, must",
    ),
    ("interval_attention", [Q, Q, Q, BOUNDS, BOUNDS[:4], *SCALE], r"end must be .*\[5\] of int32"),
    ("interval_attention", [Q, Q, Q, BOUNDS * 1.0, BOUNDS, *SCALE], r"start must be .*int32"),
    ("interval_attention", [ones(1, 3, 5, 4), Q, Q, BOUNDS, BOUNDS, *SCALE], r"a multiple of those of key"),
    (
        "interval_attention",
        [Q, Q, Q, BOUNDS, BOUNDS, 1.0, ones(2, 3, 3), 2**31, 2, *UNKNOWN],
        r"for 2147483648 rows",
    ),
    (
        "interval_attention",
        [Q, Q, Q, BOUNDS, BOUNDS, 1.0, ones(2, 3, 3), 2**62, 2, *UNKNOWN],
        r"for 4611686018427387904",
    ),
    (
        "interval_attention",
        [Q, LONG, LONG, BOUNDS, BOUNDS, *SCALE],
        r"key must have at most .*, got 2147483648",
    ),
    (
        "interval_attention_bwd",
        [*SAVED, LSE, *SCALE, ALL[:4]],
        r"relative_bias must be given for its gradient",
    ),
    (
        "interval_attention_bwd",
        [*SAVED, LSE[:, :1], *SCALE, [False] * 4],
        r"lse must be .*\[1, 2, 5\] of float32",
    ),
    ("perceiver_attention", [Q, Q, Q, Q, Q[:, :, :4], None, 1.0], r"latent_value must be .*\[1, 2, 5, 4\]"),
    ("perceiver_attention", [Q, Q, Q, Q, Q, IDS, 1.0], r"media_lengths must be .*\[1\]"),
    ("small_loss", [F, ones(5, 3), ones(1), None, True, 0.0, *ALL[:4]], r"needs as many keys as queries"),
    ("small_loss", [F, ones(3, 3), ones(1), None, False, 0.0, *ALL[:4]], r"key must have as many rows"),
    (
        "small_distillation",
        [F, F, ones(1), ones(4, 2), ones(3, 2), ones(1), *ALL[:6]],
        r"teacher_key must be .*\[4, 2\]",
    ),
    (
        "small_distillation",
        [F, F, ones(1), ones(4, 0), ones(4, 0), ones(1), *ALL[:6]],
        r"teacher_query and teacher_key must have a width",
    ),
    (
        "small_distillation",
        [F, F, ones(1), ones(4, 2), ones(4, 2), ones(2), *ALL[:6]],
        r"teacher_scale must have one element, got sizes \[2\]",
    ),
    (
        "small_distillation",
        [F[:0], F, ones(1), F[:0], F, ones(1), *ALL[:6]],
        r"query and key must have rows, got 0 and 4",
    ),
    (
        "small_loss_bwd",
        [ones(()), F, F[:3], ones(1), None, ones(4, 64), F, ones(4), F, False, [True, False, False, False]],
        r"key must have as many rows as query or more, got 3 and 4",
    ),
    (
        "small_loss_bwd",
        [ones(()), F, F, ones(1), None, F, F, F, F, False, ALL[:4]],
        r"slope must be .*\[4, 64\]",
    ),
    (
        "info_nce_stats",
        [*MANY, ones(1), ones(1), IDS[:1], True, 0, 0],
        r"query_inv_norm must be .*\[200000\]",
    ),
    ("info_nce_stats", [*MANY, *NO_BIAS, IDS[:1], True, 0, 0], r"positives must be .*\[200000\] of int64"),
    (
        "info_nce_stats",
        [F, F, ones(2), *NO_BIAS, IDS, True, 0, 0],
        r"scale must have one element, got sizes \[2\]",
    ),
    (
        "info_nce_stats",
        [*PAIR, IDS + 4, True, 0, 0],
        r"positives must be in \[0, 4\) or -1, got values from 4 to 4",
    ),
    ("info_nce_stats", [*PAIR, IDS, True, -1, 0], r"store_size must not be negative, got -1"),
    ("info_nce_stats", [F, zeros(0, 3), ones(1), *NO_BIAS, IDS - 1, True, 0, 0], r"must have rows"),
    (
        "info_nce_grads",
        [*PAIR, IDS - 2, *STATS, zeros(0).byte(), 0, True, True],
        r"positives must be in \[0, 4\)",
    ),
    (
        "info_nce_grads",
        [*PAIR, IDS[:3], *STATS, zeros(0).byte(), 0, True, True],
        r"positives must be .*\[4\]",
    ),
    (
        "info_nce_grads",
        [*PAIR, IDS, *STATS, zeros(65).byte()[1:], 0, True, True],
        r"store must be aligned to 8",
    ),
    (
        "contrastive_distillation_stats",
        [*DISTILLED[:3], ones(3, 2), *DISTILLED[4:], True, False, 0],
        r"teacher_query must be .*\[4, \*\]",
    ),
    (
        "contrastive_distillation_stats",
        [*DISTILLED[:4], ones(4, 2**20), ones(1), True, False, 0],
        r"teacher_key must be .*\[4, 2\]",
    ),
    (
        "contrastive_distillation_stats",
        [*DISTILLED[:3], ones(4, 2).double(), *DISTILLED[4:], True, False, 0],
        r"teacher_query must be .*float32",
    ),
    (
        "contrastive_distillation_stats",
        [*DISTILLED[:5], ones(2), True, False, 0],
        r"teacher_scale must have one element, got sizes \[2\]",
    ),
    (
        "contrastive_distillation_stats",
        [*DISTILLED, True, False, -1],
        r"store_size must not be negative, got -1",
    ),
    (
        "contrastive_distillation_grads",
        [*DISTILLED, ones(4, 4), *SOFTMAXES[1:], zeros(0).byte(), 0, True, True],
        r"rows must be .*\[5, 4\]",
    ),
    (
        "contrastive_distillation_grads",
        [*DISTILLED, *SOFTMAXES[:3], ones(3), zeros(0).byte(), 0, True, True],
        r"col_coef must be .*\[4\]",
    ),
    (
        "contrastive_distillation_grads",
        [*DISTILLED, *SOFTMAXES, zeros(65).byte()[1:], 0, True, True],
        r"store must be aligned to 8",
    ),
    (
        "contrastive_distillation_grads",
        [*DISTILLED, *SOFTMAXES, zeros(0).byte(), -1, True, True],
        r"workspace_bytes must not be negative, got -1",
    ),
    (
        "sigmoid_sweep",
        [*PAIR_AND_BIAS, None, IDS, None, ones(4), *ALL[:4]],
        r"positives, or query_ids and key_ids",
    ),
    (
        "sigmoid_sweep",
        [*PAIR_AND_BIAS, IDS, *NO_BIAS, ones(1), *ALL[:4]],
        r"row_coef must be .*\[4\] of float32",
    ),
    ("distillation", [X, ones(4, 2), None, *KL, "mean", True], r"teacher_logits must be .*\[4, 3\]"),
    ("distillation", [X, X, IDS[:3], *KL, "mean", True], r"target must be .*\[4\] of int64"),
    ("distillation", [*MOST, None, *KL, "mean", True], r"too large for one call"),
    (
        "distillation_bwd",
        [ones(()), X, X, None, ones(4, 5), *KL, "mean", ALL[:1]],
        r"stats must be .*\[4, 6\] of float32",
    ),
    (
        "distillation_bwd",
        [ones(()), X, X, None, ones(4, 6).double(), *KL, "mean", ALL[:1]],
        r"stats must be .*got float64",
    ),
    (
        "distillation_bwd",
        [ones(4), X, X, None, ones(4, 6), *KL, "mean", ALL[:1]],
        r"dloss must be .*\[\] of",
    ),
    ("embedding_distillation", [X, ones(4, 2), None, *L1, "mean", True], r"teacher must be .*\[4, 3\]"),
    ("embedding_distillation", [X, X, ones(3), *L1, "mean", True], r"weight must be .*\[4\]"),
    ("embedding_distillation", [*MOST, None, *L1, "mean", True], r"too large for one call"),
    (
        "embedding_distillation_bwd",
        [ones(()), X, X, None, *L1, "none", ALL[:1]],
        r"dloss must be .*\[4\] of",
    ),
    ("nms", [ones(4, 5), ones(4), None, 0.5], r"boxes must be .*\[\*, 4\]"),
    ("nms", [ones(3, 4), ones(4), None, 0.5], r"scores must be .*\[3\]"),
    ("nms", [ones(4, 4), ones(4), IDS[:3], 0.5], r"groups must be .*\[4\] of int32 or int64"),
    ("nms", [ones(4, 4), ones(4), ones(4), 0.5], r"groups must be .*got float32"),
    ("nms", [ones(4, 4), ones(4), None, 1.5], r"iou_threshold must be in \[0, 1\], got 1.5"),
    ("roi_align", [ones(2, 4, 5), BOXES, 2, 2, *ROI], r"features must be .*\[\*, \*, \*, \*\]"),
    ("roi_align", [FEATURES, ones(3, 4), 2, 2, *ROI], r"boxes must be .*\[\*, 5\]"),
    ("roi_align", [FEATURES, BOXES, 0, 2, *ROI], r"from 1 to 4096 rows and columns, got 0 x 2"),
    ("roi_align", [FEATURES, BOXES, 2, 2, 0.0, 0, True], r"spatial_scale must be positive and finite, got 0"),
    ("roi_align", [FEATURES, BOXES, 2, 2, 1.0, -1, True], r"sampling_ratio must be from 0 .*got -1"),
    ("roi_align", [ones(1, 1, 1, 1).expand(1, 1, 2**21, 1), BOXES, 2, 2, *ROI], r"at most 1048576 rows"),
    (
        "roi_align",
        [ones(1, 1, 1, 1).expand(2**40, 2**20, 1, 1), BOXES, 2, 2, *ROI],
        r"too large for one call",
    ),
    ("roi_align_bwd", [ones(2, 2, 7, 7), BOXES, 1, 4, 5, *ROI, ALL[:1]], r"dout must be .*\[3, \*, \*, \*\]"),
    (
        "roi_align_bwd",
        [ones(3, 2, 7, 7), BOXES, -1, 4, 5, *ROI, ALL[:1]],
        r"batch must be at least 0, got -1",
    ),
    ("roi_align_bwd", [ones(3, 2, 7, 7), BOXES, 1, -4, 5, *ROI, ALL[:1]], r"rows and columns, got -4 x 5"),
    ("roi_align_bwd", [ones(3, 2, 7, 7), BOXES, 2**40, 2**19, 5, *ROI, ALL[:1]], r"too large for one call"),
    ("relative_representation", [ones(4), 8.0], r"similarities must be .*\[\*, \*\]"),
    ("relative_representation", [X, -8.0], r"p must be positive and finite, got -8"),
    ("relative_representation", [MOST[0], 8.0], r"too large for one call"),
    ("relative_similarity", [*TOP[:1], TOP[1][:3], *TOP], r"image_indices must be .*\[4, 2\] of int64"),
    ("relative_similarity", [*TOP, TOP[0], TOP[1].int()], r"text_indices must be .*of int64.*got int32"),
    ("relative_similarity", [*TOP, TOP[0], TOP[1].flip(1)], r"text_indices must ascend in each row"),
    ("relative_similarity", [TOP[0], TOP[1] - 2, *TOP], r"image_indices must ascend in each row, from 0"),
    ("contrastive_search_score", [X, *STATES[:2], X, None, 2.0, 1.0], r"alpha must be from 0 to 1, got 2"),
    ("contrastive_search_score", [X, *STATES[:2], None, None, 0.5, 1.0], r"similarity must be given"),
    ("contrastive_search_score", [X, STATES[0], ones(4, 5, 3), X, None, 0.5, 1.0], r"context must be .*2\]"),
    ("contrastive_search_score", [X, *STATES[:2], X, IDS[:3], 0.5, 1.0], r"context_lengths must be .*\[4\]"),
    ("topk_similarity", [F, ones(6, 2), None, 2, *ALL[:3]], r"key must be .*\[\*, 3\]"),
    ("topk_similarity", [F, F.char(), None, 2, *ALL[:3]], r"key must be .*float32.*got int8"),
    ("topk_similarity", [F, F, ones(4), 2, *ALL[:3]], r"key must be .*of int8.*got float32"),
    ("topk_similarity", [F, F.char(), ones(3), 2, *ALL[:3]], r"key_scale must be .*\[4\]"),
    ("topk_similarity", [F, F, None, 0, *ALL[:3]], r"k must be in \[1, 2\*\*31\), got 0"),
    ("topk_similarity", [*MOST, None, 2, *ALL[:3]], r"too large for one call"),
    ("retrieval_ranks", [F, ones(6, 2), None, None], r"key must be .*\[\*, 3\]"),
    ("retrieval_ranks", [F, ones(3, 3), None, None], r"M must be at least N, got N = 4 and M = 3"),
    ("retrieval_ranks", [F, F, IDS[:3], None], r"positives must be .*\[4\] of int64"),
    ("retrieval_ranks", [F, F, IDS, IDS[:3]], r"key_ids must be .*\[4\] of int64"),
    ("retrieval_ranks", [F, F, None, IDS], r"key_ids require the ids of the queries"),
    ("mine_hard_negatives", [F, F, IDS.int(), *UNKNOWN, 2, None, True], r"positives must be .*int64"),
    ("mine_hard_negatives", [F, F, IDS, None, IDS[:3], IDS, 2, None, True], r"query_groups must be .*\[4\]"),
    ("mine_hard_negatives", [F, F, IDS, None, IDS, None, 2, None, True], r"groups must be of both"),
    ("mine_hard_negatives", [F, F, IDS, *UNKNOWN, 0, None, True], r"k must be in"),
    (
        "linear_cross_entropy_sweep",
        [F, ones(6, 2), IDS, *NO_BIAS, ones(4), 0.0, *ALL[:3]],
        r"weight must be .*\[\*, 3\]",
    ),
    (
        "linear_cross_entropy_sweep",
        [F, ones(6, 3), IDS + 6, *NO_BIAS, ones(4), 0.0, *ALL[:3]],
        r"target must be in \[0, 6\)",
    ),
    (
        "linear_cross_entropy_sweep",
        [F, ones(6, 3), IDS - 1, *NO_BIAS, ones(4), 0.0, *ALL[:3]],
        r"target must be in \[0, 6\)",
    ),
    (
        "linear_cross_entropy_sweep",
        [F, ones(6, 3), IDS, ones(5), None, ones(4), 0.0, *ALL[:3]],
        r"bias must be .*\[6\]",
    ),
    *(
        ("linear_distillation_sweep", [*tensors, ones(4), *options, *ALL[:3]], message)
        for tensors, options, message in (
            ([F, ones(6, 2), *LAYER, *[None] * 5], SOFT, r"student_weight must be .*\[\*, 3\]"),
            ([F, W, ones(3, 2), ones(6, 2), *[None] * 5], SOFT, r"teacher_hidden must be .*\[4, \*\]"),
            ([F, W, ones(4, 2), ones(5, 2), *[None] * 5], SOFT, r"teacher_weight must be .*\[6, 2\]"),
            ([F, W, *[x.double() for x in LAYER], *[None] * 5], SOFT, r"both be float64, or neither"),
            ([F, W, *LAYER, ones(5), *[None] * 4], SOFT, r"student_bias must be .*\[6\]"),
            ([F, W, *LAYER, None, ones(5), *[None] * 3], SOFT, r"teacher_bias must be .*\[6\]"),
            ([F, W, *[None] * 7], SOFT, r"a teacher must be"),
            ([F, W, *LAYER, *[None] * 2, *TOP, None], SOFT, r"a teacher must be"),
            ([F, W, *[None] * 4, ones(4, 3), TOP[1], None], SOFT, r"log_probs must be .*\[4, 2\]"),
            (
                [F, W, *[None] * 4, TOP[0], TOP[1] + 1, None],
                SOFT,
                r"indices must ascend in each row, in \[0, 6\)",
            ),
            ([F, W, *[None] * 4, TOP[0], TOP[1] - 5, None], SOFT, r"indices must ascend in each row"),
            ([F, W, *[None] * 4, TOP[0], TOP[1].flip(1), None], SOFT, r"indices must ascend in each row"),
            ([F, W, *[None] * 4, TOP[0], TOP[1] * 0, None], SOFT, r"indices must ascend in each row"),
            (
                [F, W, *[None] * 4, *TOP, None],
                (1.0, "reverse_kl", 0.5, 0.0),
                r"divergence must be .*with log_probs",
            ),
            ([F, W, *LAYER, *[None] * 4, IDS + 6], SOFT, r"target must be in \[0, 6\)"),
            ([F, W, *LAYER, *[None] * 4, IDS - 1], SOFT, r"target must be in \[0, 6\)"),
            (
                [F, W, *LAYER, *[None] * 5],
                (1.0, "jsd", 0.5, 0.5),
                r"target must be given with hard_weight 0.5",
            ),
        )
    ),
]


def misaligned(t: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros(t.nbytes + 1, dtype=torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=torch.uint8, offset=1).view(t.dtype).view(t.shape)


@native
@pytest.mark.parametrize(
    ("op", "values", "message"), CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.once
def test_arguments_that_do_not_fit(op, values, message):
    with pytest.raises(ValueError, match=message) as error:
        getattr(ops, op)(*values)
    assert op in str(error.value)


def called(op: str) -> list:
    """Arguments of which none is empty and that ask for everything."""
    for seed in itertools.count():
        values = raw.ARGUMENTS[op](raw.Draw(seed))
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        if all(t.numel() for t in tensors) and all(all(v) for v in values if isinstance(v, list)):
            return values
    raise AssertionError


@native
@pytest.mark.parametrize("op", sorted(raw.ARGUMENTS.keys() - COMPOSED - {"scale_grads"}))
def test_every_tensor_is_plain_memory_of_a_known_dtype(op):
    """In its place: other dtypes, another layout, a storage that is gone, memory off its alignment."""
    values = called(op)
    for i, value in enumerate(values):
        if not isinstance(value, torch.Tensor):
            continue
        bytes_of = torch.zeros(value.shape, dtype=torch.uint8)
        others = [
            value.to(torch.complex64),
            bytes_of.view(torch.float8_e4m3fn),
            bytes_of if value.dtype == torch.int8 else bytes_of.char(),
            value.to_sparse(),
        ]
        gone = value.clone()
        gone.untyped_storage().resize_(0)
        others += [gone, misaligned(value)] if value.itemsize > 1 else [gone]
        for other in others:
            with pytest.raises((ValueError, NotImplementedError), match=op):
                getattr(ops, op)(*values[:i], other, *values[i + 1 :])


@pytest.mark.parametrize("op", raw.names())
def test_a_tensor_without_memory_among_others(op):
    """It would be a result that nobody wrote."""
    values = called(op)
    tensors = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor)]
    for i in tensors if len(tensors) > 1 else ():
        with pytest.raises((ValueError, NotImplementedError), match=f"{op}: (all tensors|attempted)"):
            getattr(ops, op)(*values[:i], values[i].to("meta"), *values[i + 1 :])


@pytest.mark.parametrize("op", ["info_nce", "sigmoid_loss"])
def test_features_of_widths_that_differ_are_refused_before_they_are_read(op):
    """The norms of a row of 2**40 numbers, one number in memory, would take a day."""
    query, key = ones(5, 17), ones(()).expand(5, 2**40)
    for tensors in ((query, key), (key, query)):
        values = [*tensors, ones(()), *[ones(())] * (op == "sigmoid_loss"), None, None]
        options = [None, False, 0.0, True, "none", 0] if op == "info_nce" else [True, "none", *ALL[:3]]
        with pytest.raises(ValueError, match=rf"{op}: query must be \[N, D\] and key \[M, D\]"):
            getattr(torch.ops.vlmkernels, op)(*values, *options)


@pytest.mark.parametrize("given", [(), (None,), (None, torch.ones(2)), (torch.ones(3), None, torch.ones(2))])
def test_scale_grads_has_four_results_whatever_is_left_out(given):
    found = torch.ops.vlmkernels.scale_grads(torch.tensor(2.0), *given)
    wanted = [torch.empty(0) if x is None else 2 * x for x in (*given, *[None] * (4 - len(given)))]
    assert [x.tolist() for x in found] == [x.tolist() for x in wanted]
