"""The order of the samples: joint batches over all processes, as a function of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from vlmkernels.data import TarPairs
from vlmkernels.data.samples import sample_rng


class BatchPlan:
    """The samples of every step on every process, for a data set with numbered samples.

    A permutation per epoch is cut into joint batches, and a joint batch is split over the processes in parts
    that differ by at most one sample. No sample is repeated or omitted, except that a last batch smaller than
    the number of processes is dropped.
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
            need = f"{batch_size}, a batch with drop_last" if drop_last else f"{world_size}, one per process"
            raise ValueError(f"the number of samples in data must be at least {need}, got {size}")

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[int]]:
        """The indices of this process's part of each joint batch of an epoch, from batch ``start`` on."""
        # 32 bits: torch's generator on the CPU ignores the higher ones.
        seed = sample_rng(self.seed, epoch, "order").getrandbits(32)
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed), device="cpu")
        for step in range(start, self.steps_per_epoch):
            joint = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield torch.tensor_split(joint, self.world_size)[self.rank].tolist()

    def load(
        self, source: Any, collate: Callable[[list], Any], epoch: int, start: int, **options: Any
    ) -> Iterator[Any]:
        """This process's batches of an epoch, from batch ``start`` on."""
        source.set_epoch(epoch)
        indices = list(self.batches(epoch, start))
        yield from DataLoader(
            source, batch_sampler=indices, collate_fn=collate, generator=_own_generator(epoch), **options
        )


class StreamPlan:
    """Steps over tars, which are read in their own order, every process its own shards.

    An epoch has ``samples_per_epoch`` samples; each process takes an equal part of it and of every batch.
    """

    def __init__(
        self, samples_per_epoch: int, batch_size: int, *, drop_last: bool = False, world_size: int = 1
    ) -> None:
        if batch_size % world_size:
            raise ValueError(
                f"batch_size must be a multiple of the {world_size} processes for tars, got {batch_size}"
            )
        self.part = batch_size // world_size
        self.samples_per_rank = samples_per_epoch // world_size
        whole, rest = divmod(self.samples_per_rank, self.part)
        self.steps_per_epoch = whole + (0 if drop_last or rest == 0 else 1)
        if self.steps_per_epoch == 0:
            need = f"{batch_size}, a batch with drop_last" if drop_last else f"{world_size}, one per process"
            raise ValueError(f"samples_per_epoch must be at least {need}, got {samples_per_epoch}")

    def load(
        self, source: TarPairs, collate: Callable[[list], Any], epoch: int, start: int, **options: Any
    ) -> Iterator[Any]:
        """This process's batches of an epoch; those before ``start`` are read and dropped."""
        source.set_epoch(epoch)
        samples = iter(DataLoader(source, batch_size=None, generator=_own_generator(epoch), **options))
        for step in range(self.steps_per_epoch):
            batch = list(islice(samples, self.part))
            if step >= start:
                yield collate(batch)


def _own_generator(epoch: int) -> torch.Generator:
    """For the base seed of a loader, which would otherwise come from the generator of dropout."""
    return torch.Generator().manual_seed(epoch)
