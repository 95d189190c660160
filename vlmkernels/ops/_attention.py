"""What the attention ops share: checks of the arguments, the layout of their results."""

from collections.abc import Sequence

import torch
from torch import Tensor


def laid_out(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for [B, heads, T, D] in the order [B, T, heads, D]."""
    b, h, t, d = shape
    return like.new_empty((b, t, h, d)).transpose(1, 2)


def attention_faults(query: Tensor, keys: dict[str, Tensor], values: dict[str, Tensor]) -> list[str]:
    """Faults of a query [B, H, Tq, Dh] with keys [B, Hkv, Tk, Dh] and values [B, Hkv, Tk, Dv]."""
    tensors = {"query": query, **keys, **values}

    def shapes() -> str:  # only when asked for: compiled code cannot print symbolic sizes
        return ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())

    faults = []
    if any(t.dim() != 4 for t in tensors.values()):
        faults.append(f"all must have four dimensions, [batch, heads, tokens, width], got {shapes()}")
    else:
        b, h, _, dh = query.shape
        heads = {t.shape[1] for t in (*keys.values(), *values.values())}
        hkv = next(iter(heads))
        if any(t.shape[0] != b for t in tensors.values()):
            faults.append(f"all must have one batch size, got {shapes()}")
        if any(k.shape[3] != dh for k in keys.values()):
            faults.append(f"query and key must have one width, got {shapes()}")
        if len(heads) > 1 or (h % hkv if hkv else h):
            faults.append(f"the heads of query must be a multiple of those of key and value, got {shapes()}")
        if len({v.shape[3] for v in values.values()}) > 1:
            faults.append(f"values must have one width, got {shapes()}")
        for (name, k), (of, v) in zip(keys.items(), values.items(), strict=True):
            if k.shape[2] != v.shape[2]:
                faults.append(f"{name} and {of} must have as many tokens, got {shapes()}")
    if len({t.device for t in tensors.values()}) > 1:
        devices = ", ".join(f"{name} {t.device}" for name, t in tensors.items())
        faults.append(f"all must be on one device, got {devices}")
    dtypes = ", ".join(f"{name} {t.dtype}" for name, t in tensors.items())
    if not all(t.is_floating_point() for t in tensors.values()):
        faults.append(f"all must be floating point, got {dtypes}")
    elif len({t.dtype for t in tensors.values()}) > 1 and not torch.is_autocast_enabled(query.device.type):
        faults.append(f"all must have one dtype, got {dtypes}")
    return faults


def interval_faults(query: Tensor, start: Tensor, end: Tensor) -> list[str]:
    faults = []
    if query.dim() == 4:
        wanted = [(query.shape[2],), (query.shape[0], query.shape[2])]
        if start.shape != end.shape or tuple(start.shape) not in wanted:
            faults.append(
                f"start and end must both be [Tq] = {wanted[0]} or [B, Tq] = {wanted[1]}, "
                f"got start {tuple(start.shape)} and end {tuple(end.shape)}"
            )
    if start.dtype != end.dtype or start.dtype not in (torch.int32, torch.int64):
        faults.append(f"start and end must both be int32 or int64, got {start.dtype} and {end.dtype}")
    if {start.device, end.device} != {query.device}:
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
    if not bias.is_floating_point() or bias.device != query.device:
        faults.append(
            f"relative_bias must be floating point on {query.device}, got {bias.dtype} on {bias.device}"
        )
    return faults
