"""linear_distillation (contract in ops/linear_distillation.py): cuBLAS and kernels for rows.

Of a chunk of rows: products give the logits of student and teacher in float32; the kernels of `distillation`
read them for the losses and for the gradients of the student's, in the dtype of its hidden states; further
products give the gradients of its operands. With an offline teacher one kernel does what theirs do.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from vlmkernels.reference.linear_distillation import check_sizes
from vlmkernels.reference.linear_distillation import linear_distillation_bwd as reference_bwd
from vlmkernels.reference.linear_distillation import linear_distillation_fwd as reference_fwd
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_classes as layer
from vlmkernels.triton import _rows as rows
from vlmkernels.triton import _tiles as tiles
from vlmkernels.triton import distillation as of_logits
from vlmkernels.triton.distillation import _both, _exp, _log_1p_exp, _log_odds, _shift, _take_in, _weighted

READ = 4096  # classes of a row at once
NAMED = 1024  # classes of an offline teacher at once


@triton.jit
def _outcome(log_s, log_p, s, p, beta, rest, log_beta, log_rest, JSD: tl.constexpr):
    """The divergence of one outcome, and its derivative by s, up to a constant, times s."""
    if JSD:
        odds = _log_odds(log_s, log_p, log_beta - log_rest)
        log = _log_1p_exp(-tl.abs(odds))
        slope = -(rest * s) * ((tl.maximum(odds, 0.0) + log_rest) + log)
        divergence = slope - (beta * p) * ((tl.maximum(-odds, 0.0) + log_beta) + log)
    else:
        slope = -p
        divergence = _weighted(p, log_p - log_s)
    return divergence, slope


@triton.jit
def _classes(INDICES, at, named, classes):
    """Some of the teacher's classes, and which of them are any."""
    index = tl.load(INDICES + at, mask=at < named, other=0)
    return index, (at < named) & (index >= 0) & (index < classes)


