"""out = x + t y;  dy = t dout,  dgate = (1 - t^2) sum(dout y),  t = tanh(gate): one pass each way."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.gated_residual import gated_residual_bwd as reference_bwd
from vlmkernels.reference.gated_residual import gated_residual_fwd
from vlmkernels.triton import _tiles as tiles

TILE = 2048  # elements of one tile, 8 a thread: 16 bytes of bfloat16
PROGRAMS = 1024  # about the maximum number of partial sums of the gate's gradient
COLUMNS, PARTS = 32, 2048  # of the partial sums: columns of a program, and what it adds at once
WARPS = 8  # of 32 lanes


@triton.jit
def _tile(rows_before, col_block, n, depth, MASK, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [BLOCK_R, BLOCK_D] of a tile, which elements exist, and which of these the row mask keeps."""
    rows = rows_before + tl.arange(0, BLOCK_R)
    cols = col_block * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < n)[:, None] & (cols < depth)[None, :]
    kept = inside
    if MASK is not None:
        kept = inside & (tl.load(MASK + rows, mask=rows < n, other=0) != 0)[:, None]
    return rows.to(tl.int64)[:, None] * depth + cols[None, :], inside, kept


@triton.jit
def tanh(x):
    """Of float32; near 0, where the exponential loses its digits, by the quotient of Cephes."""
    z = x * x
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    return tl.where(tl.abs(x) < 0.625, x + x * (z * (p / q)), 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))


@triton.jit
def _tanh_of_gate(GATE, col_block, depth, PER_CHANNEL: tl.constexpr, BLOCK_D: tl.constexpr):
    if GATE is None:
        t = 1.0
    elif PER_CHANNEL:
        cols = col_block * BLOCK_D + tl.arange(0, BLOCK_D)
        t = tanh(tl.load(GATE + cols, mask=cols < depth, other=0.0).to(tl.float32))[None, :]
    else:
        t = tanh(tl.load(GATE).to(tl.float32))
    return t


