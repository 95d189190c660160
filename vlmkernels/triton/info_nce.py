"""info_nce: a GEMM whose epilogue is the statistics of the softmaxes along rows and columns.

Logits are in powers of two. They are computed in both passes: at the usual widths of features, that costs a
GPU no more than writing and reading them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._tiles import similarities

PROGRAMS = 1024  # the columns are split until the sweep has about so many programs
PARTIAL_TILES = 64  # row tiles of a launch, more if the sums over their columns fit in PARTIAL_BYTES
PARTIAL_BYTES = 1 << 28
LINES = 128  # rows or columns of a program that joins their sums
NOTHING: tl.constexpr = tl.constexpr(-3e38)  # a logit without weight, finite so that products with 0 are 0
LOG2E: tl.constexpr = tl.constexpr(math.log2(math.e))
NO_SCALE: tl.constexpr = tl.constexpr(2.0**-100)


@triton.jit
def slope_of(SCALE):
    """What turns similarities into logits in powers of two.

    A scale of 0 counts as one so small that all softmaxes are uniform, and by which slopes can be divided.
    """
    slope = tl.load(SCALE).to(tl.float32) * LOG2E
    return tl.where(slope == 0, NO_SCALE, slope)


@triton.jit
def row_factors(SCALE, A, rows, inside, BLOCK: tl.constexpr):
    """What the similarities of each row are multiplied by; `A` has inverse norms or is None."""
    factor = tl.full([BLOCK], 1.0, tl.float32) * slope_of(SCALE)
    if A is not None:
        factor *= tl.load(A + rows, mask=inside, other=0.0)
    return factor


@triton.jit
def _rebase(shift, total, moment):
    """Sums of 2^x and x 2^x below a maximum that is higher by -shift."""
    factor = tl.exp2(shift)
    return total * factor, (moment + shift * total) * factor


@triton.jit
def _store(
    SUMS, at, plane, high, total, moment, whole, hits, count, inside, SMOOTHED: tl.constexpr,
    BY_ID: tl.constexpr,
):  # fmt: skip
    """Of rows or columns: maximum, sums of 2^x and x 2^x below it; of all logits; those of positives."""
    tl.store(SUMS + at, high, mask=inside)
    tl.store(SUMS + plane + at, total, mask=inside)
    tl.store(SUMS + 2 * plane + at, moment, mask=inside)
    if SMOOTHED:
        tl.store(SUMS + 3 * plane + at, whole, mask=inside)
    if BY_ID:
        tl.store(SUMS + (3 + SMOOTHED) * plane + at, hits, mask=inside)
        tl.store(SUMS + (4 + SMOOTHED) * plane + at, count, mask=inside)


@triton.jit
def _stats(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    A,  # [n] or None
    B,  # [m] or None
    QUERY_IDS,  # [n] int64 or None: the pairs (i, i) are positive
    KEY_IDS,  # [m] int64 or None: those of the queries are indices of keys
    ROWS,  # [planes, splits, n] see `_store`
    COLS,  # [planes, row tiles, m] or None
    POSITIVE,  # [n] logits of the pairs (i, i), or None
    stride_q,
    stride_k,
    start,  # rows start <= i < stop are in this launch
    stop,
    n,
    m,
    depth,
    splits,
    tiles_per_split,
    SMOOTHED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    BY_ID: tl.constexpr = POSITIVE is None
    row_tiles = tl.cdiv(stop - start, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    split = tl.program_id(0) // row_tiles
    first_row = start + row_tile * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < stop
    factor = row_factors(SCALE, A, rows, row_inside, BLOCK_M)
    row_max = tl.full([BLOCK_M], NOTHING, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_moment = tl.zeros([BLOCK_M], tl.float32)
    row_whole = tl.zeros([BLOCK_M], tl.float32)
    row_hits = tl.zeros([BLOCK_M], tl.float32)
    row_count = tl.zeros([BLOCK_M], tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(m, BLOCK_N))
    for col_tile in range(split * tiles_per_split, last):
        first_col = col_tile * BLOCK_N
        cols = first_col + tl.arange(0, BLOCK_N)
        col_inside = cols < m
        s = similarities(
            Q, K, rows, cols, stride_q, stride_k, stop, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
        )
        s *= factor[:, None]
        if B is not None:
            s *= tl.load(B + cols, mask=col_inside, other=0.0)[None, :]
        whole = tl.zeros([BLOCK_N], tl.float32)
        hits = tl.zeros([BLOCK_N], tl.float32)
        count = tl.zeros([BLOCK_N], tl.float32)
        if SMOOTHED:
            row_whole += tl.sum(tl.where(col_inside[None, :], s, 0.0), 1)
            whole = tl.sum(tl.where(row_inside[:, None], s, 0.0), 0)
        if BY_ID:
            same = pairwise.is_positive(QUERY_IDS, KEY_IDS, rows, cols, row_inside, col_inside)
            same = same & row_inside[:, None] & col_inside[None, :]
            matched, ones = tl.where(same, s, 0.0), tl.where(same, 1.0, 0.0)
            row_hits += tl.sum(matched, 1)
            row_count += tl.sum(ones, 1)
            hits, count = tl.sum(matched, 0), tl.sum(ones, 0)
        elif (first_col < first_row + BLOCK_M) & (first_row < first_col + BLOCK_N):
            logit = tl.sum(tl.where(cols[None, :] == rows[:, None], s, 0.0), 1)
            here = row_inside & (rows >= first_col) & (rows < first_col + BLOCK_N)
            tl.store(POSITIVE + rows, logit, mask=here)
        s = tl.where(col_inside[None, :], s, NOTHING)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        below = s - new_max[:, None]
        e = tl.exp2(below)
        row_sum, row_moment = _rebase(row_max - new_max, row_sum, row_moment)
        row_sum += tl.sum(e, 1)
        row_moment += tl.sum(e * below, 1)
        row_max = new_max
        if COLS is not None:
            s = tl.where(row_inside[:, None], s, NOTHING)
            col_max = tl.max(s, 0)
            below = s - col_max[None, :]
            e = tl.exp2(below)
            plane = tl.cast(row_tiles, tl.int64) * m
            _store(
                COLS, row_tile.to(tl.int64) * m + cols, plane, col_max, tl.sum(e, 0), tl.sum(e * below, 0),
                whole, hits, count, col_inside, SMOOTHED, BY_ID,
            )  # fmt: skip
    plane = tl.cast(splits, tl.int64) * n
    _store(
        ROWS, split.to(tl.int64) * n + rows, plane, row_max, row_sum, row_moment, row_whole, row_hits,
        row_count, row_inside, SMOOTHED, BY_ID,
    )  # fmt: skip


@triton.jit
def _joined(SUMS, at, inside, parts, length, SMOOTHED: tl.constexpr, BY_ID: tl.constexpr):
    """What `_store` stored of the parts, for the whole: in their order."""
    high = tl.full(at.shape, NOTHING, tl.float32)
    total = tl.zeros(at.shape, tl.float32)
    moment = tl.zeros(at.shape, tl.float32)
    whole = tl.zeros(at.shape, tl.float32)
    hits = tl.zeros(at.shape, tl.float32)
    count = tl.zeros(at.shape, tl.float32)
    plane = tl.cast(parts, tl.int64) * length
    offset = at.to(tl.int64)
    for _ in range(0, parts):
        other = tl.load(SUMS + offset, mask=inside, other=0.0)
        part_total = tl.load(SUMS + plane + offset, mask=inside, other=0.0)
        part_moment = tl.load(SUMS + 2 * plane + offset, mask=inside, other=0.0)
        new = tl.maximum(high, other)
        total, moment = _rebase(high - new, total, moment)
        part_total, part_moment = _rebase(other - new, part_total, part_moment)
        total += part_total
        moment += part_moment
        if SMOOTHED:
            whole += tl.load(SUMS + 3 * plane + offset, mask=inside, other=0.0)
        if BY_ID:
            hits += tl.load(SUMS + (3 + SMOOTHED) * plane + offset, mask=inside, other=0.0)
            count += tl.load(SUMS + (4 + SMOOTHED) * plane + offset, mask=inside, other=0.0)
        high = new
        offset += length
    return high, total, moment, whole, hits, count


@triton.jit
def _join(
    PARTS,  # [planes, parts, length]
    OUT,  # [planes, length], `plane` apart
    parts,
    length,
    plane,
    SMOOTHED: tl.constexpr,
    BY_ID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of several parts as one."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    high, total, moment, whole, hits, count = _joined(PARTS, at, inside, parts, length, SMOOTHED, BY_ID)
    _store(
        OUT, at.to(tl.int64), tl.cast(plane, tl.int64), high, total, moment, whole, hits, count, inside,
        SMOOTHED, BY_ID,
    )  # fmt: skip


@triton.jit
def _finish_lines(
    PARTS, POSITIVE, WEIGHT, STATS, EXTRA, LOSS, TOTALS, block, parts, length, others, share, smoothing,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a block of rows, or of columns: their losses, weighted, and what the backward needs."""
    BY_ID: tl.constexpr = POSITIVE is None
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    high, total, moment, whole, hits, count = _joined(PARTS, at, inside, parts, length, SMOOTHED, BY_ID)
    log = tl.log2(total)
    if BY_ID:
        counted = inside & (count > 0.0)
        short = high - hits / tl.maximum(count, 1.0)
        extra = count
    else:
        counted = inside
        short = high - tl.load(POSITIVE + at, mask=inside, other=0.0)
        extra = short + log
    if SMOOTHED:
        short = (1.0 - smoothing) * short + smoothing * (high - whole / others)
    weight = tl.where(counted, 1.0, 0.0)
    if WEIGHT is not None:
        weight *= tl.load(WEIGHT + at, mask=inside, other=0).to(tl.float32)
    loss = (share / LOG2E) * weight * tl.where(counted, short + log, 0.0)
    tl.store(STATS + at, high, mask=inside)
    tl.store(STATS + length + at, log, mask=inside)
    tl.store(STATS + 2 * length + at, tl.where(counted, short + moment / total, 0.0), mask=inside)
    tl.store(EXTRA + at, extra, mask=inside)
    if LOSS is not None:
        tl.store(LOSS + at, loss, mask=inside)
    if TOTALS is not None:
        tl.store(TOTALS + tl.program_id(0), tl.sum(loss, 0))
        tl.store(TOTALS + tl.num_programs(0) + tl.program_id(0), tl.sum(weight, 0))


