"""indices_i = the k keys that are most similar to query i and not its positives."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _pairwise_targets as targets
from vlmkernels.ops._retrieval import no_gradients, pair_faults
from vlmkernels.reference._retrieval import count_faults
from vlmkernels.reference.mine_hard_negatives import mine_hard_negatives_fwd


@arguments.public
def mine_hard_negatives(
    query: Tensor,  # [Q, D]
    key: Tensor,  # [M, D]
    k: int,
    *,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    groups: tuple[Tensor, Tensor] | None = None,
    margin: float | None = None,
    normalize: bool = False,
) -> Tensor:
    """The k most similar keys of each query that are not its positives, for contrastive training.

    With a margin, as ANCE-style mining filters false negatives (NV-Retriever, Moreira et al. 2024, section
    3.1): only keys whose similarity is at most that of the best positive less `margin`.

    Args:
        query: ``[Q, D]`` of float32, float64, bfloat16 or float16.
        key: ``[M, D]`` of any of these.
        k: how many, at least 1.
        positives: ``None``: key i of query i, ``M >= Q``. ``[Q]`` int64: index of each query's key, -100 for
            a query without one. ``(query_ids [Q], key_ids [M])`` int64: keys of an equal id.
        groups: ``(query_groups [Q], key_groups [M])`` int64: keys of the query's group are left out as well.
        margin: a finite number; a query without a positive is not filtered. ``None``: no filter.
        normalize: divide the features by their L2 norm first, as ``torch.nn.functional.normalize`` does.

    Returns:
        indices ``[Q, k]``, int64, without gradient: by falling similarity, equal ones by rising index, NaN
        last; -1 where there are fewer. Similarities are float32 (float64 if a side is). Autocast changes
        nothing.

    Raises:
        ValueError: naming every invalid argument.
        IndexError: a positive outside ``[0, M)`` (a device assertion on CUDA).
    """
    ids, key_ids = targets.as_targets(positives)
    own, other = groups if groups is not None else (None, None)
    faults = pair_faults(query, key, ids, key_ids) + count_faults(k)
    faults += [
        fault.replace("positives", "groups") for fault in targets.positives_faults(query, key, own, other)
    ]
    if groups is not None and (own is None or other is None):
        got = f"({type(own).__name__}, {type(other).__name__})"
        faults.append(f"groups must be of the queries and of the keys, or None, got {got}")
    if margin is not None and not -float("inf") < margin < float("inf"):
        faults.append(f"margin must be finite, got {margin}")
    if faults:
        raise ValueError("mine_hard_negatives: " + "; ".join(faults))
    with torch.no_grad():
        return _op(query, key, ids, key_ids, own, other, k, margin, normalize)


def _fake(query, key, positives, key_ids, query_groups, key_groups, k, margin, normalize):
    return query.new_empty((query.shape[0], k), dtype=torch.int64)


_op = define(
    "mine_hard_negatives(Tensor query, Tensor key, Tensor? positives, Tensor? key_ids, "
    "Tensor? query_groups, Tensor? key_groups, SymInt k, float? margin, bool normalize) -> Tensor indices",
    reference=mine_hard_negatives_fwd,
    fake=_fake,
    flops=lambda query, key, *_, **__: pairwise.flops(query, key),
    setup_context=no_gradients,
    autocast=(),
)

if TRITON:
    from vlmkernels.triton import mine_hard_negatives as _triton

    kernel("mine_hard_negatives", "CUDA", _triton.mine_hard_negatives, "Triton")
