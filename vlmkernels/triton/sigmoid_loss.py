"""sigmoid_loss and its backward: one GEMM with loss and gradient in the epilogue.

Logits are in powers of two. The gradients of a chunk of logits are written in the dtype of the features and
multiplied by cuBLAS.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_small as small
from vlmkernels.triton import _sigmoid_loss_small as few_rows
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._sigmoid_loss_tiles import LOG2E, tile_gradient, tile_losses
from vlmkernels.triton._tiles import grouped_tile

CHUNK_BYTES = 1 << 28  # gradients of the logits in memory at once, more on a card that has much
SWEEP: tiles.Tiles = tiles.TILES | {("half", True): tiles.Tile(128, 128, 64, 8, 3)}
SWEEP_ON: dict[str, tiles.Tiles] = {
    "gfx942": tiles.TILES_ON["gfx942"] | {("half", True): tiles.Tile(128, 128, 64, 8, 2)},
}


@triton.jit
def _sweep(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    BIAS,  # [1]
    A,  # [n] or None
    B,  # [m] or None
    QUERY_IDS,  # [n] int64 or None: the pairs (i, i) are positive
    KEY_IDS,  # [m] int64 or None: those of the queries are indices of keys
    COEF,  # [n] of the gradients of each row, or None: 1
    OUT,  # [stop - start, m] or None
    LOSS,  # [programs] or, of each row, [column tiles, stop - start]; or None
    DSCALE,  # [programs] or None
    DBIAS,  # [programs] or None
    stride_q,
    stride_k,
    stride_out,
    start,
    stop,
    m,
    depth,
    EACH: tl.constexpr,
    GAIN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles, col_tiles = tl.cdiv(stop - start, BLOCK_M), tl.cdiv(m, BLOCK_N)
    program = tl.program_id(0)
    row_tile, col_tile = grouped_tile(program, row_tiles, col_tiles, GROUP)
    rows = start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, col_inside = rows < stop, cols < m
    inside = row_inside[:, None] & col_inside[None, :]
    cosine, x, log, same = tile_losses(
        Q, K, SCALE, BIAS, A, B, QUERY_IDS, KEY_IDS, rows, cols, row_inside, col_inside, inside, stride_q,
        stride_k, stop, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
    )  # fmt: skip
    if LOSS is not None:
        loss = tl.maximum(x, 0.0) + log
        if EACH:
            at = col_tile.to(tl.int64) * (stop - start) + rows - start
            tl.store(LOSS + at, tl.sum(loss, 1) / LOG2E, mask=row_inside)
        else:
            tl.store(LOSS + program, tl.sum(loss) / LOG2E)
    if OUT is not None or DSCALE is not None:
        grads = tile_gradient(x, log, same, COEF, rows, row_inside)
        if DSCALE is not None:
            tl.store(DSCALE + program, tl.sum(grads * cosine))
            tl.store(DBIAS + program, tl.sum(grads))
        if OUT is not None:
            at = (rows - start).to(tl.int64)[:, None] * stride_out + cols[None, :]
            tl.store(OUT + at, (GAIN * grads).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _put_sum(OUT, PARTS, parts, factor, BLOCK: tl.constexpr):
    total = factor * pairwise.sum_of(PARTS, None, parts, BLOCK).to(tl.float32)
    tl.store(OUT, total.to(OUT.dtype.element_ty))


@triton.jit
def _finish(
    Q,  # [n, depth]
    K,  # [m, depth]
    QUERY_ACC,  # [n, depth] float32: the products with the gradients of the tiles; or None
    KEY_ACC,  # [m, depth] float32 or None
    A,  # [n] or None
    B,  # [m] or None
    LOSS_PARTS,  # [parts] or None
    DSCALE_PARTS,  # [parts] or None
    DBIAS_PARTS,  # [parts] or None
    SCALE,  # [1]
    FACTOR,  # [1] of all results, or None
    DQUERY,  # [n, depth] or None
    DKEY,  # [m, depth] or None
    LOSS,  # [1] or None
    DSCALE,  # [1] or None
    DBIAS,  # [1] or None
    stride_q,
    stride_k,
    n,
    m,
    depth,
    parts,
    factor,
    inv_gain,  # of the products
    BLOCK: tl.constexpr,
):
    """The gradient of a query or of a key; in the last two programs, what is a sum over all pairs."""
    if FACTOR is not None:
        factor *= tl.load(FACTOR).to(tl.float32)
    scale = factor * tl.load(SCALE).to(tl.float32)
    program = tl.program_id(0)
    queries = n if DQUERY is not None else 0
    keys = m if DKEY is not None else 0
    if program < queries:
        if DQUERY is not None:
            pairwise.feature_grads(
                QUERY_ACC, Q, K, A, B, DQUERY, program, scale, inv_gain, 0.0, False, stride_q, stride_k,
                depth, False, BLOCK,
            )  # fmt: skip
    elif program < queries + keys:
        if DKEY is not None:
            pairwise.feature_grads(
                KEY_ACC, K, Q, B, A, DKEY, program - queries, scale, inv_gain, 0.0, False, stride_k, stride_q,
                depth, False, BLOCK,
            )  # fmt: skip
    elif program == queries + keys:
        if LOSS is not None:
            _put_sum(LOSS, LOSS_PARTS, parts, factor, BLOCK)
        if DBIAS is not None:
            _put_sum(DBIAS, DBIAS_PARTS, parts, factor, BLOCK)
    elif DSCALE is not None:
        _put_sum(DSCALE, DSCALE_PARTS, parts, factor, BLOCK)


def sigmoid_loss(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    bias: Tensor,
    positives: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    normalize: bool,
    reduction: str,
    need_query: bool,
    need_key: bool,
    need_scalars: bool,
) -> tuple[Tensor, ...]:
    """(loss, dquery [N, D], dkey [M, D], dscale, dbias): gradients have size 0 where not needed."""
    needs = (need_query, need_key, need_scalars, need_scalars)
    return _run(
        "sigmoid_loss", None, query, key, scale, bias, positives, key_ids, normalize, reduction, needs
    )


def sigmoid_loss_bwd(
    dloss: Tensor,
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    bias: Tensor,
    positives: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    normalize: bool,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(dquery [N, D], dkey [M, D], dscale, dbias), of size 0 where not needed."""
    inputs = (dloss, query, key, scale, bias, positives, key_ids, normalize, reduction, needs)
    return _run("sigmoid_loss_bwd", *inputs)[1:]


