"""Dense layers."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import vlmkernels
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name


def _linear(device: str, dtype: torch.dtype, rows: int, inner: int, width: int) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(rows, inner, device=device),
        "weight": torch.randn(width, inner, device=device) / inner**0.5,
        "bias": torch.randn(width, device=device),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def linear(quick: bool = False) -> list[Case]:
    """A product of 2 rows x inner x width operations forward and two backward."""

    def with_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.gelu(functional.linear(x, weight, bias))

    plain = Baseline("F.linear", lambda: functional.linear)
    gelu = Baseline("F.gelu(F.linear)", lambda: with_gelu)
    peers = {
        "none": (plain, Baseline("torch.compile of F.linear", plain.make, True)),
        "gelu": (gelu, Baseline("torch.compile of F.gelu(F.linear)", gelu.make, True)),
    }
    forms = [
        ("", (8192, 768, 3072), "none", {"memory": True, "headline": True}),
        ("", (8192, 768, 3072), "gelu", {"memory": True}),
        ("", (8192, 3072, 768), "none", {}),
        ("", (1600, 768, 768), "none", {}),
        (", forward only", (8192, 768, 3072), "gelu", {"backward": False}),
        (", forward only", (50, 768, 3072), "gelu", {"backward": False}),
        (", forward only", (1, 768, 3072), "gelu", {"backward": False}),
    ]
    cases = []
    for dtype in (F32, BF16):
        for form, (rows, inner, width), activation, flags in forms:
            act = "" if activation == "none" else f" {activation}"
            sizes = cut(quick, rows=rows, inner=inner, width=width)
            passes = 3 if flags.get("backward", True) else 1
            flops = 2.0 * passes * math.prod(sizes.values())
            kept = act != "" and passes == 3
            moved = _moved(*sizes.values(), passes=passes, kept=kept)
            cases.append(
                Case(
                    op="linear",
                    name=f"[{rows}, {inner}] -> {width}{act}{form} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=_linear,
                    ours=partial(vlmkernels.linear, activation=activation),
                    baselines=timed(quick, *peers[activation]),
                    flops=flops,
                    min_flops=flops,
                    bytes=moved * dtype.itemsize,
                    out_shape=("rows", "width"),
                    **flags,
                )
            )
    return cases


def _moved(rows: int, inner: int, width: int, *, passes: int, kept: bool) -> float:
    """Numbers read and written at least: operands and results of each product, once."""
    forward = rows * (inner + width) + inner * width
    return forward + (passes == 3) * (forward + rows * inner + inner * width) + 2 * kept * rows * width
