"""What losses of rows share: their sum in a fixed order, and how rows are read."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _tiles as tiles

ELEMENTS = 16  # of an operand that a thread reads at once
TOTAL = 4096  # rows that the sum takes in at once


@triton.jit
def _total(
    LOSS,  # [n] float32 or None: 1 for all rows together
    WEIGHT,  # [n] or None: 1 in each row
    TARGET,  # [n] int64 or None: rows with ignore_index are not counted
    OUT,  # [1] float32
    VALID,  # [1] uint8, whether each target is a class or ignore_index; or None
    n,
    end,  # of the classes
    ignore_index,
    MEAN: tl.constexpr,  # divides by the weights of the counted rows; 0 if their sum is
    BLOCK: tl.constexpr,
):
    """The sum of the losses, in one program."""
    sums = tl.zeros([BLOCK], tl.float64)
    weights = tl.zeros([BLOCK], tl.float64)
    valid = tl.full([BLOCK], 1, tl.int32)
    for first in range(0, n, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        weight = tl.where(rows < n, 1.0, 0.0)
        if WEIGHT is not None:
            weight = tl.load(WEIGHT + rows, mask=rows < n, other=0.0).to(tl.float32)
        if TARGET is not None:
            target = tl.load(TARGET + rows, mask=rows < n, other=0)
            ignored = target == ignore_index
            weight = tl.where(ignored, 0.0, weight)
            valid &= (ignored | ((target >= 0) & (target < end)) | (rows >= n)).to(tl.int32)
        weights += weight.to(tl.float64)
        if LOSS is not None:
            sums += tl.load(LOSS + rows, mask=rows < n, other=0.0).to(tl.float64)
    total = tl.sum(sums, 0) if LOSS is not None else tl.full((), 1.0, tl.float64)
    if MEAN:
        of_rows = tl.sum(weights, 0)
        total = tl.where(of_rows == 0, 0.0, total / of_rows)
    tl.store(OUT, total.to(tl.float32))
    if VALID is not None:
        tl.store(VALID, tl.min(valid, 0).to(tl.uint8))


def total(
    like: Tensor,  # on the device
    n: int,
    loss: Tensor | None = None,  # [n]
    *,
    weight: Tensor | None = None,  # [n]
    target: Tensor | None = None,  # [n]
    classes: int = 0,
    ignore_index: int = 0,
    valid: Tensor | None = None,
    mean: bool,
) -> Tensor:  # []
    out, block = like.new_empty((), dtype=torch.float32), min(tiles.next_power_of_2(n), TOTAL)
    with torch.cuda.device_of(like):
        _total[(1,)](
            loss, weight, target, out, valid, n, classes, ignore_index, mean, block, **options(block)
        )
    return out


def options(elements: int) -> dict:
    """The launch of a program that reads this many elements of an operand at once.

    Without fusing a product and a sum: the lanes of a row would round its sums differently, and equal
    features would differ.
    """
    lanes = 64 if torch.version.hip is not None else 32
    warps = max(1, min(elements // ELEMENTS, 1024) // lanes)
    return {"num_warps": warps, "enable_fp_fusion": False}


def grain(*sizes: int) -> int:
    """What divides the sizes, up to 16: aligned accesses of so many elements are made in one."""
    return math.gcd(16, *sizes)
