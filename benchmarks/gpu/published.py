"""What peers publish about their own kernels: their figures on their machines, none of them measured here."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """A time, and the workload that does the same work."""

    peer: str
    op: str
    form: str
    direction: str
    card: str  # the column with which it is compared
    microseconds: float
    on: str  # their hardware and precision
    source: str

    @property
    def type(self) -> str:
        return "bf16"


MEMEFF = "github.com/b0nce/MemoryEfficientCLIP, README, version 0.3.1"
SIGLIP = "pypi.org/project/siglip-kernel, README, version 0.1.2"
FLASH3 = "Shah et al. 2024, arXiv:2407.08608, figure 5, given there as {} TFLOP/s"
FULL = 4 * 16 * 32 * 1024**2 * 64 / 1e6  # FLOPs of the two products over 1e6: over TFLOP/s it is µs

FIGURES = (
    Figure("memeff", "info_nce", "N=65536", "training", "A100", 201e3, "A100, bf16", MEMEFF),
    Figure(
        "memeff with atomics", "info_nce", "N=65536", "training", "A100", 640e3, "A100, bf16", MEMEFF
    ),
    Figure(
        "siglip-kernel", "sigmoid_loss", "N=65536", "training", "H100", 48.8e3, "GH200, bf16", SIGLIP
    ),
    Figure(
        "cuBLAS and eager PyTorch, by siglip-kernel", "sigmoid_loss", "N=65536", "training", "H100", 102e3,
        "GH200, bf16", SIGLIP,
    ),
    *(
        Figure(
            peer, "interval_attention", "full", "forward", "H100", FULL / rate, "H100 SXM5, fp16",
            FLASH3.format(rate),
        )
        for peer, rate in (("FlashAttention-2", 306), ("FlashAttention-3", 392), ("cuDNN", 373))
    ),
)  # fmt: skip


def figures_for(entry: dict) -> list[Figure]:
    """The published figures for the workload of a prediction."""
    key = (entry["op"], entry["form"], entry["type"], entry["direction"])
    return [x for x in FIGURES if (x.op, x.form, x.type, x.direction) == key]
