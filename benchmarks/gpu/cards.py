"""Published rates of cards, from which the predictions follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class Card(NamedTuple):
    """Dense rates without sparsity, accumulated in float32: published, or ceilings that were measured."""

    name: str
    target: str  # what its kernels are compiled for
    device: str  # in the name that the driver gives it
    half: float  # TFLOP/s of bfloat16 and float16 on tensor cores
    tf32: float  # TFLOP/s
    fp32: float  # TFLOP/s outside the tensor cores
    bandwidth: float  # GB/s of the memory
    multiprocessors: int
    clock: float  # MHz to which the peak of the tensor cores belongs
    cache: int  # MiB, the last before the memory
    source: str
    ceilings: Mapping[str, Mapping[int, float]] = {}  # FLOP/s of a kind of products, by their depth

    def peak(self, kind: str, depth: int = 0) -> float:
        """FLOP/s of products of a kind; "tf32x3" multiplies three times in TF32.

        Products of a library (of a `depth`) reach what was measured at that depth or the next smaller one;
        those within a kernel, which stores no result of them, reach no more than the best.
        """
        if kind == "tf32x3":
            return self.peak("tf32", depth) / 3
        if kind not in self.ceilings:
            return {"half": self.half, "tf32": self.tf32, "fp32": self.fp32}[kind] * 1e12
        rates = self.ceilings[kind]
        if not depth:
            return max(rates.values())
        return rates[max((d for d in rates if d <= depth), default=min(rates))]

    def measured(self, ceilings: Mapping[str, Any]) -> Card:
        """The card at the rates that `measure_ceilings` found on one."""
        found = {kind: {int(d): x for d, x in rates.items()} for kind, rates in ceilings["products"].items()}
        return self._replace(bandwidth=ceilings["copy"] / 1e9, ceilings=found)


CARDS = {
    card.name: card
    for card in (
        Card(
            "A100", "sm_80", "A100-SXM4-80GB", 312, 156, 19.5, 2039, 108, 1410, 40,
            "NVIDIA A100 80GB SXM datasheet; A100 architecture whitepaper",
        ),
        Card(
            "H100", "sm_90", "H100 80GB HBM3", 989.4, 494.7, 66.9, 3352, 132, 1830, 50,
            "NVIDIA H100 SXM5: H100 architecture whitepaper, datasheet",
        ),
        Card(
            "H200", "sm_90", "H200", 989.4, 494.7, 66.9, 4800, 132, 1830, 60,
            "NVIDIA H200 SXM datasheet; the cache as the driver gives it",
        ),
        Card(
            "B200", "sm_100", "B200", 2250, 1100, 80, 8000, 148, 1860, 126,
            "NVIDIA Blackwell architecture technical brief, HGX B200",
        ),
        Card(
            "RTX 5090", "sm_120", "RTX 5090", 209.5, 104.8, 104.8, 1792, 170, 2407, 96,
            "NVIDIA RTX Blackwell GPU architecture whitepaper",
        ),
        Card(
            "MI300X", "gfx942", "MI300X", 1307.4, 653.7, 163.4, 5300, 304, 2100, 256,
            "AMD Instinct MI300X datasheet; CDNA 3 whitepaper; the cache is Infinity Cache",
        ),
    )
}  # fmt: skip


def card_of(device_name: str) -> Card | None:
    """The card behind the name of a device, None for one that is not listed."""
    return next((c for c in CARDS.values() if re.search(rf"\b{c.device}\b", device_name)), None)
