"""Shared by the pairwise ops: checks of features and scalars, norms, FLOPs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._native import TILE_COLS, TILE_HEADER, TILE_ROWS


def store_size(query: Tensor, key: Tensor, store_bytes: int) -> int:
    """Bytes of the tiles of exponentials, in the precision of the features, that the forward keeps.

    All of them if they fit in `store_bytes`; else half of it, the other half being for what is recomputed.
    Only CPU kernels keep exponentials: on a GPU recomputing them costs no more than moving them.
    """
    itemsize = 4 if query.dtype == torch.float16 else query.dtype.itemsize  # float16 is widened on the tile
    return kept(query, key, TILE_ROWS * TILE_COLS * itemsize + TILE_HEADER, store_bytes, 2)


def kept(query: Tensor, key: Tensor, tile: int, store_bytes: int, share: int = 1) -> int:
    """Bytes of the tiles, of `tile` bytes each, that a forward on a CPU keeps within `store_bytes`: all, or
    as many as a `share`-th part holds.
    """
    if query.device.type != "cpu":
        return 0
    tiles = ((query.shape[0] + TILE_ROWS - 1) // TILE_ROWS) * ((key.shape[0] + TILE_COLS - 1) // TILE_COLS)
    fit = store_bytes // tile
    return (tiles if tiles <= fit else fit // share) * tile


def flops(query: torch.Size, key: torch.Size, products: int = 1) -> int:
    """FLOPs of the logits of queries [N, D] and keys [M, D], times `products`: one more per gradient."""
    return products * 2 * query.numel() * key[0]


def feature_faults(query: Tensor, key: Tensor, whose: str = "") -> list[str]:
    faults = []
    if query.dim() != 2 or key.dim() != 2 or query.shape[1] != key.shape[1]:
        faults.append(
            f"{whose}query must be [N, D] and {whose}key [M, D], "
            f"got {whose}query {tuple(query.shape)} and {whose}key {tuple(key.shape)}"
        )
    tensors = {f"{whose}query": query, f"{whose}key": key}
    faults += arguments.device_faults(tensors)
    return faults + arguments.dtype_faults(tensors, tensors)


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
    """Features of width 0 as a single zero, since kernels do not support products of width 0."""
    return x if x.shape[1] else x.new_zeros(x.shape[0], 1)


def without_width(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of x from that of `with_width(x)`; no view, so that autograd may add to it in place."""
    return grad if x.shape[1] else grad.new_empty(len(grad), 0)


def inverse_norms(x: Tensor, normalize: bool) -> Tensor | None:
    """1 / max(|x_i|, 1e-12), [rows], in the dtype of the sums."""
    if not normalize:
        return None
    work = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=-1, dtype=work).clamp_min(1e-12).reciprocal()


def label(device: str) -> str:
    """What info() shows for an op composed of the streaming sweeps."""
    return "C++ sweeps" if device == "CPU" else "Triton sweeps"


def unless_float64(place: int, fused: Callable, sweeps: Callable) -> Callable:
    """`fused`, or `sweeps` for float64 in this place: Triton does not multiply it on every GPU."""

    def kernel(*args: Any) -> Any:
        return (sweeps if args[place].dtype == torch.float64 else fused)(*args)

    return kernel
