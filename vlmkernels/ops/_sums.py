"""Sums whose order does not depend on the number of threads."""

import torch
from torch import Tensor


def total(x: Tensor) -> Tensor:  # [rows] -> scalar
    """The sum in an order that does not depend on the number of threads, unlike torch's of long tensors."""
    part = 2**14
    if len(x) <= part:
        return x.sum()
    return torch.nn.functional.pad(x, (0, -len(x) % part)).reshape(-1, part).sum(1).sum()


def segment_sum(
    x: Tensor,  # [rows, D]
    labels: Tensor,  # [rows]
    counts: Tensor,  # [labels] how often each label occurs
) -> Tensor:  # [labels, D]
    """Sum of the rows of each label, in a fixed order."""
    return torch.segment_reduce(
        x[labels.argsort(stable=True)], "sum", lengths=counts, axis=0, unsafe=True, initial=0
    )
