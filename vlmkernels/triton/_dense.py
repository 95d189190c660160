"""Shared by the dense layers: cuBLAS' products, and one pass each way over them for the activation.

out = act(y) [* up] [+ residual];  dy = dout [* up] act'(y),  dup = dout act(y), and the sums of their rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference._dense import ACTIVATIONS
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import gated_residual as gated

WIDTH = 256  # columns that a program of the backward sums, 8 of a lane: few sums for the elements it reads
CHAIN = 16  # blocks of rows of a program at most: float32 numbers that are added one after the other


@triton.jit
def _activation(y, ACTIVATION: tl.constexpr):
    """act(y) and act'(y)."""
    if ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
        act, slope = y * below, below + y * (0.3989422804014327 * tl.exp(-0.5 * y * y))
    elif ACTIVATION == "relu" or ACTIVATION == "squared_relu":
        act = tl.where(y < 0, 0.0, y)  # not a maximum, which drops NaN
        slope = tl.where(y > 0, 1.0, 0.0)
        if ACTIVATION == "squared_relu":
            slope = 2.0 * act
            act *= act
    elif ACTIVATION == "none":
        act, slope = y, tl.full(y.shape, 1.0, tl.float32)
    else:  # y sigmoid(u)
        if ACTIVATION == "gelu_tanh":
            u = 1.5957691216057308 * (y + 0.044715 * y * y * y)
            du = 1.5957691216057308 * (1.0 + 3 * 0.044715 * y * y)
        elif ACTIVATION == "quick_gelu":
            u, du = 1.702 * y, 1.702
        else:
            tl.static_assert(ACTIVATION == "silu")
            u, du = y, 1.0
        s = 1.0 / (1.0 + tl.exp(-u))
        act, slope = y * s, s + y * s * (1.0 - s) * du
    return act, slope


