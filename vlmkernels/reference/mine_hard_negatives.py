"""The k most similar keys of each query that are not its positives.

    s_ij = <q_i, k_j>,   best_i = max s_ij over the positives of i
    candidates of i: the keys j that are no positive of i, not of its group, and with a margin
    s_ij <= best_i - margin, where i has a positive
    indices_i = the k candidates of the largest s_ij;  ties by the lower j, NaN last, -1 where there are fewer

A best that is NaN leaves no candidates with a margin. Two sweeps over blocks of products: the best, where
there is a margin, then a running top k.
"""

import torch
from torch import Tensor

from vlmkernels.reference._retrieval import COLS, ROWS, blocks, check_keys, nothing, similarities
from vlmkernels.reference.retrieval_ranks import matcher


def mine_hard_negatives(
    query: Tensor,  # [Q, D]
    key: Tensor,  # [M, D]
    k: int,
    *,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    groups: tuple[Tensor, Tensor] | None = None,  # [Q], [M]
    margin: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """The definition, by blocks."""
    ids, key_ids = positives if isinstance(positives, tuple) else (positives, None)
    own, other = groups or (None, None)
    return mine_hard_negatives_fwd(
        query.detach(), key.detach(), ids, key_ids, own, other, k, margin, normalize
    )


def mine_hard_negatives_fwd(query, key, positives, key_ids, query_groups, key_groups, k, margin, normalize):
    """The raw op: indices [Q, k]."""
    check_keys("mine_hard_negatives", query, key, None, k)
    n, m = query.shape[0], key.shape[0]
    match = matcher("mine_hard_negatives", positives, key_ids, n, m, query.device)
    if (query_groups is None) != (key_groups is None):
        raise ValueError("mine_hard_negatives: groups must be of both the queries and the keys, or of none")
    grouped = None
    if query_groups is not None:
        names = "query_groups", "key_groups"
        grouped = matcher("mine_hard_negatives", query_groups, key_groups, n, m, query.device, names)
    indices = torch.full((n, k), -1, dtype=torch.int64, device=query.device)
    for rows in blocks(n, ROWS):
        limit, filtered = None, None
        if margin is not None:
            limit, filtered = _limits(query, key, match, rows, margin, normalize)
        found = nothing(rows.stop - rows.start, similarities(query[:0], key[:0], None, normalize))
        out = found[1].bool()  # of those found, which are no candidates
        for cols in blocks(m, COLS):
            scores = similarities(query[rows], key[cols], None, normalize)
            no = match(rows, cols)
            if grouped is not None:
                no = no | grouped(rows, cols)
            if limit is not None:
                no = no | (~(scores <= limit) & filtered)
            at = torch.arange(cols.start, cols.stop, device=query.device).expand(scores.shape)
            together = (torch.cat(x, 1) for x in zip((*found, out), (scores, at, no), strict=True))
            *found, out = _best(*together, k)
        indices[rows, : found[1].shape[1]] = found[1].where(~out, -1)
    return indices


def _best(scores: Tensor, at: Tensor, no: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k best of the candidates, then of the others."""
    order = (-scores).sort(dim=1, stable=True).indices
    order = order.gather(1, no.gather(1, order).to(torch.int8).sort(dim=1, stable=True).indices)[:, :k]
    return scores.gather(1, order), at.gather(1, order), no.gather(1, order)


def _limits(query, key, match, rows, margin, normalize) -> tuple[Tensor, Tensor]:  # [rows, 1] each
    """best - margin, and which rows have a positive."""
    low = similarities(query[:0], key[:0], None, normalize).new_full((rows.stop - rows.start,), -torch.inf)
    some = torch.zeros_like(low, dtype=torch.bool)
    for cols in blocks(key.shape[0], COLS):
        same = match(rows, cols)
        if same.shape[1]:
            scores = similarities(query[rows], key[cols], None, normalize).where(same, -torch.inf)
            low, some = torch.maximum(low, scores.amax(1)), some | same.any(1)
    return (low - margin)[:, None], some[:, None]