@triton.jit
def _losses(
    ROWS,  # [planes, row parts, n]
    COLS,  # [planes, col parts, m] or None
    POSITIVE,  # [n] or None: positives by id
    WEIGHT,  # [n] or None
    ROW_STATS,  # [5, n] maximum; logarithm of the sum of 2^x below it; mean logit under the softmax less that
    # of the targets; number of positives, or what pair (i, i) is short of the log-sum-exp of row and column
    COL_STATS,  # [4, m] likewise, without what pairs are short of; or None
    ROW_LOSS,  # [n] or None
    COL_LOSS,  # [m] or None
    TOTALS,  # [2, programs] losses and weights of a program, or None
    row_parts,
    col_parts,
    n,
    m,
    share,
    smoothing,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    row_blocks = tl.cdiv(n, BLOCK)
    if block < row_blocks:
        _finish_lines(
            ROWS, POSITIVE, WEIGHT, ROW_STATS, ROW_STATS + 3 * n, ROW_LOSS, TOTALS, block, row_parts, n, m,
            share, smoothing, SMOOTHED, BLOCK,
        )  # fmt: skip
    elif COLS is not None:
        EXTRA = COL_STATS + 3 * m if POSITIVE is None else ROW_STATS + 4 * n
        _finish_lines(
            COLS, POSITIVE, WEIGHT, COL_STATS, EXTRA, COL_LOSS, TOTALS, block - row_blocks, col_parts, m, n,
            share, smoothing, SMOOTHED, BLOCK,
        )  # fmt: skip


@triton.jit
def _total(
    TOTALS,  # [2, blocks]
    OUT,  # [1]
    row_blocks,
    blocks,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the losses of rows and of columns, each over its weights if it is a mean, in one program."""
    rows = pairwise.sum_of(TOTALS, None, row_blocks, BLOCK)
    cols = pairwise.sum_of(TOTALS + row_blocks, None, blocks - row_blocks, BLOCK)
    if MEAN:
        row_mass = pairwise.sum_of(TOTALS + blocks, None, row_blocks, BLOCK)
        col_mass = pairwise.sum_of(TOTALS + blocks + row_blocks, None, blocks - row_blocks, BLOCK)
        rows /= tl.where(row_mass > 0.0, row_mass, 1.0)
        cols /= tl.where(col_mass > 0.0, col_mass, 1.0)
    tl.store(OUT, (rows + cols).to(tl.float32))


def check(op: str, query: Tensor, key: Tensor, positives, key_ids, weight, symmetric: bool) -> None:
    """The raw ops accept any tensors, and the kernels read what the sizes say."""
    pairwise.check(op, query, key, positives, key_ids, weight)
    n, m = query.shape[0], key.shape[0]
    if n and (m == 0 or (symmetric and n != m and (positives is None or weight is not None))):
        raise ValueError(f"{op}: key must have rows for all queries, got N = {n} and M = {m}")


def info_nce(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    positives: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    weight: Tensor | None,  # [N]
    symmetric: bool,
    smoothing: float,
    normalize: bool,
    reduction: str,
    store_bytes: int,
) -> tuple[Tensor, ...]:
    """(loss, rows [5, N], cols [4, M], empty store); see `_losses` for what the rows are."""
    check("info_nce", query, key, positives, key_ids, weight, symmetric)
    n, m, by_id, each = query.shape[0], key.shape[0], positives is not None, reduction == "none"
    rows, store = query.new_empty((5, n), dtype=torch.float32), query.new_empty(0, dtype=torch.uint8)
    cols_m = m if symmetric else 0
    cols = rows.new_empty((4, cols_m))
    if n == 0:
        return rows.new_zeros((0,) if each else ()), rows, cols.zero_(), store
    if positives is not None and key_ids is None:
        pairwise.check_positives("info_nce", positives, m)
    query, key = tiles.operand(query), tiles.operand(key)
    weight, positives, key_ids = map(tiles.contiguous, (weight, positives, key_ids))
    a, b = pairwise.norms(query, key, False, False)[:2] if normalize else (None, None)
    smoothed, planes = smoothing > 0, 3 + (smoothing > 0) + 2 * by_id
    options = tiles.launch_options(
        query, key, fuse=False, table=tiles.STATISTICS, exceptions=tiles.STATISTICS_ON, large=planes == 3
    )
    if planes > 3:  # sums over positives, or over all logits, take more registers
        options["num_warps"] = 8
    height, col_tiles = options["BLOCK_M"], tiles.cdiv(m, options["BLOCK_N"])
    held = max(PARTIAL_TILES, PARTIAL_BYTES // (4 * planes * m)) * height if symmetric else n
    tiles_per_split = tiles.cdiv(col_tiles, tiles.cdiv(PROGRAMS, tiles.cdiv(min(held, n), height)))
    splits = tiles.cdiv(col_tiles, tiles_per_split)
    row_parts, col_parts = rows.new_empty((planes, splits, n)), None
    joined = rows.new_empty((planes, tiles.cdiv(n, held), m)) if n > held else None
    positive = None if by_id else rows.new_empty(n)
    lines = {"BLOCK": LINES, "num_warps": 4, "enable_fp_fusion": True}
    with torch.cuda.device_of(query):
        for i, start in enumerate(range(0, n, held)):
            stop = min(start + held, n)
            row_tiles = tiles.cdiv(stop - start, height)
            if symmetric:
                col_parts = rows.new_empty((planes, row_tiles, m))
            _stats[(row_tiles * splits,)](
                query, key, scale, a, b, positives, key_ids, row_parts, col_parts, positive, query.stride(0),
                key.stride(0), start, stop, n, m, query.shape[1], splits, tiles_per_split, smoothed,
                **options,
            )  # fmt: skip
            if joined is not None:
                one = joined[:, i]
                _join[(tiles.cdiv(m, LINES),)](
                    col_parts, one, row_tiles, m, one.stride(0), smoothed, by_id, **lines
                )
        col_parts = col_parts if joined is None else joined
        row_blocks = tiles.cdiv(n, LINES)
        blocks = row_blocks + tiles.cdiv(cols_m, LINES)
        losses = [rows.new_empty(size) for size in (n, cols_m)] if each else []
        totals = None if each else rows.new_empty((2, blocks))
        _losses[(blocks,)](
            row_parts, col_parts, positive, weight, rows, cols if symmetric else None,
            *(losses if each else (None, None)), totals, splits,
            0 if col_parts is None else col_parts.shape[1], n, m, 0.5 if symmetric else 1.0, smoothing,
            smoothed, **lines,
        )  # fmt: skip
        if each:
            return losses[0] + losses[1] if symmetric else losses[0], rows, cols, store
        loss = rows.new_empty(())
        _total[(1,)](
            totals, loss, row_blocks, blocks, reduction == "mean", BLOCK=1024, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    return loss, rows, cols, store
