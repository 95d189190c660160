"""The order of the samples: a permutation per epoch, cut into joint batches, of which each process takes a part."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset


class BatchPlan:
    """Which samples every step takes on every process: a function of the seed, the epoch and nothing else.

    A joint batch is split over the processes in parts that differ by at most one sample; no sample is repeated and
    none is left out, except that a last batch smaller than the number of processes is dropped.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < world_size:
            raise ValueError(
                f"batch_size must be at least the number of processes {world_size}, got {batch_size}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.rank, self.world_size = rank, world_size
        whole, rest = divmod(size, batch_size)
        self.steps_per_epoch = whole + (0 if drop_last or rest < world_size else 1)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"data: {size} samples give no batch of {batch_size} pairs on {world_size} processes"
                + (" with drop_last" if drop_last else "")
            )

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """The indices of this process's part of each joint batch of an epoch, from batch ``start`` on."""
        generator = torch.Generator().manual_seed(self.seed + (epoch << 32))
        order = torch.randperm(self.size, generator=generator)
        for step in range(start, self.steps_per_epoch):
            joint = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield torch.tensor_split(joint, self.world_size)[self.rank].tolist()


class _Batches:
    """The batch sampler of one epoch, as DataLoader wants it."""

    def __init__(self, plan: BatchPlan, epoch: int, start: int) -> None:
        self.plan, self.epoch, self.start = plan, epoch, start

    def __iter__(self) -> Iterator[list[int]]:
        return self.plan.batches(self.epoch, self.start)

    def __len__(self) -> int:
        return self.plan.steps_per_epoch - self.start


def epoch_loader(
    source: Dataset,
    collate: Callable[[Any], Any],
    plan: BatchPlan,
    epoch: int,
    start: int,
    *,
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Batches of one epoch, from batch ``start`` on."""
    return DataLoader(
        source,
        batch_sampler=_Batches(plan, epoch, start),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        # A generator of its own: the loader's base seed must not come from the generator that dropout draws from.
        generator=torch.Generator().manual_seed(epoch),
    )
