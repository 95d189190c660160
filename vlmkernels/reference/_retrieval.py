"""Shared by the references of the retrieval ops: similarities of blocks, and the best of each row.

s_ij = <q_i, c_j k_j>,   q and c k divided by max(|x|, 1e-12) when normalised;  c_j = 1 without scales
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vlmkernels.reference._pairwise import check_features, features

ROWS, COLS = 1024, 8192  # of the similarities that are in memory at a time


def precision(query: Tensor, key: Any) -> torch.dtype:  # anything with a dtype
    """Of the similarities: float32, float64 if a side is."""
    work = torch.promote_types(query.dtype, torch.float32)
    return work if key.dtype == torch.int8 else torch.promote_types(work, key.dtype)


def similarities(query: Tensor, key: Tensor, key_scale: Tensor | None, normalize: bool) -> Tensor:
    """[N, M]"""
    work = precision(query, key)
    keys = key.to(work)
    if key_scale is not None:
        keys = keys * key_scale.to(work)[:, None]
    return features(query, normalize, work) @ features(keys, normalize, work).T


def blocks(count: int, size: int) -> Iterator[slice]:
    """At least one, which may be empty."""
    for start in range(0, max(count, 1), size):
        yield slice(start, min(start + size, count))


Best = tuple[Tensor, Tensor]  # scores [R, C] and indices [R, C]: equal scores by rising index


def nothing(rows: int, scores: Tensor) -> Best:
    return scores.new_empty(rows, 0), scores.new_empty(rows, 0, dtype=torch.int64)


def best(scores: Tensor, indices: Tensor, k: int) -> Best:
    """The k largest of each row by falling score; equal ones stay in order, NaN comes last."""
    order = (-scores).sort(dim=1, stable=True).indices[:, :k]
    return scores.gather(1, order), indices.gather(1, order)


def merged(so_far: Best, scores: Tensor, first: int, k: int) -> Best:
    """With the scores of a block, whose first column has the index `first`."""
    at = torch.arange(first, first + scores.shape[1], device=scores.device).expand(scores.shape)
    return best(torch.cat([so_far[0], scores], 1), torch.cat([so_far[1], at], 1), k)


def ordered(found: Best, by_value: bool) -> Best:
    """As they are, by falling value; or by rising index."""
    if by_value:
        return found
    indices, order = found[1].sort(dim=1)
    return found[0].gather(1, order), indices


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LISTED = "float32, float64, bfloat16 or float16"


def check_keys(op: str, query: Tensor, key: Tensor, key_scale: Tensor | None, k: int) -> None:
    """The raw ops get any tensors."""
    check_features(op, query, key)
    faults = key_faults(query, key, key_scale) + count_faults(k)
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))


def key_faults(query: Tensor, key: Any, key_scale: Tensor | None) -> list[str]:
    """Of dtypes and scales; the keys may be rows of a file."""
    faults = []
    if query.dtype not in FLOATS:
        faults.append(f"query must be {LISTED}, got {query.dtype}")
    if key.dtype not in FLOATS and (key.dtype != torch.int8 or key_scale is None):
        without = " without key_scale" if key_scale is None else ""
        faults.append(f"key must be {LISTED}, or int8 with key_scale, got {key.dtype}{without}")
    if key_scale is None:
        return faults
    if key.dtype in FLOATS:
        faults.append(f"key_scale must be None unless the keys are int8, got {key.dtype} keys")
    if key_scale.dtype not in FLOATS or tuple(key_scale.shape) != tuple(key.shape[:1]):
        faults.append(
            f"key_scale must be {LISTED} of shape {tuple(key.shape[:1])}, "
            f"got {key_scale.dtype} {tuple(key_scale.shape)}"
        )
    return faults


def count_faults(k: int) -> list[str]:
    return [] if 1 <= k < 2**31 else [f"k must be in [1, 2**31), got {k}"]