@triton.jit
def _forward(
    X,  # [n, depth]
    Y,  # [n, depth]
    GATE,  # [1] or [depth]
    MASK,  # [n] uint8 or None
    OUT,  # [n, depth]
    n,
    depth,
    PER_CHANNEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    col_blocks = tl.cdiv(depth, BLOCK_D)
    col_block = tl.program_id(0) % col_blocks
    rows_before = tl.program_id(0) // col_blocks * BLOCK_R
    at, inside, kept = _tile(rows_before, col_block, n, depth, MASK, BLOCK_R, BLOCK_D)
    t = _tanh_of_gate(GATE, col_block, depth, PER_CHANNEL, BLOCK_D)
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(Y + at, mask=kept, other=0.0).to(tl.float32)
    tl.store(OUT + at, (x + t * y).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    DOUT,  # [n, depth]
    Y,  # [n, depth] or None if the gate's gradient is not needed
    GATE,  # [1] or [depth], or None: its tanh is 1
    MASK,  # [n] uint8 or None
    DY,  # [n, depth] or None
    PARTIAL,  # [programs, 1 or depth] float64 sums of dout y, or None
    n,
    depth,
    PER_CHANNEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    col_blocks = tl.cdiv(depth, BLOCK_D)
    col_block = tl.program_id(0) % col_blocks
    program = tl.program_id(0) // col_blocks
    programs = tl.num_programs(0) // col_blocks
    t = _tanh_of_gate(GATE, col_block, depth, PER_CHANNEL, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for rows_before in range(program * BLOCK_R, n, programs * BLOCK_R):
        at, inside, kept = _tile(rows_before, col_block, n, depth, MASK, BLOCK_R, BLOCK_D)
        dout = tl.load(DOUT + at, mask=kept, other=0.0).to(tl.float32)
        if DY is not None:
            tl.store(DY + at, (t * dout).to(DY.dtype.element_ty), mask=inside)
        if PARTIAL is not None:
            total += dout * tl.load(Y + at, mask=kept, other=0.0).to(tl.float32)
    if PARTIAL is not None:
        if PER_CHANNEL:
            cols = col_block * BLOCK_D + tl.arange(0, BLOCK_D)
            at = program.to(tl.int64) * depth + cols
            tl.store(PARTIAL + at, tl.sum(total.to(tl.float64), 0), mask=cols < depth)
        else:
            tl.store(PARTIAL + tl.program_id(0), tl.sum(tl.sum(total.to(tl.float64), 1), 0))


@triton.jit
def _combine(
    PARTIAL,  # [parts, width]
    GATE,  # [width] or None: the sums alone
    OUT,  # [width] (1 - t^2) sum of the parts, t = tanh(gate)
    parts,
    width,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float64)
    for first in range(0, parts, BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        inside = (rows < parts)[:, None] & (cols < width)[None, :]
        at = rows.to(tl.int64)[:, None] * width + cols[None, :]
        total += tl.load(PARTIAL + at, mask=inside, other=0.0).to(tl.float64)
    out = tl.sum(total, 0)
    if GATE is not None:
        e = tl.exp(-2.0 * tl.abs(tl.load(GATE + cols, mask=cols < width, other=0.0).to(tl.float32)))
        out *= 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - t^2, also where t is almost 1
    if OUT.dtype.element_ty != tl.float64:  # no conversion of its own to types of 16 bits
        out = out.to(tl.float32)
    tl.store(OUT + cols, out.to(OUT.dtype.element_ty), mask=cols < width)


def blocks(depth: int) -> dict[str, int]:
    """Tile of the kernels for rows of `depth` elements."""
    block_d = min(tiles.next_power_of_2(depth), TILE)
    return {"BLOCK_R": TILE // block_d, "BLOCK_D": block_d, **options()}


def options() -> dict[str, int]:
    warps = WARPS // 2 if torch.version.hip is not None else WARPS  # AMD's have 64 lanes
    return {"num_warps": warps, "enable_fp_fusion": True}


def combined(partial: Tensor, out: Tensor, gate: Tensor | None = None) -> Tensor:
    """Into out: the sums of the columns of partial [parts, elements of out], with a gate times 1 - tanh^2."""
    parts, width = partial.shape
    if out.numel() and parts:
        block_d = min(tiles.next_power_of_2(width), COLUMNS)
        with torch.cuda.device_of(out):
            _combine[(tiles.cdiv(width, block_d),)](
                partial, gate, out, parts, width, PARTS // block_d, block_d, **options()
            )
        return out
    return out.zero_()


def operands(gate: Tensor, row_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """As the kernels read them."""
    mask = row_mask.contiguous().view(torch.uint8).reshape(-1) if row_mask is not None else None
    return gate.reshape(-1).contiguous(), mask


def gated_residual(
    x: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,  # 1 or D elements
    row_mask: Tensor | None,  # [...] bool
) -> Tensor:  # [..., D]
    dtype = torch.promote_types(x.dtype, y.dtype)
    if dtype == torch.float64:
        return gated_residual_fwd(x, y, gate, row_mask)
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    gate, mask = operands(gate, row_mask)
    x, y = x.contiguous(), y.contiguous()
    depth = x.shape[-1]
    n, tile = x.numel() // depth, blocks(depth)
    grid = (tiles.cdiv(n, tile["BLOCK_R"]) * tiles.cdiv(depth, tile["BLOCK_D"]),)
    with torch.cuda.device_of(x):
        _forward[grid](x, y, gate, mask, out, n, depth, gate.numel() > 1, **tile)
    return out


def gated_residual_bwd(
    dout: Tensor,  # [..., D]
    y: Tensor,  # [..., D]
    gate: Tensor,
    row_mask: Tensor | None,  # [...]
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    if torch.promote_types(dout.dtype, y.dtype) == torch.float64:
        return reference_bwd(dout, y, gate, row_mask, needs)
    need_y, need_gate = needs
    dy, dgate = y.new_empty(y.shape if need_y else 0), gate.new_empty(gate.shape if need_gate else 0)
    if y.numel() == 0 or not (need_y or need_gate):
        return dy, dgate.zero_()
    gate, mask = operands(gate, row_mask)
    dout, y = dout.contiguous(), y.contiguous()
    depth = y.shape[-1]
    n, tile = y.numel() // depth, blocks(depth)
    col_blocks = tiles.cdiv(depth, tile["BLOCK_D"])
    programs = min(tiles.cdiv(n, tile["BLOCK_R"]), max(1, PROGRAMS // col_blocks))
    per_channel = gate.numel() > 1
    partial = None
    if need_gate:
        shape = (programs, depth) if per_channel else (programs * col_blocks, 1)
        partial = y.new_empty(shape, dtype=torch.float64)
    with torch.cuda.device_of(y):
        _backward[(programs * col_blocks,)](
            dout, y, gate, mask, dy if need_y else None, partial, n, depth, per_channel, **tile
        )
    if partial is not None:
        combined(partial, dgate, gate)
    return dy, dgate
