"""sigmoid_loss of few rows: its loss and its gradients in one launch, in which no logit leaves its tile.

Each program computes the tiles of its rows, or of its columns, and multiplies their gradients with a block of
the features of the other side.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _pairwise_small as small
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._sigmoid_loss_tiles import LOG2E, tile_gradient, tile_losses


@triton.jit
def _put(OUT, at, total, mask):
    tl.store(OUT + at, total.to(OUT.dtype.element_ty), mask=mask)


# As a constant 1 they would leave no loop, which Triton 3.7 fails to compile for sm_100
@triton.jit(do_not_specialize=["n", "m"])
def _pairs(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    BIAS,  # [1]
    QUERY_IDS,  # [n] int64 or None: the pairs (i, i) are positive
    KEY_IDS,  # [m] int64 or None: those of the queries are indices of keys
    COEF,  # [n] of the gradients of each row, or None: 1
    FACTOR,  # [1] of all results, or None
    DQUERY,  # [n, features] or None
    DKEY,  # [m, features] or None
    LOSS,  # [row tiles] or, of each row, [n]; or None
    DSCALE,  # [row tiles] or None
    DBIAS,  # [row tiles] or None
    stride_q,
    stride_k,
    n,
    m,
    depth,
    features,
    factor,
    gain,  # of the operands of products
    EACH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of BLOCK_D features of some queries, with the sums of their rows, or of some keys."""
    GRADS: tl.constexpr = DSCALE is not None or DBIAS is not None
    PAIRS: tl.constexpr = GRADS or LOSS is not None
    if FACTOR is not None:
        factor *= tl.load(FACTOR).to(tl.float32)
    scale = factor * tl.load(SCALE).to(tl.float32) / gain
    row_tiles, col_tiles = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    parts = tl.cdiv(features, BLOCK_D)
    of_queries = parts if DQUERY is not None else (1 if PAIRS else 0)
    program = tl.program_id(0)
    if program < row_tiles * of_queries:
        if DQUERY is not None or PAIRS:
            row_tile, part = program // of_queries, program % of_queries
            at = part * BLOCK_D + tl.arange(0, BLOCK_D)
            rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
            row_inside = rows < n
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            loss = tl.zeros([BLOCK_M], tl.float32)
            dscale = tl.zeros([BLOCK_M], tl.float32)
            dbias = tl.zeros([BLOCK_M], tl.float32)
            for tile in range(0, col_tiles):
                cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                col_inside = cols < m
                cosine, x, log, same = tile_losses(
                    Q, K, SCALE, BIAS, None, None, QUERY_IDS, KEY_IDS, rows, cols, row_inside, col_inside,
                    None, stride_q, stride_k, n, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
                )  # fmt: skip
                if LOSS is not None:
                    loss += tl.sum(tl.maximum(x, 0.0) + log, 1)
                if GRADS or DQUERY is not None:
                    g = tile_gradient(x, log, same, COEF, rows, row_inside)
                    if DSCALE is not None:
                        dscale += tl.sum(g * cosine, 1)
                    if DBIAS is not None:
                        dbias += tl.sum(g, 1)
                    if DQUERY is not None:
                        y = tl.load(
                            K + cols.to(tl.int64)[:, None] * stride_k + at[None, :],
                            mask=col_inside[:, None] & (at < features)[None, :], other=0.0,
                        )  # fmt: skip
                        acc = tl.dot((gain * g).to(y.dtype), y, acc, input_precision=PRECISION)
            if DQUERY is not None:
                out = DQUERY + rows.to(tl.int64)[:, None] * features + at[None, :]
                _put(out, 0, scale * acc, row_inside[:, None] & (at < features)[None, :])
            if LOSS is not None:
                if EACH:
                    _put(LOSS, rows, loss * (factor / LOG2E), row_inside & (part == 0))
                else:
                    _put(LOSS, row_tile, tl.sum(loss, 0) * (factor / LOG2E), part == 0)
            if DSCALE is not None:
                _put(DSCALE, row_tile, factor * tl.sum(dscale, 0), part == 0)
            if DBIAS is not None:
                _put(DBIAS, row_tile, factor * tl.sum(dbias, 0), part == 0)
    elif DKEY is not None:
        program -= row_tiles * of_queries
        at = program % parts * BLOCK_D + tl.arange(0, BLOCK_D)
        cols = program // parts * BLOCK_N + tl.arange(0, BLOCK_N)
        col_inside = cols < m
        acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for tile in range(0, row_tiles):
            rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            row_inside = rows < n
            cosine, x, log, same = tile_losses(
                Q, K, SCALE, BIAS, None, None, QUERY_IDS, KEY_IDS, rows, cols, row_inside, col_inside,
                None, stride_q, stride_k, n, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
            )  # fmt: skip
            g = tile_gradient(x, log, same, COEF, rows, row_inside)
            y = tl.load(
                Q + rows.to(tl.int64)[:, None] * stride_q + at[None, :],
                mask=row_inside[:, None] & (at < features)[None, :], other=0.0,
            )  # fmt: skip
            acc = tl.dot(tl.trans((gain * g).to(y.dtype)), y, acc, input_precision=PRECISION)
        out = DKEY + cols.to(tl.int64)[:, None] * features + at[None, :]
        _put(out, 0, scale * acc, col_inside[:, None] & (at < features)[None, :])


def run(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    bias: Tensor,
    positives: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    coef: Tensor | None,  # [N]
    of_all: Tensor | None,
    grads: Sequence[Tensor | None],  # dquery [N, D], dkey [M, D]
    sums: Sequence[Tensor | None],  # loss, dscale, dbias: of each tile of rows; the loss may be of each row
    factor: float,
    gain: float,
    each: bool,
) -> None:
    """Fills what is not None of `grads` and `sums`."""
    (n, depth), m = query.shape, key.shape[0]
    q, k = tiles.operand(query), tiles.operand(key)
    options = small.launch_options(q, depth, positives is not None, fuse=True)
    parts, (dquery, dkey) = tiles.cdiv(depth, options["BLOCK_D"]), grads
    of_queries = parts if dquery is not None else int(any(x is not None for x in sums))
    programs = tiles.cdiv(n, small.ROWS) * of_queries
    if dkey is not None:
        programs += tiles.cdiv(m, small.ROWS) * parts
    with torch.cuda.device_of(query):
        _pairs[(programs,)](
            q, k, scale, bias, positives, key_ids, coef, of_all, *grads, *sums, q.stride(0), k.stride(0), n,
            m, q.shape[1], depth, factor, gain, each, **options,
        )  # fmt: skip
