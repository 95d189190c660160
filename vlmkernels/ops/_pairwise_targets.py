"""Which keys are the positives of which queries: indices of keys, or ids of queries and keys."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels.reference._pairwise import check_indices


def as_targets(positives: Any) -> tuple[Tensor | None, Tensor | None]:
    """The two forms of `positives`: indices and None, or the ids of queries and of keys."""
    if not isinstance(positives, tuple):
        return positives, None
    query_ids, key_ids = positives
    if query_ids is None or key_ids is None:
        raise TypeError("positives must be indices, or query_ids and key_ids")
    return query_ids, key_ids


def positives_faults(
    query: Tensor, key: Tensor, positives: Tensor | None, key_ids: Tensor | None
) -> list[str]:
    if positives is None:
        return []
    faults = []
    named = [
        ("positives" if key_ids is None else "positives[0]", positives, query),
        ("positives[1]", key_ids, key),
    ]
    for name, ids, features in named:
        if ids is None or features.dim() != 2:
            continue
        if ids.shape != features.shape[:1] or ids.dtype != torch.int64 or ids.device != features.device:
            faults.append(
                f"{name} must be int64 of shape ({features.shape[0]},) on {features.device}, "
                f"got {ids.dtype} {tuple(ids.shape)} on {ids.device}"
            )
    return faults


def checked_indices(op: str, positives: Tensor, m: int) -> Tensor:
    """Indices of the positives with -1 for rows without one; anything else outside [0, M) is an error."""
    check_indices(op, positives, m)
    return torch.where(positives == -100, -1, positives)


def group_labels(query_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Equal ids as equal labels in [0, N + M), without a host synchronisation: ([N], [M])."""
    ids = torch.cat([query_ids, key_ids])
    ordered, order = ids.sort()
    step = torch.zeros_like(ids)
    step[1:] = ordered[1:] != ordered[:-1]
    labels = torch.empty_like(ids).scatter_(0, order, step.cumsum(0))
    return labels[: len(query_ids)], labels[len(query_ids) :]