def _run(op, dloss, query, key, scale, bias, positives, key_ids, normalize, reduction, needs):
    """The loss, without which a gradient comes in, and the gradients."""
    pairwise.check(op, query, key, positives, key_ids, None)
    (n, depth), m = query.shape, key.shape[0]
    each, need_loss = reduction == "none", dloss is None
    loss = query.new_empty((n,) if each else (), dtype=torch.float32)
    given = zip((query, key, scale, bias), needs, strict=True)
    grads = [x.new_empty(x.shape if need else 0) for x, need in given]
    if n == 0 or m == 0:
        return loss.zero_(), *(grad.zero_() for grad in grads)
    if positives is not None and key_ids is None:
        pairwise.check_positives(op, positives, m)
    query, key = tiles.rows_contiguous(query), tiles.rows_contiguous(key)
    positives, key_ids = map(tiles.contiguous, (positives, key_ids))
    # Products are of gradients of 1 at most, of 2^14 in float16; the results are these times `factor`
    factor, gain = 1 / n if reduction == "mean" else 1.0, 2.0**14 if query.dtype == torch.float16 else 1.0
    coef, of_all = None, dloss
    if each and dloss is not None:
        coef, of_all, gain = dloss.to(torch.float32).contiguous(), None, 1.0
        if (of_each := pairwise.gain_for(query.dtype, coef)) is not None:
            coef, of_all = coef * of_each, of_each.reciprocal()
    inputs = (query, key, scale, bias, positives, key_ids, coef, of_all)
    results = [x if need else None for x, need in zip((loss, *grads), (need_loss, *needs), strict=True)]
    if small.serves(n, m, normalize) and depth:
        _few_rows(*inputs, *results, factor, gain, each)
    else:
        _many_rows(*inputs, *results, normalize, factor, gain, each)
    return loss, *grads


