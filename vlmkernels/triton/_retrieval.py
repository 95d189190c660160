"""Kernels of the retrieval ops: similarities as ranked keys, and the best of those that match.

A ranked key is one int64: the score as an integer of the same order, NaN lowest, and below it the index,
lower ones higher. No two are equal, so that the k largest, found by torch.topk, are one result, its ties in
order.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference._retrieval import Best, ordered, precision
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._pairwise import is_positive
from vlmkernels.triton._tiles import grouped_tile, similarities

CHUNK_BYTES = 1 << 28  # ranked keys in memory at once
LEAST = -(1 << 63)  # no ranked key
NO_MATCH = -(1 << 31)  # among orders of scores


@triton.jit
def order_of(scores):
    """int32 in the order of float32 scores: NaN is above infinity."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(scores != scores, 0x7FFFFFFF, order)


@triton.jit
def _ranked(scores, indices):
    order = order_of(scores)
    order = tl.where(scores != scores, -2147483648, order)
    return (order.to(tl.int64) << 32) | (4294967295 - indices.to(tl.int64))


@triton.jit
def _rank(
    Q,  # [n, depth]
    K,  # [m, depth]
    A,  # [n] or None: factors of the queries
    B,  # [m] or None: factors of the keys
    QUERY_IDS,  # [row0 + n] int64 or None: the pairs (i, i) match
    KEY_IDS,  # [col0 + m] int64 or None: those of the queries are indices of keys
    QUERY_GROUPS,  # [row0 + n] int64 or None
    KEY_GROUPS,  # [col0 + m] int64 or None
    BEST,  # [row0 + n] int32 or None: the order of the best match
    OUT,  # [n, m] int64: the keys ranked for each query
    OUT_KEYS,  # [m, n] int64 or None: the queries ranked for each key
    margin,
    stride_q,
    stride_k,
    stride_out,
    stride_out_keys,
    row0,
    col0,
    n,
    m,
    depth,
    MATCHES_OUT: tl.constexpr,  # whether keys that match are left out
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tiles, col_tiles = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, col_tiles, GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, col_inside = rows < n, cols < m
    inside = row_inside[:, None] & col_inside[None, :]
    scores = similarities(
        Q, K, rows, cols, stride_q, stride_k, n, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    if B is not None:
        scores *= tl.load(B + cols, mask=col_inside, other=0.0)[None, :]
    if A is not None:
        scores *= tl.load(A + rows, mask=row_inside, other=0.0)[:, None]
    ranked = _ranked(scores, (col0 + cols)[None, :])
    if MATCHES_OUT:
        out = is_positive(QUERY_IDS, KEY_IDS, row0 + rows, col0 + cols, row_inside, col_inside)
        if QUERY_GROUPS is not None:
            out |= is_positive(QUERY_GROUPS, KEY_GROUPS, row0 + rows, col0 + cols, row_inside, col_inside)
        if BEST is not None:
            best = tl.load(BEST + row0 + rows, mask=row_inside, other=0)
            bits = best ^ ((best >> 31) & 0x7FFFFFFF)
            limit = bits.to(tl.float32, bitcast=True) - margin
            matched = best != -2147483648
            out |= matched[:, None] & ~(scores <= limit[:, None])
        ranked = tl.where(out, -9223372036854775808, ranked)
    at = rows.to(tl.int64)[:, None] * stride_out + cols[None, :]
    tl.store(OUT + at, ranked, mask=inside)
    if OUT_KEYS is not None:
        at = cols.to(tl.int64)[None, :] * stride_out_keys + rows[:, None]
        tl.store(OUT_KEYS + at, _ranked(scores, (row0 + rows)[:, None]), mask=inside)


@triton.jit
def _best_matches(
    Q,  # [n, depth]
    K,  # [m, depth]
    A,  # [n] or None
    B,  # [m] or None
    QUERY_IDS,  # [row0 + n] int64 or None
    KEY_IDS,  # [m] int64 or None
    ROWS,  # [column tiles, n] int32: the highest order of a match, NO_MATCH before
    COLS,  # [row tiles, m] int32 or None
    stride_q,
    stride_k,
    row0,
    n,
    m,
    depth,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Only the tiles that have a match are formed."""
    row_tiles, col_tiles = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, col_tiles, GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, col_inside = rows < n, cols < m
    same = is_positive(QUERY_IDS, KEY_IDS, row0 + rows, cols, row_inside, col_inside)
    same &= row_inside[:, None] & col_inside[None, :]
    if tl.max(tl.max(same.to(tl.int32), 1), 0) > 0:
        scores = similarities(
            Q, K, rows, cols, stride_q, stride_k, n, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
        )
        if B is not None:
            scores *= tl.load(B + cols, mask=col_inside, other=0.0)[None, :]
        if A is not None:
            scores *= tl.load(A + rows, mask=row_inside, other=0.0)[:, None]
        order = tl.where(same, order_of(scores), -2147483648)
        tl.store(ROWS + col_tile.to(tl.int64) * n + rows, tl.max(order, 1), mask=row_inside)
        if COLS is not None:
            tl.store(COLS + row_tile.to(tl.int64) * m + cols, tl.max(order, 0), mask=col_inside)


def operands(query: Tensor, key: Tensor, key_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both sides in one dtype, which holds int8 exactly, as `similarities` reads them."""
    dtype = query.dtype if key.dtype == torch.int8 else torch.promote_types(query.dtype, key.dtype)
    return tiles.operand(query.to(dtype)), tiles.operand(key.to(dtype))


def factors(x: Tensor, scale: Tensor | None, normalize: bool) -> Tensor | None:
    """What the similarities of these rows are multiplied by: their scales, over their norms."""
    scale = None if scale is None else scale.to(torch.float32)
    if not normalize:
        return scale
    norms = torch.linalg.vector_norm(x.to(torch.float32), dim=1)
    if scale is None:
        return norms.clamp_min(1e-12).reciprocal()
    return scale / (scale.abs() * norms).clamp_min(1e-12)


def options_of(query: Tensor, key: Tensor) -> dict:
    """Without fusing: equal scores are equal in every kernel."""
    return tiles.launch_options(
        query, key, fuse=False, table=tiles.STATISTICS, exceptions=tiles.STATISTICS_ON
    )


def blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def chunks(n: int, m: int) -> tuple[int, int]:
    """How many queries and keys are ranked at once."""
    rows = min(n, 4096)
    return rows, max(256, CHUNK_BYTES // (8 * max(rows, 1)) // 256 * 256)


def rank(
    query: Tensor,  # [n, D]
    key: Tensor,  # [M, D]
    part: slice,  # of the keys
    row0: int,
    key_scale: Tensor | None,
    normalize: bool,
    *,
    of_keys: bool = False,
    out: tuple[Tensor | None, ...] | None = None,
    best: Tensor | None = None,
    margin: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """Ranked keys [n, m] of each query and, with `of_keys`, ranked queries [m, n] of each key.

    `out`: ids and groups of the queries and the keys, of which pairs are left out.
    """
    scale = None if key_scale is None else key_scale[part]
    q, k = operands(query, key[part], scale)
    a, b = factors(query, None, normalize), factors(key[part], scale, normalize)
    n, m = len(q), len(k)
    ranked = query.new_empty((n, m), dtype=torch.int64)
    ranked_queries = query.new_empty((m, n), dtype=torch.int64) if of_keys else None
    options = options_of(q, k)
    programs = tiles.cdiv(n, options["BLOCK_M"]) * tiles.cdiv(m, options["BLOCK_N"])
    with torch.cuda.device_of(query):
        _rank[(programs,)](
            q, k, a, b, *(out or [None] * 4), best, ranked, ranked_queries, margin, q.stride(0), k.stride(0),
            m, n, row0, part.start, n, m, q.shape[1], out is not None, tiles.GROUP, **options,
        )  # fmt: skip
    return ranked, ranked_queries


def best_matches(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    positives: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
    normalize: bool,
    *,
    of_keys: bool,
) -> tuple[Tensor, Tensor | None]:
    """The order of the best match of each query [N] and of each key [M]; NO_MATCH without one."""
    q, k = operands(query, key, None)
    a, b = factors(query, None, normalize), factors(key, None, normalize)
    n, m = len(q), len(k)
    found = query.new_full((n,), NO_MATCH, dtype=torch.int32)
    keys = query.new_full((m,), NO_MATCH, dtype=torch.int32) if of_keys else None
    options = options_of(q, k)
    col_tiles, block = tiles.cdiv(m, options["BLOCK_N"]), options["BLOCK_M"]
    for part in blocks(n, max(block, CHUNK_BYTES // (4 * col_tiles) // block * block)):
        rows = part.stop - part.start
        row_tiles = tiles.cdiv(rows, block)
        best = query.new_full((col_tiles, rows), NO_MATCH, dtype=torch.int32)
        of_columns = query.new_full((row_tiles, m), NO_MATCH, dtype=torch.int32) if of_keys else None
        with torch.cuda.device_of(query):
            _best_matches[(row_tiles * col_tiles,)](
                q[part], k, None if a is None else a[part], b, positives, key_ids, best, of_columns,
                q.stride(0), k.stride(0), part.start, rows, m, q.shape[1], tiles.GROUP, **options,
            )  # fmt: skip
        found[part] = best.amax(0)
        if keys is not None and of_columns is not None:
            torch.maximum(keys, of_columns.amax(0), out=keys)
    return found, keys


def merged(so_far: Tensor, ranked: Tensor, k: int) -> Tensor:
    """The k highest, falling."""
    together = torch.cat([so_far, ranked], 1)
    return together.topk(min(k, together.shape[1]), dim=1).values


def values_of(order: Tensor) -> Tensor:
    """float32 scores of orders, NaN of the lowest and the highest."""
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return bits.view(torch.float32)


def indices_of(ranked: Tensor) -> Tensor:
    """-1 of what is no ranked key."""
    return torch.where(ranked == LEAST, -1, 0xFFFFFFFF - (ranked & 0xFFFFFFFF))


def found(ranked: Tensor, by_value: bool) -> Best:
    """Scores and indices."""
    return ordered((values_of((ranked >> 32).to(torch.int32)), indices_of(ranked)), by_value)


def is_wide(query: Tensor, key: Tensor) -> bool:
    """Triton does not multiply float64 on every GPU."""
    return precision(query, key) == torch.float64


def label_arguments(
    op: str, query: Tensor, key: Tensor, positives: Tensor | None, key_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous ids, checked."""
    pairwise.check(op, query, key, positives, key_ids, None)
    if positives is not None and key_ids is None:
        pairwise.check_positives(op, positives, len(key))
    return tuple(None if x is None else x.contiguous() for x in (positives, key_ids))  # type: ignore[return-value]
