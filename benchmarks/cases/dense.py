"""Dense layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

import vlmkernels
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name


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


def gated_linear_residual(quick: bool, device: str) -> list[Case]:
    """A product of 2 rows x width x inner operations forward and two backward."""

    def composed(
        x: Tensor, h: Tensor, weight: Tensor, gate: Tensor, row_mask: Tensor | None = None
    ) -> Tensor:
        return vlmkernels.gated_residual(x, functional.linear(h, weight), gate, row_mask=row_mask)

    def plain(x: Tensor, h: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        return x + gate.tanh() * functional.linear(h, weight)

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


def _linear(device: str, dtype: torch.dtype, rows: int, inner: int, width: int) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(rows, inner, device=device),
        "weight": torch.randn(width, inner, device=device) / inner**0.5,
        "bias": torch.randn(width, device=device),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def linear(quick: bool, device: str) -> list[Case]:
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


def _mlp(device: str, dtype: torch.dtype, rows: int, inner: int, width: int) -> dict[str, Tensor]:
    tensors = {
        "x": torch.randn(rows, inner, device=device),
        "w1": torch.randn(width, inner, device=device) / inner**0.5,
        "b1": torch.randn(width, device=device),
        "w2": torch.randn(inner, width, device=device) / width**0.5,
        "b2": torch.randn(inner, device=device),
    }
    return {name: tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}


def _gated(device: str, dtype: torch.dtype, rows: int, inner: int, width: int) -> dict[str, Tensor]:
    tensors = _mlp(device, dtype, rows, inner, width)
    up = (torch.randn(width, inner, device=device) / inner**0.5).to(dtype).requires_grad_()
    return {"x": tensors["x"], "w_gate": tensors["w1"], "w_up": up, "w_down": tensors["w2"]}


SIZES = [
    ("", (8192, 768, 3072), {"memory": True, "headline": True}),
    ("", (1600, 768, 3072), {}),
    (", forward only", (8192, 768, 3072), {"backward": False, "memory": True}),
    (", forward only", (50, 768, 3072), {"backward": False}),
    (", forward only", (1, 768, 3072), {"backward": False}),
]


def mlp(quick: bool, device: str) -> list[Case]:
    """Two products of 2 rows x inner x width operations forward and four backward."""

    def functions(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return functional.linear(functional.gelu(functional.linear(x, w1, b1)), w2, b2)

    module = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.GELU(), torch.nn.Linear(1, 1))
    names = {"w1": "0.weight", "b1": "0.bias", "w2": "2.weight", "b2": "2.bias"}

    def sequential(x: Tensor, **weights: Tensor) -> Tensor:
        parameters = {names[name]: weight for name, weight in weights.items()}
        return torch.func.functional_call(module, parameters, (x,))

    peers = (
        Baseline("nn.Sequential(Linear, GELU, Linear)", lambda: sequential),
        Baseline("torch.compile of F.linear, F.gelu, F.linear", lambda: functions, True),
    )
    ours = partial(vlmkernels.mlp, activation="gelu")
    return _feed_forward("mlp", quick, _mlp, ours, peers, products=2)


def gated_mlp(quick: bool, device: str) -> list[Case]:
    """Three products of 2 rows x inner x width operations forward and six backward."""

    def plain(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        gate, up = functional.linear(x, w_gate), functional.linear(x, w_up)
        return functional.linear(functional.silu(gate) * up, w_down)

    name = "F.linear(F.silu(F.linear) * F.linear)"
    peers = (Baseline(name, lambda: plain), Baseline(f"torch.compile of {name}", lambda: plain, True))
    return _feed_forward("gated_mlp", quick, _gated, vlmkernels.gated_mlp, peers, products=3)


def _feed_forward(
    op: str,
    quick: bool,
    make: Callable[..., dict[str, Tensor]],
    ours: Callable[..., Tensor],
    peers: tuple[Baseline, ...],
    *,
    products: int,
) -> list[Case]:
    cases = []
    for dtype in (F32, BF16):
        for form, (rows, inner, width), flags in SIZES:
            sizes = cut(quick, rows=rows, inner=inner, width=width)
            passes = 3 if flags.get("backward", True) else 1
            flops = 2.0 * products * passes * math.prod(sizes.values())
            kept = products - 1 if passes == 3 else 0
            n, d, h = sizes.values()
            moved = (2 * n * d + products * d * h) * (1 if passes == 1 else 2) + 2 * kept * n * h
            moved += (passes == 3) * products * d * h
            cases.append(
                Case(
                    op=op,
                    name=f"[{rows}, {inner}] -> {width} -> {inner}{form} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=make,
                    ours=ours,
                    baselines=timed(quick, *peers),
                    flops=flops,
                    min_flops=flops,
                    bytes=float(moved * dtype.itemsize),
                    out_shape=("rows", "inner"),
                    **flags,
                )
            )
    return cases


def _moved(rows: int, inner: int, width: int, *, passes: int, kept: bool) -> float:
    """The minimum of elements read and written: operands and results of each product, once."""
    forward = rows * (inner + width) + inner * width
    return forward + (passes == 3) * (forward + rows * inner + inner * width) + 2 * kept * rows * width


CASES = (gated_linear_residual, linear, mlp, gated_mlp)
