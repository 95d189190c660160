"""A case: inputs, ours, the baselines, and lower bounds of the costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

OURS = "vlmkernels"
QUICK_SIZE = 192
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Baseline:
    name: str
    make: Callable[[], Callable[..., Tensor]]  # imports it; what it raises becomes the reason in the table
    compiled: bool = False
    matrices: int = 0  # N x M matrices in the features' precision that live at its peak

    def function(self) -> Callable[..., Tensor]:
        return torch.compile(self.make(), dynamic=False) if self.compiled else self.make()


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    dtype: torch.dtype
    sizes: dict[str, int]
    make_inputs: Callable[..., dict[str, Tensor]]  # (device, dtype, **sizes)
    ours: Callable[..., Tensor]
    baselines: tuple[Baseline, ...]
    flops: float  # performed by our kernel, products only
    min_flops: float  # of any algorithm that forms the logits once
    bytes: float  # compulsory: every input read and every result written once
    backward: bool = True
    memory: bool = False
    long: bool = False
    headline: bool = False
    out_shape: tuple[str | int, ...] = field(default=())  # of the result, sizes by name; () for a loss
    runs_with: tuple[str, ...] = ()  # ops whose run includes this case

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    def inputs(self, device: str, *, small: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
        """The tensors, and the gradient of the result (None for a loss); `small` cuts every size to 64."""
        torch.manual_seed(0)
        sizes = {name: min(size, 64) for name, size in self.sizes.items()} if small else self.sizes
        tensors = self.make_inputs(device, self.dtype, **sizes)
        if not self.backward:
            return {name: tensor.detach() for name, tensor in tensors.items()}, None
        if not self.out_shape:
            return tensors, None
        shape = [sizes[size] if isinstance(size, str) else size for size in self.out_shape]
        return tensors, torch.randn(shape, device=device).to(self.dtype)

    def implementations(self) -> Iterator[tuple[str, bool, Callable[[], Callable[..., Tensor]]]]:
        """Name, whether it is compiled, and what makes the function: ours first."""
        yield OURS, False, lambda: self.ours
        for baseline in self.baselines:
            yield baseline.name, baseline.compiled, partial(self._function, baseline)

    def _function(self, baseline: Baseline) -> Callable[..., Tensor]:
        needed = baseline.matrices * self.sizes.get("n", 0) * self.sizes.get("m", 0) * self.dtype.itemsize
        if needed > available_bytes():
            raise MemoryError(
                f"needs about {needed / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} GiB are free"
            )
        return baseline.function()


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def cut(quick: bool, **sizes: int) -> dict[str, int]:
    return {name: min(size, QUICK_SIZE) for name, size in sizes.items()} if quick else sizes


def timed(quick: bool, *baselines: Baseline) -> tuple[Baseline, ...]:
    return tuple(b for b in baselines if not (quick and b.compiled))


def type_name(dtype: torch.dtype) -> str:
    return {F32: "fp32", BF16: "bf16"}[dtype]