@triton.jit
def _forward(
    Y,  # [size]
    UP,  # [size] or None: act(y) alone
    RESIDUAL,  # [size] or None
    OUT,  # [size], may be Y
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    out, _ = _activation(tl.load(Y + at, mask=at < size, other=0.0).to(tl.float32), ACTIVATION)
    if UP is not None:
        out *= tl.load(UP + at, mask=at < size, other=0.0).to(tl.float32)
    if RESIDUAL is not None:
        out += tl.load(RESIDUAL + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=at < size)


@triton.jit
def _backward(
    DOUT,  # [n, depth] gradient of act(y), or of act(y) * up
    Y,  # [n, depth]
    UP,  # [n, depth] or None: act(y) alone
    DY,  # [n, depth] or None
    DUP,  # [n, depth] or None
    HIDDEN,  # [n, depth] act(y), or act(y) * up; or None
    SUMS,  # [programs, depth] float32: sums of the rows of dy, or None
    SUMS_UP,  # [programs, depth] float32: of dup, or None
    n,
    depth,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    col_blocks = tl.cdiv(depth, BLOCK_D)
    cols = tl.program_id(0) % col_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    program = tl.program_id(0) // col_blocks
    programs = tl.num_programs(0) // col_blocks
    sums = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    sums_up = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(program * BLOCK_R, n, programs * BLOCK_R):
        rows = first + tl.arange(0, BLOCK_R)
        inside = (rows < n)[:, None] & (cols < depth)[None, :]
        at = rows.to(tl.int64)[:, None] * depth + cols[None, :]
        dout = tl.load(DOUT + at, mask=inside, other=0.0).to(tl.float32)
        act, slope = _activation(tl.load(Y + at, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
        if DUP is not None:
            tl.store(DUP + at, (dout * act).to(DUP.dtype.element_ty), mask=inside)
        if SUMS_UP is not None:
            sums_up += dout * act
        if UP is not None:
            up = tl.load(UP + at, mask=inside, other=0.0).to(tl.float32)
            act *= up
            dout *= up
        if HIDDEN is not None:
            tl.store(HIDDEN + at, act.to(HIDDEN.dtype.element_ty), mask=inside)
        dy = dout * slope
        if ACTIVATION == "relu":
            dy = tl.where(slope > 0, dout, 0.0)  # even for a gradient that is not finite
        if DY is not None:
            tl.store(DY + at, dy.to(DY.dtype.element_ty), mask=inside)
        if SUMS is not None:
            sums += dy
    at = program.to(tl.int64) * depth + cols
    if SUMS is not None:
        tl.store(SUMS + at, tl.sum(sums.to(tl.float64), 0).to(tl.float32), mask=cols < depth)
    if SUMS_UP is not None:
        tl.store(SUMS_UP + at, tl.sum(sums_up.to(tl.float64), 0).to(tl.float32), mask=cols < depth)


def is_double(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the result is float64, which the references compute."""
    return torch.float64 in (x.dtype, x.dtype if residual is None else residual.dtype)


def check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def rows(x: Tensor) -> Tensor:  # [..., K] -> [n, K]
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # [n, K], [O, K], [O] -> [n, O]
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)


def layer(
    x: Tensor,  # [n, K]
    weight: Tensor,  # [O, K]
    bias: Tensor | None,  # [O]
    activation: str,
    residual: Tensor | None = None,  # [n, O]
) -> Tensor:  # [n, O]
    """act(x weight^T + bias) + residual without what a backward needs."""
    # The GELU of cuBLAS is the tanh form, in as many bits as 16-bit types need; of a CPU it is exact
    tanh = activation == "gelu_tanh" and x.is_cuda and x.dtype != torch.float32
    # Without a product, torch leaves the activation out
    if (activation == "relu" or tanh) and bias is not None and residual is None and x.numel():
        return torch.ops.aten._addmm_activation(bias, x, weight.T, use_gelu=tanh)
    return activated(product(x, weight, bias), activation, residual=residual, in_place=True)


def activated(
    y: Tensor,  # [n, O], contiguous
    activation: str,
    *,
    up: Tensor | None = None,  # [n, O]
    residual: Tensor | None = None,  # [n, O]
    in_place: bool = False,  # y is not needed any more
) -> Tensor:  # [n, O]
    """act(y) [* up] [+ residual], in new memory or that of y; y itself where nothing changes it."""
    check(activation)
    dtype = y.dtype if residual is None else torch.promote_types(y.dtype, residual.dtype)
    out = y if in_place and dtype == y.dtype else y.new_empty(y.shape, dtype=dtype)
    if activation == "none" and up is None:
        return y if residual is None else torch.add(y, residual, out=out)
    if out.numel():
        residual = residual if residual is None else residual.contiguous()
        grid = (tiles.cdiv(out.numel(), gated.TILE),)
        with torch.cuda.device_of(y):
            _forward[grid](y, up, residual, out, out.numel(), activation, gated.TILE, **gated.options())
    return out


def kept(y: Tensor | None, x: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [n, H], or x [n, K] weight^T + bias where it was not kept."""
    if y is not None:
        return rows(y)
    assert x is not None
    return product(x, weight, bias)


class Needs(NamedTuple):
    """Which results of `activated_bwd` are needed."""

    dy: bool
    dup: bool = False
    hidden: bool = False
    sums: bool = False
    sums_up: bool = False


def activated_bwd(
    dout: Tensor,  # [n, H]
    y: Tensor,  # [n, H]
    activation: str,
    up: Tensor | None,  # [n, H]
    needs: Needs,
) -> list[Tensor]:
    """Gradients by y and up [n, H], act(y) [* up] [n, H], and the sums of the rows of both gradients [H].

    What is not needed has size 0, unless it is there.
    """
    check(activation)
    if activation == "none" and up is None:
        nothing = y.new_empty(0)
        return [dout, nothing, y, dout.sum(0) if needs.sums else nothing, nothing]
    dout, y = dout.contiguous(), y.contiguous()
    up = up if up is None else up.contiguous()
    n, depth = y.shape
    out = [y.new_empty(y.shape if need else 0) for need in needs[:3]]
    sums = [y.new_empty(depth if need else 0) for need in needs[3:]]
    if y.numel() == 0:
        return [*out, *(x.zero_() for x in sums)]
    tile = gated.blocks(min(depth, WIDTH))
    col_blocks = tiles.cdiv(depth, tile["BLOCK_D"])
    blocks = tiles.cdiv(n, tile["BLOCK_R"])
    programs = max(min(blocks, gated.PROGRAMS // col_blocks), tiles.cdiv(blocks, CHAIN))
    partial = [y.new_empty((programs, depth), dtype=torch.float32) if need else None for need in needs[3:]]
    results = [x if need else None for x, need in zip(out, needs, strict=False)]
    with torch.cuda.device_of(y):
        _backward[(programs * col_blocks,)](dout, y, up, *results, *partial, n, depth, activation, **tile)
    for parts, total in zip(partial, sums, strict=True):
        if parts is not None:
            gated.combined(parts, total)
    return out + sums


def product_bwd(
    g: Tensor,  # [n, O]
    x: Tensor | None,  # [n, K]
    weight: Tensor,  # [O, K]
    need_x: bool,
    need_weight: bool,
    need_bias: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x weight^T + bias under g."""
    dx, dweight, dbias = (weight.new_empty(0) for _ in range(3))
    if need_x:
        dx = torch.mm(g, weight)
    if need_weight:
        assert x is not None
        dweight = torch.mm(g.T, x)
    if need_bias:
        dbias = g.sum(0)
    return dx, dweight, dbias
