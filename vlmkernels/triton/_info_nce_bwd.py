"""info_nce_bwd: the products of the forward once more, whose epilogue is the gradient.

The gradients of a chunk of logits are written in the dtype of the features and multiplied by cuBLAS. Those of
the pairs (i, i) are kept out of them and added in float32.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _info_nce_small as few_rows
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_small as small
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._info_nce_tiles import pair_gradient, tile_gradient
from vlmkernels.triton._tiles import grouped_tile
from vlmkernels.triton.info_nce import check, slope_of


@triton.jit
def _weights(WEIGHT, COUNT, DLOSS, at, inside, EACH: tl.constexpr):
    """Of rows or columns: their weights, 0 for those that do not count; and these times dloss."""
    weight = tl.where(inside, 1.0, 0.0)
    if COUNT is not None:
        weight = tl.where(tl.load(COUNT + at, mask=inside, other=0.0) > 0.0, 1.0, 0.0)
    if WEIGHT is not None:
        weight *= tl.load(WEIGHT + at, mask=inside, other=0).to(tl.float32)
    coef = weight
    if EACH:
        coef = weight * tl.load(DLOSS + at, mask=inside, other=0.0).to(tl.float32)
    return weight, coef


@triton.jit
def _peak_and_share(
    WEIGHT, COUNT, DLOSS, length, share, MEAN: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest coefficient, and what they all share."""
    mass = tl.zeros([BLOCK], tl.float64)
    high = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        weight, coef = _weights(WEIGHT, COUNT, DLOSS, at, at < length, EACH)
        mass += weight.to(tl.float64)
        high = tl.maximum(high, tl.abs(coef))
    if MEAN:
        total = tl.sum(mass, 0).to(tl.float32)
        share /= tl.where(total > 0.0, total, 1.0)
    return tl.max(high, 0) * share, share


