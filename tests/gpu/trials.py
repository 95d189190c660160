"""A trial: inputs of a launcher, its launches, and the verdict of float64 on what they gave.

`check(trial, executor)` launches inside `executor()`, a context manager that takes the launches: the
interpreter under its sanitizer, the simulator of the compiled code.
"""

import itertools
import mmap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor

from vlmkernels.testing import assert_as_good

from .interpreter import interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Executor = Callable[[], AbstractContextManager]


def grid(*axes: Sequence) -> list[tuple]:
    """Every combination."""
    return list(itertools.product(*axes))


class Trial(Protocol):
    def launch(self) -> Sequence[Tensor]:
        """What the launchers return; the inputs stay as they are."""

    def judge(self, got: Sequence[Tensor]) -> None:
        """Raises AssertionError where a result is wrong."""


def sanitized() -> AbstractContextManager:
    return interpreting(sanitize=True)


def check(trial: Trial, executor: Executor = sanitized) -> Sequence[Tensor]:
    with executor():
        got = trial.launch()
    trial.judge(got)
    return got


def strided(x: Tensor) -> Tensor:
    """The values of x [rows, width] in rows further apart than they are wide."""
    return x.new_full((x.shape[0], x.shape[1] + 7), float("nan"))[:, 3:-4].copy_(x)


def far(x: Tensor) -> Tensor:
    """The values of x [rows, width] in rows 2^30 elements apart, so that a third one lies beyond 32 bits.

    Of the memory between them nothing is ever touched, so it takes up none.
    """
    stride, noreserve = 1 << 30, getattr(mmap, "MAP_NORESERVE", 0x4000)
    size = ((len(x) - 1) * stride + x.shape[1]) * x.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve)
    rows = torch.frombuffer(memory, dtype=x.dtype).as_strided(x.shape, (stride, 1))
    return rows.copy_(x)


def widened(tensors: Sequence, work: torch.dtype) -> list:
    """Floating-point tensors in the dtype `work`, everything else as it is."""
    return [x.to(work) if isinstance(x, Tensor) and x.is_floating_point() else x for x in tensors]


def judge(names, got, low, exact, needs=None, cap=None) -> None:
    """Each result is as good as PyTorch's; what is not needed has size 0.

    With `cap`, a bound on the relative Frobenius error takes the place of PyTorch's error: for results of
    products whose factors are rounded on the way.
    """
    needs = [True] * len(got) if needs is None else needs
    for name, value, lower, truth, need in zip(names, got, low, exact, needs, strict=True):
        if not need:
            assert value.numel() == 0, name
        elif cap is None:
            assert_as_good(value, lower, truth, name=name)
        else:
            assert (value.shape, value.dtype) == (truth.shape, lower.dtype), name
            error, largest = (value.double() - truth).norm(), truth.norm()
            assert error <= cap * largest + 1e-30, f"{name}: error {error:.3e} of {largest:.3e}"
