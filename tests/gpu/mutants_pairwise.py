"""Seeded faults of the kernels of info_nce and sigmoid_loss; the others are in mutants.py."""

from .mutants import Mutation

NCE, NCE_BWD, NCE_TILES, SIGMOID = "info_nce", "_info_nce_bwd", "_info_nce_tiles", "sigmoid_loss"
FEW, FEW_GRADS = "_info_nce_small", "_info_nce_small._grads"
NORMS, SCALE = "_pairwise._norms", "_ahead._scale"
STATS, JOIN, LOSSES, TOTAL = (f"{NCE}.{name}" for name in ("_stats", "_join", "_losses", "_total"))
COEFFICIENTS, TILE_GRADS, FINISH = (
    f"{NCE_BWD}.{name}" for name in ("_coefficients", "_tile_grads", "_finish")
)
SWEEP, FINISH_PAIRS = f"{SIGMOID}._sweep", f"{SIGMOID}._finish"
SIGMOID_TILES, SIGMOID_FEW = "_sigmoid_loss_tiles", "_sigmoid_loss_small"
SIGMOID_PAIRS = f"{SIGMOID_FEW}._pairs"

PAIRS, CHUNKS, BY_ID = f"{NCE}, pairs, float32", f"{NCE}, chunks, float16", f"{NCE}, by id, float32"
OF_EACH, LONG, FAR = f"{NCE}, of each row, float32", f"{NCE}, long, bfloat16", f"{NCE}, far rows, bfloat16"
ID_CHUNKS, NORMALISED = f"{NCE}, by id, chunks, float16", f"{NCE}, far rows, normalised, bfloat16"
IDS, OF_ROWS = f"{SIGMOID}, ragged, by ids, float32", f"{SIGMOID}, chunks of each row, float16"
FEW_ROWS, FEW_FAR = f"{NCE}, few rows, float32", f"{NCE}, few far rows, bfloat16"
SIGMOIDS, SIGMOID_FAR = f"{SIGMOID}, few rows, float32", f"{SIGMOID}, few far rows, bfloat16"
LARGE, HALF = f"{NCE}, large tiles, bfloat16", f"{NCE}, pairs, bfloat16"
LOW = f"{NCE}, low scale, float32"
SCALED = "scale_grads, four, float32"

