"""info_nce_stats and info_nce_grads (contracts in ops/_info_nce_sweeps.py): two GEMMs with an epilogue.

The exponentials of the first are not kept for the second: at the usual widths of features, recomputing
them costs a GPU no more than writing and reading them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_chunked as chunked
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._tiles import grouped_tile, similarities

PROGRAMS = 1024  # the columns are split until the first sweep has about so many programs
PARTIAL_TILES = 256  # row tiles of a launch, more if their column statistics fit in `workspace_bytes`
NOTHING: tl.constexpr = tl.constexpr(-3e38)  # a logit without weight, finite so that products with 0 are 0


@triton.jit
def _rebase(shift, total, moment):
    """Sums of e^x and x e^x below a maximum that is higher by -shift."""
    factor = tl.exp(shift)
    return total * factor, (moment + shift * total) * factor


@triton.jit
def _stats(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    A,  # [n] or None
    B,  # [m] or None
    POSITIVES,  # [n] int64
    ROW_MAX,  # [splits, n]
    ROW_SUM,  # [splits, n]
    ROW_MOMENT,  # [splits, n]
    POSITIVE,  # [splits, n]
    COL_MAX,  # [row tiles, m] or None
    COL_SUM,  # [row tiles, m] or None
    COL_MOMENT,  # [row tiles, m] or None
    stride_q,
    stride_k,
    start,  # rows start <= i < stop are in this launch
    stop,
    n,
    m,
    depth,
    tiles_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles = tl.cdiv(stop - start, BLOCK_M)
    row_tile = tl.program_id(0) % row_tiles
    split = tl.program_id(0) // row_tiles
    rows = start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_inside = rows < stop
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * tl.load(SCALE).to(tl.float32)
    if A is not None:
        factor *= tl.load(A + rows, mask=row_inside, other=0.0)
    target = tl.load(POSITIVES + rows, mask=row_inside, other=-1).to(tl.int32)
    row_max = tl.full([BLOCK_M], NOTHING, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_moment = tl.zeros([BLOCK_M], tl.float32)
    positive = tl.full([BLOCK_M], -float("inf"), tl.float32)
    last = tl.minimum((split + 1) * tiles_per_split, tl.cdiv(m, BLOCK_N))
    for col_tile in range(split * tiles_per_split, last):
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        s = similarities(
            Q, K, rows, cols, stride_q, stride_k, stop, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
        )
        s *= factor[:, None]
        if B is not None:
            s *= tl.load(B + cols, mask=cols < m, other=0.0)[None, :]
        here = (target >= col_tile * BLOCK_N) & (target < (col_tile + 1) * BLOCK_N)
        if tl.max(here.to(tl.int32), 0) > 0:
            logit = tl.sum(tl.where(cols[None, :] == target[:, None], s, 0.0), 1)
            positive = tl.where(here, logit, positive)
        s = tl.where((cols < m)[None, :], s, NOTHING)
        new_max = tl.maximum(row_max, tl.max(s, 1))
        below = s - new_max[:, None]
        e = tl.exp(below)
        row_sum, row_moment = _rebase(row_max - new_max, row_sum, row_moment)
        row_sum += tl.sum(e, 1)
        row_moment += tl.sum(e * below, 1)
        row_max = new_max
        if COL_MAX is not None:
            s = tl.where(row_inside[:, None], s, NOTHING)
            col_max = tl.max(s, 0)
            below = s - col_max[None, :]
            e = tl.exp(below)
            at = row_tile.to(tl.int64) * m + cols
            tl.store(COL_MAX + at, col_max, mask=cols < m)
            tl.store(COL_SUM + at, tl.sum(e, 0), mask=cols < m)
            tl.store(COL_MOMENT + at, tl.sum(e * below, 0), mask=cols < m)
    at = split.to(tl.int64) * n + rows
    tl.store(ROW_MAX + at, row_max, mask=row_inside)
    tl.store(ROW_SUM + at, row_sum, mask=row_inside)
    tl.store(ROW_MOMENT + at, row_moment, mask=row_inside)
    tl.store(POSITIVE + at, positive, mask=row_inside)


@triton.jit
def _combine(
    PART_MAX,  # [parts, length]
    PART_SUM,  # [parts, length]
    PART_MOMENT,  # [parts, length]
    MAX,  # [length]
    SUM,  # [length]
    MOMENT,  # [length]
    parts,
    length,
    BLOCK: tl.constexpr,
):
    """The maximum and the sums below it, from those of the parts, in their order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    high = tl.full([BLOCK], NOTHING, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    offset = at.to(tl.int64)
    for _ in range(0, parts):
        other = tl.load(PART_MAX + offset, mask=inside, other=0.0)
        part_total = tl.load(PART_SUM + offset, mask=inside, other=0.0)
        part_moment = tl.load(PART_MOMENT + offset, mask=inside, other=0.0)
        new = tl.maximum(high, other)
        total, moment = _rebase(high - new, total, moment)
        part_total, part_moment = _rebase(other - new, part_total, part_moment)
        total += part_total
        moment += part_moment
        high = new
        offset += length
    tl.store(MAX + at, high, mask=inside)
    tl.store(SUM + at, total, mask=inside)
    tl.store(MOMENT + at, moment, mask=inside)


@triton.jit
def _tile_grads(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    A,  # [n] or None
    B,  # [m] or None
    POSITIVES,  # [n] int64
    ROW_MAX,  # [n]
    ROW_LOG,  # [n]
    COL_MAX,  # [m] or None
    COL_LOG,  # [m] or None
    ROW_COEF,  # [n]
    COL_COEF,  # [m] or None
    OUT,  # [stop - start, m]
    stride_q,
    stride_k,
    stride_out,
    start,
    stop,
    m,
    depth,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """u_i e^{S_ij - r_i} + v_j e^{S_ij - c_j}, 0 on the positives; r = ROW_MAX + ROW_LOG, c likewise."""
    row_tiles, col_tiles = tl.cdiv(stop - start, BLOCK_M), tl.cdiv(m, BLOCK_N)
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, col_tiles, GROUP)
    rows = start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, col_inside = rows < stop, cols < m
    s = similarities(
        Q, K, rows, cols, stride_q, stride_k, stop, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * tl.load(SCALE).to(tl.float32)
    if A is not None:
        factor *= tl.load(A + rows, mask=row_inside, other=0.0)
    s *= factor[:, None]
    if B is not None:
        s *= tl.load(B + cols, mask=col_inside, other=0.0)[None, :]
    row_max = tl.load(ROW_MAX + rows, mask=row_inside, other=0.0)[:, None]
    row_log = tl.load(ROW_LOG + rows, mask=row_inside, other=0.0)[:, None]
    row_coef = tl.load(ROW_COEF + rows, mask=row_inside, other=0.0)[:, None]
    grads = row_coef * tl.exp((s - row_max) - row_log)
    if COL_COEF is not None:
        col_max = tl.load(COL_MAX + cols, mask=col_inside, other=0.0)[None, :]
        col_log = tl.load(COL_LOG + cols, mask=col_inside, other=0.0)[None, :]
        col_coef = tl.load(COL_COEF + cols, mask=col_inside, other=0.0)[None, :]
        grads += col_coef * tl.exp((s - col_max) - col_log)
    target = tl.load(POSITIVES + rows, mask=row_inside, other=-1).to(tl.int32)
    grads = tl.where(cols[None, :] == target[:, None], 0.0, grads)
    at = (rows - start).to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(OUT + at, grads.to(OUT.dtype.element_ty), mask=row_inside[:, None] & col_inside[None, :])


def combine(parts: Tensor) -> Tensor:  # [3, parts, length] -> [3, length]
    """Maxima, sums and moments of the whole."""
    count, length = parts.shape[1:]
    if count == 1:
        return parts[:, 0]
    out = parts.new_empty((3, length))
    options = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": True}
    _combine[(triton.cdiv(length, 128),)](*parts, *out, count, length, **options)
    return out


def info_nce_stats(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    query_inv_norm: Tensor | None,  # [N]
    key_inv_norm: Tensor | None,  # [M]
    positives: Tensor,  # [N] int64
    columns: bool,
    store_size: int,
    workspace_bytes: int,
) -> tuple[Tensor, ...]:
    """(row_max [N], row_sum, row_moment, positive_logit, col_max [M], col_sum, col_moment, empty store)."""
    if query.dtype == torch.float64:  # Triton does not multiply it on every GPU
        return chunked.info_nce_stats(query, key, scale, query_inv_norm, key_inv_norm, positives, columns)
    n, m = query.shape[0], key.shape[0]
    store, stats = query.new_empty(0, dtype=torch.uint8), query.new_empty(0, dtype=torch.float32)
    if n == 0 or m == 0:
        rows, cols = (stats.new_zeros((3, length)) for length in (n, m if columns else 0))
        rows[0], cols[0] = -float("inf"), -float("inf")
        return *rows, stats.new_full((n,), -float("inf")), *cols, store
    query, key = tiles.operand(query), tiles.operand(key)
    options = tiles.launch_options(query, key, fuse=False, exceptions=tiles.STATISTICS_ON)
    col_tiles = triton.cdiv(m, options["BLOCK_N"])
    tiles_per_split = triton.cdiv(col_tiles, triton.cdiv(PROGRAMS, triton.cdiv(n, options["BLOCK_M"])))
    splits = triton.cdiv(col_tiles, tiles_per_split)
    rows, positive = stats.new_empty((3, splits, n)), stats.new_empty((splits, n))
    held = max(PARTIAL_TILES, workspace_bytes // (12 * m)) * options["BLOCK_M"] if columns else n
    col_parts = []
    with torch.cuda.device_of(query):
        for start in range(0, n, held):
            stop = min(start + held, n)
            row_tiles = triton.cdiv(stop - start, options["BLOCK_M"])
            cols = stats.new_empty((3, row_tiles if columns else 0, m))
            _stats[(row_tiles * splits,)](
                query, key, scale, query_inv_norm, key_inv_norm, positives, *rows, positive,
                *(cols if columns else (None, None, None)),
                query.stride(0), key.stride(0), start, stop, n, m, query.shape[1], tiles_per_split, **options,
            )  # fmt: skip
            if columns:
                col_parts.append(combine(cols))
        by_row = combine(rows)
        by_col = combine(torch.stack(col_parts, 1)) if columns else stats.new_empty((3, 0))
    return *by_row, positive.amax(0), *by_col, store


def info_nce_grads(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    query_inv_norm: Tensor | None,  # [N]
    key_inv_norm: Tensor | None,  # [M]
    positives: Tensor,  # [N] int64
    row_max: Tensor,  # [N]
    row_log: Tensor,  # [N]
    col_max: Tensor,  # [M], size 0 when one-directional
    col_log: Tensor,  # [M], size 0 when one-directional
    row_coef: Tensor,  # [N]
    col_coef: Tensor,  # [M], size 0 when one-directional
    positive_coef: Tensor,  # [N]
    query_extra: Tensor | None,  # [N, D]
    key_extra: Tensor | None,  # [M, D]
    store: Tensor,
    workspace_bytes: int,
    need_query: bool,
    need_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dquery [N, D], dkey [M, D], query_dot [N], key_dot [M]); size 0 where not needed."""
    if query.dtype == torch.float64:
        return chunked.info_nce_grads(
            query, key, scale, query_inv_norm, key_inv_norm, positives, row_max, row_log, col_max, col_log,
            row_coef, col_coef, positive_coef, query_extra, key_extra, need_query, need_key,
        )  # fmt: skip
    n, m = query.shape[0], key.shape[0]
    none = query.new_empty(0)
    out = [none, none.clone(), row_coef.new_empty(0), row_coef.new_empty(0)]
    if n == 0 or m == 0:
        for side, x, need in ((0, query, need_query), (1, key, need_key)):
            if need:
                out[side], out[side + 2] = x.new_zeros(x.shape), row_coef.new_zeros(x.shape[0])
        return out[0], out[1], out[2], out[3]
    query, key = tiles.rows_contiguous(query), tiles.rows_contiguous(key)
    q, k = tiles.operand(query), tiles.operand(key)
    options = tiles.launch_options(q, k, fuse=False, exceptions=tiles.PRODUCTS_ON)
    columns = col_coef.numel() > 0
    gain = pairwise.gain_for(query.dtype, row_coef, col_coef)
    inv_gain = None
    if gain is not None:
        row_coef, col_coef, inv_gain = row_coef * gain, col_coef * gain, gain.reciprocal()
    unit_query = pairwise.unit(query, query_inv_norm) if need_key else query
    unit_key = pairwise.unit(key, key_inv_norm) if need_query else key
    query_acc = row_coef.new_empty(query.shape) if need_query else None
    key_acc = row_coef.new_empty(key.shape) if need_key else None
    held = pairwise.chunk_rows(n, m, query.element_size(), workspace_bytes)
    buffer = pairwise.chunk_buffer(query, held, m)
    with torch.cuda.device_of(query):
        for start in range(0, n, held):
            stop = min(start + held, n)
            grads = buffer[: stop - start]
            grid = (triton.cdiv(stop - start, options["BLOCK_M"]) * triton.cdiv(m, options["BLOCK_N"]),)
            _tile_grads[grid](
                q, k, scale, query_inv_norm, key_inv_norm, positives,
                row_max, row_log, *((col_max, col_log) if columns else (None, None)),
                row_coef, col_coef if columns else None, grads,
                q.stride(0), k.stride(0), grads.stride(0), start, stop, m, q.shape[1],
                tiles.GROUP, **options,
            )  # fmt: skip
            if query_acc is not None:
                tiles.product(grads, unit_key, query_acc[start:stop])
            if key_acc is not None:
                tiles.product(grads.T, unit_query[start:stop], key_acc, add=start > 0)
    if query_acc is not None:
        out[0], out[2] = pairwise.finish(
            query_acc, inv_gain, query_extra, query, key, scale, query_inv_norm, key_inv_norm,
            positive_coef, positives, None,
        )  # fmt: skip
    if key_acc is not None:
        ordered, order = positives.sort(stable=True)
        first = torch.searchsorted(ordered, torch.arange(m + 1, device=key.device))
        out[1], out[3] = pairwise.finish(
            key_acc, inv_gain, key_extra, key, query, scale, key_inv_norm, query_inv_norm,
            positive_coef, order, first,
        )  # fmt: skip
    return out[0], out[1], out[2], out[3]