def _few_rows(
    query, key, scale, bias, positives, key_ids, coef, of_all, loss, dquery, dkey, dscale, dbias, factor,
    gain, each,
) -> None:  # fmt: skip
    """Fills what is not None of the results; sums of several tiles of rows in a second launch."""
    of_all_rows = (None if each else loss, dscale, dbias)
    parts, count = list(of_all_rows), tiles.cdiv(len(query), small.ROWS)
    if count > 1:
        parts = [None if x is None else scale.new_empty(count, dtype=torch.float32) for x in of_all_rows]
    few_rows.run(
        query, key, scale, bias, positives, key_ids, coef, of_all, (dquery, dkey),
        (loss if each else parts[0], *parts[1:]), factor, gain, each,
    )  # fmt: skip
    if count > 1 and any(x is not None for x in parts):
        _launch_finish(
            query,
            key,
            None,
            None,
            None,
            None,
            parts,
            scale,
            None,
            (None, None, *of_all_rows),
            count,
            1.0,
            1.0,
        )


def _many_rows(
    query, key, scale, bias, positives, key_ids, coef, of_all, loss, dquery, dkey, dscale, dbias, normalize,
    factor, gain, each,
) -> None:  # fmt: skip
    """Fills what is not None of the results, chunk by chunk of the rows."""
    n, m = len(query), len(key)
    a = b = None
    buffer: Any = None
    unit_query, unit_key = query, key
    if normalize:
        a, b, unit_query, unit_key = pairwise.norms(query, key, dkey is not None, dquery is not None)
    q, k = tiles.operand(query), tiles.operand(key)
    options = tiles.launch_options(q, k, fuse=True, table=SWEEP, exceptions=SWEEP_ON)
    query_acc, key_acc = (
        None if grad is None else grad.new_empty(grad.shape, dtype=torch.float32) for grad in (dquery, dkey)
    )
    held = pairwise.chunk_rows(n, m, query.element_size(), CHUNK_BYTES, tiles.memory(query))
    if query_acc is not None or key_acc is not None:
        buffer = pairwise.chunk_buffer(query, held, m)
    col_tiles = tiles.cdiv(m, options["BLOCK_N"])
    programs = [
        tiles.cdiv(min(held, n - start), options["BLOCK_M"]) * col_tiles for start in range(0, n, held)
    ]
    scalars = dscale is not None or dbias is not None
    wanted = (loss is not None and not each, scalars, scalars)
    parts = [q.new_empty(sum(programs), dtype=torch.float32) if want else None for want in wanted]
    with torch.cuda.device_of(query):
        for i, start in enumerate(range(0, n, held)):
            stop = min(start + held, n)
            tile_grads: Any = None if buffer is None else tiles.rows_of(buffer, 0, stop - start)
            first = i * programs[0]
            partial: list[Any] = [None if x is None else tiles.rows_of(x, first, len(x)) for x in parts]
            if loss is not None and each:
                partial[0] = loss.new_empty((col_tiles, stop - start))
            _sweep[(programs[i],)](
                q, k, scale, bias, a, b, positives, key_ids, coef, tile_grads, *partial, q.stride(0),
                k.stride(0), 0 if tile_grads is None else tile_grads.stride(0), start, stop, m, q.shape[1],
                each, gain, tiles.GROUP, **options,
            )  # fmt: skip
            if loss is not None and each:
                torch.sum(partial[0], 0, out=tiles.rows_of(loss, start, stop))
            if query_acc is not None:
                tiles.product(tile_grads, unit_key, tiles.rows_of(query_acc, start, stop))
            if key_acc is not None:
                tiles.product(tile_grads.T, tiles.rows_of(unit_query, start, stop), key_acc, add=start > 0)
    results = (dquery, dkey, loss if wanted[0] else None, dscale, dbias)
    if any(x is not None for x in results):
        _launch_finish(
            query, key, query_acc, key_acc, a, b, parts, scale, of_all, results, sum(programs), factor,
            1.0 / gain,
        )  # fmt: skip


def _launch_finish(
    query, key, query_acc, key_acc, a, b, parts, scale, of_all, results, count, factor, inv_gain
) -> None:
    (n, depth), m, (dquery, dkey, *sums) = query.shape, len(key), results
    programs = n * (dquery is not None) + m * (dkey is not None)
    options = pairwise.row_options(depth if programs else count)
    if any(x is not None for x in sums):
        programs += 1 + (sums[1] is not None)
    with torch.cuda.device_of(query):
        _finish[(programs,)](
            query, key, query_acc, key_acc, a, b, *parts, scale, of_all, *results, query.stride(0),
            key.stride(0), n, m, depth, count, factor, inv_gain, **options,
        )  # fmt: skip