MUTANTS = [
    Mutation(
        NORMS, "_pairwise", "one block of the row summed", LONG,
        "squares += x * x", "squares = x * x",
    ),
    Mutation(
        NORMS, "_pairwise", "keys read with the stride of the queries", BY_ID,
        "program - n, program, stride_k", "program - n, program, stride_q",
    ),
    Mutation(
        NORMS, "_pairwise", "norms of the keys stored over those of the queries", BY_ID,
        "UNIT_K, program - n, program, stride_k", "UNIT_K, program - n, program - n, stride_k",
    ),
    Mutation(
        NORMS, "_pairwise", "offset of a row left in int32", NORMALISED,
        "    row = row.to(tl.int64)\n    squares", "    squares",
    ),
    Mutation(
        STATS, NCE, "columns past the end counted", PAIRS,
        "s = tl.where(col_inside[None, :], s, NOTHING)", "s = tl.where(col_inside[None, :], s, s)",
    ),
    Mutation(
        STATS, NCE, "rows past the end counted in the columns", PAIRS,
        "s = tl.where(row_inside[:, None], s, NOTHING)", "s = tl.where(row_inside[:, None], s, s)",
    ),
    Mutation(
        STATS, NCE, "sums not rescaled to the new maximum", CHUNKS,
        "_rebase(row_max - new_max, row_sum, row_moment)", "_rebase(new_max - new_max, row_sum, row_moment)",
    ),
    Mutation(
        STATS, NCE, "moment shifted without its share of the sum", PAIRS,
        "(moment + shift * total) * factor", "moment * factor",
    ),
    Mutation(
        STATS, NCE, "splits of the columns store one result", CHUNKS,
        "ROWS, split.to(tl.int64) * n + rows", "ROWS, rows",
    ),
    Mutation(
        STATS, NCE, "columns without their tail", PAIRS,
        "tl.cdiv(m, BLOCK_N))\n    for", "m // BLOCK_N)\n    for",
    ),
    Mutation(
        STATS, NCE, "positives past the last query counted", BY_ID,
        "same & row_inside[:, None] & col_inside[None, :]", "same & col_inside[None, :]",
    ),
    Mutation(
        STATS, NCE, "logits of pairs stored from every tile", LARGE,
        "row_inside & (rows >= first_col) & (rows < first_col + BLOCK_N)", "row_inside",
    ),
    Mutation(
        STATS, "_tiles", "offset of a row left in int32", FAR,
        "tl.minimum(rows, n - 1).to(tl.int64)[:, None]", "tl.minimum(rows, n - 1)[:, None]",
    ),
    Mutation(
        JOIN, NCE, "all parts read the first", CHUNKS,
        "        offset += length\n", "",
    ),
    Mutation(
        JOIN, NCE, "part not rescaled", CHUNKS,
        "_rebase(other - new, part_total, part_moment)", "_rebase(new - new, part_total, part_moment)",
    ),
    Mutation(
        JOIN, NCE, "last part left out", CHUNKS,
        "for _ in range(0, parts):", "for _ in range(0, parts - 1):",
    ),
    Mutation(
        JOIN, NCE, "sums stored as if there were one chunk", CHUNKS,
        "tl.cast(plane, tl.int64), high", "tl.cast(length, tl.int64), high",
    ),
    Mutation(
        JOIN, NCE, "counts of positives stored over their logits", ID_CHUNKS,
        "tl.store(SUMS + (4 + SMOOTHED) * plane", "tl.store(SUMS + (3 + SMOOTHED) * plane",
    ),
    Mutation(
        LOSSES, NCE, "store of a loss not masked", OF_EACH,
        "tl.store(LOSS + at, loss, mask=inside)", "tl.store(LOSS + at, loss)",
    ),
    Mutation(
        LOSSES, NCE, "columns' blocks counted from the rows'", CHUNKS,
        "TOTALS, block - row_blocks, col_parts", "TOTALS, block, col_parts",
    ),
    Mutation(
        LOSSES, NCE, "row without a positive counted", BY_ID,
        "counted = inside & (count > 0.0)", "counted = inside",
    ),
    Mutation(
        TOTAL, NCE, "losses of the columns left out", PAIRS,
        "(rows + cols).to(tl.float32)", "rows.to(tl.float32)",
    ),
    Mutation(
        TOTAL, NCE, "weights of the rows taken for the columns'", BY_ID,
        "cols /= tl.where(col_mass > 0.0, col_mass, 1.0)", "cols /= tl.where(row_mass > 0.0, row_mass, 1.0)",
    ),
    Mutation(
        TOTAL, NCE, "sums read past their end", PAIRS,
        "row_blocks, None, blocks - row_blocks, BLOCK", "row_blocks, None, blocks, BLOCK", count=2,
    ),
    Mutation(
        COEFFICIENTS, NCE_BWD, "row without a positive has a gradient", BY_ID,
        "tl.load(COUNT + at, mask=inside, other=0.0) > 0.0, 1.0, 0.0)",
        "tl.load(COUNT + at, mask=inside, other=0.0) >= 0.0, 1.0, 0.0)",
    ),
    Mutation(
        COEFFICIENTS, NCE_BWD, "share of the rows taken for the columns'", BY_ID,
        "m, col_share * inverse", "m, row_share * inverse",
    ),
    Mutation(
        COEFFICIENTS, NCE_BWD, "incoming gradient forgotten", BY_ID,
        "unit *= tl.load(DLOSS).to(tl.float32)", "unit *= 1.0",
    ),
    Mutation(
        COEFFICIENTS, NCE_BWD, "store not masked", OF_EACH,
        "factor * coef, mask=at < length)", "factor * coef)",
    ),
    Mutation(
        TILE_GRADS, NCE_TILES, "positives kept", PAIRS,
        "grads = tl.where(same, 0.0, grads)", "grads = tl.where(same, grads, grads)",
    ),
    Mutation(
        TILE_GRADS, NCE_BWD, "store masked by rows alone", PAIRS,
        "mask=row_inside[:, None] & col_inside[None, :]", "mask=row_inside[:, None]",
    ),
    Mutation(
        TILE_GRADS, NCE_BWD, "stride of the keys in place of the buffer's", PAIRS,
        "* stride_out + cols", "* m + cols",
    ),
    Mutation(
        TILE_GRADS, NCE_BWD, "chunk stored at the rows of the whole", CHUNKS,
        "at = (rows - start).to(tl.int64)", "at = rows.to(tl.int64)",
    ),
    Mutation(
        TILE_GRADS, NCE_TILES, "maximum of the row taken for the column's", PAIRS,
        "(s - col_max) - col_log", "(s - row_max) - col_log",
    ),
    Mutation(
        TILE_GRADS, NCE_TILES, "number of positives of a column forgotten", BY_ID,
        "ones * col_weight, hit, QUERY_IDS is not None)", "ones * col_weight, hit, False)",
    ),
    Mutation(
        TILE_GRADS, "_tiles", "features read without their mask", HALF,
        "a = tl.load(q, mask=(start + at < depth)[None, :], other=0.0)", "a = tl.load(q)",
    ),
    Mutation(
        FINISH, "_pairwise", "barrier before reading what other threads stored dropped", LONG,
        "        tl.debug_barrier()\n        a =", "        a =",
    ),
    Mutation(
        FINISH, "_pairwise", "barrier before replacing what other warps read dropped", LOW,
        "            tl.debug_barrier()  # warps", "            # warps", rung="PTX simulator",
    ),
    Mutation(
        FINISH, "_pairwise", "key without a pair reads one", LONG,
        "mask=inside & paired", "mask=inside",
    ),
    Mutation(
        FINISH, "_pairwise", "store not masked", BY_ID,
        "            tl.store(DX + row * depth + cols, out.to(DX.dtype.element_ty), mask=inside)",
        "            tl.store(DX + row * depth + cols, out.to(DX.dtype.element_ty))",
    ),
    Mutation(
        FINISH, "_pairwise", "offset of a row left in int32", FAR,
        "    row = row.to(tl.int64)\n    if PAIRS", "    if PAIRS",
    ),
    Mutation(
        FINISH, "_pairwise", "one block of the row summed", LONG,
        "dots += x * total", "dots = x * total",
    ),
    Mutation(
        FINISH, NCE_BWD, "keys take the rows of the queries' programs", PAIRS,
        "tl.where(program < queries, program, program - queries)", "program",
    ),
    Mutation(
        FINISH, NCE_TILES, "smoothing of a pair forgotten", OF_EACH,
        "other=0.0)) + row_rest)", "other=0.0)))",
    ),
    Mutation(
        FINISH, NCE_BWD, "gradient of the scale left in powers of two", PAIRS,
        "total.to(tl.float32) / slope_of(SCALE)", "total.to(tl.float32) / tl.load(SCALE)",
    ),
    Mutation(
        FEW_GRADS, FEW, "queries past the end read", FEW_ROWS,
        "mask=row_inside[:, None] & (at < features)[None, :], other=0.0",
        "mask=(at < features)[None, :], other=0.0",
    ),
    Mutation(
        FEW_GRADS, FEW, "last tile of the queries left out", FEW_ROWS,
        "for tile in range(0, row_tiles):", "for tile in range(0, row_tiles - 1):",
    ),
    Mutation(
        FEW_GRADS, FEW, "blocks of features overlap", FEW_ROWS,
        "at = program % parts * BLOCK_D", "at = program % parts * (BLOCK_D // 2)",
    ),
    Mutation(
        FEW_GRADS, FEW, "store masked by rows alone", FEW_ROWS,
        "mask = inside[:, None] & (at < features)[None, :]", "mask = inside[:, None] & (at >= 0)[None, :]",
    ),
    Mutation(
        FEW_GRADS, FEW, "keys take the tiles of the queries' programs", FEW_ROWS,
        "tl.where(program < queries, program, program - queries) // parts", "program // parts",
    ),
    Mutation(
        FEW_GRADS, FEW, "offset of a row left in int32", FEW_FAR,
        "K + cols.to(tl.int64)[:, None] * stride_k", "K + cols[:, None] * stride_k",
    ),
    Mutation(
        SWEEP, SIGMOID_TILES, "loss of pairs past the end counted", IDS,
        "x = tl.where(inside, x, NOTHING)", "x = tl.where(inside, x, x)",
    ),
    Mutation(
        SWEEP, SIGMOID, "tiles of columns store one sum", OF_ROWS,
        "at = col_tile.to(tl.int64) * (stop - start) + rows - start", "at = rows - start",
    ),
    Mutation(
        SWEEP, SIGMOID_TILES, "sigmoid of negative logits for all", IDS,
        "tl.exp2(tl.minimum(x, 0.0) - log)", "tl.exp2(x - log)",
    ),
    Mutation(
        SWEEP, SIGMOID, "store masked by rows alone", IDS,
        "grads).to(OUT.dtype.element_ty), mask=inside)",
        "grads).to(OUT.dtype.element_ty), mask=row_inside[:, None])",
    ),
    Mutation(
        SWEEP, "_tiles", "two programs make one tile", IDS,
        "program % in_group // height", "program // in_group",
    ),
    Mutation(
        FINISH_PAIRS, SIGMOID, "keys take the rows of the queries' programs", IDS,
        "DKEY, program - queries", "DKEY, program",
    ),
    Mutation(
        FINISH_PAIRS, SIGMOID, "incoming gradient forgotten", IDS,
        "factor *= tl.load(FACTOR).to(tl.float32)", "factor *= 1.0",
    ),
    Mutation(
        FINISH_PAIRS, SIGMOID, "last part of the sums left out", IDS,
        "pairwise.sum_of(PARTS, None, parts, BLOCK)", "pairwise.sum_of(PARTS, None, parts - 1, BLOCK)",
    ),
    Mutation(
        SIGMOID_PAIRS, SIGMOID_FEW, "every block of features stores the sums", SIGMOIDS,
        "part == 0)", "part >= 0)", count=4,
    ),
    Mutation(
        SIGMOID_PAIRS, SIGMOID_FEW, "sums of the last tile of keys alone", SIGMOIDS,
        "loss += tl.sum(", "loss = tl.sum(",
    ),
    Mutation(
        SIGMOID_PAIRS, SIGMOID_FEW, "last tile of the queries left out", SIGMOIDS,
        "for tile in range(0, row_tiles):", "for tile in range(0, row_tiles - 1):",
    ),
    Mutation(
        SIGMOID_PAIRS, SIGMOID_FEW, "blocks of features overlap", SIGMOIDS,
        "at = part * BLOCK_D", "at = part * (BLOCK_D // 2)",
    ),
    Mutation(
        SIGMOID_PAIRS, SIGMOID_FEW, "keys take the tiles of the queries' programs", SIGMOIDS,
        "program -= row_tiles * of_queries", "program -= 0",
    ),
    Mutation(
        SIGMOID_PAIRS, SIGMOID_FEW, "store masked by rows alone", SIGMOIDS,
        "scale * acc, row_inside[:, None] & (at < features)[None, :])", "scale * acc, row_inside[:, None])",
    ),
    Mutation(
        SIGMOID_PAIRS, SIGMOID_FEW, "offset of a row left in int32", SIGMOID_FAR,
        "K + cols.to(tl.int64)[:, None] * stride_k", "K + cols[:, None] * stride_k",
    ),
    Mutation(
        SCALE, "_ahead", "bound of the store off by one", SCALED,
        "element_ty), mask=at < size)", "element_ty), mask=at <= size)",
    ),
    Mutation(
        SCALE, "_ahead", "size of the first tensor taken for the second's", SCALED,
        "_scaled(X1, OUT1, factor, block, size1", "_scaled(X1, OUT1, factor, block, size0",
    ),
    Mutation(
        SCALE, "_ahead", "last tensor left out", SCALED,
        "if X3 is not None and block >= 0:", "if X3 is not None and block > 0:",
    ),
]  # fmt: skip
