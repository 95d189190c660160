"""Ops on the residual stream."""

from __future__ import annotations

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


CASES = (gated_residual,)
