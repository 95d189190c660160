"""The k nearest of features in several blocks, by cosine: exact, approximate, and of all ranks."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import vlmkernels
from vlmkernels.distributed import all_gather_with_grad, shard_sizes

Nearest = tuple[
    Tensor, Tensor
]  # cosines [Q, min(k, n)] float32, the largest first, and which they are, int64


def exact(
    x: Tensor,  # [Q, D]
    blocks: Sequence[Tensor],  # [n_i, D] each
    k: int,
) -> Nearest:
    """Block by block. Of equal cosines the lower index comes first."""
    found = []
    for block, start in zip(blocks, _starts(blocks), strict=False):
        values, indices = vlmkernels.topk_similarity(x.to(block.device), block, k, normalize=True)
        found.append((values, indices + start))
    return merged(found, k) if found else nothing(x)


def merged(found: Sequence[Nearest], k: int) -> Nearest:
    """The k nearest of several results, each with higher indices than those before it."""
    values, indices = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return values.gather(1, order), indices.gather(1, order)


def nothing(x: Tensor) -> Nearest:
    return x.new_zeros(len(x), 0, dtype=torch.float32), x.new_zeros(len(x), 0, dtype=torch.int64)


def ascending(values: Tensor, indices: Tensor) -> Nearest:
    """In the order of the indices."""
    indices, order = indices.sort(dim=1)
    return values.gather(1, order), indices


def first_of_rank(count: int, group: dist.ProcessGroup) -> int:
    """The number of the first row of this rank if those of all are numbered in the order of the ranks."""
    return sum(shard_sizes(count, _device(group), group)[: dist.get_rank(group)])


def of_all_ranks(
    values: Tensor,  # [Q, min(k, n_rank)]
    indices: Tensor,  # [Q, min(k, n_rank)]
    count: int,
    k: int,
    group: dist.ProcessGroup,
) -> Nearest:
    """The k nearest of the rows of all ranks, from those of each; n_rank is its `count`."""
    device = _device(group)
    sizes = shard_sizes(count, device, group)
    first = sum(sizes[: dist.get_rank(group)])
    # Columns of all ranks as rows, of which their numbers may differ.
    parts = [
        all_gather_with_grad(part.T.contiguous().to(device), group, [min(k, size) for size in sizes])
        for part in (values, indices + first)
    ]
    return merged([(parts[0].T.to(values), parts[1].T.to(indices))], k)


def _device(group: dist.ProcessGroup) -> torch.device:
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")


def _starts(blocks: Sequence[Tensor]) -> list[int]:
    return list(itertools.accumulate((len(block) for block in blocks), initial=0))


class Faiss:
    """Approximate: an inverted file of faiss over all blocks, made again when these are others.

    It looks at the lists that have `PER_RESULT` candidates for each result on average, and at the whole of a
    small set. Some of the nearest may be missing; farther ones are then in their place.
    """

    PER_RESULT, LEAST_LISTS = 8, 16
    ROWS_PER_LIST = 39  # with fewer faiss warns that its clusters are poor

    def __init__(self) -> None:
        try:
            self._faiss = importlib.import_module("faiss")
        except ImportError as error:
            raise ModuleNotFoundError(
                f"faiss cannot be imported ({error}): pip install faiss-cpu", name="faiss"
            ) from error
        self._blocks: list[Tensor] = []
        self._index: Any = None

    def __call__(self, x: Tensor, blocks: Sequence[Tensor], k: int) -> Nearest:
        count = sum(len(block) for block in blocks)
        if count == 0:
            return nothing(x)
        if len(blocks) != len(self._blocks) or any(
            a is not b for a, b in zip(blocks, self._blocks, strict=True)
        ):
            self._blocks, self._index = list(blocks), self._made(blocks, count)
        k = min(k, count)
        lists = math.ceil(self.PER_RESULT * k * self._index.nlist / count)
        self._index.nprobe = min(self._index.nlist, max(self.LEAST_LISTS, lists))
        values, indices = map(torch.from_numpy, self._index.search(_unit_rows(x), k))
        absent = indices < 0  # the lists had fewer than k
        numbers = torch.arange(ABSENT, ABSENT + k).expand_as(indices)
        return values.masked_fill(absent, 0.0), numbers.where(absent, indices)

    def _made(self, blocks: Sequence[Tensor], count: int) -> Any:
        lists = max(1, min(round(4 * math.sqrt(count)), count // self.ROWS_PER_LIST))
        width = blocks[0].shape[1]
        index = self._faiss.index_factory(width, f"IVF{lists},Flat", self._faiss.METRIC_INNER_PRODUCT)
        # Clusters of a sample that is spread over all blocks; more than 256 rows each change nothing.
        step = max(1, count // (256 * lists))
        index.train(_unit_rows(torch.cat([block[::step] for block in blocks])))
        for block in blocks:
            index.add(_unit_rows(block))
        return index


ABSENT = 2**62  # numbers from here on are of no anchor
SEARCHES: dict[str, Callable[[], Callable[[Tensor, Sequence[Tensor], int], Nearest]]] = {
    "exact": lambda: exact,
    "faiss": Faiss,
}


def _unit_rows(x: Tensor) -> Any:
    return F.normalize(x.float(), dim=1).cpu().numpy()
