"""Published figures of cards: what the predictions divide by."""

from __future__ import annotations

import re
from typing import NamedTuple


class Card(NamedTuple):
    """Dense peaks without sparsity, accumulated in float32."""

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

    def peak(self, kind: str) -> float:
        """FLOP/s of products of a kind; "tf32x3" multiplies three times in TF32."""
        tera = {"half": self.half, "tf32": self.tf32, "tf32x3": self.tf32 / 3, "fp32": self.fp32}[kind]
        return tera * 1e12


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
            "H200", "sm_90", "H200", 989.4, 494.7, 66.9, 4800, 132, 1830, 50,
            "NVIDIA H200 SXM datasheet",
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
