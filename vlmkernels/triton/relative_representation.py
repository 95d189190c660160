"""relative_representation (contract in ops/relative_representation.py).

Rows stay in registers from their largest similarity to their norm, as far as they fit there.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.relative_representation import power_faults, relative_representation_fwd
from vlmkernels.triton import _rows as rows
from vlmkernels.triton import _tiles as tiles

TILE = 2048  # similarities of the rows of a program
HELD = 8192  # similarities of a row that stay in registers
MOST_WHOLE = 2**30  # the powers beyond are as small


@triton.jit
def _above(at, cols, counted, k):
    """Some similarities of the rows, those below 0 as 0; NaN stays."""
    x = tl.load(at + cols[None, :], mask=counted[:, None] & (cols < k)[None, :], other=0.0).to(tl.float32)
    return 0.5 * x + 0.5 * tl.abs(x)


@triton.jit
def _powers(x, top, whole, bits, fraction):
    """(x / top)^(whole + fraction). The logarithm of a GPU is too coarse for more than the fraction."""
    base = tl.where(top > 0.0, x / tl.where(top > 0.0, top, 1.0), x)
    r = tl.exp2(fraction * tl.log2(tl.where(base > 0.0, base, 1.0)))
    r = tl.where(base > 0.0, r, base)
    for bit in range(bits):
        r = tl.where((whole >> bit) % 2 == 1, r * base, r)
        base = base * base
    return r


@triton.jit
def _forward(
    S,  # [n, k]
    OUT,  # [n, k] float32
    stride,
    n,
    k,
    whole,
    bits,  # of whole
    fraction,  # of the power
    LONG: tl.constexpr,  # a row has several blocks
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    counted, rows = rows < n, rows.to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    at = S + rows[:, None] * stride
    x = _above(at, cols, counted, k)
    top = tl.max(x, 1)
    if LONG:
        for first in range(BLOCK_K, k, BLOCK_K):
            top = tl.maximum(top, tl.max(_above(at, first + cols, counted, k), 1))
    top = top[:, None]
    held = _powers(x, top, whole, bits, fraction)
    squares = tl.sum(held * held, 1)
    if LONG:
        for first in range(BLOCK_K, k, BLOCK_K):
            r = _powers(_above(at, first + cols, counted, k), top, whole, bits, fraction)
            squares += tl.sum(r * r, 1)
    norm = tl.sqrt(squares)[:, None]
    norm = tl.where(norm == 0.0, 1.0, norm)
    OUT += rows[:, None] * k
    tl.store(OUT + cols[None, :], held / norm, mask=counted[:, None] & (cols < k)[None, :])
    if LONG:
        for first in range(BLOCK_K, k, BLOCK_K):
            r = _powers(_above(at, first + cols, counted, k), top, whole, bits, fraction)
            inside = counted[:, None] & (first + cols < k)[None, :]
            tl.store(OUT + (first + cols)[None, :], r / norm, mask=inside)


def blocks(k: int) -> dict:
    """Tile and launch for rows of k similarities."""
    block_k = min(tiles.next_power_of_2(k), HELD)
    block_r = max(TILE // block_k, 1)
    return {"BLOCK_R": block_r, "BLOCK_K": block_k} | rows.options(block_r * block_k)


def relative_representation(
    similarities: Tensor,  # [Q, k]
    p: float,
) -> Tensor:  # [Q, k]
    faults = power_faults(p)
    if faults or similarities.dim() != 2 or similarities.dtype == torch.float64 or similarities.numel() == 0:
        return relative_representation_fwd(similarities, p)
    if similarities.stride(1) != 1:
        similarities = similarities.contiguous()
    n, k = similarities.shape
    out = similarities.new_empty((n, k), dtype=torch.float32)
    fraction, whole = math.modf(min(p, MOST_WHOLE))
    form = blocks(k)
    with torch.cuda.device_of(similarities):
        _forward[(tiles.cdiv(n, form["BLOCK_R"]),)](
            similarities, out, similarities.stride(0), n, k, int(whole), int(whole).bit_length(), fraction,
            LONG=k > form["BLOCK_K"], **form,
        )  # fmt: skip
    return out
