"""Shared by the pairwise kernels: norms, chunks of rows, and the last steps of the gradients of features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference._pairwise import check_features, check_pair
from vlmkernels.triton import _rows as rows_of
from vlmkernels.triton import _tiles as tiles

CHUNK_ROWS = 256  # rows of gradients in memory at once, more if `workspace_bytes` allow
LARGE_CHUNK_ROWS = 8192  # those that give every multiprocessor a tile of the products with them
CARD_SHARE = 64  # a chunk of so many rows takes at most this part of a card's memory
READ = 2048  # features of a row, or terms of a sum, that a program reads at once


@triton.jit
def is_positive(QUERY_IDS, KEY_IDS, rows, cols, row_inside, col_inside):
    """Which pairs have equal ids, [BLOCK_M, BLOCK_N]. No query ids: the pairs (i, i); no key ids: indices."""
    if QUERY_IDS is None:
        same = cols[None, :] == rows[:, None]
    else:
        if KEY_IDS is None:
            key_ids = cols.to(tl.int64)
        else:
            key_ids = tl.load(KEY_IDS + cols, mask=col_inside, other=0)
        same = tl.load(QUERY_IDS + rows, mask=row_inside, other=0)[:, None] == key_ids[None, :]
    return same


@triton.jit
def _row_norm(X, INV_NORM, UNIT, row, at, stride, depth, BLOCK: tl.constexpr):
    row = row.to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(X + row * stride + cols, mask=cols < depth, other=0.0).to(tl.float32)
        squares += x * x
    inv_norm = 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, 0)), 1e-12)
    tl.store(INV_NORM + at, inv_norm)
    if UNIT is not None:
        for start in range(0, depth, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(X + row * stride + cols, mask=cols < depth, other=0.0).to(tl.float32)
            tl.store(UNIT + row * depth + cols, (inv_norm * x).to(UNIT.dtype.element_ty), mask=cols < depth)


@triton.jit
def _norms(
    Q,  # [n, depth]
    K,  # [m, depth]
    INV_NORMS,  # [n + m] 1 / max(|x|, 1e-12)
    UNIT_Q,  # [n, depth] or None: the features divided by their norms
    UNIT_K,  # [m, depth] or None
    stride_q,
    stride_k,
    n,
    depth,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    if program < n:
        _row_norm(Q, INV_NORMS, UNIT_Q, program, program, stride_q, depth, BLOCK)
    else:
        _row_norm(K, INV_NORMS, UNIT_K, program - n, program, stride_k, depth, BLOCK)


def norms(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    unit_query: bool,
    unit_key: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inverse norms [N] and [M], and the features; divided by their norms where that is asked for."""
    (n, depth), m = query.shape, key.shape[0]
    inv_norms = query.new_empty(n + m, dtype=torch.float32)
    q, k = (x.new_empty(x.shape) if need else None for x, need in ((query, unit_query), (key, unit_key)))
    block = row_options(depth)["BLOCK"]
    with torch.cuda.device_of(query):
        _norms[(n + m,)](
            query, key, inv_norms, q, k, query.stride(0), key.stride(0), n, depth, block,
            **rows_of.options(block),
        )  # fmt: skip
    return inv_norms[:n], inv_norms[n:], query if q is None else q, key if k is None else k


