"""Ops on the residual stream."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

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


def gated_residual(quick: bool, device: str) -> list[Case]:
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


def _levels(
    device: str, dtype: torch.dtype, batch: int, tokens: int, width: int, levels: int
) -> dict[str, Tensor]:
    shape = (batch, tokens, width)
    shapes = {"language": shape, "visual": (levels, *shape), "gate_logits": (levels, *shape)}
    return {name: torch.randn(x, device=device).to(dtype).requires_grad_() for name, x in shapes.items()}


def levels_bytes(batch: int, tokens: int, width: int, levels: int, *, itemsize: int) -> float:
    """The inputs read, the result written; then the inputs and dout read, three gradients written."""
    read = 1 + 2 * levels
    return batch * tokens * width * itemsize * ((read + 1) + (1 + read + read))


def _eager_tail(language: Tensor, visual: Tensor, gate_logits: Tensor) -> Tensor:
    """As VisualGPT's decoder has it."""
    total = 0
    for seen, logits in zip(visual, gate_logits, strict=True):
        alpha = logits.sigmoid()
        spoken = torch.where(alpha > 0.2, torch.ones_like(alpha), torch.zeros_like(alpha))
        looked = torch.where(alpha < 0.8, torch.ones_like(alpha), torch.zeros_like(alpha))
        total = total + (alpha * spoken * language + (1 - alpha) * looked * seen)
    return total / math.sqrt(len(visual))


def srau(quick: bool, device: str) -> list[Case]:
    """Bound by memory: 6 L + 5 tensors moved."""
    eager = Baseline("the authors' lines", lambda: _eager_tail)
    compiled = Baseline("torch.compile of the authors' lines", eager.make, True)
    plain = Baseline("torch.compile of the reference", lambda: partial(reference.srau, tau=0.2), True)
    cases = []
    for batch, tokens in ((50, 20), (8, 2048)):
        sizes = cut(quick, batch=batch, tokens=tokens, width=768, levels=3)
        for dtype in (F32, BF16):
            case = Case(
                op="srau",
                name=f"3 levels of [{batch}, {tokens}, 768] {type_name(dtype)}",
                dtype=dtype,
                sizes=sizes,
                make_inputs=_levels,
                ours=partial(vlmkernels.srau, tau=0.2),
                baselines=timed(quick, eager, compiled, plain),
                flops=0,
                min_flops=0,
                bytes=levels_bytes(**sizes, itemsize=dtype.itemsize),
                memory=batch == 50,
                headline=batch == 50,
                out_shape=("batch", "tokens", "width"),
            )
            cases.append(case)
    return cases


CASES = (gated_residual, srau)
