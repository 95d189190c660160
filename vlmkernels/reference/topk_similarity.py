"""The k largest similarities of each query.

    values_i, indices_i = the k largest s_ij over the keys j;  ties by the lower j, NaN last

Streaming: the scores of a block of keys join the best k so far and a stable sort keeps k of them. Those so
far have lower indices than the block, so that ties keep their order. The same scores, by column, give the k
best queries of each key.
"""

import torch
from torch import Tensor

from vlmkernels.reference._retrieval import (
    COLS,
    ROWS,
    Best,
    best,
    blocks,
    check_keys,
    merged,
    nothing,
    ordered,
    precision,
    similarities,
)

CANDIDATES = 4  # times k: how many are rescored


def topk_similarity(
    query: Tensor,  # [Q, D]
    key: Tensor,  # [M, D]
    k: int,
    *,
    normalize: bool = False,
    return_sorted: bool = True,
    key_scale: Tensor | None = None,  # [M]
    rescore: Tensor | None = None,  # [M, D]
    both: bool = False,
) -> tuple[Tensor, ...]:
    """The definition, from all similarities."""
    scores = similarities(query.detach(), key, key_scale, normalize)
    at = torch.arange(len(key), device=key.device).expand(scores.shape)
    if rescore is not None:
        _, chosen = ordered(best(scores, at, CANDIDATES * k), False)
        exact = similarities(query.detach(), rescore, None, normalize)
        return ordered(best(exact.gather(1, chosen), chosen, k), return_sorted)
    rows = ordered(best(scores, at, k), return_sorted)
    if not both:
        return rows
    at = torch.arange(len(query), device=query.device).expand(scores.T.shape)
    return *rows, *ordered(best(scores.T, at, k), return_sorted)


def topk_similarity_fwd(query, key, key_scale, k, normalize, return_sorted, both):
    """The raw op: (values, indices, key_values, key_indices), the last two of size 0 unless `both`."""
    check_keys("topk_similarity", query, key, key_scale, k)
    empty = query.new_empty(0, dtype=precision(query, key))
    of_keys: list[Best] = [nothing(b.stop - b.start, empty) for b in blocks(len(key), COLS)]
    of_queries: list[Best] = []
    for rows in blocks(len(query), ROWS):
        found = nothing(rows.stop - rows.start, empty)
        for i, cols in enumerate(blocks(len(key), COLS)):
            scale = None if key_scale is None else key_scale[cols]
            scores = similarities(query[rows], key[cols], scale, normalize)
            found = merged(found, scores, cols.start, k)
            if both:
                of_keys[i] = merged(of_keys[i], scores.T, rows.start, k)
        of_queries.append(ordered(found, return_sorted))
    sides = _joined(of_queries)
    if not both:
        return *sides, empty, empty.to(torch.int64)
    return *sides, *_joined([ordered(each, return_sorted) for each in of_keys])


def _joined(parts: list[Best]) -> Best:
    return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])
