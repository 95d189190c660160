"""Ops on the residual stream."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

import vlmkernels
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name
from vlmkernels import reference


def _residual(
    device: str, dtype: torch.dtype, batch: int, tokens: int, width: int, *, vector: bool, masked: bool
) -> dict[str, Tensor]:
    shape = (batch, tokens, width)
    tensors = {name: torch.randn(shape, device=device).to(dtype).requires_grad_() for name in ("x", "y")}
    tensors["gate"] = torch.randn(width if vector else 1, device=device).to(dtype).requires_grad_()
    if masked:
        tensors["row_mask"] = torch.rand(shape[:-1], device=device) < 0.5
    return tensors


def residual_bytes(batch: int, tokens: int, width: int, *, itemsize: int, kept: float, masked: bool) -> float:
    """x read, y read where the mask keeps it, the sum written; then dout and y read where kept, dy written.

    dx is dout itself and moves nothing.
    """
    rows = batch * tokens
    return rows * width * itemsize * ((2 + kept) + (2 * kept + 1)) + 2 * rows * masked


def gated_residual(quick: bool = False) -> list[Case]:
    """Bound by memory: no product, six tensors moved."""
    eager = Baseline("x + gate.tanh() * y", lambda: lambda x, y, gate: x + gate.tanh() * y)
    compiled = Baseline("torch.compile of x + gate.tanh() * y", eager.make, True)
    plain = Baseline("reference", lambda: reference.gated_residual)
    plain_compiled = Baseline("torch.compile of the reference", plain.make, True)
    sizes = cut(quick, batch=8, tokens=2048, width=1024)
    cases = []
    for dtype in (F32, BF16):
        for form in ("scalar gate", "vector gate", "scalar gate, half the rows masked"):
            masked = "masked" in form
            kept = 0.5 if masked else 1.0
            case = Case(
                op="gated_residual",
                name=f"[8, 2048, 1024] {form} {type_name(dtype)}",
                dtype=dtype,
                sizes=sizes,
                make_inputs=partial(_residual, vector=form == "vector gate", masked=masked),
                ours=vlmkernels.gated_residual,
                baselines=timed(
                    quick, *((plain, plain_compiled) if masked else (eager, compiled, plain_compiled))
                ),
                flops=0,
                min_flops=0,
                bytes=residual_bytes(**sizes, itemsize=dtype.itemsize, kept=kept, masked=masked),
                memory=form == "scalar gate",
                headline=form == "scalar gate",
                out_shape=("batch", "tokens", "width"),
            )
            cases.append(case)
    return cases


def _linear_residual(
    device: str, dtype: torch.dtype, rows: int, width: int, inner: int, *, vector: bool, masked: bool
) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(rows, width, device=device),
        "h": torch.randn(rows, inner, device=device),
        "weight": torch.randn(width, inner, device=device) / inner**0.5,
        "gate": torch.randn(width if vector else 1, device=device),
    }
    tensors = {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    if masked:
        tensors["row_mask"] = torch.rand(rows, device=device) < 0.5
    return tensors


def gated_linear_residual(quick: bool = False) -> list[Case]:
    """A product of 2 rows x width x inner operations forward and two backward."""

    def composed(
        x: Tensor, h: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None = None
    ) -> Tensor:
        return vlmkernels.gated_residual(x, linear(h, weight), gate, row_mask=row_mask)

    def plain(x: Tensor, h: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return x + gate.tanh() * linear(h, weight)

    fused = Baseline("F.linear, then gated_residual", lambda: composed)
    eager = Baseline("x + gate.tanh() * F.linear(h, weight)", lambda: plain)
    compiled = Baseline("torch.compile of x + gate.tanh() * F.linear(h, weight)", eager.make, True)
    attention, feed_forward = (4096, 1024, 512), (2048, 1024, 4096)
    forms = [
        ("attention output", attention, {"memory": True, "headline": True}),
        ("attention output, vector gate", attention, {}),
        ("attention output, half the rows masked", attention, {}),
        ("attention output, forward only", attention, {"backward": False}),
        ("feed-forward", feed_forward, {}),
        ("16 rows, forward only", (16, 1024, 512), {"backward": False}),
        ("1 row, forward only", (1, 1024, 512), {"backward": False}),
    ]
    cases = []
    for dtype in (F32, BF16):
        for form, (rows, width, inner), flags in forms:
            name = f"{form} [{rows}, {inner}] -> {width} {type_name(dtype)}"
            sizes = cut(quick, rows=rows, width=width, inner=inner)
            masked, backward = "masked" in form, flags.get("backward", True)
            rows, width, inner = sizes.values()
            kept = rows * (0.5 if masked else 1.0)
            flops = 2.0 * kept * width * inner * (3 if backward else 1)
            moved = rows * width * 2 + kept * inner + width * inner
            if backward:
                moved += kept * (width + inner) + rows * inner + 2 * width * inner
            cases.append(
                Case(
                    op="gated_linear_residual",
                    name=name,
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=partial(_linear_residual, vector="vector" in form, masked=masked),
                    ours=vlmkernels.gated_linear_residual,
                    baselines=timed(quick, *((fused,) if masked else (fused, eager, compiled))),
                    flops=flops,
                    min_flops=flops,
                    bytes=moved * dtype.itemsize,
                    out_shape=("rows", "width"),
                    **flags,
                )
            )
    return cases
