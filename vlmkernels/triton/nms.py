"""nms (contract in ops/nms.py): which boxes a box overlaps as bits, then one pass over the boxes by score."""

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.nms import nms_faults, nms_fwd, order_of
from vlmkernels.triton import _tiles as tiles

WORD = tl.constexpr(32)  # bits
ROWS = 64  # boxes of a program, which compares them with those of one word
MOST = 2**17  # boxes, whose bits take 2 GiB


@triton.jit
def _corners(BOXES, at, inside):
    """x1, y1, x2, y2 and the area of some boxes."""
    x1 = tl.load(BOXES + at * 4, mask=inside, other=0.0).to(tl.float32)
    y1 = tl.load(BOXES + at * 4 + 1, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(BOXES + at * 4 + 2, mask=inside, other=0.0).to(tl.float32)
    y2 = tl.load(BOXES + at * 4 + 3, mask=inside, other=0.0).to(tl.float32)
    return x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit
def _overlaps(
    BOXES,  # [n, 4]
    GROUPS,  # [n] or None
    HITS,  # [n, words] int32
    n,
    words,
    threshold,
    BLOCK_R: tl.constexpr,
):
    """Bit b of HITS[i, w]: box 32 w + b, behind box i, goes if that stays. Words before i are left out."""
    first = tl.program_id(1) * BLOCK_R
    word = tl.program_id(0)
    if (word + 1) * WORD > first:
        rows = first + tl.arange(0, BLOCK_R)
        bits = tl.arange(0, WORD)
        cols = word * WORD + bits
        x1, y1, x2, y2, area = _corners(BOXES, rows, rows < n)
        left, top, right, bottom, other = _corners(BOXES, cols, cols < n)
        x = tl.minimum(x2[:, None], right[None, :]) - tl.maximum(x1[:, None], left[None, :])
        y = tl.minimum(y2[:, None], bottom[None, :]) - tl.maximum(y1[:, None], top[None, :])
        common = tl.maximum(x, 0.0) * tl.maximum(y, 0.0)
        hit = tl.div_rn(common, area[:, None] + other[None, :] - common) > threshold
        hit = hit & (rows[:, None] < cols[None, :]) & (cols < n)[None, :]
        if GROUPS is not None:
            own = tl.load(GROUPS + rows, mask=rows < n, other=0)
            hit = hit & (own[:, None] == tl.load(GROUPS + cols, mask=cols < n, other=0)[None, :])
        bit = tl.full([WORD], 1, tl.int32) << bits
        found = tl.sum(tl.where(hit, bit[None, :], 0), 1)
        tl.store(HITS + rows.to(tl.int64) * words + word, found, mask=rows < n)


@triton.jit
def _scan(
    HITS,  # [n, words] int32
    KEPT,  # [words] int32
    n,
    words,
    BLOCK_W: tl.constexpr,  # at least `words`
):
    """Bit b of KEPT[w]: box 32 w + b stays."""
    cols = tl.arange(0, BLOCK_W)
    gone = tl.zeros([BLOCK_W], tl.int32)
    at = HITS  # the bits of the boxes of a word
    for word in range(words):
        here = tl.sum(tl.where(cols == word, gone, 0), 0)
        for bit in tl.static_range(WORD):
            inside = word * WORD + bit < n
            hits = tl.load(at + bit * words + word, mask=inside, other=0)
            here |= tl.where(((here >> bit) & 1) == 0, hits, 0)
        tl.store(KEPT + word, ~here)
        for bit in tl.static_range(WORD):
            stays = (((here >> bit) & 1) == 0) & (word * WORD + bit < n)
            gone |= tl.load(at + bit * words + cols, mask=(cols > word) & (cols < words) & stays, other=0)
        at += WORD * words


def rounded_down(x: float) -> float:
    """The largest number of float32 that is not above x: comparing float32 with either gives the same."""
    near = numpy.float32(x)
    return float(numpy.nextafter(near, numpy.float32(-numpy.inf)) if near > x else near)


def kept_bits(
    boxes: Tensor,  # [N, 4], by falling score
    groups: Tensor | None,  # [N]
    iou_threshold: float,
) -> Tensor:  # [ceil(N / 32)] int32
    """Which boxes stay."""
    n = len(boxes)
    words = tiles.cdiv(n, 32)
    hits = boxes.new_empty((n, words), dtype=torch.int32)
    kept = boxes.new_empty(words, dtype=torch.int32)
    with torch.cuda.device_of(boxes):
        _overlaps[(words, tiles.cdiv(n, ROWS))](
            boxes, groups, hits, n, words, rounded_down(iou_threshold), ROWS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
        block = tiles.next_power_of_2(words)
        _scan[(1,)](hits, kept, n, words, block, num_warps=8 if block > 512 else 4, enable_fp_fusion=False)
    return kept


def nms(
    boxes: Tensor,  # [N, 4]
    scores: Tensor,  # [N]
    groups: Tensor | None,  # [N]
    iou_threshold: float,
) -> Tensor:  # [kept]
    faults = nms_faults(boxes, scores, groups, iou_threshold)
    if faults or boxes.dtype == torch.float64 or not 0 < len(boxes) <= MOST:
        return nms_fwd(boxes, scores, groups, iou_threshold)
    order = order_of(scores)
    kept = kept_bits(boxes[order], groups if groups is None else groups[order], iou_threshold)
    bits = kept[:, None] >> torch.arange(32, dtype=torch.int32, device=kept.device)
    return order[(bits & 1).flatten()[: len(order)].bool()]
