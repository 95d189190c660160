"""What the contrastive ops share: checks of the arguments, targets, norms."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels.reference.info_nce import check_indices

# One stored tile of the CPU kernel: 128 x 256 exponentials and a header of 64 bytes
# (csrc/include/vlmkernels/info_nce.h).
TILE_ROWS, TILE_COLS, TILE_HEADER = 128, 256, 64


def store_size(query: Tensor, key: Tensor, store_bytes: int) -> int:
    """Bytes of the tiles of exponentials, in the precision of the features, that the forward keeps.

    All of them where they fit in `store_bytes`; else half of it, the other half holding what is made again.
    """
    tiles = ((query.shape[0] + TILE_ROWS - 1) // TILE_ROWS) * ((key.shape[0] + TILE_COLS - 1) // TILE_COLS)
    itemsize = 4 if query.dtype == torch.float16 else query.dtype.itemsize  # float16 is widened on the tile
    tile = TILE_ROWS * TILE_COLS * itemsize + TILE_HEADER
    fit = store_bytes // tile
    return (tiles if tiles <= fit else fit // 2) * tile


def flops(query: torch.Size, key: torch.Size, products: int = 1) -> int:
    """Of the logits of queries [N, D] and keys [M, D], and as much again for each gradient of theirs."""
    return products * 2 * query.numel() * key[0]


def feature_faults(query: Tensor, key: Tensor) -> list[str]:
    faults = []
    if query.dim() != 2 or key.dim() != 2 or query.shape[1] != key.shape[1]:
        faults.append(
            f"query must be [N, D] and key [M, D], got query {tuple(query.shape)} and key {tuple(key.shape)}"
        )
    tensors = {"query": query, "key": key}
    faults += arguments.device_faults(tensors)
    return faults + arguments.dtype_faults(tensors, tensors)


def as_targets(positives: Any) -> tuple[Tensor | None, Tensor | None]:
    """The two forms of `positives`: indices and no ids of the keys, or the ids of queries and of keys."""
    if not isinstance(positives, tuple):
        return positives, None
    query_ids, key_ids = positives
    if query_ids is None or key_ids is None:
        raise TypeError("positives must be indices, or query_ids and key_ids")
    return query_ids, key_ids


def positives_faults(
    query: Tensor, key: Tensor, positives: Tensor | None, key_ids: Tensor | None
) -> list[str]:
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


def scalar_faults(name: str, value: float | Tensor, query: Tensor) -> list[str]:
    if not isinstance(value, Tensor):
        if not arguments.is_number(value):
            raise TypeError(f"{name} must be a number or a tensor")
        return []
    if value.numel() != 1 or value.dtype not in arguments.FLOATS:
        wanted = f"a float or a {arguments.FLOATS_LISTED} tensor with one element"
        return [f"{name} must be {wanted}, got {value.dtype} {tuple(value.shape)}"]
    return arguments.device_faults({"query": query, name: value})


def weight_faults(query: Tensor, weight: Tensor) -> list[str]:
    faults = arguments.device_faults({"query": query, "weight": weight})
    wanted = tuple(query.shape[:1])
    if weight.shape != wanted:
        faults.append(f"weight must be [N] = {wanted}, got {tuple(weight.shape)}")
    if not arguments.known(weight.dtype):
        faults.append(f"weight must be {arguments.FLOATS_LISTED}, or integers, got {weight.dtype}")
    return faults


def as_scalar(op: str, name: str, value: float | Tensor, query: Tensor) -> Tensor:
    """A float as a tensor in the dtype of the sums; a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    work = torch.promote_types(query.dtype, torch.float32)
    try:
        return query.new_full((), value, dtype=work)
    except (OverflowError, RuntimeError):
        raise ValueError(f"{op}: {name} must be in the range of {work}, got {value}")


def with_width(x: Tensor) -> Tensor:
    """Features of width 0 as a single zero: products of no width are not for kernels."""
    return x if x.shape[1] else x.new_zeros(x.shape[0], 1)


def inverse_norms(x: Tensor, normalize: bool) -> Tensor | None:
    """1 / max(|x_i|, 1e-12), [rows], in the dtype of the sums."""
    if not normalize:
        return None
    work = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=work).clamp_min(1e-12).reciprocal()


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


def segment_sum(
    x: Tensor,  # [rows, D]
    labels: Tensor,  # [rows]
    counts: Tensor,  # [labels] how often each label occurs
) -> Tensor:  # [labels, D]
    """Sum of the rows of each label, in a fixed order."""
    return torch.segment_reduce(
        x[labels.argsort(stable=True)], "sum", lengths=counts, axis=0, unsafe=True, initial=0
    )


def total(x: Tensor) -> Tensor:  # [rows] -> scalar
    """The sum in an order that does not depend on the number of threads, by which torch splits long sums."""
    part = 2**14
    if len(x) <= part:
        return x.sum()
    return torch.nn.functional.pad(x, (0, -len(x) % part)).reshape(-1, part).sum(1).sum()


def label(device: str) -> str:
    """What info() shows for an op composed of the streaming sweeps."""
    return "C++ sweeps" if device == "CPU" else "Triton sweeps"