@triton.jit
def _scale_coefficients(OUT, WEIGHT, COUNT, DLOSS, length, factor, EACH: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        _, coef = _weights(WEIGHT, COUNT, DLOSS, at, at < length, EACH)
        tl.store(OUT + at, factor * coef, mask=at < length)


@triton.jit
def _coefficients(
    WEIGHT,  # [n] or None
    ROW_COUNT,  # [n] positives, or None: all count
    COL_COUNT,  # [m] or None
    DLOSS,  # [n] if EACH, else [1]
    U,  # [n]
    V,  # [m] or None
    FACTOR,  # [1]
    n,
    m,
    share,
    MEAN: tl.constexpr,
    EACH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients by the losses of rows and of columns, over FACTOR: their sum is then 1 at most."""
    row_peak, row_share = _peak_and_share(WEIGHT, ROW_COUNT, DLOSS, n, share, MEAN, EACH, BLOCK)
    col_peak, col_share = row_peak * 0.0, row_share
    if V is not None:
        col_peak, col_share = _peak_and_share(WEIGHT, COL_COUNT, DLOSS, m, share, MEAN, EACH, BLOCK)
    unit = row_peak + col_peak
    inverse = tl.where(unit > 0.0, 1.0 / tl.where(unit > 0.0, unit, 1.0), 0.0)
    _scale_coefficients(U, WEIGHT, ROW_COUNT, DLOSS, n, row_share * inverse, EACH, BLOCK)
    if V is not None:
        _scale_coefficients(V, WEIGHT, COL_COUNT, DLOSS, m, col_share * inverse, EACH, BLOCK)
    if not EACH:
        unit *= tl.load(DLOSS).to(tl.float32)
    tl.store(FACTOR, unit)


@triton.jit
def _tile_grads(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    A,  # [n] or None
    B,  # [m] or None
    QUERY_IDS,  # [n] int64 or None: the pairs (i, i) are positive
    KEY_IDS,  # [m] int64 or None: those of the queries are indices of keys
    ROWS,  # [5, n] see `info_nce._losses`
    COLS,  # [4, m] or None
    U,  # [n] or None: 1
    V,  # [m] or None: 1
    OUT,  # [stop - start, m]
    stride_q,
    stride_k,
    stride_out,
    start,
    stop,
    n,
    m,
    depth,
    row_weight,
    col_weight,
    row_smooth,  # the part of the target that all keys have
    col_smooth,
    hit,  # the part that the positives have
    SMOOTHED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles, col_tiles = tl.cdiv(stop - start, BLOCK_M), tl.cdiv(m, BLOCK_N)
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, col_tiles, GROUP)
    rows = start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, col_inside = rows < stop, cols < m
    grads = tile_gradient(
        Q, K, SCALE, A, B, QUERY_IDS, KEY_IDS, ROWS, COLS, U, V, rows, cols, row_inside, col_inside, stride_q,
        stride_k, stop, n, m, depth, row_weight, col_weight, row_smooth, col_smooth, hit, SMOOTHED, BLOCK_M,
        BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    at = (rows - start).to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(OUT + at, grads.to(OUT.dtype.element_ty), mask=row_inside[:, None] & col_inside[None, :])


@triton.jit
def _finish(
    Q,  # [n, depth]
    K,  # [m, depth]
    QUERY_ACC,  # [n, depth] float32: the products with the gradients of the tiles; or None
    KEY_ACC,  # [m, depth] float32 or None
    A,  # [n] or None
    B,  # [m] or None
    ROWS,  # [5, n] see `info_nce._losses`
    COLS,  # [4, m] or None
    U,  # [n] or None: 1
    V,  # [m] or None: 1
    SCALE,  # [1]
    FACTOR,  # [1] of all gradients
    DQUERY,  # [n, depth] or None
    DKEY,  # [m, depth] or None
    DSCALE,  # [1] or None
    stride_q,
    stride_k,
    n,
    m,
    depth,
    factor,
    inv_gain,  # of the products
    row_weight,
    col_weight,
    row_rest,  # what the target of a pair (i, i) is short of 1
    col_rest,
    PAIRS: tl.constexpr,  # the pairs (i, i) are not in the products
    BLOCK: tl.constexpr,
):
    """The gradient of a query, of a key, or of the scale: from sums of the first sweep, in float32."""
    factor *= tl.load(FACTOR).to(tl.float32)
    scale = factor * tl.load(SCALE).to(tl.float32)
    program = tl.program_id(0)
    queries = n if DQUERY is not None else 0
    keys = m if DKEY is not None else 0
    if program < queries + keys:
        row = tl.where(program < queries, program, program - queries)
        paired = row < n
        weight = 0.0
        if PAIRS:
            weight = pair_gradient(
                ROWS + 3 * n,
                n,
                U,
                V,
                row,
                paired,
                row_weight,
                col_weight,
                row_rest,
                col_rest,
                COLS is not None,
            )
        if program < queries:
            if DQUERY is not None:
                pairwise.feature_grads(
                    QUERY_ACC, Q, K, A, B, DQUERY, row, scale, inv_gain, weight, paired, stride_q, stride_k,
                    depth, PAIRS, BLOCK,
                )  # fmt: skip
        elif DKEY is not None:
            pairwise.feature_grads(
                KEY_ACC, K, Q, B, A, DKEY, row, scale, inv_gain, weight, paired, stride_k, stride_q, depth,
                PAIRS, BLOCK,
            )  # fmt: skip
    elif DSCALE is not None:
        total = row_weight * pairwise.sum_of(ROWS + 2 * n, U, n, BLOCK)
        if COLS is not None:
            total += col_weight * pairwise.sum_of(COLS + 2 * m, V, m, BLOCK)
        dscale = factor * (total.to(tl.float32) / slope_of(SCALE))
        tl.store(DSCALE, dscale.to(DSCALE.dtype.element_ty))


def info_nce_bwd(
    dloss: Tensor,
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    positives: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    weight: Tensor | None,  # [N]
    rows: Tensor,  # [5, N]
    cols: Tensor,  # [4, M], of size 0 when not symmetric
    store: Tensor,
    symmetric: bool,
    smoothing: float,
    normalize: bool,
    reduction: str,
    store_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery [N, D], dkey [M, D], dscale), of size 0 where not needed; `store_bytes` bounds a chunk."""
    check("info_nce_bwd", query, key, positives, key_ids, weight, symmetric)
    given = zip((query, key, scale), needs, strict=True)
    dquery, dkey, dscale = (x.new_empty(x.shape if need else 0) for x, need in given)
    if query.numel() == 0 or not any(needs):
        return dquery.zero_(), dkey.zero_(), dscale.zero_()
    if rows.shape != (5, query.shape[0]) or cols.shape != (4, key.shape[0] if symmetric else 0):
        raise ValueError(
            f"info_nce_bwd: rows must be [5, N] and cols [4, M], got {rows.shape} and {cols.shape}"
        )
    need_query, need_key, need_scale = needs
    (n, depth), m, by_id, each = query.shape, key.shape[0], positives is not None, reduction == "none"
    query, key = tiles.rows_contiguous(query), tiles.rows_contiguous(key)
    weight, positives, key_ids = map(tiles.contiguous, (weight, positives, key_ids))
    share = 0.5 if symmetric else 1.0
    row_share, col_share = (share / n, share / m) if reduction == "mean" else (share, share)
    # Products are of gradients of 1 at most, of 2^14 in float16; FACTOR and `factor` make them those of dloss
    gain = 2.0**14 if query.dtype == torch.float16 else 1.0
    u: Tensor | None = None
    v: Tensor | None = None
    with torch.cuda.device_of(query):
        if weight is None and not by_id and not each:
            factor, of_all = row_share + symmetric * col_share, dloss
            row_weight, col_weight = row_share / factor, col_share / factor
        else:
            factor, row_weight, col_weight = 1.0, 1.0, 1.0
            u, of_all = rows.new_empty(n), rows.new_empty(())
            v = rows.new_empty(m) if symmetric else None
            counts = (rows[3] if by_id else None, cols[3] if by_id and symmetric else None)
            _coefficients[(1,)](
                weight, *counts, dloss.contiguous(), u, v, of_all, n, m, share, reduction == "mean", each,
                BLOCK=pairwise.READ, num_warps=8, enable_fp_fusion=True,
            )  # fmt: skip
        smooth, of_cols = (smoothing / m, smoothing / n), cols if symmetric else None
        if small.serves(n, m, normalize):
            few_rows.gradients(
                query, key, scale, positives, key_ids, rows, of_cols, u, v, of_all,
                [x if need else None for x, need in zip((dquery, dkey, dscale), needs, strict=True)],
                factor, gain, (row_weight, col_weight), smooth, smoothing,
            )  # fmt: skip
            return dquery, dkey, dscale
        a = b = None
        unit_query, unit_key = query, key
        if normalize:
            a, b, unit_query, unit_key = pairwise.norms(query, key, need_key, need_query)
        accs: tuple[Tensor | None, Tensor | None] = (None, None)
        if need_query or need_key:
            inputs = (query, key, scale, a, b, positives, key_ids, rows, of_cols, u, v)
            weights = (gain * row_weight, gain * col_weight, *smooth, 1.0 - smoothing)
            accs = _products(
                *inputs, unit_query, unit_key, weights, smoothing > 0, store_bytes, need_query, need_key
            )
        programs = n * need_query + m * need_key + need_scale
        _finish[(programs,)](
            query, key, *accs, a, b, rows, of_cols, u, v, scale, of_all,
            *(x if need else None for x, need in zip((dquery, dkey, dscale), needs, strict=True)),
            query.stride(0), key.stride(0), n, m, depth, factor, 1.0 / gain, row_weight, col_weight,
            smoothing - smooth[0], smoothing - smooth[1], not by_id, **pairwise.row_options(depth),
        )  # fmt: skip
    return dquery, dkey, dscale


def _products(
    query, key, scale, a, b, positives, key_ids, rows, cols, u, v, unit_query, unit_key, weights, smoothed,
    store_bytes, need_query, need_key,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of the logits times the features, [N, D] and [M, D]: what is needed of them."""
    n, m = query.shape[0], key.shape[0]
    q, k = tiles.operand(query), tiles.operand(key)
    options = tiles.launch_options(q, k, fuse=False, exceptions=tiles.PRODUCTS_ON)
    query_acc = rows.new_empty(query.shape) if need_query else None
    key_acc = rows.new_empty(key.shape) if need_key else None
    held = pairwise.chunk_rows(n, m, query.element_size(), store_bytes, tiles.memory(query))
    buffer = pairwise.chunk_buffer(query, held, m)
    for start in range(0, n, held):
        stop = min(start + held, n)
        grads = buffer[: stop - start]
        _tile_grads[(tiles.cdiv(stop - start, options["BLOCK_M"]) * tiles.cdiv(m, options["BLOCK_N"]),)](
            q, k, scale, a, b, positives, key_ids, rows, cols, u, v, grads, q.stride(0), k.stride(0),
            grads.stride(0), start, stop, n, m, q.shape[1], *weights, smoothed, tiles.GROUP, **options,
        )  # fmt: skip
        if query_acc is not None:
            tiles.product(grads, unit_key, query_acc[start:stop])
        if key_acc is not None:
            tiles.product(grads.T, unit_query[start:stop], key_acc, add=start > 0)
    return query_acc, key_acc
