"""values, indices = the k largest <q_i, k_j> of each query, without the matrix."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops._retrieval import SafetensorsSlice, StoredRows, as_rows, no_gradients, shape_faults
from vlmkernels.reference import _retrieval as plain
from vlmkernels.reference._pairwise import features
from vlmkernels.reference.topk_similarity import CANDIDATES, topk_similarity_fwd

RESCORED = 2**22  # features of candidates in memory at a time


@arguments.public
def topk_similarity(
    query: Tensor,  # [Q, D]
    key: Tensor | numpy.ndarray | SafetensorsSlice,  # [M, D]
    k: int,
    *,
    normalize: bool = False,
    return_sorted: bool = True,
    key_scale: Tensor | None = None,  # [M]
    rescore: Tensor | numpy.ndarray | SafetensorsSlice | None = None,  # [M, D]
    both: bool = False,
) -> tuple[Tensor, ...]:
    """The k largest inner products of each query with the keys: exact, streaming, in O(Q k) memory.

    Equal values are in the order of their indices, and of equal ones at the k-th place the lower indices are
    taken; NaN is below every number. Results have no gradient.

    Args:
        query: ``[Q, D]`` of float32, float64, bfloat16 or float16.
        key: ``[M, D]`` of any of these, not necessarily that of the queries, or of int8 with `key_scale`. A
            numpy array (a memmap) or a slice of a safetensors file, ``safe_open(...).get_slice(name)``, is
            read block by block and never held as a whole.
        k: how many, at least 1; of fewer keys all are given, so that the results are ``[Q, min(k, M)]``.
        normalize: divide the features by their L2 norm first, as ``torch.nn.functional.normalize`` does: the
            values are cosines.
        return_sorted: by falling value; otherwise by rising index.
        key_scale: ``[M]`` of int8 keys: key j is ``key_scale[j] * key[j]``. Results are those of the keys so
            dequantised.
        rescore: ``[M, D]``, the full keys, in memory or in a file: the best ``4 k`` by `key` are compared by
            these, and values are theirs. For int8 keys, to give the results of the keys before quantisation.
        both: also the k best queries of each key, from the same products; not with `rescore`.

    Returns:
        ``(values, indices)``, ``[Q, min(k, M)]``, float32 (float64 if the queries or keys are) and int64;
        with `both` ``(values, indices, key_values, key_indices)``, the last two ``[M, min(k, Q)]``. Autocast
        changes nothing.

    Raises:
        ValueError: naming every invalid argument.
    """
    keys, full = as_rows("topk_similarity", "key", key), as_rows("topk_similarity", "rescore", rescore)
    faults = _faults(query, keys, k, key_scale, full, both)
    if faults:
        raise ValueError("topk_similarity: " + "; ".join(faults))
    with torch.no_grad():
        if full is None:
            found = _search(query, keys, key_scale, k, normalize, return_sorted, both)
            return found if both else found[:2]
        _, chosen, *_ = _search(query, keys, key_scale, CANDIDATES * k, normalize, False, False)
        return _rescored(query, full, chosen, k, normalize, return_sorted)


def _faults(query, key, k, key_scale, rescore, both) -> list[str]:
    faults = shape_faults("key", key, query) + plain.key_faults(query, key, key_scale)
    faults += plain.count_faults(k)
    if rescore is not None:
        if tuple(rescore.shape) != tuple(key.shape):
            faults.append(
                f"rescore must have the shape of key, got {tuple(rescore.shape)} and {tuple(key.shape)}"
            )
        if rescore.dtype not in arguments.FLOATS:
            faults.append(f"rescore must be {arguments.FLOATS_LISTED}, got {rescore.dtype}")
        if both:
            faults.append("rescore must be None with both=True")
    tensors = {"query": query, "key": key, "key_scale": key_scale, "rescore": rescore}
    return faults + arguments.device_faults({name: x for name, x in tensors.items() if isinstance(x, Tensor)})


def _search(
    query: Tensor,
    key: Tensor | StoredRows,
    key_scale: Tensor | None,
    k: int,
    normalize: bool,
    return_sorted: bool,
    both: bool,
) -> tuple[Tensor, ...]:
    """The results of the raw op, for keys in a file as well."""
    if isinstance(key, Tensor):
        return _op(query, key, key_scale, k, normalize, return_sorted, both)
    empty = query.new_empty(0, dtype=plain.precision(query, key))
    found = plain.nothing(len(query), empty)
    of_keys: list[plain.Best] = []
    for part, rows in key.blocks(8 * k, query.device):
        scale = None if key_scale is None else key_scale[part]
        values, indices, *columns = _op(query, rows, scale, k, normalize, True, both)
        indices = torch.cat([found[1], indices + part.start], 1)
        found = plain.best(torch.cat([found[0], values], 1), indices, k)
        if both:
            of_keys.append(plain.ordered(tuple(columns), return_sorted))
    found = plain.ordered(found, return_sorted)
    if not both:
        return found
    return *found, *map(torch.cat, zip(*of_keys, strict=True))


def _rescored(
    query: Tensor,
    keys: Tensor | StoredRows,
    chosen: Tensor,  # [Q, C] int64, rising in each row
    k: int,
    normalize: bool,
    return_sorted: bool,
) -> tuple[Tensor, Tensor]:
    """The k best of chosen keys, by their features here."""
    work = plain.precision(query, keys)
    parts: list[plain.Best] = []
    rows = max(1, RESCORED // max(1, chosen.shape[1] * query.shape[1]))
    for some in plain.blocks(len(query), rows):
        own = features(query[some], normalize, work)
        theirs = keys[chosen[some]] if isinstance(keys, Tensor) else keys.take(chosen[some])
        scores = (own[:, None] * features(theirs, normalize, work)).sum(-1)
        parts.append(plain.ordered(plain.best(scores, chosen[some], k), return_sorted))
    values, indices = map(torch.cat, zip(*parts, strict=True))
    return values, indices


def _fake(query, key, key_scale, k, normalize, return_sorted, both):
    work = plain.precision(query, key)
    rows = (query.shape[0], torch.sym_min(k, key.shape[0]))
    cols = (key.shape[0], torch.sym_min(k, query.shape[0])) if both else (0,)
    return tuple(query.new_empty(s, dtype=t) for s in (rows, cols) for t in (work, torch.int64))


_op: Any = define(
    "topk_similarity(Tensor query, Tensor key, Tensor? key_scale, SymInt k, bool normalize, "
    "bool return_sorted, bool both) "
    "-> (Tensor values, Tensor indices, Tensor key_values, Tensor key_indices)",
    reference=topk_similarity_fwd,
    fake=_fake,
    flops=lambda query, key, *_, **__: pairwise.flops(query, key),
    setup_context=no_gradients,
    autocast=(),
)

if TRITON:
    from vlmkernels.triton import topk_similarity as _triton

    kernel("topk_similarity", "CUDA", _triton.topk_similarity, "Triton")
