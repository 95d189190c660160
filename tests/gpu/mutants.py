"""Seeded faults of the Triton kernels: patches of the shipped sources, each with a case that must see it."""

import dataclasses

ATTENTION = "_attention._forward"
ROW_SUMS, QUERY, KEY = "_attention_bwd._row_sums", "_attention_bwd._query_grads", "_attention_bwd._key_grads"
RANGES = "_attention_bwd._query_ranges"
BIAS, BIAS_SUMS = "interval_attention._bias_grads", "interval_attention._bias_sums"
LINEAR, SCALE_ROWS = "gated_linear_residual._forward", "gated_linear_residual._scale_rows"
GATED, GATED_BWD = "gated_residual._forward", "gated_residual._backward"

CAUSAL = "interval_attention, causal, bfloat16"
ANY = "interval_attention, any interval, float32"
SEVERAL = "interval_attention, ranges of rows, bfloat16"
BIASED = "interval_attention, bias, batches together, float32"
FAR = "interval_attention, far rows, bfloat16"
NEGATIVE = "interval_attention, negative scale, bfloat16"
PADDED, FROZEN = "interval_attention, padding, bfloat16", "interval_attention, frozen queries, float32"
ALL = "perceiver_attention, all, bfloat16"


@dataclasses.dataclass(frozen=True)
class Mutation:
    """`old`, which occurs `count` times in vlmkernels/triton/<module>.py, becomes `new`."""

    kernel: str  # the launched kernel that has the fault, `module.name`
    module: str
    fault: str
    case: str  # of CASES: the one that must fail
    old: str
    new: str
    count: int = 1
    rung: str = "sanitized interpreter"  # of RUNGS in mutations.py: the first one that sees it

    @property
    def name(self) -> str:
        return f"{self.kernel}: {self.fault}"


