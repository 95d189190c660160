"""Seeded faults of the kernels of contrastive_distillation."""

from .mutants import Mutation

DISTILLED, DISTILLED_BWD = "contrastive_distillation", "_contrastive_distillation_bwd"
TWO, JOIN, DIVERGENCES = f"{DISTILLED}._stats", f"{DISTILLED}._join", f"{DISTILLED}._losses"
TWO_GRADS, SCALED = f"{DISTILLED_BWD}._tile_grads", f"{DISTILLED_BWD}._finish"

PAIRS, OF_CHUNKS = f"{DISTILLED}, ragged, float32", f"{DISTILLED}, chunks, float16"

MUTANTS = [
    Mutation(
        TWO, DISTILLED, "columns past the end counted", PAIRS,
        "s = tl.where(col_inside[None, :], s, NOTHING)", "s = tl.where(col_inside[None, :], s, s)",
    ),
    Mutation(
        TWO, DISTILLED, "rows past the end counted in the teacher's columns", PAIRS,
        "t = tl.where(row_inside[:, None], t, NOTHING)", "t = tl.where(row_inside[:, None], t, t)",
    ),
    Mutation(
        TWO, DISTILLED, "sums not rescaled to the new maximum", OF_CHUNKS,
        "_rebase(s_max - s_top, t_max - t_top,", "_rebase(s_top - s_top, t_max - t_top,", count=2,
    ),
    Mutation(
        TWO, DISTILLED, "gap shifted without its share of the sum", PAIRS,
        "(gap + shift * teacher) * factor", "gap * factor",
    ),
    Mutation(
        TWO, DISTILLED, "splits of the columns store one result", OF_CHUNKS,
        "_store(ROWS, split.to(tl.int64) * n + rows", "_store(ROWS, rows",
    ),
    Mutation(
        TWO, DISTILLED, "teacher read with the student's stride", PAIRS,
        "rows, cols, stride_tq, stride_tk", "rows, cols, stride_q, stride_tk",
    ),
    Mutation(
        TWO, "_tiles", "offset of a row left in int32", f"{DISTILLED}, far rows, bfloat16",
        "tl.minimum(rows, n - 1).to(tl.int64)[:, None]", "tl.minimum(rows, n - 1)[:, None]",
    ),
    Mutation(
        JOIN, DISTILLED, "all parts read the first", OF_CHUNKS,
        "        offset += length\n", "",
    ),
    Mutation(
        JOIN, DISTILLED, "part not rescaled", OF_CHUNKS,
        "_rebase(s_high - s_top, t_high - t_top, s_part", "_rebase(s_high - s_top, t_top - t_top, s_part",
    ),
    Mutation(
        JOIN, DISTILLED, "last part left out", OF_CHUNKS,
        "for _ in range(0, parts):", "for _ in range(0, parts - 1):",
    ),
    Mutation(
        JOIN, DISTILLED, "sums stored as if there were one chunk", OF_CHUNKS,
        "tl.cast(plane, tl.int64), s_max", "tl.cast(length, tl.int64), s_max",
    ),
    Mutation(
        DIVERGENCES, DISTILLED, "columns' blocks counted from the rows'", PAIRS,
        "        block -= row_blocks\n", "",
    ),
    Mutation(
        DIVERGENCES, DISTILLED, "store of a loss not masked", OF_CHUNKS,
        "tl.store(LOSS + at, loss, mask=inside)", "tl.store(LOSS + at, loss)",
    ),
    Mutation(
        DIVERGENCES, DISTILLED, "rows past the end divided by nothing", PAIRS,
        "tl.where(inside, student, 1.0), tl.where(inside, teacher, 1.0)", "student, teacher",
    ),
    Mutation(
        DIVERGENCES, DISTILLED, "log-sum-exp of the teacher forgotten", PAIRS,
        "(s_log - t_log if KL else s_log)", "(s_log if KL else s_log)",
    ),
    Mutation(
        TWO_GRADS, DISTILLED_BWD, "store masked by rows alone", PAIRS,
        "grads.to(OUT.dtype.element_ty), mask=inside)",
        "grads.to(OUT.dtype.element_ty), mask=row_inside[:, None])",
    ),
    Mutation(
        TWO_GRADS, DISTILLED_BWD, "chunk stored at the rows of the whole", OF_CHUNKS,
        "at = (rows - start).to(tl.int64)", "at = rows.to(tl.int64)",
    ),
    Mutation(
        TWO_GRADS, DISTILLED_BWD, "coefficient of the row taken for the column's", OF_CHUNKS,
        "v *= tl.load(COEF + cols, mask=col_inside", "v *= tl.load(COEF + rows, mask=row_inside",
    ),
    Mutation(
        TWO_GRADS, DISTILLED_BWD, "pairs past the end counted for the scale", PAIRS,
        "tl.where(inside, grads * s, 0.0)", "tl.where(inside, grads * s, grads * s)",
    ),
    Mutation(
        TWO_GRADS, DISTILLED_BWD, "maximum of the student taken for the teacher's", PAIRS,
        "_softmax(t, 1.0, ROWS + n", "_softmax(t, 1.0, ROWS",
    ),
    Mutation(
        SCALED, DISTILLED_BWD, "bound of the store off by one", PAIRS,
        "(factor * x).to(OUT.dtype.element_ty), mask=at < size)",
        "(factor * x).to(OUT.dtype.element_ty), mask=at <= size)",
    ),
    Mutation(
        SCALED, DISTILLED_BWD, "keys take the products of the queries", PAIRS,
        "_scaled(KEY_ACC, DKEY", "_scaled(QUERY_ACC, DKEY",
    ),
    Mutation(
        SCALED, DISTILLED_BWD, "incoming gradient forgotten", PAIRS,
        "factor *= tl.load(FACTOR).to(tl.float32)", "factor *= 1.0",
    ),
    Mutation(
        SCALED, DISTILLED_BWD, "gradient of the scale left in powers of two", PAIRS,
        " / slope_of(SCALE)[1]", "",
    ),
]  # fmt: skip
