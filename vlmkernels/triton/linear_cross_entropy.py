"""linear_cross_entropy_sweep (contract in ops/_linear_cross_entropy_sweep.py): cuBLAS and a kernel for rows.

Of a chunk of rows: a product gives their logits in float32; one kernel reads them for the loss and replaces
them by their gradient, in the dtype of the features; further products give the gradients of the operands.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_chunked as chunked
from vlmkernels.triton import _pairwise_classes as layer
from vlmkernels.triton import _tiles as tiles

READ = 2048  # classes of a row at once
NOTHING: tl.constexpr = tl.constexpr(-3e38)  # less than any logit; -inf minus it is no NaN


@triton.jit
def _logits(Z, BIAS, SCALE, cols, classes, padded):
    """(z + bias) scale; -inf past the last class."""
    z = tl.load(Z + cols, mask=cols < padded, other=0.0)
    if BIAS is not None:
        z += tl.load(BIAS + cols, mask=cols < classes, other=0.0).to(tl.float32)
    if SCALE is not None:
        z *= tl.load(SCALE + cols, mask=cols < classes, other=0.0).to(tl.float32)
    return tl.where(cols < classes, z, -float("inf"))


@triton.jit
def _row_losses(
    Z,  # [rows, padded] float32: <h_i, w_j>
    DZ,  # [rows, padded] in the memory of Z: GAIN times the gradient of the loss by Z; or None
    TARGET,  # [n] int64, -1 for a row that does not count
    ORDER,  # [n] int64, rows that count come first; or None: rows are where they are
    BIAS,  # [classes] or None
    SCALE,  # [classes] or None
    COEF,  # [n]
    GAIN,  # [1] or None
    LOSS,  # [n]
    stride_z,
    stride_dz,
    start,  # of the chunk, in that order
    classes,
    smoothing,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The loss of a row, and its gradient in place of its logits."""
    row = tl.program_id(0).to(tl.int64)
    place = start + row
    if ORDER is not None:
        place = tl.load(ORDER + place)
    target = tl.load(TARGET + place).to(tl.int32)
    counted = target >= 0
    Z += row * stride_z
    padded = (classes + 15) // 16 * 16  # masks of whole vectors: columns up to there are memory of the row
    read = tl.where(counted, padded, 0)
    top = tl.full([BLOCK], NOTHING, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)  # of exponentials below the maximum
    logits = tl.zeros([BLOCK], tl.float32)  # their sum
    for first in range(0, read, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        z = _logits(Z, BIAS, SCALE, cols, classes, padded)
        e = tl.exp(-tl.abs(z - top))
        total = tl.where(z > top, total * e + 1.0, total + e)
        top = tl.maximum(top, z)
        if SMOOTHED:
            logits += tl.where(cols < classes, z, 0.0)
    high = tl.max(top, 0)
    log = tl.log(tl.sum(total * tl.exp(top - high), 0))
    hit = tl.load(Z + target, mask=counted, other=0.0)
    if BIAS is not None:
        hit += tl.load(BIAS + target, mask=counted, other=0.0).to(tl.float32)
    if SCALE is not None:
        hit *= tl.load(SCALE + target, mask=counted, other=0.0).to(tl.float32)
    loss = (high - hit) + log
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * ((high - tl.sum(logits, 0) / classes) + log)
    tl.store(LOSS + place, tl.where(counted, loss, 0.0))
    if DZ is not None:
        DZ += row * stride_dz
        each = smoothing / classes
        coef = tl.load(COEF + place)
        if GAIN is not None:
            coef *= tl.load(GAIN)
        for first in range(0, padded, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            z = _logits(Z, BIAS, SCALE, cols, classes, read)
            q = tl.where(cols == target, 1.0 - smoothing + each, each)
            g = (tl.exp((z - high) - log) - q) * coef
            if SCALE is not None:
                g *= tl.load(SCALE + cols, mask=cols < classes, other=0.0).to(tl.float32)
            g = tl.where(counted & (cols < classes), g, 0.0)
            tl.debug_barrier()  # not wider than logits, gradients cover none that is still to be read
            tl.store(DZ + cols, g.to(DZ.dtype.element_ty), mask=cols < padded)


def _loss_options(classes: int) -> dict:
    """The launch of `_row_losses`, without fusing a product and a sum: see `tiles.launch_options`."""
    block = max(16, min(tiles.next_power_of_2(classes), READ))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4, "enable_fp_fusion": False}


def linear_cross_entropy_sweep(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64, -1 for a row that does not count
    bias: Tensor | None,  # [V]
    column_scale: Tensor | None,  # [V]
    row_coef: Tensor,  # [N]
    label_smoothing: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row_loss [N], dhidden [N, D], dweight [V, D], dbias [V]); gradients have size 0 where not needed."""
    needs = (need_hidden, need_weight, need_bias)
    if hidden.dtype == torch.float64:
        return chunked.linear_cross_entropy_sweep(
            hidden, weight, target, bias, column_scale, row_coef, label_smoothing, *needs
        )
    (n, depth), classes = hidden.shape, weight.shape[0]
    hidden, weight = tiles.rows_contiguous(hidden), tiles.rows_contiguous(weight)
    target, row_coef = target.contiguous(), row_coef.contiguous()
    bias, column_scale = (x if x is None else x.contiguous() for x in (bias, column_scale))
    held, padded = pairwise.chunk_rows(n, classes, 4, layer.CHUNK_BYTES), tiles.cdiv(classes, 16) * 16
    buffer = row_coef.new_empty((held, padded))
    if padded > classes:
        buffer[:, classes:] = 0
    gain = None
    if any(needs) and n:
        peak = row_coef if column_scale is None else row_coef * column_scale.abs().amax()
        gain = pairwise.gain_for(hidden.dtype, peak)
    taken = hidden.new_empty((held, depth))
    with torch.cuda.device_of(hidden):
        rows = layer.Rows(n, held, target, -1)
        loss = rows.empty(row_coef, (n,))
        grads = layer.LayerGrads(rows, hidden, weight, bias, needs, gain)
        for start, stop in rows.chunks():
            h, z = rows.take(hidden, start, stop, taken), buffer[: stop - start]
            dz = z.view(hidden.dtype)[:, :padded] if any(needs) else None
            tiles.product(h, weight.T, z[:, :classes])
            _row_losses[(stop - start,)](
                z, dz, target, rows.order, bias, column_scale, row_coef, gain, loss, z.stride(0),
                0 if dz is None else dz.stride(0), start, classes, label_smoothing,
                SMOOTHED=label_smoothing > 0, **_loss_options(classes),
            )  # fmt: skip
            if dz is not None:
                grads.add(dz[:, :classes], h, start)
    return loss, *grads.results()
