"""Seeded faults of the kernels for losses of rows."""

from .mutants import Mutation

FORWARD, BACKWARD = "distillation._forward", "distillation._backward"
FEATURES, FEATURES_BWD = "embedding_distillation._forward", "embedding_distillation._backward"
TOTAL = "_rows._total"

FORWARD_KL, REVERSE_KL = "distillation, forward KL, float32", "distillation, reverse KL, float16"
JSD, HELD = "distillation, JSD, float32", "distillation, JSD in registers, float16"
FAR = "distillation, far rows, bfloat16"
L1, LONG = "embedding_distillation, l1, float32", "embedding_distillation, l1, long, float16"
L2, FAR_FEATURES = "embedding_distillation, l2, float32", "embedding_distillation, far rows, bfloat16"

MUTANTS = [
    Mutation(
        FORWARD, "distillation", "columns past the last class counted", JSD,
        'z = tl.load(STUDENT + cols, mask=cols < end, other=-float("inf"))',
        "z = tl.load(STUDENT + cols, mask=cols < end, other=0.0)",
    ),
    Mutation(
        FORWARD, "distillation", "sum not rescaled to the new maximum", FORWARD_KL,
        "sum_s * keep_s + tl.sum(s, 0)", "sum_s + tl.sum(s, 0)",
    ),
    Mutation(
        FORWARD, "distillation", "sum of the cross-entropy not rescaled", FORWARD_KL,
        "hard * _keep(old_s, top_s, 1.0)", "hard",
    ),
    Mutation(
        FORWARD, "distillation", "differences left relative to the old maxima", FORWARD_KL,
        "cross + sum_p * moved", "cross",
    ),
    Mutation(
        FORWARD, "distillation", "differences moved the wrong way", REVERSE_KL,
        "cross - sum_s * moved", "cross + sum_s * moved",
    ),
    Mutation(
        FORWARD, "distillation", "row that does not count has a loss", FORWARD_KL,
        "tl.store(LOSS + row, tl.where(counted, loss, 0.0))", "tl.store(LOSS + row, loss)",
    ),
    Mutation(
        FORWARD, "distillation", "logarithm of the student's share for the teacher's", HELD,
        "tl.maximum(-odds, 0.0) + log_beta", "tl.maximum(odds, 0.0) + log_beta",
    ),
    Mutation(
        FORWARD, "distillation", "student's strides for the teacher", FORWARD_KL,
        "TEACHER += row * (stride_t // GRAIN * GRAIN)", "TEACHER += row * (stride_s // GRAIN * GRAIN)",
        count=2,
    ),
    Mutation(
        FORWARD, "distillation", "offset of a row left in int32", FAR,
        "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)",
    ),
    Mutation(
        BACKWARD, "distillation", "blocks of a row overlap", FORWARD_KL,
        "tl.program_id(0) % blocks * BLOCK + ", "tl.program_id(0) % blocks * (BLOCK - 1) + ",
    ),
    Mutation(
        BACKWARD, "distillation", "row that does not count gets a gradient", FORWARD_KL,
        "g = tl.where(counted, g, 0.0)", "g = g + 0.0",
    ),
    Mutation(
        BACKWARD, "distillation", "bound of the store off by one", JSD,
        "g.to(OUT.dtype.element_ty), mask=cols < classes)",
        "g.to(OUT.dtype.element_ty), mask=cols <= classes)",
    ),
    Mutation(
        BACKWARD, "distillation", "target left out", FORWARD_KL,
        "tl.where(cols == target, s - 1.0, s)", "s",
    ),
    Mutation(
        BACKWARD, "distillation", "sum of the rows in place of their mean", FORWARD_KL,
        "u *= tl.load(SHARE)", "u *= 1.0",
    ),
    Mutation(
        BACKWARD, "distillation", "cross-entropy at the temperature of the divergence", JSD,
        "s = _exp(above) * (1.0 / tl.load", "s = _exp(a) * (1.0 / tl.load",
    ),
    Mutation(
        BACKWARD, "distillation", "mean of the logarithms not subtracted", REVERSE_KL,
        "(a - b) + (log_sums - mean)", "(a - b) + log_sums",
    ),
    Mutation(
        BACKWARD, "distillation", "offset of a row left in int32", FAR,
        "(tl.program_id(0) // blocks).to(tl.int64)", "(tl.program_id(0) // blocks)",
    ),
    Mutation(
        FEATURES, "embedding_distillation", "rows past the end read", L1,
        "tl.load(WEIGHT + rows, mask=rows < n, other=0.0)",
        "tl.load(WEIGHT + rows, mask=rows < n, other=1.0)",
    ),
    Mutation(
        FEATURES, "embedding_distillation", "bound of the features off by one", L1,
        "inside = read[:, None] & (cols < depth)", "inside = read[:, None] & (cols <= depth)",
    ),
    Mutation(
        FEATURES, "embedding_distillation", "norm of the first block of a row", LONG,
        "of_s += tl.sum(x * x, 1)", "of_s += 0.0",
    ),
    Mutation(
        FEATURES, "embedding_distillation", "distance of the first block of a row", LONG,
        "total += tl.sum(", "total += 0.0 * tl.sum(",
    ),
    Mutation(
        FEATURES, "embedding_distillation", "rows of neighbouring programs overlap", L1,
        "rows = tl.program_id(0) * BLOCK_R + ", "rows = tl.program_id(0) * (BLOCK_R - 1) + ",
    ),
    Mutation(
        FEATURES, "embedding_distillation", "student's strides for the teacher", L1,
        "(stride_t // GRAIN * GRAIN)", "(stride_s // GRAIN * GRAIN)",
    ),
    Mutation(
        FEATURES, "embedding_distillation", "offset of a row left in int32", FAR_FEATURES,
        "    rows = rows.to(tl.int64)\n", "",
    ),
    Mutation(
        FEATURES_BWD, "embedding_distillation", "derivative of the norm left out", L2,
        "coef * (_slope(u, v, DISTANCE) - u * along)", "coef * _slope(u, v, DISTANCE)",
    ),
    Mutation(
        FEATURES_BWD, "embedding_distillation", "gradient by the unit vector", L2,
        "(coef * weight)[:, None] * of_s", "(coef * weight)[:, None]",
    ),
    Mutation(
        FEATURES_BWD, "embedding_distillation", "store not masked by the features", L1,
        "mask=inside & (cols < depth)[None, :])", "mask=inside)",
    ),
    Mutation(
        FEATURES_BWD, "embedding_distillation", "sum of the rows in place of their mean", L1,
        "coef *= tl.load(SHARE)", "coef *= 1.0",
    ),
    Mutation(
        FEATURES_BWD, "embedding_distillation", "rest of a row stored over its first block", LONG,
        "OUT + (first + cols)[None, :]", "OUT + cols[None, :]",
    ),
    Mutation(
        FEATURES_BWD, "embedding_distillation", "projection of the first block of a row", LONG,
        "along += tl.sum(x * of_s", "along += 0.0 * tl.sum(x * of_s",
    ),
    Mutation(
        TOTAL, "_rows", "rows that do not count in the mean", FORWARD_KL,
        "tl.where(ignored, 0.0, weight)", "tl.where(ignored, weight, weight)",
    ),
    Mutation(
        TOTAL, "_rows", "rows past the end in the mean", FORWARD_KL,
        "tl.where(rows < n, 1.0, 0.0)", "tl.where(rows < n, 1.0, 1.0)",
    ),
    Mutation(
        TOTAL, "_rows", "one block of rows summed", FORWARD_KL,
        "range(0, n, BLOCK)", "range(0, BLOCK, BLOCK)",
    ),
    Mutation(
        TOTAL, "_rows", "bound of the losses off by one", L1,
        "tl.load(LOSS + rows, mask=rows < n, other=0.0)", "tl.load(LOSS + rows, mask=rows <= n, other=0.0)",
    ),
]  # fmt: skip