@triton.jit
def _offline(
    Z,  # [rows, padded] float32: the student's logits without the bias; -inf in the teacher's classes after
    DZ,  # [rows, padded]: the gradient by Z; or None
    BIAS,  # [padded] or None
    TARGET,  # [rows] int64 or None
    LOG_PROBS,  # [rows, k]
    INDICES,  # [rows, k] int64, the teacher's classes
    TAKEN,  # [rows, k] float32: their logits
    DLOSS,  # [1] or [rows]; or None: 1
    SHARE,  # [1] float32: of a row in the mean; or None
    LOSS,  # [rows] float32
    WRONG,  # [rows] uint8: whether INDICES are other than different classes
    stride_dloss,
    share,  # as SHARE, where the host knows it
    temperature,
    classes,
    k,
    ignore_index,
    inv_t,  # 1 / T
    soft,  # (1 - hard_weight) T
    hard_weight,
    beta,
    rest,  # 1 - beta
    log_beta,
    log_rest,
    JSD: tl.constexpr,
    HARD: tl.constexpr,  # with the cross-entropy
    TAIL: tl.constexpr,  # there are other classes, which are one outcome
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The loss of a row of an offline teacher, and its gradient."""
    row = tl.program_id(0).to(tl.int64)
    counted = True
    if TARGET is not None:
        target = tl.load(TARGET + row)
        counted = target != ignore_index
    padded = (classes + 15) // 16 * 16
    end, named = tl.where(counted, padded, 0), tl.where(counted, k, 0)
    Z += row * padded
    LOG_PROBS += row * k
    INDICES += row * k
    TAKEN += row * k
    logit = tl.full((), 0.0, tl.float32)
    if HARD:
        is_class = counted & (target >= 0) & (target < classes)
        logit = tl.load(Z + target, mask=is_class, other=0.0)
        if BIAS is not None:
            logit += tl.load(BIAS + target, mask=is_class, other=0.0).to(tl.float32)
    high = tl.full((), -float("inf"), tl.float32)
    for first in range(0, named, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        index, inside = _classes(INDICES, at, named, classes)
        z = tl.load(Z + index, mask=inside, other=-float("inf"))
        if BIAS is not None:
            z += tl.load(BIAS + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(TAKEN + at, z, mask=at < named)
        tl.debug_barrier()  # all warps have read them
        tl.store(Z + index, at.to(tl.float32), mask=inside)  # which stays if no other is of the same class
        high = tl.maximum(high, tl.max(z, 0))
    tl.debug_barrier()
    wrong = tl.full((), 0, tl.int32)
    for first in range(0, named, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        index, inside = _classes(INDICES, at, named, classes)
        kept = tl.load(Z + index, mask=inside, other=-1.0) == at.to(tl.float32)
        wrong = tl.maximum(wrong, tl.max(((at < named) & (kept == 0)).to(tl.int32), 0))
        tl.debug_barrier()
        tl.store(Z + index, tl.full([BLOCK_K], -float("inf"), tl.float32), mask=inside)
    tl.store(WRONG + row, wrong.to(tl.uint8))
    tl.debug_barrier()

    cols = tl.arange(0, BLOCK)
    top = tl.full((), -float("inf"), tl.float32)
    others = tl.full((), 0.0, tl.float32)
    top_p, sum_p, cross, hard = top, others, others, others
    for first in range(0, end, BLOCK):
        z, q = _both(Z, BIAS, None, None, first + cols, end)
        top, others, top_p, sum_p, cross, hard = _take_in(
            z, q, top, others, top_p, sum_p, cross, hard, inv_t, "none", HARD
        )
    high = _shift(tl.maximum(high, top))
    moved = _shift(top) - high
    total = _weighted(others, _exp(moved * inv_t))
    hard_total = _weighted(hard, _exp(moved))
    known = tl.full((), 0.0, tl.float32)
    for first in range(0, named, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        above = tl.load(TAKEN + at, mask=at < named, other=-float("inf")) - high
        log_p = tl.load(LOG_PROBS + at, mask=at < named, other=-float("inf")).to(tl.float32)
        total += tl.sum(_exp(above * inv_t), 0)
        hard_total += tl.sum(_exp(above), 0)
        known += tl.sum(_exp(log_p), 0)

    log_total = tl.log(total)
    divergence = tl.full((), 0.0, tl.float32)
    mean = divergence
    s_others = _weighted(others, _exp(moved * inv_t)) / total
    if TAIL:
        tail = tl.maximum(1.0 - known, 0.0)
        log_s = (tl.log(others) + moved * inv_t) - log_total
        divergence, mean = _outcome(log_s, tl.log(tail), s_others, tail, beta, rest, log_beta, log_rest, JSD)
    slope_others = mean
    for first in range(0, named, BLOCK_K):
        at = first + tl.arange(0, BLOCK_K)
        a = (tl.load(TAKEN + at, mask=at < named, other=-float("inf")) - high) * inv_t
        log_p = tl.load(LOG_PROBS + at, mask=at < named, other=-float("inf")).to(tl.float32)
        more, slope = _outcome(
            a - log_total, log_p, _exp(a) / total, _exp(log_p), beta, rest, log_beta, log_rest, JSD
        )
        divergence += tl.sum(more, 0)
        mean += tl.sum(slope, 0)
    loss = soft * (temperature * divergence)
    if HARD:
        loss += hard_weight * (tl.log(hard_total) - (logit - high))
    tl.store(LOSS + row, tl.where(counted, loss, 0.0))

    if DZ is not None:
        DZ += row * padded
        u = share
        if DLOSS is not None:
            u *= tl.load(DLOSS + row * stride_dloss).to(tl.float32)
        if SHARE is not None:
            u *= tl.load(SHARE)
        among_others = (u * soft) * (slope_others - mean * s_others) / others
        among_others = tl.where(others == 0.0, 0.0, among_others)
        of_hard = tl.where(others == 0.0, 0.0, (u * hard_weight) * _exp(moved) / hard_total)
        low = _shift(top)
        for first in range(0, padded, BLOCK):
            at = first + cols
            z, q = _both(Z, BIAS, None, None, at, end)
            g = among_others * _exp((z - low) * inv_t)
            if HARD:
                g += of_hard * _exp(z - low)
                g = tl.where(counted & (at == target), g - u * hard_weight, g)
            tl.store(DZ + at, g.to(DZ.dtype.element_ty), mask=at < padded)
        tl.debug_barrier()
        for first in range(0, named, BLOCK_K):
            at = first + tl.arange(0, BLOCK_K)
            index, inside = _classes(INDICES, at, named, classes)
            above = tl.load(TAKEN + at, mask=at < named, other=-float("inf")) - high
            log_p = tl.load(LOG_PROBS + at, mask=at < named, other=-float("inf")).to(tl.float32)
            a = above * inv_t
            s = _exp(a) / total
            more, slope = _outcome(a - log_total, log_p, s, _exp(log_p), beta, rest, log_beta, log_rest, JSD)
            g = (u * soft) * (slope - mean * s)
            if HARD:
                p = _exp(above) / hard_total
                g += (u * hard_weight) * tl.where(index == target, p - 1.0, p)
            tl.store(DZ + index, g.to(DZ.dtype.element_ty), mask=inside)


def linear_distillation(*inputs) -> tuple[Tensor, ...]:
    """(loss, dhidden, dweight, dbias); a gradient that is not needed has size 0."""
    if _of_reference(inputs):
        return reference_fwd(*inputs)
    losses, *grads = _sweep("linear_distillation", None, *(*inputs[:-3], inputs[-3:]))
    weight, target, ignore_index, reduction = inputs[1], inputs[8], *inputs[-5:-3]
    target = None if target is None else target.contiguous()
    loss = of_logits.reduced("linear_distillation", losses, target, len(weight), ignore_index, reduction)
    return loss, *grads


def linear_distillation_bwd(dloss: Tensor, *inputs) -> tuple[Tensor, ...]:
    """(dhidden, dweight, dbias); a gradient that is not needed has size 0."""
    if _of_reference(inputs):
        return reference_bwd(dloss, *inputs)
    return _sweep("linear_distillation_bwd", dloss, *inputs)[1:]


def _of_reference(inputs: Sequence) -> bool:
    """Whether the reference computes a call: in float64, and without rows, classes or features."""
    layers = [x for x in inputs[:4] if x is not None]
    return any(x.dtype == torch.float64 or x.numel() == 0 for x in layers)


def _sweep(
    op: str,
    dloss: Tensor | None,  # [] or [n]; None: 1
    hidden: Tensor,  # [n, depth]
    weight: Tensor,  # [classes, depth]
    teacher_hidden: Tensor | None,  # [n, teacher's depth]
    teacher_weight: Tensor | None,  # [classes, teacher's depth]
    student_bias: Tensor | None,  # [classes]
    teacher_bias: Tensor | None,  # [classes]
    log_probs: Tensor | None,  # [n, k]
    indices: Tensor | None,  # [n, k] int64
    target: Tensor | None,  # [n] int64
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, ...]:
    """(losses, dhidden, dweight, dbias); the losses are in any order if they are to be reduced."""
    layers = (hidden, weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    options = (temperature, divergence, beta, hard_weight, ignore_index)
    check_sizes(op, *layers, log_probs, indices, target, *options, reduction, dloss=dloss)
    (n, classes), formed = (len(hidden), len(weight)), any(needs)
    if target is not None:
        target = target.contiguous()
    share, shares = 1.0, None
    if formed:
        share, shares = of_logits.share_of(hidden, target, classes, ignore_index, reduction)
    if hard_weight == 1:  # the teacher is not read
        teacher_hidden = log_probs = None
    online, offline = teacher_hidden is not None, log_probs is not None
    bytes_of_pair = 4 * (1 + online) + hidden.itemsize * formed
    held = pairwise.chunk_rows(n, classes, bytes_of_pair, layer.CHUNK_BYTES)
    padded = tiles.cdiv(classes, 16) * 16  # columns past the classes are classes that cannot be
    logits = hidden.new_empty((1 + online, held, padded), dtype=torch.float32)
    if padded > classes:
        logits[:, :, classes:] = -torch.inf
    slopes = hidden.new_empty((held if formed else 0, padded))
    stats = hidden.new_empty((held, 6), dtype=torch.float32)
    with torch.cuda.device_of(hidden):
        batch = layer.Rows(n, held, target, ignore_index)
        target, log_probs, indices = (batch.ordered(x) for x in (target, log_probs, indices))
        if dloss is not None and dloss.dim():
            dloss = batch.ordered(dloss)
        gain = _gain(hidden, dloss, target, share, shares, *options) if formed else None
        if gain is not None:
            shares = gain if shares is None else shares * gain
        student, teacher = _Layer(batch, hidden, weight, student_bias, padded), None
        if teacher_hidden is not None and teacher_weight is not None:
            teacher = _Layer(batch, teacher_hidden, teacher_weight, teacher_bias, padded)
        losses = batch.empty(hidden, (n,), torch.float32)
        wrong = batch.empty(hidden, (n if offline else 0,), torch.uint8)
        grads = layer.LayerGrads(batch, student.hidden, student.weight, student_bias, needs, gain)
        for start, stop in batch.chunks():
            part, size = slice(start, stop), stop - start
            h, z, q = *student.logits(start, stop, logits[0]), None
            if teacher is not None:
                q = teacher.logits(start, stop, logits[1])[1]
            dz = slopes[:size] if formed else None
            of, u = (x[part] if x is not None and x.dim() else x for x in (target, dloss))
            if log_probs is not None and indices is not None:
                _offline_rows(
                    z, dz, student.bias, of, log_probs[part], indices[part], u, shares, losses[part],
                    wrong[part], share, classes, *options,
                )  # fmt: skip
            else:
                biases = student.bias, None if teacher is None else teacher.bias
                of_logits.losses_of(z, q, of, losses[part], stats[:size], *options, biases=biases)
                if dz is not None:
                    of_logits.gradients_of(
                        u, z, q, of, stats[:size], dz, share, shares, *options, biases=biases
                    )
            if dz is not None:
                grads.add(dz[:, :classes], h, start)
    if offline and wrong.is_cuda:  # there it does not wait
        torch._assert_async(
            (wrong == 0).all(), f"{op}: the indices of teacher_topk must be in [0, V) and differ in each row"
        )
    if reduction == "none" and batch.order is not None:
        losses = torch.empty_like(losses).index_copy_(0, batch.order, losses)
    return losses, *grads.results()


class _Layer:
    """The logits of a student or a teacher, a chunk of rows at a time, without the bias."""

    def __init__(
        self,
        batch: layer.Rows,
        hidden: Tensor,  # [n, depth]
        weight: Tensor,  # [classes, depth]
        bias: Tensor | None,  # [classes]
        padded: int,
    ):
        self.batch = batch
        self.hidden, self.weight = tiles.rows_contiguous(hidden), tiles.rows_contiguous(weight)
        if bias is not None:
            bias = (bias if len(bias) == padded else pad(bias, (0, padded - len(bias)))).contiguous()
        self.bias = bias  # [padded]
        self.taken = hidden.new_empty((0 if batch.target is None else batch.held, hidden.shape[1]))

    def logits(self, start: int, stop: int, out: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, [stop - start, depth], and their logits in `out`, [stop - start, padded]."""
        h, z = self.batch.take(self.hidden, start, stop, self.taken), out[: stop - start]
        tiles.product(h, self.weight.T, z[:, : len(self.weight)])
        return h, z


def _gain(
    hidden: Tensor,
    dloss: Tensor | None,  # [] or [n]
    target: Tensor | None,  # [n]
    share: float,
    shares: Tensor | None,  # []
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
) -> Tensor | None:  # []
    """A factor that moves the gradients of the logits into the range of float16, if that is their dtype.

    s - p and that of the JSD are at most 1; that of KL(s || p) is a quarter of the widest range of
    log(s / p), which is taken to be 256.
    """
    if hidden.dtype != torch.float16:
        return None
    largest = (1 - hard_weight) * temperature * (64 if divergence == "reverse_kl" else 1) + hard_weight
    peak = hidden.new_full((), share * largest, dtype=torch.float32)
    if dloss is not None:
        if dloss.dim() and target is not None:
            dloss = dloss.where(target != ignore_index, 0)
        peak = peak * dloss.abs().amax()
    return pairwise.gain_for(hidden.dtype, peak if shares is None else peak * shares)


def _offline_rows(
    z: Tensor,  # [size, padded]
    dz: Tensor | None,  # [size, padded]
    bias: Tensor | None,  # [padded]
    target: Tensor | None,  # [size]
    log_probs: Tensor,  # [size, k]
    indices: Tensor,  # [size, k]
    dloss: Tensor | None,  # [] or [size]
    shares: Tensor | None,  # []
    losses: Tensor,  # [size]
    wrong: Tensor,  # [size] uint8
    share: float,
    classes: int,
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
) -> None:
    """Writes the losses of the rows and the gradients by their logits, which are lost."""
    (size, padded), k = z.shape, log_probs.shape[1]
    block, named = min(tiles.next_power_of_2(padded), READ), max(16, min(tiles.next_power_of_2(k), NAMED))
    _offline[(size,)](
        z, dz, bias, target, log_probs.contiguous(), indices.contiguous(), z.new_empty((size, k)), dloss,
        shares, losses, wrong, dloss.stride(0) if dloss is not None and dloss.dim() else 0, share,
        temperature, classes, k, ignore_index, min(1 / temperature, 2.0**127),
        *of_logits.weights(temperature, beta, hard_weight), divergence == "jsd", hard_weight > 0,
        k < classes, block, named, **rows.options(block),
    )  # fmt: skip
