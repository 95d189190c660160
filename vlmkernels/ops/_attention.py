"""Shared by the attention ops: checks of the arguments, FLOPs."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels import _providers
from vlmkernels.intervals import Bounds, Intervals
from vlmkernels.reference._attention import empty_heads_merged

# Whether a known mask is causal, and where its segments end (None without segments); None for other masks
KnownMask = tuple[bool | None, Tensor | None, Tensor | None]


def flops(query: torch.Size, keys: int, dv: int) -> int:
    """FLOPs of the products of a query [B, H, Tq, Dh] with `keys` keys [.., Dh] and values [.., Dv]."""
    return 2 * query[:-1].numel() * keys * (query[-1] + dv)


def flops_bwd(
    query: torch.Size,
    keys: int,
    dv: int,
    *,
    need_query: bool,
    need_key: bool,
    need_value: bool,
    need_logits: bool,
) -> int:
    """FLOPs of the recomputed logits and of the gradients that are needed."""
    width = query[-1] * (1 + need_query + need_key) + dv * (need_value + need_logits)
    return 2 * query[:-1].numel() * keys * width


def empty_grads(tensors: Iterable[Tensor], needs: Iterable[bool]) -> tuple[Tensor, ...]:
    """Memory for gradients in the layout of the results; one that is not needed has size 0."""
    return tuple(
        empty_heads_merged(t, t.shape) if need else t.new_empty(0)
        for t, need in zip(tensors, needs, strict=True)
    )


def attention_faults(query: Tensor, keys: dict[str, Tensor], values: dict[str, Tensor]) -> list[str]:
    """Errors of a query [B, H, Tq, Dh] with keys [B, Hkv, Tk, Dh] and values [B, Hkv, Tk, Dv]."""
    tensors = {"query": query, **keys, **values}

    def got() -> str:
        return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())

    faults = []
    if any(t.dim() != 4 for t in tensors.values()):
        faults.append(f"all must have four dimensions, [batch, heads, tokens, width], got {got()}")
    else:
        (b, h, _, dh), *key_shapes = (t.shape for t in (query, *keys.values()))
        value_shapes = [v.shape for v in values.values()]
        hkv, dv = key_shapes[0][1], value_shapes[0][3]
        others = (*key_shapes, *value_shapes)
        if any(shape[0] != b for shape in others):
            faults.append(f"all must have the same batch size, got {got()}")
        if any(shape[3] != dh for shape in key_shapes):
            faults.append(f"query and key must have the same width, got {got()}")
        if any(shape[1] != hkv for shape in others) or (h % hkv if hkv else h):
            faults.append(f"the heads of query must be a multiple of those of key and value, got {got()}")
        if any(shape[3] != dv for shape in value_shapes):
            faults.append(f"values must have the same width, got {got()}")
        for name, of, k, v in zip(keys, values, key_shapes, value_shapes, strict=True):
            if k[2] != v[2]:
                faults.append(f"{name} and {of} must have the same number of tokens, got {got()}")
    faults += arguments.device_faults(tensors)
    return faults + arguments.dtype_faults(tensors, tensors)


def scale_of(scale: float | None, query: Tensor) -> float:
    """The scale, 1 / sqrt(Dh) unless given."""
    if scale is None:
        width = query.shape[-1]
        width = int(width) if torch.jit.is_tracing() else width  # a tensor of float32 would be recorded
        return max(width, 1) ** -0.5
    if not arguments.is_number(scale):  # float() takes tensors, whose gradient would be lost
        raise TypeError("scale must be a number")
    return float(scale)


def bounds_of(start: Bounds | Tensor, end: Tensor | None) -> tuple[Any, list[str]]:
    """(start, end), also where the first is both, and errors."""
    if isinstance(start, Tensor):
        return (start, end), [] if end is not None else ["end must be a tensor as start is, got None"]
    first, last = start
    return (first, last), [] if end is None else ["end must be None where start is both, got a tensor"]


def known_mask(intervals: Bounds | Tensor, query: Tensor, key: Tensor) -> KnownMask:
    """What other libraries may know as a mask of theirs, on CUDA, where they may be called."""
    if not isinstance(intervals, Intervals) or not _providers.may_run_on(query) or torch.jit.is_tracing():
        return None, None, None  # a trace would keep the answer for other sizes
    given, queries, keys = intervals.given, query.shape[2], key.shape[2]
    if intervals.made_by == "full" and given["keys"] >= keys:
        return False, None, None
    if intervals.made_by == "causal" and given["offset"] == keys - queries:
        return True, None, None
    if intervals.ends is not None:
        if intervals.made_by == "packed" and query.shape[0] == 1 and queries == keys:
            return bool(given["causal"]), *intervals.ends
        if intervals.made_by == "media" and keys == given["num_media"] * given["tokens_per_media"]:
            return False, *intervals.ends
    return None, None, None


def interval_faults(query: Tensor, start: Tensor, end: Tensor) -> list[str]:
    faults = []
    if query.dim() == 4:
        b, tq = query.shape[0], query.shape[2]
        wanted = (tq,) if start.dim() == 1 else (b, tq)
        if start.shape != wanted or end.shape != wanted:
            faults.append(
                f"start and end must both be [Tq] = {(tq,)} or [B, Tq] = {(b, tq)}, "
                f"got start {tuple(start.shape)} and end {tuple(end.shape)}"
            )
    if start.dtype != end.dtype or start.dtype not in (torch.int32, torch.int64):
        faults.append(f"start and end must both be int32 or int64, got {start.dtype} and {end.dtype}")
    if start.device != query.device or end.device != query.device:
        faults.append(f"start and end must be on {query.device}, got {start.device} and {end.device}")
    return faults


def bias_faults(query: Tensor, bias: Tensor | None, grid: tuple[int, int] | None) -> list[str]:
    if bias is None:
        return [] if grid is None else [f"grid {grid} needs relative_bias"]
    if grid is None or len(grid) != 2 or min(grid) < 1:
        return [f"relative_bias needs grid = (rows, columns), each at least 1, got {grid}"]
    faults = []
    wanted = (query.shape[1] if query.dim() == 4 else -1, 2 * grid[0] - 1, 2 * grid[1] - 1)
    if tuple(bias.shape) != wanted:
        faults.append(f"relative_bias must be [H, 2R-1, 2C-1] = {wanted}, got {tuple(bias.shape)}")
    faults += arguments.dtype_faults({"relative_bias": bias})
    return faults + arguments.device_faults({"query": query, "relative_bias": bias})
