"""sigmoid_sweep (contract in ops/_sigmoid_loss_sweep.py): one GEMM with loss and gradient in the epilogue."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_chunked as chunked
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._tiles import grouped_tile, similarities

CHUNK_BYTES = 1 << 28  # gradients of the logits in memory at once


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1 to 1.6e-7 relative, also where 1 + e rounds."""
    p = -0.00317605701 * e + 0.0195425272
    p = p * e - 0.0563736128
    p = p * e + 0.105436238
    p = p * e - 0.152696671
    p = p * e + 0.196632743
    p = p * e - 0.249516163
    p = p * e + 0.333297105
    p = p * e - 0.499998926
    return (p * e + 1.0) * e


@triton.jit
def _sweep(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    BIAS,  # [1]
    A,  # [n] or None
    B,  # [m] or None
    POSITIVES,  # [n] int64 or None
    QUERY_IDS,  # [n] int64 or None
    KEY_IDS,  # [m] int64 or None
    COEF,  # [n]
    GAIN,  # [1] or None
    OUT,  # [stop - start, m] or None
    LOSS,  # [column tiles, stop - start] or None
    DSCALE,  # [column tiles, stop - start] or None
    DBIAS,  # [column tiles, stop - start] or None
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
    row_tiles, col_tiles = tl.cdiv(stop - start, BLOCK_M), tl.cdiv(m, BLOCK_N)
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, col_tiles, GROUP)
    rows = start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, col_inside = rows < stop, cols < m
    cosine = similarities(
        Q, K, rows, cols, stride_q, stride_k, stop, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    if A is not None:
        cosine *= tl.load(A + rows, mask=row_inside, other=0.0)[:, None]
    if B is not None:
        cosine *= tl.load(B + cols, mask=col_inside, other=0.0)[None, :]
    z = cosine * tl.load(SCALE).to(tl.float32) + tl.load(BIAS).to(tl.float32)
    if POSITIVES is not None:
        target = tl.load(POSITIVES + rows, mask=row_inside, other=-1).to(tl.int32)
        same = cols[None, :] == target[:, None]
    else:
        query_ids = tl.load(QUERY_IDS + rows, mask=row_inside, other=0)
        same = query_ids[:, None] == tl.load(KEY_IDS + cols, mask=col_inside, other=0)[None, :]
    x = tl.where(same, -z, z)  # the loss of a pair is softplus(x), its derivative by x sigmoid(x)
    e = tl.exp(-tl.abs(x))
    partial = col_tile.to(tl.int64) * (stop - start) + rows - start
    if LOSS is not None:
        loss = tl.where(col_inside[None, :], tl.maximum(x, 0.0) + _log1p(e), 0.0)
        tl.store(LOSS + partial, tl.sum(loss, 1), mask=row_inside)
    if OUT is not None or DSCALE is not None:
        sigmoid = tl.where(x >= 0, 1.0, e) / (1.0 + e)
        coef = tl.load(COEF + rows, mask=row_inside, other=0.0)[:, None]
        grads = tl.where(col_inside[None, :], tl.where(same, -coef, coef) * sigmoid, 0.0)
        if DSCALE is not None:
            tl.store(DSCALE + partial, tl.sum(grads * cosine, 1), mask=row_inside)
            tl.store(DBIAS + partial, tl.sum(grads, 1), mask=row_inside)
        if OUT is not None:
            if GAIN is not None:
                grads *= tl.load(GAIN)
            at = (rows - start).to(tl.int64)[:, None] * stride_out + cols[None, :]
            tl.store(OUT + at, grads.to(OUT.dtype.element_ty), mask=row_inside[:, None] & col_inside[None, :])


def sigmoid_sweep(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    bias: Tensor,
    query_inv_norm: Tensor | None,  # [N]
    key_inv_norm: Tensor | None,  # [M]
    positives: Tensor | None,  # [N] int64
    query_ids: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    row_coef: Tensor,  # [N]
    need_loss: bool,
    need_query: bool,
    need_key: bool,
    need_scalars: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(row_loss [N], dquery [N, D], dkey [M, D], row_dscale [N], row_dbias [N]); size 0 where not needed."""
    if query.dtype == torch.float64:
        return chunked.sigmoid_sweep(
            query, key, scale, bias, query_inv_norm, key_inv_norm, positives, query_ids, key_ids, row_coef,
            need_loss, need_query, need_key, need_scalars,
        )  # fmt: skip
    n, m = query.shape[0], key.shape[0]
    rows = [row_coef.new_empty(n if need else 0) for need in (need_loss, need_scalars, need_scalars)]
    dquery, dkey = (x.new_empty(x.shape if need else 0) for x, need in ((query, need_query), (key, need_key)))
    if n == 0 or m == 0:
        for x in (*rows, dquery, dkey):
            x.zero_()
        return rows[0], dquery, dkey, rows[1], rows[2]
    query, key = tiles.rows_contiguous(query), tiles.rows_contiguous(key)
    q, k = tiles.operand(query), tiles.operand(key)
    options = tiles.launch_options(q, k, fuse=True)
    col_tiles = triton.cdiv(m, options["BLOCK_N"])
    gain = pairwise.gain_for(query.dtype, row_coef)
    inv_gain = gain.reciprocal() if gain is not None else None
    unit_query = pairwise.unit(query, query_inv_norm) if need_key else query
    unit_key = pairwise.unit(key, key_inv_norm) if need_query else key
    query_acc = row_coef.new_empty(query.shape) if need_query else None
    key_acc = row_coef.new_empty(key.shape) if need_key else None
    held = pairwise.chunk_rows(n, m, query.element_size(), CHUNK_BYTES)
    buffer = pairwise.chunk_buffer(query, held, m) if need_query or need_key else None
    with torch.cuda.device_of(query):
        for start in range(0, n, held):
            stop = min(start + held, n)
            grads = buffer[: stop - start] if buffer is not None else None
            partial = [x.new_empty((col_tiles, stop - start)) if x.numel() else None for x in rows]
            _sweep[(triton.cdiv(stop - start, options["BLOCK_M"]) * col_tiles,)](
                q, k, scale, bias, query_inv_norm, key_inv_norm, positives, query_ids, key_ids,
                row_coef, gain, grads, *partial, q.stride(0), k.stride(0),
                0 if grads is None else grads.stride(0), start, stop, m, q.shape[1], tiles.GROUP,
                **options,
            )  # fmt: skip
            for x, parts in zip(rows, partial, strict=True):
                if parts is not None:
                    torch.sum(parts, 0, out=x[start:stop])
            if grads is not None and query_acc is not None:
                tiles.product(grads, unit_key, query_acc[start:stop])
            if grads is not None and key_acc is not None:
                tiles.product(grads.T, unit_query[start:stop], key_acc, add=start > 0)
    if query_acc is not None:
        dquery, _ = pairwise.finish(
            query_acc, inv_gain, None, query, key, scale, query_inv_norm, key_inv_norm, None, None, None
        )
    if key_acc is not None:
        dkey, _ = pairwise.finish(
            key_acc, inv_gain, None, key, query, scale, key_inv_norm, query_inv_norm, None, None, None
        )
    return rows[0], dquery, dkey, rows[1], rows[2]
