"""out = x + t (h W^T), t = tanh(gate): a GEMM that adds in its epilogue.

Backward: the product with dout in float32 that gives a gradient gives the gate's in the pass that scales it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.gated_linear_residual import gated_linear_residual_bwd as reference_bwd
from vlmkernels.reference.gated_linear_residual import gated_linear_residual_fwd as reference_fwd
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import gated_residual as gated
from vlmkernels.triton._tiles import grouped_tile, similarities
from vlmkernels.triton.gated_residual import tanh


@triton.jit
def _forward(
    H,  # [n, depth]
    W,  # [m, depth]
    X,  # [n, m]
    GATE,  # [1] or [m]
    MASK,  # [n] uint8 or None
    OUT,  # [n, m]
    stride_h,
    stride_w,
    n,
    m,
    depth,
    PER_CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row_tile, col_tile = grouped_tile(tl.program_id(0), tl.cdiv(n, BLOCK_M), tl.cdiv(m, BLOCK_N), GROUP)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    branch = similarities(
        H, W, rows, cols, stride_h, stride_w, n, m, depth, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION
    )
    if PER_CHANNEL:
        branch *= tanh(tl.load(GATE + cols, mask=cols < m, other=0.0).to(tl.float32))[None, :]
    else:
        branch *= tanh(tl.load(GATE).to(tl.float32))
    if MASK is not None:
        kept = tl.load(MASK + rows, mask=rows < n, other=0) != 0
        branch = tl.where(kept[:, None], branch, 0.0)
    inside = (rows < n)[:, None] & (cols < m)[None, :]
    at = rows.to(tl.int64)[:, None] * m + cols[None, :]
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(OUT + at, (x + branch).to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _scale_rows(
    P,  # [n, depth] float32
    Y,  # [n, depth] what the products are the gradient of
    GATE,  # [1] or [n]
    OUT,  # [n, depth] t P, t = tanh(gate), or None
    SCALED,  # [n, depth] t y, or None
    DOT,  # [n] float32: <P, y>
    stride_y,
    depth,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tanh(tl.load(GATE + row if PER_ROW else GATE).to(tl.float32))
    dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        p = tl.load(P + row * depth + cols, mask=cols < depth, other=0.0)
        y = tl.load(Y + row * stride_y + cols, mask=cols < depth, other=0.0).to(tl.float32)
        dots += p * y
        if OUT is not None:
            tl.store(OUT + row * depth + cols, (t * p).to(OUT.dtype.element_ty), mask=cols < depth)
        if SCALED is not None:
            tl.store(SCALED + row * depth + cols, (t * y).to(SCALED.dtype.element_ty), mask=cols < depth)
    tl.store(DOT + row, tl.sum(dots, 0))


def _kept(x: Tensor, gate: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor:  # [n, D]
    """tanh(gate) x in `dtype`, 0 in rows that the mask drops, even for NaN; x itself if nothing changes."""
    if gate is None and mask is None and x.dtype == dtype:
        return x
    x = x.contiguous()
    out = x.new_empty(x.shape, dtype=dtype)
    n, depth = x.shape
    if out.numel():
        per_channel = gate is not None and gate.numel() > 1
        tile = gated.blocks(depth)
        grid = (tiles.cdiv(n, tile["BLOCK_R"]) * tiles.cdiv(depth, tile["BLOCK_D"]),)
        with torch.cuda.device_of(x):
            gated._backward[grid](x, None, gate, mask, out, None, n, depth, per_channel, **tile)
    return out


def _scaled(
    products: Tensor,  # [n, depth] float32
    y: Tensor,  # [n, depth]
    gate: Tensor,  # [1] or [n]
    need: bool,
    need_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """t P and t y in the dtype of y (size 0 when not needed), t = tanh(gate), and <P, y> of each row."""
    out, scaled = y.new_empty(y.shape if need else 0), y.new_empty(y.shape if need_y else 0)
    dot = products.new_empty(len(y))
    if products.numel() == 0:
        return out, scaled, dot.zero_()
    block = max(16, min(tiles.next_power_of_2(y.shape[1]), 2048))
    with torch.cuda.device_of(y):
        _scale_rows[(len(y),)](
            products,
            y,
            gate,
            out if need else None,
            scaled if need_y else None,
            dot,
            y.stride(0),
            y.shape[1],
            gate.numel() > 1,
            block,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out, scaled, dot


def gated_linear_residual(
    x: Tensor,  # [..., D]
    h: Tensor,  # [..., K]
    weight: Tensor,  # [D, K]
    gate: Tensor,  # 1 or D elements
    row_mask: Tensor | None,  # [...] bool
) -> Tensor:  # [..., D]
    dtype = torch.promote_types(x.dtype, h.dtype)
    if dtype == torch.float64:
        return reference_fwd(x, h, weight, gate, row_mask)
    out = x.new_empty(x.shape, dtype=dtype)
    if out.numel() == 0:
        return out
    x, (gate, mask) = x.contiguous(), gated.operands(gate, row_mask)
    n, m = x.numel() // x.shape[-1], x.shape[-1]
    h, weight = tiles.operand(h.reshape(n, h.shape[-1])), tiles.operand(weight)
    options = tiles.launch_options(h, weight, fuse=True, exceptions=tiles.PRODUCTS_ON)
    with torch.cuda.device_of(x):
        _forward[(tiles.cdiv(n, options["BLOCK_M"]) * tiles.cdiv(m, options["BLOCK_N"]),)](
            h, weight, x, gate, mask, out, h.stride(0), weight.stride(0), n, m, h.shape[1], gate.numel() > 1,
            tiles.GROUP, **options,
        )  # fmt: skip
    return out


def gated_linear_residual_bwd(
    dout: Tensor,  # [..., D]
    h: Tensor,  # [..., K]
    weight: Tensor,  # [D, K]
    gate: Tensor,
    row_mask: Tensor | None,  # [...] bool
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, dweight and dgate; size 0 where not needed."""
    if torch.promote_types(dout.dtype, h.dtype) == torch.float64:
        return reference_bwd(dout, h, weight, gate, row_mask, needs)
    need_h, need_weight, need_gate = needs
    n, one = dout.shape[:-1].numel(), gate.numel() == 1
    shape, (m, depth) = h.shape, weight.shape
    dout, h, weight = dout.reshape(n, m), h.reshape(n, depth), tiles.rows_contiguous(weight)
    dh, dweight, dgate = h.new_empty(0), weight.new_empty(0), gate.new_empty(gate.shape if need_gate else 0)
    gate, mask = gated.operands(gate, row_mask)
    if not (need_weight or need_gate):
        if need_h:
            dh = torch.mm(_kept(dout, gate, mask, h.dtype), weight).view(shape)
        return dh, dweight, dgate
    kept = _kept(dout, None, mask, h.dtype)
    h = tiles.rows_contiguous(_kept(h, None, mask, h.dtype))
    if need_h and one and not need_weight:  # no product for the gate alone
        products = h.new_empty((n, depth), dtype=torch.float32)
        tiles.product(kept, weight, products)
        dh, _, total = _scaled(products, h, gate, True)
    else:
        products = h.new_empty((m, depth), dtype=torch.float32)
        tiles.product(kept.T, h, products)
        dweight, scaled, total = _scaled(products, weight, gate, need_weight, need_h)
        if need_h:
            dh = torch.mm(kept, scaled)
    if need_gate:
        gated.combined(total[:, None] if one else total[None], dgate, gate)
    return dh.view(shape) if need_h else dh, dweight, dgate
