"""info_nce_bwd of few rows: one launch, in which no gradient of a logit leaves its tile.

Each program computes the tiles of its rows, or of its columns, once more, and multiplies them with a block of
the features of the other side.
"""

import torch
import triton
import triton.language as tl

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_small as small
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._info_nce_tiles import pair_gradient, tile_gradient
from vlmkernels.triton.info_nce import slope_of


@triton.jit
def _gradient(
    X, Y, DX, acc, GAPS, U, V, lines, paired, inside, at, features, n, stride_y, scale, inv_gain, row_weight,
    col_weight, row_rest, col_rest, PAIRS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What a program has of the gradients of its lines, with the pairs (i, i)."""
    lines = lines.to(tl.int64)
    total = inv_gain * acc
    if PAIRS:
        weight = pair_gradient(GAPS, n, U, V, lines, paired, row_weight, col_weight, row_rest, col_rest, COLS)
        y = tl.load(
            Y + lines[:, None] * stride_y + at[None, :],
            mask=paired[:, None] & (at < features)[None, :], other=0.0,
        )  # fmt: skip
        total += weight[:, None] * y.to(tl.float32)
    mask = inside[:, None] & (at < features)[None, :]
    tl.store(DX + lines[:, None] * features + at[None, :], (scale * total).to(DX.dtype.element_ty), mask=mask)


@triton.jit
def _grads(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    QUERY_IDS,  # [n] int64 or None: the pairs (i, i) are positive
    KEY_IDS,  # [m] int64 or None: those of the queries are indices of keys
    ROWS,  # [5, n] see `info_nce._losses`
    COLS,  # [4, m] or None
    U,  # [n] or None: 1
    V,  # [m] or None: 1
    FACTOR,  # [1] of all gradients
    DQUERY,  # [n, features] or None
    DKEY,  # [m, features] or None
    DSCALE,  # [1] or None
    stride_q,
    stride_k,
    n,
    m,
    depth,
    features,
    factor,
    gain,  # of the operands of products
    row_weight,
    col_weight,
    row_smooth,
    col_smooth,
    hit,
    row_rest,
    col_rest,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,  # terms of the gradient of the scale
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of BLOCK_D features of some queries, or of some keys; last, of the scale."""
    PAIRS: tl.constexpr = QUERY_IDS is None
    factor *= tl.load(FACTOR).to(tl.float32)
    scale = factor * tl.load(SCALE).to(tl.float32)
    row_tiles, col_tiles = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    parts = tl.cdiv(features, BLOCK_D)
    program = tl.program_id(0)
    queries = row_tiles * parts if DQUERY is not None else 0
    keys = col_tiles * parts if DKEY is not None else 0
    at = program % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    if program < queries + keys:
        own = tl.where(program < queries, program, program - queries) // parts
        if program < queries:
            if DQUERY is not None:
                rows = own * BLOCK_M + tl.arange(0, BLOCK_M)
                row_inside = rows < n
                acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                for tile in range(0, col_tiles):
                    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                    col_inside = cols < m
                    g = tile_gradient(
                        Q, K, SCALE, None, None, QUERY_IDS, KEY_IDS, ROWS, COLS, U, V, rows, cols, row_inside,
                        col_inside, stride_q, stride_k, n, n, m, depth, gain * row_weight, gain * col_weight,
                        row_smooth, col_smooth, hit, SMOOTHED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
                    )  # fmt: skip
                    g = tl.where(row_inside[:, None] & col_inside[None, :], g, 0.0)
                    y = tl.load(
                        K + cols.to(tl.int64)[:, None] * stride_k + at[None, :],
                        mask=col_inside[:, None] & (at < features)[None, :], other=0.0,
                    )  # fmt: skip
                    acc = tl.dot(g.to(y.dtype), y, acc, input_precision=PRECISION)
                _gradient(
                    Q, K, DQUERY, acc, ROWS + 3 * n, U, V, rows, row_inside, row_inside, at, features, n,
                    stride_k, scale, 1.0 / gain, row_weight, col_weight, row_rest, col_rest, PAIRS,
                    COLS is not None,
                )  # fmt: skip
        elif DKEY is not None:
            cols = own * BLOCK_N + tl.arange(0, BLOCK_N)
            col_inside = cols < m
            acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            for tile in range(0, row_tiles):
                rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
                row_inside = rows < n
                g = tile_gradient(
                    Q, K, SCALE, None, None, QUERY_IDS, KEY_IDS, ROWS, COLS, U, V, rows, cols, row_inside,
                    col_inside, stride_q, stride_k, n, n, m, depth, gain * row_weight, gain * col_weight,
                    row_smooth, col_smooth, hit, SMOOTHED, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
                )  # fmt: skip
                g = tl.where(row_inside[:, None] & col_inside[None, :], g, 0.0)
                x = tl.load(
                    Q + rows.to(tl.int64)[:, None] * stride_q + at[None, :],
                    mask=row_inside[:, None] & (at < features)[None, :], other=0.0,
                )  # fmt: skip
                acc = tl.dot(tl.trans(g.to(x.dtype)), x, acc, input_precision=PRECISION)
            _gradient(
                K, Q, DKEY, acc, ROWS + 3 * n, U, V, cols, col_inside & (cols < n), col_inside, at, features,
                n, stride_q, scale, 1.0 / gain, row_weight, col_weight, row_rest, col_rest, PAIRS,
                COLS is not None,
            )  # fmt: skip
    elif DSCALE is not None:
        total = row_weight * pairwise.sum_of(ROWS + 2 * n, U, n, BLOCK)
        if COLS is not None:
            total += col_weight * pairwise.sum_of(COLS + 2 * m, V, m, BLOCK)
        dscale = factor * (total.to(tl.float32) / slope_of(SCALE))
        tl.store(DSCALE, dscale.to(DSCALE.dtype.element_ty))


def gradients(
    query, key, scale, positives, key_ids, rows, cols, u, v, of_all, grads, factor, gain, weights, smooth,
    smoothing,
) -> None:  # fmt: skip
    """Fills what is not None of dquery [N, D], dkey [M, D] and dscale."""
    (n, depth), m = query.shape, key.shape[0]
    q, k = tiles.operand(query), tiles.operand(key)
    options = small.launch_options(q, depth, positives is not None, fuse=False)
    parts = tiles.cdiv(depth, options["BLOCK_D"])
    programs = parts * sum(
        tiles.cdiv(size, small.ROWS) for size, x in zip((n, m), grads[:2], strict=True) if x is not None
    )
    with torch.cuda.device_of(query):
        _grads[(programs + (grads[2] is not None),)](
            q, k, scale, positives, key_ids, rows, cols, u, v, of_all, *grads, q.stride(0), k.stride(0), n, m,
            q.shape[1], depth, factor, gain, *weights, *smooth, 1.0 - smoothing, smoothing - smooth[0],
            smoothing - smooth[1], smoothing > 0, BLOCK=1024, **options,
        )  # fmt: skip
