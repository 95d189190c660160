"""mine_hard_negatives: the kernels of topk_similarity, which leave pairs out, and of the best matches."""

import torch
from torch import Tensor

from vlmkernels.reference._retrieval import check_keys
from vlmkernels.reference.mine_hard_negatives import mine_hard_negatives_fwd
from vlmkernels.triton import _retrieval as retrieval


def mine_hard_negatives(
    query: Tensor,  # [Q, D]
    key: Tensor,  # [M, D]
    positives: Tensor | None,  # [Q] int64
    key_ids: Tensor | None,  # [M] int64
    query_groups: Tensor | None,  # [Q] int64
    key_groups: Tensor | None,  # [M] int64
    k: int,
    margin: float | None,
    normalize: bool,
) -> Tensor:
    """indices [Q, k]."""
    op, (n, m) = "mine_hard_negatives", (x.shape[0] if x.dim() else 0 for x in (query, key))
    if retrieval.is_wide(query, key) or n == 0 or m == 0:
        return mine_hard_negatives_fwd(
            query, key, positives, key_ids, query_groups, key_groups, k, margin, normalize
        )
    check_keys(op, query, key, None, k)
    ids = retrieval.label_arguments(op, query, key, positives, key_ids)
    if (query_groups is None) != (key_groups is None):
        raise ValueError(f"{op}: groups must be of both the queries and the keys, or of none")
    groups: tuple[Tensor | None, Tensor | None] = (None, None)
    if query_groups is not None:
        groups = retrieval.label_arguments(op, query, key, query_groups, key_groups)
    best = None
    if margin is not None:
        best, _ = retrieval.best_matches(query, key, *ids, normalize, of_keys=False)
    indices = query.new_full((n, k), -1, dtype=torch.int64)
    rows, cols = retrieval.chunks(n, m)
    for part in retrieval.blocks(n, rows):
        found = indices.new_empty(part.stop - part.start, 0)
        for some in retrieval.blocks(m, cols):
            ranked, _ = retrieval.rank(
                query[part], key, some, part.start, None, normalize, out=(*ids, *groups), best=best,
                margin=margin or 0.0,
            )  # fmt: skip
            found = retrieval.merged(found, ranked, k)
        indices[part, : found.shape[1]] = retrieval.indices_of(found)
    return indices
