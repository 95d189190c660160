"""contrastive_distillation_bwd: the products of the forward once more, whose epilogue is the gradient.

The gradients of a chunk of logits are written in the dtype of the features and multiplied by cuBLAS.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.contrastive_distillation import check_distillation, sum_dtype
from vlmkernels.reference.contrastive_distillation import contrastive_distillation_bwd as reference_bwd
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._tiles import Tile, grouped_tile, similarities
from vlmkernels.triton.contrastive_distillation import (
    STATS,
    STATS_ON,
    operands_of,
    options_of,
    slope_of,
    strides_of,
    weights_of,
)

READ = 1024  # elements of a program that finishes gradients, four of a lane: 16 bytes of float32
GRADS: tiles.Tiles = STATS | {
    ("half", True): Tile(128, 128, 64, 8, 3),
    ("tf32", True): Tile(128, 128, 32, 8, 3),
}
GRADS_ON: dict[str, tiles.Tiles] = {
    "gfx942": STATS_ON["gfx942"]
    | {("half", True): Tile(128, 128, 64, 8, 2), ("tf32", True): Tile(128, 128, 32, 8, 2)},
}


@triton.jit
def _softmax(logits, present, STATS, at, inside, length, AXIS: tl.constexpr):
    """Along the rows or columns whose maxima and logarithms are in the first and the third line of STATS."""
    high = tl.load(STATS + at, mask=inside, other=0.0)
    log = tl.load(STATS + 2 * tl.cast(length, tl.int64) + at, mask=inside, other=0.0)
    return tl.exp2((logits - tl.expand_dims(high, AXIS)) * present - tl.expand_dims(log, AXIS))


@triton.jit
def _tile_grads(
    Q,  # [n, depth]
    K,  # [m, depth]
    SCALE,  # [1]
    TEACHER_Q,  # [n, width]
    TEACHER_K,  # [m, width]
    TEACHER_SCALE,  # [1]
    ROWS,  # [5, n]
    COLS,  # [5, m] or None
    COEF,  # [n] of the loss of each row, and of the column of that index; or None
    OUT,  # [stop - start, m] or None
    DSCALE,  # [programs] or None
    stride_q,
    stride_k,
    stride_tq,
    stride_tk,
    stride_out,
    start,
    stop,
    n,
    m,
    depth,
    width,
    row_weight,
    col_weight,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g_ij = u_i (s_ij - p_ij) + v_j (s'_ij - p'_ij), and of a tile the sum of g_ij <q_i, k_j> `_slope`."""
    row_tiles, col_tiles = tl.cdiv(stop - start, BLOCK_M), tl.cdiv(m, BLOCK_N)
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, col_tiles, GROUP)
    rows = start + row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, col_inside = rows < stop, cols < m
    slope, unit = slope_of(SCALE)
    s = unit * similarities(
        Q, K, rows, cols, stride_q, stride_k, stop, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    present = tl.where(slope == 0, 0.0, 1.0)  # else s is no logit, but what the gradient of the scale needs
    t = slope_of(TEACHER_SCALE)[0] * similarities(
        TEACHER_Q, TEACHER_K, rows, cols, stride_tq, stride_tk, stop, m, width, BLOCK_M, BLOCK_N, BLOCK_E,
        EVEN_E, PRECISION,
    )  # fmt: skip
    u = tl.full([BLOCK_M], row_weight, tl.float32)
    if COEF is not None:
        u *= tl.load(COEF + rows, mask=row_inside, other=0.0)
    student = _softmax(s, present, ROWS, rows, row_inside, n, 1)
    teacher = _softmax(t, 1.0, ROWS + n, rows, row_inside, n, 1)
    grads = u[:, None] * (student - teacher)
    if COLS is not None:
        v = tl.full([BLOCK_N], col_weight, tl.float32)
        if COEF is not None:
            v *= tl.load(COEF + cols, mask=col_inside, other=0.0)
        student = _softmax(s, present, COLS, cols, col_inside, m, 0)
        teacher = _softmax(t, 1.0, COLS + m, cols, col_inside, m, 0)
        grads += v[None, :] * (student - teacher)
    inside = row_inside[:, None] & col_inside[None, :]
    if DSCALE is not None:
        tl.store(DSCALE + tl.program_id(0), tl.sum(tl.where(inside, grads * s, 0.0)))
    if OUT is not None:
        at = (rows - start).to(tl.int64)[:, None] * stride_out + cols[None, :]
        tl.store(OUT + at, grads.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _sum(PARTS, count, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(PARTS + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _scaled(ACC, OUT, block, size, factor, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(ACC + at, mask=at < size, other=0.0)
    tl.store(OUT + at, (factor * x).to(OUT.dtype.element_ty), mask=at < size)


@triton.jit
def _finish(
    DQUERY,  # [n, depth] or None
    DKEY,  # [m, depth] or None
    DSCALE,  # [1] or None
    QUERY_ACC,  # [n, depth] float32: the products with the gradient of the tiles; or None
    KEY_ACC,  # [m, depth] float32 or None
    SCALE_PARTS,  # [parts] or None
    SCALE,  # [1]
    FACTOR,  # [1] or None
    query_size,  # 0 for what is None
    key_size,
    parts,
    factor,
    BLOCK: tl.constexpr,
):
    """The gradients of a block of the queries' elements, then of the keys'; last, of the scale."""
    if FACTOR is not None:
        factor *= tl.load(FACTOR).to(tl.float32)
    scaled = factor * tl.load(SCALE).to(tl.float32)
    block = tl.program_id(0)
    query_blocks, key_blocks = tl.cdiv(query_size, BLOCK), tl.cdiv(key_size, BLOCK)
    if DQUERY is not None and block < query_blocks:
        _scaled(QUERY_ACC, DQUERY, block, query_size, scaled, BLOCK)
    block -= query_blocks
    if DKEY is not None and (block >= 0) & (block < key_blocks):
        _scaled(KEY_ACC, DKEY, block, key_size, scaled, BLOCK)
    if DSCALE is not None and block == key_blocks:
        dscale = factor * _sum(SCALE_PARTS, parts, BLOCK).to(tl.float32) / slope_of(SCALE)[1]
        tl.store(DSCALE, dscale.to(DSCALE.dtype.element_ty))


def contrastive_distillation_bwd(
    dloss: Tensor,
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    teacher_query: Tensor,  # [N, E]
    teacher_key: Tensor,  # [M, E]
    teacher_scale: Tensor,
    rows: Tensor,  # [5, N]
    cols: Tensor,  # [5, M], or [5, 0] when not symmetric
    store: Tensor,
    symmetric: bool,
    divergence: str,
    reduction: str,
    store_bytes: int,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery [N, D], dkey [M, D], dscale), of size 0 where not needed; `store_bytes` bounds a chunk."""
    tensors = (query, key, scale, teacher_query, teacher_key, teacher_scale)
    features = (query, key, teacher_query, teacher_key)
    check_distillation("contrastive_distillation_bwd", *features, symmetric, divergence, reduction)
    if sum_dtype(query, teacher_query) == torch.float64:
        return reference_bwd(dloss, *tensors, symmetric, divergence, reduction, needs)
    given = zip((query, key, scale), needs, strict=True)
    dquery, dkey, dscale = (x.new_empty(x.shape if need else 0) for x, need in given)
    if query.numel() == 0 or key.numel() == 0 or not any(needs):
        return dquery.zero_(), dkey.zero_(), dscale.zero_()
    need_query, need_key, need_scale = needs
    query, key, *teacher = operands_of(*features)
    operands = [tiles.operand(x) for x in (query, key, *teacher)]
    q, k, teacher_q, teacher_k = operands
    options = options_of(q, k, teacher_q, GRADS, GRADS_ON)
    n, m = len(query), len(key)
    row_weight, col_weight = weights_of(n, m, symmetric, reduction)
    # Products are of gradients of 1 at most, of 2^14 in float16; `factor` and `unit` make them those of dloss
    unit, gain = row_weight + symmetric * col_weight, 2.0**14 if q.dtype == torch.float16 else 1.0
    coef: Tensor | None = None
    factor: Tensor | None = dloss
    if reduction == "none":
        coef, factor, gain = dloss.to(rows.dtype).contiguous(), None, 1.0
        if (of_each := pairwise.gain_for(q.dtype, coef)) is not None:
            coef, factor = coef * of_each, of_each.reciprocal()
    products = need_query or need_key
    held = pairwise.chunk_rows(n, m, q.element_size(), store_bytes, tiles.memory(q)) if products else n
    buffer = pairwise.chunk_buffer(q, held if products else 0, m)
    query_acc, key_acc = (
        (x if x.dtype == torch.float32 else x.new_empty(x.shape, dtype=torch.float32)) if need else None
        for x, need in ((dquery, need_query), (dkey, need_key))
    )
    programs = [
        tiles.cdiv(min(held, n - start), options["BLOCK_M"]) * tiles.cdiv(m, options["BLOCK_N"])
        for start in range(0, n, held)
    ]
    parts = rows.new_empty(sum(programs)) if need_scale else None
    with torch.cuda.device_of(query):
        for i, start in enumerate(range(0, n, held)):
            stop = min(start + held, n)
            grads = buffer[: stop - start]
            _tile_grads[(programs[i],)](
                q, k, scale, teacher_q, teacher_k, teacher_scale, rows, cols if symmetric else None, coef,
                grads if products else None, None if parts is None else parts[i * programs[0] :],
                *strides_of(*operands), grads.stride(0), start, stop, n, m, q.shape[1], teacher_q.shape[1],
                row_weight / unit * gain, col_weight / unit * gain, tiles.GROUP, **options,
            )  # fmt: skip
            if query_acc is not None:
                tiles.product(grads, key, query_acc[start:stop])
            if key_acc is not None:
                tiles.product(grads.T, query[start:stop], key_acc, add=start > 0)
        sizes = [x.numel() for x in (dquery, dkey)]
        _finish[(sum(tiles.cdiv(size, READ) for size in sizes) + need_scale,)](
            *(x if need else None for x, need in zip((dquery, dkey, dscale), needs, strict=True)),
            query_acc, key_acc, parts, scale, factor, *sizes, sum(programs), unit / gain,
            BLOCK=READ, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
    return dquery, dkey, dscale
