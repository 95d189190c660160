"""The measured rates of a card, of copies and of its library's matrix products, for the predictions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu.timing import Timer, rounds_of, timer_for
from benchmarks.gpu.workload import TYPES, precision

DEPTHS = (512, 1024, 8192)
KINDS = {"half": "bf16", "tf32": "tf32", "fp32": "fp32"}  # of products, and the type of their factors
EDGE, COPIED = 8192, 1 << 32  # rows and columns; bytes
QUICK_EDGE, QUICK_COPIED = 64, 1 << 20


def measure_ceilings(device: str, *, quick: bool, timer: Timer | None = None) -> dict[str, Any]:
    """Bytes/s read and written, FLOP/s by kind and depth. Factors are random: zeros would be faster."""
    timer = timer or timer_for(device)
    edge, copied = (QUICK_EDGE, QUICK_COPIED) if quick else (EDGE, COPIED)

    def seconds(call: Callable[[], Any]) -> float:
        call()
        [taken] = rounds_of({"": call}, timer, seconds=1.0, rounds=(3, 3) if quick else (10, 30)).values()
        return measure.spread(taken)["median"]

    source = torch.ones(copied // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {"copy": copied / seconds(partial(target.copy_, source)), "products": {}}
    for kind, type in KINDS.items():
        with precision(type):
            rates = found["products"][kind] = {}
            for depth in DEPTHS:
                a = torch.randn(edge, depth, device=device).to(TYPES[type])
                b = torch.randn(depth, edge, device=device).to(TYPES[type])
                rates[str(depth)] = 2 * edge**2 * depth / seconds(partial(torch.mm, a, b, out=a @ b))
    return found


def shown(found: dict[str, Any]) -> str:
    parts = [f"copy {found['copy'] / 1e9:.4g} GB/s"]
    for kind, rates in found["products"].items():
        parts.append(
            f"{KINDS[kind]} "
            + ", ".join(f"{rate / 1e12:.4g} TFLOP/s at K={depth}" for depth, rate in rates.items())
        )
    return "; ".join(parts)
