"""contrastive_distillation: two GEMMs in one, the student's and the teacher's, with a common epilogue.

Logits are in powers of two. They are computed in both passes: at the usual widths of features, that costs a
GPU no more than writing and reading them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.contrastive_distillation import check_distillation, sum_dtype
from vlmkernels.reference.contrastive_distillation import contrastive_distillation_fwd as reference_fwd
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._tiles import Tile, similarities

PROGRAMS = 1024  # the columns are split until the first sweep has about so many programs
PARTIAL_BYTES = 1 << 26  # sums over the columns of a launch's tiles, or those of one row of tiles
LINES = 128  # rows or columns of a program that joins their sums
SUMS = 5  # of a row or a column: see `_store`
NOTHING: tl.constexpr = tl.constexpr(-3e38)  # a logit without weight, finite so that products with 0 are 0
LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))

# As in `tiles.TILES`, for the registers of two products at once and, in the first sweep, of the sums of both
STATS: tiles.Tiles = {
    ("half", True): Tile(128, 64, 64, 8, 3),
    ("half", False): Tile(64, 64, 64, 4, 3),
    ("tf32", True): Tile(128, 64, 32, 8, 3),
    ("tf32", False): Tile(64, 64, 32, 4, 3),
    ("ieee", True): Tile(64, 64, 16, 8, 2),
    ("ieee", False): Tile(64, 64, 16, 8, 2),
}
STATS_ON: dict[str, tiles.Tiles] = {
    "sm_90": {("half", True): Tile(128, 128, 32, 8, 4)},
    "sm_100": {
        ("half", True): Tile(128, 64, 32, 8, 3),
        ("half", False): Tile(64, 64, 64, 8, 3),
        ("tf32", True): Tile(64, 64, 32, 8, 3),
        ("tf32", False): Tile(64, 64, 32, 8, 3),
    },
    "gfx942": {
        ("half", True): Tile(128, 64, 64, 8, 2),
        ("half", False): Tile(64, 64, 64, 4, 2),
        ("tf32", True): Tile(128, 64, 32, 8, 2),
        ("tf32", False): Tile(64, 64, 32, 4, 2),
        ("ieee", True): Tile(64, 64, 16, 4, 2),
        ("ieee", False): Tile(64, 64, 16, 4, 2),
    },
}


@triton.jit
def slope_of(SCALE):
    """What turns similarities into logits in powers of two, and 1 in its place where it is 0."""
    slope = tl.load(SCALE).to(tl.float32) * LOG2E
    return slope, tl.where(slope == 0, 1.0, slope)


@triton.jit
def _sums(s, t, s_max, t_max, AXIS: tl.constexpr, KL: tl.constexpr):
    """Of 2^s, of 2^t, and of 2^t times (t - s, or -s), all of them below the maxima."""
    s -= tl.expand_dims(s_max, AXIS)
    t -= tl.expand_dims(t_max, AXIS)
    p = tl.exp2(t)
    gap = t - s if KL else -s
    return tl.sum(tl.exp2(s), AXIS), tl.sum(p, AXIS), tl.sum(p * gap, AXIS)


@triton.jit
def _rebase(s_shift, t_shift, student, teacher, gap, KL: tl.constexpr):
    """The sums below maxima that are higher by -s_shift and -t_shift."""
    factor = tl.exp2(t_shift)
    shift = t_shift - s_shift if KL else -s_shift
    return student * tl.exp2(s_shift), teacher * factor, (gap + shift * teacher) * factor


@triton.jit
def _store(SUMS, at, plane, s_max, t_max, student, teacher, gap, inside):
    tl.store(SUMS + at, s_max, mask=inside)
    tl.store(SUMS + plane + at, t_max, mask=inside)
    tl.store(SUMS + 2 * plane + at, student, mask=inside)
    tl.store(SUMS + 3 * plane + at, teacher, mask=inside)
    tl.store(SUMS + 4 * plane + at, gap, mask=inside)


@triton.jit
def _stats(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    TEACHER_Q,  # [n, width]
    TEACHER_K,  # [m, width]
    TEACHER_SCALE,  # [1]
    ROWS,  # [5, splits, n]
    COLS,  # [5, row tiles, m] or None
    stride_q,
    stride_k,
    stride_tq,
    stride_tk,
    start,  # rows start <= i < stop are in this launch
    stop,
    n,
    m,
    depth,
    width,
    splits,
    tiles_per_split,
    KL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(stop - start, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    split = tl.program_id(0) // row_tiles
    rows = start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < stop
    slope, teacher_slope = slope_of(SCALE)[0], slope_of(TEACHER_SCALE)[0]
    s_max = tl.full([BLOCK_M], NOTHING, tl.float32)
    t_max = tl.full([BLOCK_M], NOTHING, tl.float32)
    student = tl.zeros([BLOCK_M], tl.float32)
    teacher = tl.zeros([BLOCK_M], tl.float32)
    gap = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(m, BLOCK_N))
    for col_tile in range(split * tiles_per_split, last):
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        col_inside = cols < m
        s = slope * similarities(
            Q, K, rows, cols, stride_q, stride_k, stop, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
        )
        t = teacher_slope * similarities(
            TEACHER_Q, TEACHER_K, rows, cols, stride_tq, stride_tk, stop, m, width, BLOCK_M, BLOCK_N,
            BLOCK_E, EVEN_E, PRECISION,
        )  # fmt: skip
        s = tl.where(col_inside[None, :], s, NOTHING)
        t = tl.where(col_inside[None, :], t, NOTHING)
        s_top = tl.maximum(s_max, tl.max(s, 1))
        t_top = tl.maximum(t_max, tl.max(t, 1))
        student, teacher, gap = _rebase(s_max - s_top, t_max - t_top, student, teacher, gap, KL)
        s_part, t_part, gap_part = _sums(s, t, s_top, t_top, 1, KL)
        student += s_part
        teacher += t_part
        gap += gap_part
        s_max, t_max = s_top, t_top
        if COLS is not None:
            s = tl.where(row_inside[:, None], s, NOTHING)
            t = tl.where(row_inside[:, None], t, NOTHING)
            s_high = tl.max(s, 0)
            t_high = tl.max(t, 0)
            s_part, t_part, gap_part = _sums(s, t, s_high, t_high, 0, KL)
            plane = tl.cast(row_tiles, tl.int64) * m
            at = row_tile.to(tl.int64) * m + cols
            _store(COLS, at, plane, s_high, t_high, s_part, t_part, gap_part, col_inside)
    plane = tl.cast(splits, tl.int64) * n
    _store(ROWS, split.to(tl.int64) * n + rows, plane, s_max, t_max, student, teacher, gap, row_inside)


@triton.jit
def _joined(SUMS, at, inside, parts, length, KL: tl.constexpr):
    """Maxima and sums of the whole, from those of its parts, in their order."""
    s_max = tl.full(at.shape, NOTHING, tl.float32)
    t_max = tl.full(at.shape, NOTHING, tl.float32)
    student = tl.zeros(at.shape, tl.float32)
    teacher = tl.zeros(at.shape, tl.float32)
    gap = tl.zeros(at.shape, tl.float32)
    plane = tl.cast(parts, tl.int64) * length
    offset = at.to(tl.int64)
    for _ in range(0, parts):
        s_high = tl.load(SUMS + offset, mask=inside, other=0.0)
        t_high = tl.load(SUMS + plane + offset, mask=inside, other=0.0)
        s_part = tl.load(SUMS + 2 * plane + offset, mask=inside, other=0.0)
        t_part = tl.load(SUMS + 3 * plane + offset, mask=inside, other=0.0)
        gap_part = tl.load(SUMS + 4 * plane + offset, mask=inside, other=0.0)
        s_top = tl.maximum(s_max, s_high)
        t_top = tl.maximum(t_max, t_high)
        student, teacher, gap = _rebase(s_max - s_top, t_max - t_top, student, teacher, gap, KL)
        s_part, t_part, gap_part = _rebase(s_high - s_top, t_high - t_top, s_part, t_part, gap_part, KL)
        student += s_part
        teacher += t_part
        gap += gap_part
        s_max, t_max = s_top, t_top
        offset += length
    return s_max, t_max, student, teacher, gap


@triton.jit
def _join(
    PARTS,  # [5, parts, length]
    OUT,  # [5, length], `plane` apart
    parts,
    length,
    plane,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of several parts as one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    s_max, t_max, student, teacher, gap = _joined(PARTS, at, inside, parts, length, KL)
    _store(OUT, at.to(tl.int64), tl.cast(plane, tl.int64), s_max, t_max, student, teacher, gap, inside)


@triton.jit
def _finish_lines(
    PARTS, STATS, LOSS, TOTAL, block, parts, length, weight, KL: tl.constexpr, BLOCK: tl.constexpr
):
    """Log-sum-exps and weighted losses of a block of rows, or of columns."""
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    s_max, t_max, student, teacher, gap = _joined(PARTS, at, inside, parts, length, KL)
    student, teacher = tl.where(inside, student, 1.0), tl.where(inside, teacher, 1.0)
    s_log = tl.log2(student)
    t_log = tl.log2(teacher)
    loss = weight * (gap / teacher + (s_log - t_log if KL else s_log))
    if LOSS is not None:
        tl.store(LOSS + at, loss, mask=inside)
    if TOTAL is not None:
        tl.store(TOTAL + tl.program_id(0), tl.sum(loss, 0))
    plane = tl.cast(length, tl.int64)
    _store(STATS, at.to(tl.int64), plane, s_max, t_max, s_log, t_log, tl.zeros([BLOCK], tl.float32), inside)


@triton.jit
def _losses(
    ROWS,  # [5, row parts, n]
    COLS,  # [5, col parts, m] or None
    ROW_STATS,  # [5, n] maxima, then logarithms of the sums, of the student and of the teacher; zeros
    COL_STATS,  # [5, m] or None
    ROW_LOSS,  # [n] or None
    COL_LOSS,  # [m] or None
    TOTAL,  # [programs] sums of the losses of a program, or None
    row_parts,
    col_parts,
    n,
    m,
    row_weight,
    col_weight,
    KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    row_blocks = tl.cdiv(n, BLOCK)
    if block < row_blocks:
        _finish_lines(ROWS, ROW_STATS, ROW_LOSS, TOTAL, block, row_parts, n, row_weight, KL, BLOCK)
    elif COLS is not None:
        block -= row_blocks
        _finish_lines(COLS, COL_STATS, COL_LOSS, TOTAL, block, col_parts, m, col_weight, KL, BLOCK)


def operands_of(*features: Tensor) -> list[Tensor]:
    """In one dtype, that of the products."""
    dtype = torch.promote_types(features[0].dtype, features[2].dtype)
    return [tiles.rows_contiguous(x.to(dtype)) for x in features]


def options_of(
    query: Tensor, key: Tensor, teacher_query: Tensor, table: tiles.Tiles, exceptions: dict[str, tiles.Tiles]
) -> dict:
    """The tile, and its steps through the features of the student and of the teacher."""
    options, teacher = (
        tiles.launch_options(x, key, fuse=False, table=table, exceptions=exceptions)
        for x in (query, teacher_query)
    )
    return options | {"BLOCK_E": teacher["BLOCK_K"], "EVEN_E": teacher["EVEN_K"]}


def strides_of(*features: Tensor) -> tuple[int, ...]:
    return tuple(x.stride(0) for x in features)


def weights_of(n: int, m: int, symmetric: bool, reduction: str) -> tuple[float, float]:
    """Of the loss of a row in the result, and of a column."""
    share = 0.5 if symmetric else 1.0
    return (share / n, share / m) if reduction == "mean" else (share, share)


def contrastive_distillation(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    teacher_query: Tensor,  # [N, E]
    teacher_key: Tensor,  # [M, E]
    teacher_scale: Tensor,
    symmetric: bool,
    divergence: str,
    reduction: str,
    store_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, rows [5, N], cols [5, M], empty store); see `_losses` for what the rows are."""
    tensors = (query, key, scale, teacher_query, teacher_key, teacher_scale)
    features = (query, key, teacher_query, teacher_key)
    check_distillation("contrastive_distillation", *features, symmetric, divergence, reduction)
    n, m, work = len(query), len(key), sum_dtype(query, teacher_query)
    stats = query.new_empty(0, dtype=work)
    rows, cols = stats.new_empty((5, n)), stats.new_empty((5, m if symmetric else 0))
    store = query.new_empty(0, dtype=torch.uint8)
    if n == 0 or m == 0:
        loss = stats.new_zeros((n,) if reduction == "none" else ())
        return loss, rows.zero_(), cols.zero_(), store
    if work == torch.float64:  # Triton does not multiply it on every GPU
        return reference_fwd(*tensors, symmetric, divergence, reduction), rows.zero_(), cols.zero_(), store
    operands = [tiles.operand(x) for x in operands_of(*features)]
    q, k, teacher_q, teacher_k = operands
    options, kl = options_of(q, k, teacher_q, STATS, STATS_ON), divergence == "kl"
    height, col_tiles = options["BLOCK_M"], tiles.cdiv(m, options["BLOCK_N"])
    held = max(1, PARTIAL_BYTES // (SUMS * 4 * m)) * height if symmetric else n
    tiles_per_split = tiles.cdiv(col_tiles, tiles.cdiv(PROGRAMS, tiles.cdiv(min(held, n), height)))
    splits = tiles.cdiv(col_tiles, tiles_per_split)
    row_parts, col_parts = stats.new_empty((SUMS, splits, n)), None
    joined = stats.new_empty((SUMS, tiles.cdiv(n, held), m)) if n > held else None
    lines = {"BLOCK": LINES, "num_warps": 4, "enable_fp_fusion": True}
    with torch.cuda.device_of(query):
        for i, start in enumerate(range(0, n, held)):
            stop = min(start + held, n)
            row_tiles = tiles.cdiv(stop - start, height)
            if symmetric:
                col_parts = stats.new_empty((SUMS, row_tiles, m))
            _stats[(row_tiles * splits,)](
                q, k, scale, teacher_q, teacher_k, teacher_scale, row_parts, col_parts,
                *strides_of(*operands), start, stop, n, m, q.shape[1], teacher_q.shape[1], splits,
                tiles_per_split, kl, **options,
            )  # fmt: skip
            if joined is not None:
                out = joined[:, i]
                _join[(tiles.cdiv(m, LINES),)](col_parts, out, row_tiles, m, out.stride(0), kl, **lines)
        col_parts = col_parts if joined is None else joined
        counts, each = (n, cols.shape[1]), reduction == "none"
        blocks = sum(tiles.cdiv(count, LINES) for count in counts)
        losses = [stats.new_empty(count if each else 0) for count in counts]
        totals = stats.new_empty(0 if each else blocks)
        weights = [math.log(2) * weight for weight in weights_of(n, m, symmetric, reduction)]
        _losses[(blocks,)](
            row_parts, col_parts, rows, cols if symmetric else None, *(losses if each else (None, None)),
            None if each else totals, splits, 0 if col_parts is None else col_parts.shape[1], n, m, *weights,
            kl, **lines,
        )  # fmt: skip
    if each:
        return losses[0] + losses[1] if symmetric else losses[0], rows, cols, store
    return totals.sum(), rows, cols, store
