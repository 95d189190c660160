"""The rank of the best match of each query among the keys, and of each key among the queries.

    s_ij = <q_i, k_j>,   best_i = max s_ij over the keys j that match i
    rank_i = 1 + the number of keys j that do not match with not (s_ij < best_i);   M + 1 without a match

and along the columns likewise. A NaN score is not below any, and nothing is below a best that is NaN, so that
ties and NaN count against a model. Two sweeps over blocks of products: the best, then the counts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmkernels.reference._pairwise import check_features, check_indices, check_pair
from vlmkernels.reference._retrieval import COLS, ROWS, blocks, similarities


def retrieval_ranks(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, by blocks."""
    ids, key_ids = positives if isinstance(positives, tuple) else (positives, None)
    return retrieval_ranks_fwd(query.detach(), key.detach(), ids, key_ids)


def retrieval_ranks_fwd(query, key, positives, key_ids):
    """The raw op: (query_ranks [N], key_ranks [M])."""
    check_features("retrieval_ranks", query, key)
    n, m = query.shape[0], key.shape[0]
    match = matcher("retrieval_ranks", positives, key_ids, n, m, query.device)

    def sweep(take: Callable[[Tensor, Tensor, slice, slice], Any]) -> None:
        for rows in blocks(n, ROWS):
            for cols in blocks(m, COLS):
                take(similarities(query[rows], key[cols], None, False), match(rows, cols), rows, cols)

    low = similarities(query[:0], key[:0], None, False).new_full((n + m,), -torch.inf)
    of_queries, of_keys = low[:n], low[n:]
    matched = torch.zeros(n + m, dtype=torch.bool, device=query.device)
    has_key, has_query = matched[:n], matched[n:]

    def find(s: Tensor, same: Tensor, rows: slice, cols: slice) -> None:
        best = s.where(same, -torch.inf)
        for dim, sides in ((1, (of_queries[rows], has_key[rows])), (0, (of_keys[cols], has_query[cols]))):
            if s.shape[dim]:
                sides[0].copy_(torch.maximum(sides[0], best.amax(dim)))
                sides[1].logical_or_(same.any(dim))

    ranks = torch.ones(n + m, dtype=torch.int64, device=query.device)

    def count(s: Tensor, same: Tensor, rows: slice, cols: slice) -> None:
        ranks[:n][rows] += (~(s < of_queries[rows, None]) & ~same).sum(1)
        ranks[n:][cols] += (~(s < of_keys[cols]) & ~same).sum(0)

    sweep(find)
    sweep(count)
    return ranks[:n].where(has_key, m + 1), ranks[n:].where(has_query, n + 1)


def matcher(
    op: str,
    own: Tensor | None,
    other: Tensor | None,
    n: int,
    m: int,
    device: torch.device,
    names: tuple[str, str] = ("positives", "key_ids"),
) -> Callable[[slice, slice], Tensor]:
    """A function of blocks of rows and columns: which pairs match, by index or by equal id."""
    check_pair(op, own, other)
    for name, ids, count in ((names[0], own, n), (names[1], other, m)):
        if ids is not None and (ids.dtype != torch.int64 or ids.shape != (count,)):
            raise ValueError(f"{op}: {name} must be int64 [{count}], got {ids.dtype} {list(ids.shape)}")
    if own is None and m < n:
        raise ValueError(f"{op}: without positives, M must be at least N, got N = {n} and M = {m}")
    if own is not None and other is None:
        check_indices(op, own, m)
    rows_of = torch.arange(n, device=device) if own is None else own
    cols_of = torch.arange(m, device=device) if other is None else other
    return lambda rows, cols: rows_of[rows, None] == cols_of[cols]
