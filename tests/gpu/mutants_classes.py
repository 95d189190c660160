"""Seeded faults of the kernels for the losses of a linear layer's classes."""

from .mutants import Mutation

MOVE, LOSSES = "_pairwise_classes._move_rows", "linear_cross_entropy._row_losses"
OFFLINE, FORWARD = "linear_distillation._offline", "distillation._forward"

CLASSES, CHUNKED = "linear_cross_entropy, ragged, float32", "linear_cross_entropy, chunks, bfloat16"
WIDE = "linear_cross_entropy, wide, bfloat16"
TAUGHT, TOP = "linear_distillation, ragged, float32", "linear_distillation, offline, float32"
TOP_CHUNKED = "linear_distillation, offline, chunks, bfloat16"
TOP_WIDE = "linear_distillation, offline, wide, bfloat16"

MUTANTS = [
    Mutation(
        MOVE, "_pairwise_classes", "row that does not count read", CLASSES,
        "mask=(cols < depth) & counted, other=0.0)", "mask=cols < depth, other=0.0)",
    ),
    Mutation(
        MOVE, "_pairwise_classes", "row without its tail", WIDE,
        "range(0, depth, BLOCK)", "range(0, depth - BLOCK + 1, BLOCK)",
    ),
    Mutation(
        MOVE, "_pairwise_classes", "put where it is in the chunk", CHUNKED,
        "OUT += place * depth", "OUT += row * depth",
    ),
    Mutation(
        MOVE, "_pairwise_classes", "bound of the store off by one", CLASSES,
        "x.to(OUT.dtype.element_ty), mask=cols < depth)", "x.to(OUT.dtype.element_ty), mask=cols <= depth)",
    ),
    Mutation(
        MOVE, "_pairwise_classes", "factor forgotten", "linear_cross_entropy, ragged, float16",
        "x *= tl.load(FACTOR)", "x *= 1.0",
    ),
    Mutation(
        MOVE, "_pairwise_classes", "offset of a row left in int32",
        "linear_cross_entropy, far rows, bfloat16",
        "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "columns past the last class counted", CLASSES,
        'return tl.where(cols < classes, z, -float("inf"))', "return z",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "sum not rescaled to the new maximum", CHUNKED,
        "total * e + 1.0", "total + 1.0",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "sums of the lanes added below their own maxima", CLASSES,
        "tl.sum(total * tl.exp(top - high), 0)", "tl.sum(total, 0)",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "mean over the padded row", CHUNKED,
        "tl.sum(logits, 0) / classes", "tl.sum(logits, 0) / padded",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "coefficient of the row of the chunk", CHUNKED,
        "coef = tl.load(COEF + place)", "coef = tl.load(COEF + row)",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "scale of the classes forgotten in the gradient", CHUNKED,
        "g *= tl.load(SCALE + cols, mask=cols < classes, other=0.0).to(tl.float32)", "g *= 1.0",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "row that does not count gets a gradient", CLASSES,
        "tl.where(counted & (cols < classes), g, 0.0)", "tl.where(cols < classes, g, 0.0)",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "stride of the logits for the gradients", WIDE,
        "DZ += row * stride_dz", "DZ += row * stride_z",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "store past the padded row", CLASSES,
        "mask=cols < padded)\n\n\ndef", "mask=cols <= padded)\n\n\ndef",
    ),
    Mutation(
        LOSSES, "linear_cross_entropy", "barrier before replacing logits that other warps read dropped", WIDE,
        "            tl.debug_barrier()  # not wider", "            # not wider",
        rung="PTX simulator",
    ),
    Mutation(
        FORWARD, "distillation", "bias of the student for the teacher's", TAUGHT,
        "q += tl.load(TEACHER_BIAS + cols", "q += tl.load(STUDENT_BIAS + cols",
    ),
    Mutation(
        FORWARD, "distillation", "bias of the target forgotten", TAUGHT,
        "logit += tl.load(STUDENT_BIAS + target, mask=is_class, other=0.0).to(tl.float32)", "logit += 0.0",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "teacher's classes counted among the others", TOP,
        'tl.store(Z + index, tl.full([BLOCK_K], -float("inf"), tl.float32), mask=inside)',
        "tl.store(Z + index, tl.load(TAKEN + at, mask=inside), mask=inside)",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "bias of the teacher's classes forgotten", TOP,
        "z += tl.load(BIAS + index, mask=inside, other=0.0).to(tl.float32)", "z += 0.0",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "sum of the others not moved to the maximum of all", TOP_CHUNKED,
        "moved = _shift(top) - high", "moved = 0.0 * high",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "rest of the teacher's probability dropped", TOP,
        "tail = tl.maximum(1.0 - known, 0.0)", "tail = known * 0.0",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "divergence of the last block of the teacher's classes", TOP_CHUNKED,
        "divergence += tl.sum(more, 0)", "divergence = tl.sum(more, 0)",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "row that does not count has a loss", TOP,
        "tl.store(LOSS + row, tl.where(counted, loss, 0.0))", "tl.store(LOSS + row, loss)",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "row that does not count gets a gradient", TOP,
        "tl.where(counted & (at == target)", "tl.where(at == target",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "target among the other classes left out", TOP,
        "tl.where(counted & (at == target), g - u * hard_weight, g)", "g",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "target among the teacher's classes left out", TOP_CHUNKED,
        "tl.where(index == target, p - 1.0, p)", "p",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "store past the row", TOP,
        "g.to(DZ.dtype.element_ty), mask=at < padded)", "g.to(DZ.dtype.element_ty), mask=at <= padded)",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "barrier before the others are read dropped", TOP,
        "    tl.debug_barrier()\n\n    cols = ", "\n    cols = ",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "barrier before logits that other warps read are replaced dropped",
        TOP_WIDE, "        tl.debug_barrier()  # all", "        # all", rung="PTX simulator",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "barrier before marks that other warps read are replaced dropped",
        TOP_WIDE, "        tl.debug_barrier()\n        tl.store(Z", "        tl.store(Z",
        rung="PTX simulator",
    ),
    Mutation(
        OFFLINE, "linear_distillation", "barrier before gradients are replaced dropped", TOP_WIDE,
        "        tl.debug_barrier()\n        for first in range(0, named",
        "        for first in range(0, named",
        rung="PTX simulator",
    ),
]  # fmt: skip
