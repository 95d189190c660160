"""out = s sum_l (a_l language + b_l visual_l), s = 1 / sqrt(L), and its gradients: one pass each way."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.srau import srau_bwd as reference_bwd
from vlmkernels.reference.srau import srau_fwd
from vlmkernels.triton import _tiles as tiles

TILE = 1024  # elements of one tile, 4 a thread of 8 warps: 16 bytes of float32
WARPS = 8  # of 32 lanes


@triton.jit
def _place(n, depth, MASK, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [BLOCK_R, BLOCK_D] of a program's tile, which elements exist, and which the row mask keeps."""
    col_blocks = tl.cdiv(depth, BLOCK_D)
    rows = tl.program_id(0) // col_blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) % col_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (cols < depth)[None, :]
    kept = inside
    if MASK is not None:
        kept = inside & (tl.load(MASK + rows, mask=rows < n, other=0) != 0)[:, None]
    return rows.to(tl.int64)[:, None] * depth + cols[None, :], inside, kept


@triton.jit
def _weights(logits, tau, rest_of_tau, SIGN: tl.constexpr):
    """sigmoid, its complement, and both with what the threshold cuts set to 0."""
    z = logits.to(tl.float32) * SIGN
    e = tl.exp(tl.where(z < 0, z, 0.0 - z))
    large = 1.0 / (1.0 + e)
    small = e * large
    alpha = tl.where(z < 0, small, large)
    rest = tl.where(z < 0, large, small)
    return alpha, rest, tl.where(alpha <= tau, 0.0, alpha), tl.where(alpha >= rest_of_tau, 0.0, rest)


@triton.jit
def _forward(
    LANGUAGE,  # [n, depth]
    VISUAL,  # [levels, n, depth]
    LOGITS,  # [levels, n, depth]
    MASK,  # [n] uint8 or None
    OUT,  # [n, depth]
    n,
    depth,
    levels,
    level,  # n depth
    tau,
    rest_of_tau,  # 1 - tau
    scale,
    SIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    at, inside, kept = _place(n, depth, MASK, BLOCK_R, BLOCK_D)
    heard = tl.load(LANGUAGE + at, mask=kept, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    at_level = at
    for _ in range(levels):
        seen = tl.load(VISUAL + at_level, mask=kept, other=0.0).to(tl.float32)
        logits = tl.load(LOGITS + at_level, mask=kept, other=0.0)
        _, _, a, b = _weights(logits, tau, rest_of_tau, SIGN)
        total += a * heard + b * seen
        at_level += level
    tl.store(OUT + at, (scale * total).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    DOUT,  # [n, depth]
    LANGUAGE,  # [n, depth]
    VISUAL,  # [levels, n, depth]
    LOGITS,  # [levels, n, depth]
    MASK,  # [n] uint8 or None
    DLANGUAGE,  # [n, depth] or None
    DVISUAL,  # [levels, n, depth] or None
    DLOGITS,  # [levels, n, depth] or None
    n,
    depth,
    levels,
    level,  # n depth
    tau,
    rest_of_tau,  # 1 - tau
    scale,
    SIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    at, inside, kept = _place(n, depth, MASK, BLOCK_R, BLOCK_D)
    g = scale * tl.load(DOUT + at, mask=kept, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    at_level = at
    for _ in range(levels):
        logits = tl.load(LOGITS + at_level, mask=kept, other=0.0)
        alpha, rest, a, b = _weights(logits, tau, rest_of_tau, SIGN)
        total += a
        if DVISUAL is not None:
            tl.store(DVISUAL + at_level, (g * b).to(DVISUAL.dtype.element_ty), mask=inside)
        if DLOGITS is not None:
            heard = tl.load(LANGUAGE + at, mask=kept, other=0.0).to(tl.float32)
            seen = tl.load(VISUAL + at_level, mask=kept, other=0.0).to(tl.float32)
            slope = SIGN * g * (rest * a * heard - alpha * b * seen)
            tl.store(DLOGITS + at_level, slope.to(DLOGITS.dtype.element_ty), mask=inside)
        at_level += level
    if DLANGUAGE is not None:
        tl.store(DLANGUAGE + at, (g * total).to(DLANGUAGE.dtype.element_ty), mask=inside)


def blocks(depth: int) -> dict[str, int | bool]:
    """Tile of the kernels for rows of `depth` elements."""
    block_d = min(tiles.next_power_of_2(depth), TILE)
    warps = WARPS // 2 if torch.version.hip is not None else WARPS  # AMD's have 64 lanes
    return {"BLOCK_R": TILE // block_d, "BLOCK_D": block_d, "num_warps": warps, "enable_fp_fusion": True}


class _Call:
    """Operands and options of both kernels."""

    def __init__(
        self,
        language: Tensor,  # [..., D]
        visual: Tensor,  # [L, ..., D] or [..., D]
        row_mask: Tensor | None,  # [...] bool
        tau: float,
        orientation: str,
    ):
        size, depth = language.numel(), language.shape[-1]
        levels = visual.numel() // size
        self.numbers = size // depth, depth, levels, size, tau, 1 - tau, 1 / math.sqrt(levels)
        self.form = {"SIGN": 1 if orientation == "code" else -1, **blocks(depth)}
        rows, columns = (
            tiles.cdiv(size // depth, self.form["BLOCK_R"]),
            tiles.cdiv(depth, self.form["BLOCK_D"]),
        )
        self.grid = (rows * columns,)
        self.mask = row_mask.contiguous().view(torch.uint8).reshape(-1) if row_mask is not None else None


def srau(
    language: Tensor,  # [..., D]
    visual: Tensor,  # [L, ..., D] or [..., D]
    gate_logits: Tensor,  # as visual
    row_mask: Tensor | None,  # [...] bool
    tau: float,
    orientation: str,
) -> Tensor:  # [..., D]
    tensors = language, visual, gate_logits
    if any(x.dtype == torch.float64 for x in tensors):
        return srau_fwd(language, visual, gate_logits, row_mask, tau, orientation)
    out = language.new_empty(language.shape, dtype=torch.promote_types(language.dtype, visual.dtype))
    if out.numel() == 0:
        return out
    call = _Call(language, visual, row_mask, tau, orientation)
    with torch.cuda.device_of(out):
        _forward[call.grid](*(x.contiguous() for x in tensors), call.mask, out, *call.numbers, **call.form)
    return out


def srau_bwd(
    dout: Tensor,  # [..., D]
    language: Tensor,  # [..., D]
    visual: Tensor,  # [L, ..., D] or [..., D]
    gate_logits: Tensor,  # as visual
    row_mask: Tensor | None,  # [...]
    tau: float,
    orientation: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = dout, language, visual, gate_logits
    if any(x.dtype == torch.float64 for x in tensors):
        return reference_bwd(dout, language, visual, gate_logits, row_mask, tau, orientation, needs)
    dlanguage, dvisual, dlogits = (
        x.new_empty(x.shape if need else 0) for x, need in zip(tensors[1:], needs, strict=True)
    )
    if dout.numel() and any(needs):
        call = _Call(language, visual, row_mask, tau, orientation)
        grads = [
            grad if need else None for grad, need in zip((dlanguage, dvisual, dlogits), needs, strict=True)
        ]
        with torch.cuda.device_of(dout):
            _backward[call.grid](
                *(x.contiguous() for x in tensors), call.mask, *grads, *call.numbers, **call.form
            )
    return dlanguage, dvisual, dlogits
