"""Features of all processes: an all-gather along the rows with a gradient, for shards of any sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

if dist.is_available():  # by their names since torch 2.13, or those before
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def shard_sizes(rows: int, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """The number of rows of each rank of `group`, in rank order; all ranks call it. Waits for the device."""
    sizes = torch.empty(dist.get_world_size(group), dtype=torch.int64, device=device)
    all_gather(sizes, torch.tensor([rows], device=device), group=group)
    return sizes.tolist()


def all_gather_with_grad(
    x: Tensor,  # [n_rank, ...], the same trailing shape on every rank; n_rank may differ and be 0
    group: dist.ProcessGroup | None = None,
    sizes: list[int] | None = None,
) -> Tensor:
    """The rows of all ranks in rank order, [sum of n_rank, ...].

    The gradient of a rank's rows is the sum over the ranks of what each of them sends back for these rows. If
    every rank's loss is the loss of the joint batch, or the mean over the ranks of the losses is, then after
    the averaging of DistributedDataParallel the gradients are those of one process with the joint batch. All
    ranks of the group must call it, and run backward through it, together.

    `sizes` are the row counts of all ranks (`shard_sizes`), exchanged first when None. ValueError without an
    initialised process group, or if `sizes` does not match this rank.
    """
    check_initialized()
    if sizes is None:
        sizes = shard_sizes(x.shape[0], x.device, group)
    rank = dist.get_rank(group)
    if len(sizes) != dist.get_world_size(group) or sizes[rank] != x.shape[0]:
        raise ValueError(f"sizes must match the {x.shape[0]} rows of rank {rank}, got {sizes}")
    return _AllGather.apply(x, group, sizes)


def check_initialized() -> None:
    """ValueError if there is no default process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("world_size > 1 requires torch.distributed.init_process_group to have been called")


class _AllGather(torch.autograd.Function):
    """Shards are padded to the longest, so that each direction is one collective of equal parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, sizes: list[int]) -> Tensor:
        ctx.group, ctx.sizes, ctx.rank = group, sizes, dist.get_rank(group)
        longest = max(sizes)
        shard = x.new_zeros(longest, *x.shape[1:])
        shard[: x.shape[0]] = x
        gathered = x.new_empty(len(sizes) * longest, *x.shape[1:])
        all_gather(gathered, shard, group=group)
        if min(sizes) == longest:
            return gathered
        return torch.cat([gathered[i * longest : i * longest + size] for i, size in enumerate(sizes)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        longest = max(ctx.sizes)
        padded = grad.contiguous()
        if min(ctx.sizes) != longest:
            padded = grad.new_zeros(len(ctx.sizes) * longest, *grad.shape[1:])
            for i, part in enumerate(grad.split(ctx.sizes)):
                padded[i * longest : i * longest + len(part)] = part
        own = grad.new_empty(longest, *grad.shape[1:])
        reduce_scatter(own, padded, group=ctx.group)
        return own[: ctx.sizes[ctx.rank]], None, None
