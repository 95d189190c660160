"""An op at the sizes of a real model on a GPU, and its peers, which are imported when they are called."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases.attention import bounds
from benchmarks.cases.case import BF16, F32, Baseline

FORWARD, TRAINING = "forward", "training"
TYPES = {"bf16": BF16, "fp32": F32, "tf32": F32}
QUICK = 64  # what --quick cuts every size to


@dataclass(frozen=True)
class Workload:
    op: str
    form: str
    type: str  # "bf16", "fp32", or "tf32": float32 whose products may be rounded
    sizes: Mapping[str, int]
    make: Callable[..., dict[str, Tensor]]  # (device, dtype, **sizes)
    ours: Callable[..., Tensor]
    peers: tuple[Baseline, ...]
    mask: str = ""  # of interval_attention
    backward: bool = True
    predicted: bool = True  # not where the numbers decide how large results are

    @property
    def name(self) -> str:
        return f"{self.op}, {self.form}, {self.type}"

    @property
    def directions(self) -> tuple[str, ...]:
        return (FORWARD, TRAINING) if self.backward else (FORWARD,)

    def tensors(self, device: str) -> dict[str, Tensor]:
        """The arguments."""
        torch.manual_seed(0)
        # Without memory nothing is computed either, also where the inputs are made on the host
        with torch.device(device) if device == "meta" else contextlib.nullcontext():
            return self.make(device, TYPES[self.type], **self.sizes)

    def intervals(self) -> tuple[list[int], list[int]] | None:
        """Start and end of each query, which meta tensors do not contain."""
        if not self.mask:
            return None
        start, end = bounds(self.mask, self.sizes["queries"], self.sizes["keys"])
        return start.tolist(), end.tolist()

    def precision(self) -> AbstractContextManager:
        return precision(self.type)


@contextlib.contextmanager
def precision(type: str) -> Iterator[None]:
    """The setting under which workloads of this type run, ours and theirs."""
    matmul = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision(), matmul.fp32_precision
    # Not fp32_precision = "tf32": under it torch.compile refuses to read the older setting
    torch.set_float32_matmul_precision("high" if type == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        matmul.fp32_precision = before[1]


def peer(name: str, make: Callable[[], Callable[..., Tensor]]) -> tuple[Baseline, Baseline]:
    """A peer, eager and compiled."""
    return Baseline(name, make), Baseline(f"torch.compile of {name}", make, True)


def cut(quick: bool, **sizes: int) -> dict[str, int]:
    limits = {"batch": 1, "heads": 2}
    return {k: min(size, limits.get(k, QUICK)) for k, size in sizes.items()} if quick else sizes