@triton.jit
def feature_grads(
    ACC,  # [rows, depth] float32: the products with the gradients of the tiles
    X,  # [rows, depth]
    Y,  # [others, depth]
    A,  # [rows] inverse norms or None
    B,  # [others] inverse norms or None
    DX,  # [rows, depth]
    row,
    scale,
    inv_gain,  # undoes the factor that ACC carries
    weight,  # of the pair of the row with that of its index on the other side
    paired,  # whether it has one
    stride_x,
    stride_y,
    depth,
    PAIRS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """scale a (D - a^2 <x, D> x) of one row, D = inv_gain ACC + weight b y."""
    row = row.to(tl.int64)
    if PAIRS and B is not None:
        weight *= tl.load(B + row, mask=paired, other=0.0)
    dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < depth
        total = inv_gain * tl.load(ACC + row * depth + cols, mask=inside, other=0.0)
        if PAIRS:
            y = tl.load(Y + row * stride_y + cols, mask=inside & paired, other=0.0)
            total += weight * y.to(tl.float32)
        if A is not None:
            x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
            dots += x * total
            tl.debug_barrier()  # warps with the same columns have read them
            tl.store(ACC + row * depth + cols, total, mask=inside)
        else:
            tl.store(DX + row * depth + cols, (scale * total).to(DX.dtype.element_ty), mask=inside)
    if A is not None:
        tl.debug_barrier()
        a = tl.load(A + row)
        dot = tl.sum(dots, 0)
        for start in range(0, depth, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < depth
            total = tl.load(ACC + row * depth + cols, mask=inside, other=0.0)
            x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
            out = scale * a * (total - a * dot * (a * x))
            tl.store(DX + row * depth + cols, out.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def sum_of(X, WEIGHT, count, BLOCK: tl.constexpr):
    """The sum of numbers, each times its weight, in one program."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(X + at, mask=at < count, other=0.0)
        if WEIGHT is not None:
            x *= tl.load(WEIGHT + at, mask=at < count, other=0.0)
        total += x.to(tl.float64)
    return tl.sum(total, 0)


def check(op: str, query: Tensor, key: Tensor, positives, key_ids, weight) -> None:
    """The raw ops accept any tensors, and the kernels read what the sizes say."""
    check_features(op, query, key)
    check_pair(op, positives, key_ids)
    n, m = query.shape[0], key.shape[0]
    if positives is None and n > m:
        raise ValueError(f"{op}: without positives M must be at least N, got N = {n} and M = {m}")
    for name, x, length in (("positives", positives, n), ("key_ids", key_ids, m), ("weight", weight, n)):
        if x is not None and x.shape != (length,):
            raise ValueError(f"{op}: {name} must be [{length}], got {tuple(x.shape)}")


def check_positives(op: str, positives: Tensor, m: int) -> None:
    """A device assertion that indices of keys are in [0, M) or -100."""
    valid = positives.new_empty((), dtype=torch.uint8)
    rows_of.total(
        positives, len(positives), target=positives, classes=m, ignore_index=-100, valid=valid, mean=False
    )
    if valid.is_cuda:
        torch._assert_async(valid, f"{op}: positives must be in [0, M) or -100")


def row_options(depth: int) -> dict:
    """The launch of a program that reads a row."""
    block = max(16, min(tiles.next_power_of_2(depth), READ))
    return {"BLOCK": block, "num_warps": 4, "enable_fp_fusion": True}


def chunk_rows(n: int, m: int, itemsize: int, workspace_bytes: int, card_bytes: int = 0) -> int:
    """How many rows of gradients of the similarities are in memory at once.

    As many as `workspace_bytes` hold, unless it is 0 at least `LARGE_CHUNK_ROWS` where a card has the memory.
    """
    row = max(m, 1) * itemsize
    if workspace_bytes:
        workspace_bytes = max(workspace_bytes, min(LARGE_CHUNK_ROWS * row, card_bytes // CARD_SHARE))
    rows = workspace_bytes // row
    return max(1, min(n, max(CHUNK_ROWS, rows // CHUNK_ROWS * CHUNK_ROWS)))


def chunk_buffer(like: Tensor, rows: int, m: int) -> Tensor:  # [rows, m]
    """Rows begin at multiples of 16 elements."""
    return like.new_empty((rows, tiles.cdiv(m, 16) * 16))[:, :m]


def gain_for(dtype: torch.dtype, *coefficients: Tensor) -> Tensor | None:
    """A factor that moves gradients, at most the sum of `coefficients`, into the range of float16."""
    if dtype != torch.float16:
        return None
    peak = torch.stack([c.abs().amax() for c in coefficients if c.numel()]).amax()
    return torch.where(peak > 0, 2.0**14 / peak, 1.0)