MUTANTS = [
    Mutation(
        ATTENTION, "_attention", "bound of the keys off by one", ANY,
        "(cols[None, :] < end[:, None])", "(cols[None, :] <= end[:, None])",
    ),
    Mutation(
        ATTENTION, "_attention", "start of the interval ignored", ANY,
        "seen = (cols[None, :] >= start[:, None]) & (cols", "seen = (cols",
    ),
    Mutation(
        ATTENTION, "_attention", "accumulator not rescaled to the new maximum", CAUSAL,
        "acc * shrink[:, None], input", "acc, input",
    ),
    Mutation(
        ATTENTION, "_attention", "sum not rescaled to the new maximum", CAUSAL,
        "total = total * shrink + tl.sum(p, 1)", "total = total + tl.sum(p, 1)",
    ),
    Mutation(
        ATTENTION, "_attention", "empty row divided by its sum", ANY,
        "out = tl.where(none[:, None], 0.0, acc / tl.where(none, 1.0, total)[:, None])",
        "out = acc / total[:, None]",
    ),
    Mutation(
        ATTENTION, "_attention", "log-sum-exp of an empty row is the least number", ANY,
        'lse = tl.where(none, -float("inf"), high', "lse = tl.where(none, high, high",
    ),
    Mutation(
        ATTENTION, "_attention", "offset of a row left in int32", FAR,
        "rows.to(tl.int64)[:, None] * stride + cols", "rows[:, None] * stride + cols",
    ),
    Mutation(
        ATTENTION, "_attention", "strides of batch and head swapped", ANY,
        "K += batch * stride_kb + head // group * stride_kh",
        "K += batch * stride_kh + head // group * stride_kb",
    ),
    Mutation(
        ATTENTION, "_attention", "store of log-sum-exp not masked", ANY,
        "* tq + rows, lse, mask=inside)", "* tq + rows, lse)",
    ),
    Mutation(
        ATTENTION, "_attention", "half-seen block taken for a whole one", CAUSAL,
        "a + tl.maximum(first_end - a, 0) // BLOCK_N * BLOCK_N",
        "a + tl.cdiv(tl.maximum(first_end - a, 0), BLOCK_N) * BLOCK_N",
    ),
    Mutation(
        ATTENTION, "_attention", "log-sum-exp left to the base 2", CAUSAL,
        "high / LOG_E + tl.log(", "high + tl.log(",
    ),
    Mutation(
        ATTENTION, "_attention", "sign of the scale lost", NEGATIVE,
        "tl.where(scale < 0, -1.0,", "tl.where(scale < 0, 1.0,",
    ),
    Mutation(
        ATTENTION, "_attention", "rows taken to begin at multiples of 16 bytes", CAUSAL,
        "if x.data_ptr() % 16 or any(n % size for n in (*x.stride()[:3], x.shape[3])):",
        "if x.data_ptr() % 16:", rung="PTX simulator",
    ),
    Mutation(
        ATTENTION, "_attention", "second source without its tail", ALL,
        "start, end, 0, tk2, K2", "start, end, 0, tk2 // BLOCK_N * BLOCK_N, K2",
    ),
    Mutation(
        ATTENTION, "_attention", "all queries read the first head of keys", CAUSAL,
        "V += batch * stride_vb + head // group * stride_vh", "V += batch * stride_vb + head * stride_vh",
    ),
    Mutation(
        ROW_SUMS, "_attention_bwd", "load of the gradient of log-sum-exp not masked", FROZEN,
        "tl.load(DLSE + at, mask=inside, other=0.0)", "tl.load(DLSE + at)",
    ),
    Mutation(
        ROW_SUMS, "_attention_bwd", "bound of the store off by one", FROZEN,
        "at, rows < tq), mask=rows < tq)", "at, rows < tq), mask=rows <= tq)",
    ),
    Mutation(
        ROW_SUMS, "_attention_bwd", "strides of batch and head swapped", FROZEN,
        "    OUT += batch * stride_ob + head * stride_oh", "    OUT += batch * stride_oh + head * stride_ob",
        count=2,
    ),
    Mutation(
        ROW_SUMS, "_attention_bwd", "gradient of log-sum-exp added", FROZEN,
        "delta -= tl.load(DLSE", "delta += tl.load(DLSE",
    ),
    Mutation(
        QUERY, "_attention_bwd", "mask of the gradient of logits dropped", ANY,
        "ds = tl.where(seen, ds, 0.0)", "ds = tl.where(seen, ds, ds)",
    ),
    Mutation(
        QUERY, "_attention_bwd", "scale forgotten", CAUSAL,
        "dq * scale, rows", "dq, rows",
    ),
    Mutation(
        QUERY, "_attention_bwd", "strides of batch and head of the result swapped", ANY,
        "DQ + batch * stride_gb + head * stride_gh, dq", "DQ + batch * stride_gh + head * stride_gb, dq",
    ),
    Mutation(
        QUERY, "_attention_bwd", "accumulator starts uninitialised", ANY,
        "dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)",
        "dq = tile(DQ + batch * stride_gb + head * stride_gh, rows, stride_gt, tq, width, True, EVEN_D, "
        "STEP, BLOCK_D).to(tl.float32)",
    ),
    Mutation(
        QUERY, "_attention_bwd", "store of the row sums not masked", ANY,
        "tl.store(DELTA + at, delta, mask=inside)", "tl.store(DELTA + at, delta)",
    ),
    Mutation(
        RANGES, "_attention_bwd", "block whose keys begin within it overlooked", ANY,
        "(start < lo + BLOCK_N)", "(start < lo)",
    ),
    Mutation(
        RANGES, "_attention_bwd", "last query left out", CAUSAL,
        "tl.where(seen, rows + 1, 0)", "tl.where(seen, rows, 0)",
    ),
    Mutation(
        RANGES, "_attention_bwd", "rows read without their tail", SEVERAL,
        "for before in range(0, tq, ROWS):", "for before in range(0, tq - ROWS + 1, ROWS):",
    ),
    Mutation(
        RANGES, "_attention_bwd", "results of neighbours overlap", SEVERAL,
        "at = RANGES + 3 * tl.program_id(0)", "at = RANGES + tl.program_id(0)",
    ),
    Mutation(
        RANGES, "_attention_bwd", "query that sees the first keys of a block taken to see all", CAUSAL,
        "partly = (start > lo) | (end <", "partly = (start > lo) & (end <",
    ),
    Mutation(
        KEY, "_attention_bwd", "mask of the probabilities dropped", ANY,
        "< end[None, :]), p, 0.0)", "< end[None, :]), p, p)",
    ),
    Mutation(
        KEY, "_attention_bwd", "last head of a group left out", CAUSAL,
        "for member in range(0, group):", "for member in range(0, tl.maximum(group - 1, 1)):",
    ),
    Mutation(
        KEY, "_attention_bwd", "row sums not subtracted", CAUSAL,
        " - delta[None, :])\n            dk", ")\n            dk",
    ),
    Mutation(
        KEY, "_attention_bwd", "half-seen block taken for a whole one", CAUSAL,
        "tl.cdiv(whole - first, BLOCK_M) * BLOCK_M", "(whole - first) // BLOCK_M * BLOCK_M",
    ),
    Mutation(
        KEY, "_attention_bwd", "padding of the keys stored", ANY,
        "put(DV, dv, cols, stride_wt, tk, value", "put(DV, dv, cols, stride_wt, tk + 1, value",
    ),
    Mutation(
        KEY, "_attention_bwd", "blocks that all queries see left out", PADDED,
        "tl.where((begin < hi)", "tl.where((begin >= hi)",
    ),
    Mutation(
        KEY, "_attention_bwd", "heads of queries of another head of keys", SEVERAL,
        "head = key_head * group + member", "head = member",
    ),
    Mutation(
        LINEAR, "gated_linear_residual", "row mask ignored", "gated_linear_residual, ragged, float32",
        "branch = tl.where(kept[:, None], branch, 0.0)", "branch = tl.where(kept[:, None], branch, branch)",
    ),
    Mutation(
        LINEAR, "gated_linear_residual", "stride of the depth in place of the width",
        "gated_linear_residual, ragged, float32",
        "at = rows.to(tl.int64)[:, None] * m + cols", "at = rows.to(tl.int64)[:, None] * depth + cols",
    ),
    Mutation(
        LINEAR, "gated_linear_residual", "load of the residual not masked",
        "gated_linear_residual, ragged, float32",
        "x = tl.load(X + at, mask=inside, other=0.0)", "x = tl.load(X + at)",
    ),
    Mutation(
        LINEAR, "gated_linear_residual", "gates of the first block for all",
        "gated_linear_residual, channels, bfloat16",
        "tl.load(GATE + cols, mask=cols < m, other=0.0)",
        "tl.load(GATE + tl.arange(0, BLOCK_N), mask=cols < m, other=0.0)",
    ),
    Mutation(
        SCALE_ROWS, "gated_linear_residual", "row without its tail", "gated_linear_residual, wide, bfloat16",
        "for start in range(0, depth, BLOCK):", "for start in range(0, depth - BLOCK + 1, BLOCK):",
    ),
    Mutation(
        SCALE_ROWS, "gated_linear_residual", "one gate for all rows",
        "gated_linear_residual, channels, bfloat16",
        "tl.load(GATE + row if PER_ROW else GATE)", "tl.load(GATE)",
    ),
    Mutation(
        SCALE_ROWS, "gated_linear_residual", "bound of the store off by one",
        "gated_linear_residual, ragged, float32",
        "(t * p).to(OUT.dtype.element_ty), mask=cols < depth)",
        "(t * p).to(OUT.dtype.element_ty), mask=cols <= depth)",
    ),
    Mutation(
        SCALE_ROWS, "gated_linear_residual", "one block of the row summed",
        "gated_linear_residual, wide, bfloat16",
        "dots += p * y", "dots = p * y",
    ),
    Mutation(
        GATED, "gated_residual", "bound of the rows off by one", "gated_residual, ragged, float32",
        "inside = (rows < n)[:, None]", "inside = (rows <= n)[:, None]",
    ),
    Mutation(
        GATED, "gated_residual", "row mask ignored", "gated_residual, channels, masked, bfloat16",
        "y = tl.load(Y + at, mask=kept, other=0.0)", "y = tl.load(Y + at, mask=inside, other=0.0)",
    ),
    Mutation(
        GATED, "gated_residual", "gates of the first block for all", "gated_residual, wide, bfloat16",
        "cols = col_block * BLOCK_D + tl.arange(0, BLOCK_D)\n        t =",
        "cols = tl.arange(0, BLOCK_D)\n        t =",
    ),
    Mutation(
        GATED, "gated_residual", "rows of neighbouring programs overlap", "gated_residual, ragged, float32",
        "tl.program_id(0) // col_blocks * BLOCK_R", "tl.program_id(0) // col_blocks * (BLOCK_R - 1)",
    ),
    Mutation(
        GATED_BWD, "gated_residual", "programs share their rows", "gated_residual, ragged, float32",
        "range(program * BLOCK_R, n, programs * BLOCK_R)", "range(program * BLOCK_R, n, BLOCK_R)",
    ),
    Mutation(
        GATED_BWD, "gated_residual", "sum of the last rows alone", "gated_residual, ragged, float32",
        "total += dout * tl.load", "total = dout * tl.load",
    ),
    Mutation(
        GATED_BWD, "gated_residual", "all programs store one partial sum", "gated_residual, ragged, float32",
        "tl.store(PARTIAL + tl.program_id(0),", "tl.store(PARTIAL,",
    ),
    Mutation(
        GATED_BWD, "gated_residual", "bound of the partial sums off by one", "gated_residual, wide, bfloat16",
        "tl.sum(total.to(tl.float64), 0), mask=cols < depth)",
        "tl.sum(total.to(tl.float64), 0), mask=cols <= depth)",
    ),
    Mutation(
        BIAS, "interval_attention", "mask of the gradient of logits dropped", BIASED,
        "total += tl.where(seen, ds, 0.0)", "total += ds",
    ),
    Mutation(
        BIAS, "interval_attention", "rows past the grid counted", BIASED,
        "rows = tl.where(i < grid_cols, row * grid_cols + i, tq)", "rows = row * grid_cols + i",
    ),
    Mutation(
        BIAS, "interval_attention", "last batch left out", BIASED,
        "range(0, tl.cdiv(batches - split, splits))",
        "range(0, tl.maximum((batches - split) // splits - 1, 1))",
    ),
    Mutation(
        BIAS, "interval_attention", "results of neighbouring programs overlap", BIASED,
        "tl.program_id(0).to(tl.int64) * BLOCK * BLOCK +", "tl.program_id(0).to(tl.int64) * BLOCK +",
    ),
    Mutation(
        BIAS, "_attention", "row of the table without its last column", BIASED,
        "wide = 2 * grid_cols - 1", "wide = 2 * grid_cols - 2",
    ),
    Mutation(
        BIAS_SUMS, "interval_attention", "neighbours of a diagonal swapped", BIASED,
        "tl.where(i < BLOCK, tile_of, tile_of + 1)", "tl.where(i < BLOCK, tile_of + 1, tile_of)",
    ),
    Mutation(
        BIAS_SUMS, "interval_attention", "tiles past the last one read", BIASED,
        "(at >= 0) & (at < 2 * col_blocks - 1)", "(at >= 0)",
    ),
    Mutation(
        BIAS_SUMS, "interval_attention", "first key of a tile left out", BIASED,
        "for j in range(0, BLOCK):", "for j in range(1, BLOCK):",
    ),
    Mutation(
        BIAS_SUMS, "interval_attention", "store not masked", BIASED,
        "total.to(DTABLE.dtype.element_ty), mask=entries < width)", "total.to(DTABLE.dtype.element_ty))",
    ),
]  # fmt: skip
