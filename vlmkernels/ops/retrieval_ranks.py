"""rank_i = 1 + how many keys that do not match query i are not less similar than its best match."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _pairwise_targets as targets
from vlmkernels.ops._retrieval import no_gradients, pair_faults
from vlmkernels.reference.retrieval_ranks import retrieval_ranks_fwd


@arguments.public
def retrieval_ranks(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The rank, from 1, of each query's best match among the keys, and of each key's among the queries.

    Only keys that do not match are counted, so that R@k is the fraction of ranks up to k. One with the score
    of the best match is counted as better, and so is a NaN: a model with one embedding for everything has no
    R@1. The similarities, inner products, are never materialised.

    Args:
        query: ``[N, D]`` of float32, float64, bfloat16 or float16.
        key: ``[M, D]`` of any of these.
        positives: which pairs match. ``None``: key i and query i, ``M >= N``. ``[N]`` int64: index of each
            query's key, -100 for a query without one. ``(query_ids [N], key_ids [M])`` int64: equal ids.

    Returns:
        ``(query_ranks [N], key_ranks [M])``, int64, without gradient. A query without a match has rank
        ``M + 1``, a key without one ``N + 1``. Scores are float32 (float64 if a side is); the score of a
        match is that of the products in which it is compared. Autocast changes nothing.

    Raises:
        ValueError: naming every invalid argument.
        IndexError: a positive outside ``[0, M)`` (a device assertion on CUDA).
    """
    ids, key_ids = targets.as_targets(positives)
    faults = pair_faults(query, key, ids, key_ids)
    if faults:
        raise ValueError("retrieval_ranks: " + "; ".join(faults))
    with torch.no_grad():
        return _op(query, key, ids, key_ids)


def _fake(query, key, positives, key_ids):
    return tuple(query.new_empty(x.shape[0], dtype=torch.int64) for x in (query, key))


_op = define(
    "retrieval_ranks(Tensor query, Tensor key, Tensor? positives, Tensor? key_ids) "
    "-> (Tensor query_ranks, Tensor key_ranks)",
    reference=retrieval_ranks_fwd,
    fake=_fake,
    flops=lambda query, key, *_, **__: pairwise.flops(query, key),
    setup_context=no_gradients,
    autocast=(),
)

if TRITON:
    from vlmkernels.triton import retrieval_ranks as _triton

    kernel("retrieval_ranks", "CUDA", _triton.retrieval_ranks, "Triton")
