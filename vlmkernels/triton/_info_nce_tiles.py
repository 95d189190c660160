"""The gradients of the logits of info_nce: of a tile of them, and of a pair (i, i), kept out of it."""

import triton
import triton.language as tl

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton._tiles import similarities
from vlmkernels.triton.info_nce import LOG2E, row_factors


@triton.jit
def _line(COEF, COUNT, at, inside, coef, hit, BY_ID: tl.constexpr):
    """The coefficients of rows or columns, and these times the target of one of their positives."""
    if COEF is not None:
        coef *= tl.load(COEF + at, mask=inside, other=0.0)
    if BY_ID:
        hit *= 1.0 / tl.maximum(tl.load(COUNT + at, mask=inside, other=1.0), 1.0)
    return coef, coef * hit


@triton.jit
def tile_gradient(
    Q, K, SCALE, A, B, QUERY_IDS, KEY_IDS, ROWS, COLS, U, V, rows, cols, row_inside, col_inside, stride_q,
    stride_k, last, n, m, depth, row_weight, col_weight, row_smooth, col_smooth, hit, SMOOTHED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u_i (softmax of row i - targets) + v_j (of column j); 0 on the pairs (i, i) where they are positive."""
    s = similarities(
        Q, K, rows, cols, stride_q, stride_k, last, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    s *= row_factors(SCALE, A, rows, row_inside, BLOCK_M)[:, None]
    if B is not None:
        s *= tl.load(B + cols, mask=col_inside, other=0.0)[None, :]
    row_max = tl.load(ROWS + rows, mask=row_inside, other=0.0)[:, None]
    row_log = tl.load(ROWS + n + rows, mask=row_inside, other=0.0)[:, None]
    ones = tl.full([BLOCK_M], 1.0, tl.float32)
    u, row_hit = _line(U, ROWS + 3 * n, rows, row_inside, ones * row_weight, hit, QUERY_IDS is not None)
    p = tl.exp2((s - row_max) - row_log)
    if SMOOTHED:
        p -= row_smooth
    grads = u[:, None] * p
    if COLS is not None:
        col_max = tl.load(COLS + cols, mask=col_inside, other=0.0)[None, :]
        col_log = tl.load(COLS + m + cols, mask=col_inside, other=0.0)[None, :]
        ones = tl.full([BLOCK_N], 1.0, tl.float32)
        v, col_hit = _line(V, COLS + 3 * m, cols, col_inside, ones * col_weight, hit, QUERY_IDS is not None)
        p = tl.exp2((s - col_max) - col_log)
        if SMOOTHED:
            p -= col_smooth
        grads += v[None, :] * p
    same = pairwise.is_positive(QUERY_IDS, KEY_IDS, rows, cols, row_inside, col_inside)
    if QUERY_IDS is None:
        grads = tl.where(same, 0.0, grads)
    else:
        grads -= tl.where(same, row_hit[:, None], 0.0)
        if COLS is not None:
            grads -= tl.where(same, col_hit[None, :], 0.0)
    return grads


@triton.jit
def _minus_one(gap):
    """2^-gap - 1 for a gap >= 0, to a relative precision."""
    x = gap * (-1.0 / LOG2E)
    p = 1.0 + x * (1.0 / 8)
    for i in tl.static_range(6):
        p = 1.0 + x * (1.0 / (7 - i)) * p
    return tl.where(x > -0.5, x * p, tl.exp2(-gap) - 1.0)


@triton.jit
def pair_gradient(GAPS, n, U, V, row, paired, row_weight, col_weight, row_rest, col_rest, COLS: tl.constexpr):
    """The gradient of the logit of a pair (i, i)."""
    if U is not None:
        row_weight *= tl.load(U + row, mask=paired, other=0.0)
    weight = row_weight * (_minus_one(tl.load(GAPS + row, mask=paired, other=0.0)) + row_rest)
    if COLS:
        if V is not None:
            col_weight *= tl.load(V + row, mask=paired, other=0.0)
        weight += col_weight * (_minus_one(tl.load(GAPS + n + row, mask=paired, other=0.0)) + col_rest)
    return weight
