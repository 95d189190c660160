"""roi_align (contract in ops/roi_align.py).

Positions are rounded as on a CPU: they decide on the number of samples and on which are in the picture. The
backward gathers: a program owns some pixels of a picture and adds what its boxes give, in their order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.roi_align import FAR as _FAR
from vlmkernels.reference.roi_align import check, check_backward, check_pictures, roi_align_fwd
from vlmkernels.reference.roi_align import roi_align_bwd as reference_bwd
from vlmkernels.triton import _tiles as tiles

FAR = tl.constexpr(_FAR)
TRIED = tl.constexpr(1024)  # samples of a bin of which all are looked at
BINS = 64  # of a box at a time
SIDE = 8  # of the square of pixels of a program
NEIGHBOURS = 32  # boxes that are compared with the pixels at a time


@triton.jit
def _axis(low, high, scale, offset, bins, ratio, length, ALIGNED: tl.constexpr):
    """Start, size of a bin and samples of one, and how many samples of a bin to look at, along an axis."""
    low = low.to(tl.float32) * scale
    high = high.to(tl.float32) * scale
    low = tl.where(low < -FAR, -FAR, tl.where(low > FAR, FAR, low))  # NaN stays
    high = tl.where(high < -FAR, -FAR, tl.where(high > FAR, FAR, high))
    start = low - offset
    extent = (high - offset) - start
    if not ALIGNED:
        extent = tl.where(extent < 1.0, 1.0, extent)
    size = tl.div_rn(extent, bins + low * 0.0)
    some = tl.where(size > 0.0, size, 0.0)
    whole = some.to(tl.int32)
    samples = tl.where(ratio > 0, ratio, tl.where(whole.to(tl.float32) < some, whole + 1, whole))
    # Beyond, samples are at most a pixel and at least half a pixel apart
    tried = tl.where(samples > TRIED, tl.minimum(samples, 2 * length + 16), samples)
    return start, extent, size, samples, tried


@triton.jit
def _sample(step, bin, start, size, samples, length):
    """Where a sample of a bin, the one numbered `step` of those to look at, reads in the picture; whether."""
    base = start + bin * size
    count = tl.maximum(samples, 1).to(tl.float32)
    apart = tl.where(size > 0.0, size, 1.0) / count
    passed = tl.where(base < -1.0, (-1.0 - base) / apart, 0.0)  # samples before the picture
    first = tl.where(samples > TRIED, tl.maximum(passed.to(tl.int32) - 3, 0), 0)
    number = first + step
    at = base + tl.div_rn((number.to(tl.float32) + 0.5) * size, count + base * 0.0)
    inside = (at >= -1.0) & (at <= length) & (number < samples)
    at = tl.where(inside, at, 0.0)
    at = tl.minimum(tl.maximum(at, 0.0), length - 1.0)
    return at, inside


@triton.jit
def _forward(
    FEATURES,  # [B, channels, image_rows, image_cols]
    BOXES,  # [K, 5]
    OUT,  # [K, channels, h, w]
    channels,
    image_rows,
    image_cols,
    h,
    w,
    scale,
    offset,
    ratio,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    blocks = tl.cdiv(channels, BLOCK_C)
    box = (tl.program_id(0) // blocks).to(tl.int64)
    plane = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    bins = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    stored = (plane < channels)[:, None] & (bins < h * w)[None, :]
    picture = tl.load(BOXES + box * 5).to(tl.int64)
    x1, y1 = tl.load(BOXES + box * 5 + 1), tl.load(BOXES + box * 5 + 2)
    x2, y2 = tl.load(BOXES + box * 5 + 3), tl.load(BOXES + box * 5 + 4)
    top, _, y_size, y_samples, y_tried = _axis(y1, y2, scale, offset, h, ratio, image_rows, ALIGNED)
    left, _, x_size, x_samples, x_tried = _axis(x1, x2, scale, offset, w, ratio, image_cols, ALIGNED)
    row_bin, col_bin = (bins // w).to(tl.float32), (bins % w).to(tl.float32)
    at = FEATURES + ((picture * channels + plane.to(tl.int64)) * image_rows * image_cols)[:, None]
    sums = tl.zeros([BLOCK_C, BLOCK_B], tl.float32)
    for i in range(y_tried):
        y, in_rows = _sample(i, row_bin, top, y_size, y_samples, image_rows)
        row = y.to(tl.int32)
        below = y - row.to(tl.float32)
        rows = at + (row.to(tl.int64) * image_cols)[None, :]
        for j in range(x_tried):
            x, in_cols = _sample(j, col_bin, left, x_size, x_samples, image_cols)
            col = x.to(tl.int32)
            beyond = x - col.to(tl.float32)
            here = stored & (in_rows & in_cols)[None, :]
            down, right = here & (below > 0.0)[None, :], here & (beyond > 0.0)[None, :]
            cols = rows + col[None, :]
            a = tl.load(cols, mask=here, other=0.0).to(tl.float32)
            b = tl.load(cols + 1, mask=right, other=0.0).to(tl.float32)
            c = tl.load(cols + image_cols, mask=down, other=0.0).to(tl.float32)
            d = tl.load(cols + image_cols + 1, mask=down & right, other=0.0).to(tl.float32)
            above = a * (1.0 - beyond)[None, :] + b * beyond[None, :]
            under = c * (1.0 - beyond)[None, :] + d * beyond[None, :]
            sums += above * (1.0 - below)[None, :] + under * below[None, :]
    count = tl.maximum(y_samples.to(tl.float32) * x_samples.to(tl.float32), 1.0)
    to = OUT + (box * channels + plane.to(tl.int64))[:, None] * (h * w) + bins[None, :]
    tl.store(to, (sums / count).to(OUT.dtype.element_ty), mask=stored)


@triton.jit
def _reaches(start, extent, first, SIDE: tl.constexpr):
    """Whether samples between start and start + extent may read pixels first, ..., first + SIDE - 1."""
    low, high = tl.minimum(start, start + extent), tl.maximum(start, start + extent)
    return (low - 2.0 < first + SIDE) & (high + 2.0 > first)


@triton.jit
def _is_near(
    BOXES, box, there, picture, row, col, scale, offset, h, w, ratio, image_rows, image_cols,
    ALIGNED: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """Whether a box of the picture may read pixels of the square that begins at row and col."""
    own = tl.load(BOXES + box * 5, mask=there, other=-1.0).to(tl.int32) == picture
    x1 = tl.load(BOXES + box * 5 + 1, mask=there, other=0.0)
    y1 = tl.load(BOXES + box * 5 + 2, mask=there, other=0.0)
    x2 = tl.load(BOXES + box * 5 + 3, mask=there, other=0.0)
    y2 = tl.load(BOXES + box * 5 + 4, mask=there, other=0.0)
    top, tall, _, _, _ = _axis(y1, y2, scale, offset, h, ratio, image_rows, ALIGNED)
    left, wide, _, _, _ = _axis(x1, x2, scale, offset, w, ratio, image_cols, ALIGNED)
    return own & _reaches(top, tall, row, SIDE) & _reaches(left, wide, col, SIDE)


@triton.jit
def _weights(bin, start, size, samples, tried, length, pixels, BLOCK_B: tl.constexpr, SIDE: tl.constexpr):
    """[BLOCK_B, SIDE]: what the samples of a bin read of a pixel."""
    sums = tl.zeros([BLOCK_B, SIDE], tl.float32)
    for step in range(tried):
        at, inside = _sample(step, bin, start, size, samples, length)
        weight = 1.0 - tl.abs(at[:, None] - pixels[None, :])
        sums += tl.where(inside[:, None] & (weight > 0.0), weight, 0.0)
    return sums


@triton.jit
def _backward(
    DOUT,  # [K, channels, h, w]
    BOXES,  # [K, 5]
    DFEATURES,  # [B, channels, image_rows, image_cols]
    count,  # K
    channels,
    image_rows,
    image_cols,
    h,
    w,
    scale,
    offset,
    ratio,
    ALIGNED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SIDE: tl.constexpr,
    SOME: tl.constexpr,
):
    across = tl.cdiv(image_cols, SIDE)
    blocks = tl.cdiv(channels, BLOCK_C)
    first_row = tl.program_id(0) // across * SIDE
    first_col = tl.program_id(0) % across * SIDE
    plane = tl.program_id(1) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    number = tl.zeros([BLOCK_C], tl.int64)
    picture = tl.program_id(1) // blocks
    rows = (first_row + tl.arange(0, SIDE)).to(tl.float32)
    cols = (first_col + tl.arange(0, SIDE)).to(tl.float32)
    sums = tl.zeros([BLOCK_C, SIDE * SIDE], tl.float32)
    for first in range(0, count, SOME):
        some = first + tl.arange(0, SOME)
        near = _is_near(
            BOXES, some, some < count, picture, first_row, first_col, scale, offset, h, w, ratio, image_rows,
            image_cols, ALIGNED, SIDE,
        )  # fmt: skip
        if tl.sum(near.to(tl.int32), 0) > 0:
            for box in range(first, tl.minimum(first + SOME, count)):
                is_near = _is_near(
                    BOXES, box, box < count, picture, first_row, first_col, scale, offset, h, w, ratio,
                    image_rows, image_cols, ALIGNED, SIDE,
                )  # fmt: skip
                if is_near:
                    x1, y1 = tl.load(BOXES + box * 5 + 1), tl.load(BOXES + box * 5 + 2)
                    x2, y2 = tl.load(BOXES + box * 5 + 3), tl.load(BOXES + box * 5 + 4)
                    top, _, y_size, y_samples, y_tried = _axis(
                        y1, y2, scale, offset, h, ratio, image_rows, ALIGNED
                    )
                    left, _, x_size, x_samples, x_tried = _axis(
                        x1, x2, scale, offset, w, ratio, image_cols, ALIGNED
                    )
                    share = 1.0 / tl.maximum(y_samples.to(tl.float32) * x_samples.to(tl.float32), 1.0)
                    grads = DOUT + ((number + box) * channels + plane)[:, None] * (h * w)
                    for first_bin in range(0, h * w, BLOCK_B):
                        bins = first_bin + tl.arange(0, BLOCK_B)
                        row_bin, col_bin = (bins // w).to(tl.float32), (bins % w).to(tl.float32)
                        y = _weights(
                            row_bin, top, y_size, y_samples, y_tried, image_rows, rows, BLOCK_B, SIDE
                        )  # fmt: skip
                        x = _weights(
                            col_bin, left, x_size, x_samples, x_tried, image_cols, cols, BLOCK_B, SIDE
                        )  # fmt: skip
                        both = tl.reshape((share * y)[:, :, None] * x[:, None, :], [BLOCK_B, SIDE * SIDE])
                        inside = (plane < channels)[:, None] & (bins < h * w)[None, :]
                        grad = tl.load(grads + bins[None, :], mask=inside, other=0.0).to(tl.float32)
                        sums = tl.dot(grad, both, sums, input_precision="ieee")
    pixels = tl.arange(0, SIDE * SIDE)
    row, col = first_row + pixels // SIDE, first_col + pixels % SIDE
    to = (
        DFEATURES
        + ((picture.to(tl.int64) * channels + plane.to(tl.int64)) * image_rows * image_cols)[:, None]
    )
    inside = (plane < channels)[:, None] & ((row < image_rows) & (col < image_cols))[None, :]
    tl.store(
        to + (row.to(tl.int64) * image_cols + col)[None, :], sums.to(DFEATURES.dtype.element_ty), mask=inside
    )


def blocks(channels: int, bins: int, least: int) -> dict:
    """Channels and bins of a program, at least `least` of each."""
    block_c = min(max(tiles.next_power_of_2(channels), least), 64)
    block_b = min(max(tiles.next_power_of_2(bins), 16), BINS)
    return {"BLOCK_C": block_c, "BLOCK_B": block_b, "num_warps": 4, "enable_fp_fusion": False}


def roi_align(
    features: Tensor,  # [B, C, H, W]
    boxes: Tensor,  # [K, 5]
    out_height: int,
    out_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:  # [K, C, h, w]
    options = (out_height, out_width), spatial_scale, sampling_ratio
    check("roi_align", features, boxes, *options)
    if features.dtype == torch.float64 or 0 in features.shape or len(boxes) == 0:
        return roi_align_fwd(features, boxes, out_height, out_width, spatial_scale, sampling_ratio, aligned)
    check_pictures("roi_align", boxes[:, 0], len(features))
    features, boxes = features.contiguous(), boxes.contiguous()
    _, channels, height, width = features.shape
    out = features.new_empty((len(boxes), channels, out_height, out_width))
    form = blocks(channels, out_height * out_width, 1)
    grid = (
        len(boxes) * tiles.cdiv(channels, form["BLOCK_C"]),
        tiles.cdiv(out_height * out_width, form["BLOCK_B"]),
    )
    with torch.cuda.device_of(features):
        _forward[grid](
            features, boxes, out, channels, height, width, out_height, out_width, spatial_scale,
            0.5 if aligned else 0.0, sampling_ratio, aligned, **form,
        )  # fmt: skip
    return out


def roi_align_bwd(
    dout: Tensor,  # [K, C, h, w]
    boxes: Tensor,  # [K, 5]
    batch: int,
    height: int,
    width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
    needs: Sequence[bool],
) -> Tensor:  # [B, C, H, W]
    options = batch, height, width, spatial_scale, sampling_ratio
    check_backward("roi_align_bwd", dout, boxes, *options)
    if dout.dtype == torch.float64 or 0 in (*dout.shape, batch, height, width) or not needs[0]:
        return reference_bwd(dout, boxes, *options, aligned, needs)
    check_pictures("roi_align_bwd", boxes[:, 0], batch)
    dout, boxes = dout.contiguous(), boxes.contiguous()
    count, channels, h, w = dout.shape
    dfeatures = dout.new_empty((batch, channels, height, width))
    form = blocks(channels, h * w, 16)
    squares = tiles.cdiv(height, SIDE) * tiles.cdiv(width, SIDE)
    with torch.cuda.device_of(dout):
        _backward[squares, batch * tiles.cdiv(channels, form["BLOCK_C"])](
            dout, boxes, dfeatures, count, channels, height, width, h, w, spatial_scale,
            0.5 if aligned else 0.0, sampling_ratio, aligned, SIDE=SIDE, SOME=NEIGHBOURS, **form,
        )  # fmt: skip
    return dfeatures
