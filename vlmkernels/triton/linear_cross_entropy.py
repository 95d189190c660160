"""linear_cross_entropy_sweep (contract in ops/_linear_cross_entropy_sweep.py): cuBLAS and a kernel for rows.

Of a chunk of rows: a product gives their logits in float32; one kernel reads them for the loss and replaces
them by their gradient, in the dtype of the features; further products give the gradients of the operands.
"""

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_chunked as chunked
from vlmkernels.triton import _tiles as tiles

CHUNK_BYTES = 1 << 28  # of logits in memory at once, or those of `pairwise.CHUNK_ROWS` rows
READ = 2048  # classes of a row at once
NOTHING: tl.constexpr = tl.constexpr(-3e38)  # less than any logit; -inf minus it is no NaN


@triton.jit
def _move_rows(
    X,  # [rows, depth]
    FACTOR,  # [1] or None
    TARGET,  # [n] int64, negative for a row that does not count
    ORDER,  # [n] int64, rows that count come first; or None: rows are where they are
    OUT,  # [rows, depth]
    stride_x,
    start,  # of the chunk, in that order
    depth,
    PUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of a chunk, taken from its place or put there, times the factor; 0 if it does not count."""
    row = tl.program_id(0).to(tl.int64)
    place = start + row
    if ORDER is not None:
        place = tl.load(ORDER + place)
    counted = tl.load(TARGET + place) >= 0
    if PUT:
        X += row * stride_x
        OUT += place * depth
    else:
        X += place * stride_x
        OUT += row * depth
    for first in range(0, depth, BLOCK):
        cols = first + tl.arange(0, BLOCK)
        x = tl.load(X + cols, mask=(cols < depth) & counted, other=0.0)
        if FACTOR is not None:
            x *= tl.load(FACTOR)
        tl.store(OUT + cols, x.to(OUT.dtype.element_ty), mask=cols < depth)


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
    TARGET,  # [n] int64, negative for a row that does not count
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


def _move_options(depth: int) -> dict:
    """The launch of `_move_rows`: 8 elements of a lane make a wide access of 16-bit types."""
    block = max(16, min(triton.next_power_of_2(depth), 2048))
    return {"BLOCK": block, "num_warps": max(1, min(block // 256, 8)), "enable_fp_fusion": True}


def _loss_options(classes: int) -> dict:
    """The launch of `_row_losses`, without fusing a product and a sum: see `tiles.launch_options`."""
    block = max(16, min(triton.next_power_of_2(classes), READ))
    return {"BLOCK": block, "num_warps": 8 if block > 1024 else 4, "enable_fp_fusion": False}


def _counted(target: Tensor) -> Callable[[], int]:
    """How many rows count. The host waits when it asks, for what was queued before this call and no longer.

    It cannot wait while a CUDA graph is captured, which then has to do for all of them.
    """
    if target.device.type == "cpu":
        return lambda: int((target >= 0).sum())
    if torch.cuda.is_current_stream_capturing():
        return lambda: len(target)
    count, copied = torch.empty((), dtype=torch.int64, pin_memory=True), torch.cuda.Event()
    count.copy_((target >= 0).sum(), non_blocking=True)
    copied.record()

    def wait() -> int:
        copied.synchronize()
        return int(count)

    return wait


def _chunks(n: int, held: int, counted: Callable[[], int]) -> Iterator[tuple[int, int]]:
    """Where the chunks begin and end; the first one is at work when the host asks how many there are."""
    if n:
        yield 0, min(held, n)
    for start in range(held, counted() if n > held else 0, held):
        yield start, min(start + held, n)


def linear_cross_entropy_sweep(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [N] int64, negative for a row that does not count
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
    held, padded = pairwise.chunk_rows(n, classes, 4, CHUNK_BYTES), triton.cdiv(classes, 16) * 16
    buffer = row_coef.new_empty((held, padded))
    if padded > classes:
        buffer[:, classes:] = 0
    gain = inv_gain = None
    if any(needs) and n:
        peak = row_coef if column_scale is None else row_coef * column_scale.abs().amax()
        gain = pairwise.gain_for(hidden.dtype, peak)
        inv_gain = gain.reciprocal() if gain is not None else None
    make = torch.Tensor.new_zeros if n > held else torch.Tensor.new_empty  # a chunk left out writes nothing
    loss, dhidden = make(row_coef, (n,)), make(hidden, hidden.shape if need_hidden else (0,))
    sums = row_coef.new_empty if n else row_coef.new_zeros
    weight_sums = sums(weight.shape if need_weight else 0)
    bias_sums, ones = sums((1, classes) if need_bias else 0), hidden.new_ones((1, held if need_bias else 0))
    taken, products = hidden.new_empty((held, depth)), row_coef.new_empty((held, depth if need_hidden else 0))
    move = _move_options(depth)
    order, counted = None, lambda: n
    with torch.cuda.device_of(hidden):
        if n > held:
            order, counted = (target < 0).byte().argsort(stable=True), _counted(target)
        for start, stop in _chunks(n, held, counted):
            size, add = stop - start, start > 0
            h, z = taken[:size], buffer[:size]
            dz = z.view(hidden.dtype)[:, :padded] if any(needs) else None
            _move_rows[(size,)](
                hidden, None, target, order, h, hidden.stride(0), start, depth, PUT=False, **move
            )
            tiles.product(h, weight.T, z[:, :classes])
            _row_losses[(size,)](
                z, dz, target, order, bias, column_scale, row_coef, gain, loss, z.stride(0),
                0 if dz is None else dz.stride(0), start, classes, label_smoothing,
                SMOOTHED=label_smoothing > 0, **_loss_options(classes),
            )  # fmt: skip
            if dz is None:
                continue
            g = dz[:, :classes]
            if need_hidden:
                out = products[:size]
                tiles.product(g, weight, out)
                _move_rows[(size,)](
                    out, inv_gain, target, order, dhidden, depth, start, depth, PUT=True, **move
                )
            if need_weight:
                tiles.product(g.T, h, weight_sums, add=add)
            if need_bias:
                tiles.product(ones[:, :size], g, bias_sums, add=add)
    if inv_gain is not None:
        for x in (weight_sums, bias_sums):
            x *= inv_gain
    dbias = bias_sums.reshape(-1).to(weight.dtype if bias is None else bias.dtype)
    return loss, dhidden, weight_sums.to(weight.dtype), dbias
