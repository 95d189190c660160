"""relative_similarity (contract in ops/relative_similarity.py).

A program has one image and a block of texts, whose indices it searches for among the image's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.relative_similarity import check, relative_similarity_fwd
from vlmkernels.triton import _rows as rows
from vlmkernels.triton import _tiles as tiles

TEXTS = 16  # of a program
ENTRIES = 64  # of each text that are searched for at once


@triton.jit
def _forward(
    V,  # [n, k]
    AT_V,  # [n, k] int64
    W,  # [m, l]
    AT_W,  # [m, l] int64
    OUT,  # [n, m] float32
    n,
    k,
    m,
    l,  # noqa: E741
    half,  # the largest power of 2 that is at most k
    steps,  # of a search
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    blocks = tl.cdiv(m, BLOCK_M)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    texts = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    counted, row = texts < m, texts.to(tl.int64) * l
    cols = tl.arange(0, BLOCK_L)
    V += image * k
    AT_V += image * k
    # 0, or NaN where a value of the image is not finite: in a dense product it would meet a 0
    zero = tl.zeros([BLOCK_L], tl.float32)
    for first in range(0, k, BLOCK_L):
        zero += tl.load(V + first + cols, mask=first + cols < k, other=0.0).to(tl.float32) * 0.0
    sums = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    for first in range(0, l, BLOCK_L):
        inside = counted[:, None] & (first + cols < l)[None, :]
        at = row[:, None] + (first + cols)[None, :]
        wanted = tl.load(AT_W + at, mask=inside, other=-1)
        w = tl.load(W + at, mask=inside, other=0.0).to(tl.float32)
        below = tl.zeros([BLOCK_M, BLOCK_L], tl.int32)  # how many indices of the image are smaller
        for step in range(steps):
            probed = below + (half >> step)
            index = tl.load(AT_V + probed - 1, mask=inside & (probed <= k), other=0x7FFFFFFFFFFFFFFF)
            below = tl.where(index < wanted, probed, below)
        found = inside & (below < k)
        found = found & (tl.load(AT_V + below, mask=found, other=-1) == wanted)
        sums += tl.load(V + below, mask=found, other=0.0).to(tl.float32) * w
    out = tl.sum(sums, 1) + tl.sum(zero, 0)
    tl.store(OUT + image * m + texts, out, mask=counted)


def relative_similarity(
    image_values: Tensor,  # [Q, k]
    image_indices: Tensor,  # [Q, k] int64
    text_values: Tensor,  # [C, l]
    text_indices: Tensor,  # [C, l] int64
) -> Tensor:  # [Q, C]
    tensors = (image_values, image_indices, text_values, text_indices)
    if (
        torch.float64 in (image_values.dtype, text_values.dtype)
        or 0 in image_values.shape + text_values.shape
    ):
        return relative_similarity_fwd(*tensors)
    check(*tensors)
    v, at_v, w, at_w = (x.contiguous() for x in tensors)
    (n, k), (m, length) = v.shape, w.shape
    out = v.new_empty((n, m), dtype=torch.float32)
    steps = k.bit_length()
    with torch.cuda.device_of(v):
        _forward[(n * tiles.cdiv(m, TEXTS),)](
            v, at_v, w, at_w, out, n, k, m, length, 1 << (steps - 1), steps, TEXTS, ENTRIES,
            **rows.options(TEXTS * ENTRIES),
        )  # fmt: skip
    return out
