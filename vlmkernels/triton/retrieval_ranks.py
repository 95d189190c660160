"""retrieval_ranks: the best matches, then a count of what is not below them, both from products in tiles."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.retrieval_ranks import retrieval_ranks_fwd
from vlmkernels.triton import _retrieval as retrieval
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton._pairwise import is_positive
from vlmkernels.triton._tiles import grouped_tile, similarities


@triton.jit
def _count(
    Q,  # [n, depth]
    K,  # [m, depth]
    QUERY_IDS,  # [row0 + n] int64 or None: the pairs (i, i) match
    KEY_IDS,  # [m] int64 or None: those of the queries are indices of keys
    QUERY_BEST,  # [row0 + n] float32
    KEY_BEST,  # [m] float32
    ROWS,  # [column tiles, n] int32
    COLS,  # [row tiles, m] int32
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
    """How many of the others are not below the best match, of each row and column of a tile."""
    row_tiles, col_tiles = tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N)
    row_tile, col_tile = grouped_tile(tl.program_id(0), row_tiles, col_tiles, GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside, col_inside = rows < n, cols < m
    scores = similarities(
        Q, K, rows, cols, stride_q, stride_k, n, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    same = is_positive(QUERY_IDS, KEY_IDS, row0 + rows, cols, row_inside, col_inside)
    counted = row_inside[:, None] & col_inside[None, :] & ~same
    own = tl.load(QUERY_BEST + row0 + rows, mask=row_inside, other=0.0)
    other = tl.load(KEY_BEST + cols, mask=col_inside, other=0.0)
    above = (counted & ~(scores < own[:, None])).to(tl.int32)
    tl.store(ROWS + col_tile.to(tl.int64) * n + rows, tl.sum(above, 1), mask=row_inside)
    above = (counted & ~(scores < other[None, :])).to(tl.int32)
    tl.store(COLS + row_tile.to(tl.int64) * m + cols, tl.sum(above, 0), mask=col_inside)


def retrieval_ranks(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    positives: Tensor | None,  # [N] int64
    key_ids: Tensor | None,  # [M] int64
) -> tuple[Tensor, Tensor]:
    """(query_ranks [N], key_ranks [M])."""
    n, m = (x.shape[0] if x.dim() else 0 for x in (query, key))
    if retrieval.is_wide(query, key) or n == 0 or m == 0:
        return retrieval_ranks_fwd(query, key, positives, key_ids)
    ids = retrieval.label_arguments("retrieval_ranks", query, key, positives, key_ids)
    of_queries, of_keys = retrieval.best_matches(query, key, *ids, False, of_keys=True)
    assert of_keys is not None
    best, key_best = retrieval.values_of(of_queries), retrieval.values_of(of_keys)
    q, k = retrieval.operands(query, key, None)
    options = retrieval.options_of(q, k)
    col_tiles, block = tiles.cdiv(m, options["BLOCK_N"]), options["BLOCK_M"]
    query_ranks, key_ranks = query.new_ones(n, dtype=torch.int64), query.new_ones(m, dtype=torch.int64)
    for part in retrieval.blocks(n, max(block, retrieval.CHUNK_BYTES // (4 * col_tiles) // block * block)):
        rows = part.stop - part.start
        row_tiles = tiles.cdiv(rows, block)
        row_counts = query.new_empty((col_tiles, rows), dtype=torch.int32)
        col_counts = query.new_empty((row_tiles, m), dtype=torch.int32)
        with torch.cuda.device_of(query):
            _count[(row_tiles * col_tiles,)](
                q[part], k, *ids, best, key_best, row_counts, col_counts, q.stride(0), k.stride(0),
                part.start, rows, m, q.shape[1], tiles.GROUP, **options,
            )  # fmt: skip
        query_ranks[part] += row_counts.sum(0)
        key_ranks += col_counts.sum(0)
    none = retrieval.NO_MATCH
    return query_ranks.where(of_queries != none, m + 1), key_ranks.where(of_keys != none, n + 1)
