"""Is a mean of paired differences more than chance? A sign-flip test, and a bootstrap interval."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

DRAWS = 100_000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The mean of the differences, its interval, and the p-value of a mean of 0."""

    mean: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p = {self.p:.2g}"


def compare(
    first: Sequence[float], second: Sequence[float], *, draws: int = DRAWS, seed: int = 0
) -> Comparison:
    """`first` minus `second`, of the same subjects in the same order.

    p is the share of random signs of the differences whose mean is at least as far from 0, two-sided, with
    the signs found counted among them: at least 1 / (draws + 1). The interval contains 95 % of the means of
    subjects drawn with replacement. ValueError for sequences of different lengths or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"first and second must pair up, got {len(first)} and {len(second)}")
    differences = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    n, mean = len(differences), differences.mean()
    signs = torch.randint(0, 2, (draws, n), generator=generator, dtype=torch.int8).double() * 2 - 1
    room = 1e-12 * differences.abs().amax()  # equal means may be rounded differently
    extreme = ((signs @ differences / n).abs() >= mean.abs() - room).sum().item()
    drawn = differences[torch.randint(0, n, (draws, n), generator=generator)].mean(1)
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = drawn.quantile(edges).tolist()
    return Comparison(mean.item(), low, high, (1 + extreme) / (1 + draws))
