"""Random sizes, dtypes and tensors for the arguments of a call."""

import random
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 1, 2, 3, 4, 5, 8, 13, 16, 17, 31, 32, 33, 64, 65, 100, 130, 257)
SMALL = (1, 1, 2, 3, 4)


def work(dtype: torch.dtype) -> torch.dtype:
    """Of sums and statistics."""
    return torch.promote_types(dtype, torch.float32)


class Draw(random.Random):
    """What a seed draws; the values of tensors come from the same seed."""

    def __init__(self, seed: int):
        super().__init__(seed)
        torch.manual_seed(seed)

    def size(self, *, zero: bool = True) -> int:
        return 0 if zero and self.random() < 0.05 else self.choice(SIZES)

    def small(self) -> int:
        return self.choice(SMALL)

    def lead(self) -> tuple[int, ...]:
        return tuple(self.small() for _ in range(self.randrange(3)))

    def dtype(self) -> torch.dtype:
        return self.choice(FLOATS)

    def flag(self) -> bool:
        return self.random() < 0.5

    def maybe(self, value: Any) -> Any:
        return value if self.flag() else None

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape).to(dtype or self.dtype())

    def scalar(self, dtype: torch.dtype | None = None) -> Tensor:
        shape = self.choice(((), (1,), (1, 1)))
        return torch.full(shape, self.choice((0.0, 1.0, -3.0, 20.0)), dtype=dtype or self.dtype())

    def gate(self, d: int) -> Tensor:
        return self.floats(*self.choice(((), (1,), (d,), (1, d))))

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(shape) < 0.7

    def ids(self, count: int, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(0, max(high, 1), (count,), dtype=dtype)

    def needs(self, count: int) -> list[bool]:
        return [self.flag() for _ in range(count)]


def targets(draw: Draw, query: Tensor, key: Tensor) -> list[Tensor | None]:
    """positives and key_ids."""
    if draw.flag():
        return [draw.ids(len(query), 5), draw.ids(len(key), 5)]
    indices = draw.ids(len(query), len(key))
    return [draw.maybe(torch.where(torch.rand(len(query)) < 0.8, indices, -100)), None]
