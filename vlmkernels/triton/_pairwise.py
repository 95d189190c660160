"""Shared by the pairwise kernels: chunks of rows, and the last steps of the gradients of features."""

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK_ROWS = 256  # rows of gradients in memory at once, more if `workspace_bytes` allow


@triton.jit
def feature_grads(
    ACC,  # [rows, depth] float32: the products with the gradient of the tiles
    INV_GAIN,  # [1] undoes the factor that ACC carries, or None
    EXTRA,  # [rows, depth] float32 or None
    X,  # [rows, depth]
    Y,  # [others, depth]
    SCALE,  # [1]
    A,  # [rows] inverse norms or None
    B,  # [others] inverse norms or None
    COEF,  # weight of each pair of a row and its positive, by the index of the query; None without positives
    INDEX,  # [rows] the positive of each row, -1 for none; with FIRST, the queries ordered by their positive
    FIRST,  # [rows + 1] where the queries of each row begin in INDEX, or None
    DX,  # [rows, depth]
    DOT,  # [rows] float32
    stride_x,
    stride_y,
    depth,
    BLOCK: tl.constexpr,
):
    """D = ACC + EXTRA + the positives' part, <x, D>, and scale a (D - a^2 <x, D> x) of one row."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(SCALE).to(tl.float32)
    dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, depth, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < depth
        total = tl.load(ACC + row * depth + cols, mask=inside, other=0.0)
        if INV_GAIN is not None:
            total *= tl.load(INV_GAIN)
        if EXTRA is not None:
            total += tl.load(EXTRA + row * depth + cols, mask=inside, other=0.0)
        if FIRST is not None:
            for entry in range(tl.load(FIRST + row), tl.load(FIRST + row + 1)):
                other = tl.load(INDEX + entry)
                weight = tl.load(COEF + other)
                if B is not None:
                    weight *= tl.load(B + other)
                total += weight * tl.load(Y + other * stride_y + cols, mask=inside, other=0.0).to(tl.float32)
        elif INDEX is not None:
            other = tl.load(INDEX + row)
            weight = tl.load(COEF + row)
            if B is not None:
                weight *= tl.load(B + other, mask=other >= 0, other=0.0)
            y = tl.load(Y + other * stride_y + cols, mask=inside & (other >= 0), other=0.0).to(tl.float32)
            total += tl.where(other >= 0, weight, 0.0) * y
        x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
        dots += x * total
        if A is not None:
            tl.debug_barrier()  # warps with the same columns have read them
            tl.store(ACC + row * depth + cols, total, mask=inside)
        else:
            tl.store(DX + row * depth + cols, (scale * total).to(DX.dtype.element_ty), mask=inside)
    dot = tl.sum(dots, 0)
    tl.store(DOT + row, dot)
    if A is not None:
        tl.debug_barrier()
        a = tl.load(A + row)
        for start in range(0, depth, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = cols < depth
            total = tl.load(ACC + row * depth + cols, mask=inside, other=0.0)
            x = tl.load(X + row * stride_x + cols, mask=inside, other=0.0).to(tl.float32)
            out = scale * a * (total - a * dot * (a * x))
            tl.store(DX + row * depth + cols, out.to(DX.dtype.element_ty), mask=inside)


def chunk_rows(n: int, m: int, itemsize: int, workspace_bytes: int) -> int:
    """How many rows of gradients of the similarities are in memory at once."""
    rows = workspace_bytes // (max(m, 1) * itemsize)
    return max(1, min(n, max(CHUNK_ROWS, rows // CHUNK_ROWS * CHUNK_ROWS)))


def chunk_buffer(like: Tensor, rows: int, m: int) -> Tensor:  # [rows, m]
    """Rows begin at multiples of 16 elements."""
    return like.new_empty((rows, triton.cdiv(m, 16) * 16))[:, :m]


def unit(x: Tensor, inv_norm: Tensor | None) -> Tensor:
    """a_i x_i in the dtype of x: the operand of a product."""
    return x if inv_norm is None else (x * inv_norm[:, None]).to(x.dtype)


def gain_for(dtype: torch.dtype, *coefficients: Tensor) -> Tensor | None:
    """A factor that moves gradients, at most the sum of `coefficients`, into the range of float16."""
    if dtype != torch.float16:
        return None
    peak = torch.stack([c.abs().amax() for c in coefficients if c.numel()]).amax()
    return torch.where(peak > 0, 2.0**14 / peak, 1.0)


def finish(acc, inv_gain, extra, x, y, scale, a, b, coef, index, first) -> tuple[Tensor, Tensor]:
    """dx and <x, D> from the products; see `feature_grads`."""
    dx, dot = x.new_empty(x.shape), acc.new_empty(x.shape[0])
    block = max(16, min(triton.next_power_of_2(x.shape[1]), 2048))
    extra = extra.contiguous() if extra is not None else None
    with torch.cuda.device_of(x):
        feature_grads[(x.shape[0],)](
            acc, inv_gain, extra, x, y, scale, a, b, coef, index, first, dx, dot,
            x.stride(0), y.stride(0), x.shape[1], BLOCK=block, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return dx, dot
