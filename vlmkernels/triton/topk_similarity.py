"""topk_similarity: products that are ranked as they are formed, and torch.topk of chunks of them."""

import torch
from torch import Tensor

from vlmkernels.reference._retrieval import check_keys
from vlmkernels.reference.topk_similarity import topk_similarity_fwd
from vlmkernels.triton import _retrieval as retrieval


def topk_similarity(
    query: Tensor,  # [Q, D]
    key: Tensor,  # [M, D]
    key_scale: Tensor | None,  # [M]
    k: int,
    normalize: bool,
    return_sorted: bool,
    both: bool,
) -> tuple[Tensor, ...]:
    """Values and indices [Q, k] of the queries, then those [M, k] of the keys, empty unless `both`."""
    (n, m) = (x.shape[0] if x.dim() else 0 for x in (query, key))
    if retrieval.is_wide(query, key) or n == 0 or m == 0:
        return topk_similarity_fwd(query, key, key_scale, k, normalize, return_sorted, both)
    check_keys("topk_similarity", query, key, key_scale, k)
    nothing = query.new_empty(0, dtype=torch.int64)
    of_queries, of_keys = [], nothing.new_empty(m if both else 0, 0)
    rows, cols = retrieval.chunks(n, m)
    for part in retrieval.blocks(n, rows):
        best, new = nothing.new_empty(part.stop - part.start, 0), []
        for some in retrieval.blocks(m, cols):
            ranked, ranked_queries = retrieval.rank(
                query[part], key, some, part.start, key_scale, normalize, of_keys=both
            )
            best = retrieval.merged(best, ranked, k)
            if ranked_queries is not None:
                new.append(retrieval.merged(of_keys[some], ranked_queries, k))
        of_queries.append(best)
        of_keys = torch.cat(new) if both else of_keys
    results = retrieval.found(torch.cat(of_queries), return_sorted)
    if both:
        return *results, *retrieval.found(of_keys, return_sorted)
    return *results, results[0].new_empty(0), nothing
