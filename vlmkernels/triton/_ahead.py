"""Gradients that a forward computed times the incoming one, in one launch (ops/_ahead.py)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _tiles as tiles

READ = 2048  # elements of a program
MOST = 4  # tensors of a launch


@triton.jit
def _scaled(X, OUT, factor, block, size, BLOCK: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(OUT + at, (factor * x).to(OUT.dtype.element_ty), mask=at < size)


@triton.jit
def _scale(
    X0,  # [size0]
    X1,  # [size1] or None
    X2,  # [size2] or None
    X3,  # [size3] or None
    FACTOR,  # [1]
    OUT0,  # [size0]
    OUT1,  # [size1] or None
    OUT2,  # [size2] or None
    OUT3,  # [size3] or None
    size0,
    size1,
    size2,
    size3,
    BLOCK: tl.constexpr,
):
    """A block of elements of one of the tensors."""
    factor = tl.load(FACTOR).to(tl.float32)
    block = tl.program_id(0)
    blocks = tl.cdiv(size0, BLOCK)
    if block < blocks:
        _scaled(X0, OUT0, factor, block, size0, BLOCK)
    block -= blocks
    if X1 is not None:
        blocks = tl.cdiv(size1, BLOCK)
        if (block >= 0) & (block < blocks):
            _scaled(X1, OUT1, factor, block, size1, BLOCK)
        block -= blocks
    if X2 is not None:
        blocks = tl.cdiv(size2, BLOCK)
        if (block >= 0) & (block < blocks):
            _scaled(X2, OUT2, factor, block, size2, BLOCK)
        block -= blocks
    if X3 is not None and block >= 0:
        _scaled(X3, OUT3, factor, block, size3, BLOCK)


def scale_grads(dloss: Tensor, grads: list[Tensor]) -> list[Tensor]:
    """Each of at most `MOST` gradients times `dloss`, a scalar."""
    out = [x.new_empty(x.shape) for x in grads]
    sizes = [x.numel() for x in grads]
    none, absent = [None] * (MOST - len(grads)), [0] * (MOST - len(grads))
    blocks = sum(tiles.cdiv(size, READ) for size in sizes)
    if blocks:
        with torch.cuda.device_of(dloss):
            _scale[(blocks,)](
                *grads, *none, dloss, *out, *none, *sizes, *absent, BLOCK=READ, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
    return out
