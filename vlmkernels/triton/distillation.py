"""distillation (contract in ops/distillation.py): a program reads a row of student and teacher together.

Sums are relative to the maxima of the classes read so far.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.reference.distillation import check
from vlmkernels.reference.distillation import distillation_bwd as reference_bwd
from vlmkernels.reference.distillation import distillation_fwd as reference_fwd
from vlmkernels.triton import _rows as rows
from vlmkernels.triton import _tiles as tiles

READ = 4096  # classes at once
HELD = 16384  # classes of a row that the JSD keeps in registers until both softmaxes are known
WRITTEN = 2048  # classes of a program of the backward
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
MEANS = ("mean", "batchmean")
Biases = tuple[Tensor | None, Tensor | None]  # of the student's logits and of the teacher's, [classes]


@triton.jit
def _both(STUDENT, STUDENT_BIAS, TEACHER, TEACHER_BIAS, cols, end):
    """Logits of some classes; -inf past the end."""
    z = tl.load(STUDENT + cols, mask=cols < end, other=-float("inf")).to(tl.float32)
    if STUDENT_BIAS is not None:
        z += tl.load(STUDENT_BIAS + cols, mask=cols < end, other=0.0).to(tl.float32)
    q = z
    if TEACHER is not None:
        q = tl.load(TEACHER + cols, mask=cols < end, other=-float("inf")).to(tl.float32)
        if TEACHER_BIAS is not None:
            q += tl.load(TEACHER_BIAS + cols, mask=cols < end, other=0.0).to(tl.float32)
    return z, q


@triton.jit
def _exp(x):
    """Subnormal results are 0, for which tl.exp takes further steps."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def _shift(top):
    """Finite: exp(-inf - shift) is 0, not NaN, where no class can be."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _keep(old, new, inv_t):
    """The factor of sums that were relative to the maximum `old`."""
    return tl.where(old == -float("inf"), 0.0, _exp((old - new) * inv_t))


@triton.jit
def _weighted(weight, x):
    """weight * x, 0 where the weight is 0, whatever x is."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def _take_in(
    z, q, old_s, sum_s, old_p, sum_p, cross, hard, inv_t, DIVERGENCE: tl.constexpr, OWN: tl.constexpr
):
    """Maxima and sums of a row with further classes: (student's, teacher's, of exp(x) (x - y), at T = 1)."""
    top_s = tl.maximum(old_s, tl.max(z, 0))
    top_p = old_p
    keep_s = _keep(old_s, top_s, inv_t)
    above = z - _shift(top_s)
    a = above * inv_t
    s = _exp(a)
    if OWN:
        hard = hard * _keep(old_s, top_s, 1.0) + tl.sum(_exp(above), 0)
    if DIVERGENCE != "none":
        top_p = tl.maximum(old_p, tl.max(q, 0))
        keep_p = _keep(old_p, top_p, inv_t)
        b = (q - _shift(top_p)) * inv_t
        p = _exp(b)
        moved = ((_shift(old_p) - _shift(top_p)) - (_shift(old_s) - _shift(top_s))) * inv_t
        if DIVERGENCE == "forward_kl":
            cross = _weighted(keep_p, cross + sum_p * moved) + tl.sum(_weighted(p, b - a), 0)
        if DIVERGENCE == "reverse_kl":
            cross = _weighted(keep_s, cross - sum_s * moved) + tl.sum(_weighted(s, a - b), 0)
        sum_p = sum_p * keep_p + tl.sum(p, 0)
    sum_s = sum_s * keep_s + tl.sum(s, 0)
    return top_s, sum_s, top_p, sum_p, cross, hard


@triton.jit
def _log_odds(x, y, offset):
    """log(beta p / ((1 - beta) s)) from the exponents of s and p; finite where one of them is 0."""
    return tl.minimum(tl.maximum(y - x, -1e30), 1e30) + offset


@triton.jit
def _log_1p_exp(x):
    """log(1 + exp(x)) for x <= 0, to 5e-9 and the rounding."""
    r = _exp(x)
    log = tl.fma(r, 3.930459264665842e-3, -2.385546453297138e-2)
    log = tl.fma(log, r, 6.808470189571381e-2)
    log = tl.fma(log, r, -1.269088834524155e-1)
    log = tl.fma(log, r, 1.856981813907623e-1)
    log = tl.fma(log, r, -2.467268854379654e-1)
    log = tl.fma(log, r, 3.328966796398163e-1)
    log = tl.fma(log, r, -4.99970942735672e-1)
    return tl.fma(log, r, 9.999993443489075e-1) * r


@triton.jit
def _jsd_sums(z, q, top_s, top_p, inv_t, offset, log_rest, log_beta):
    """The sums of log(m / s) and log(m / p) over some classes, by exponentials of student and teacher."""
    x, y = (z - _shift(top_s)) * inv_t, (q - _shift(top_p)) * inv_t
    odds = _log_odds(x, y, offset)
    log = _log_1p_exp(-tl.abs(odds))
    of_s = _exp(x) * ((tl.maximum(odds, 0.0) + log_rest) + log)
    of_p = _exp(y) * ((tl.maximum(-odds, 0.0) + log_beta) + log)
    return tl.sum(of_s, 0), tl.sum(of_p, 0)


@triton.jit
def _forward(
    STUDENT,  # [n, classes]
    STUDENT_BIAS,  # [classes] or None
    TEACHER,  # [n, classes] or None: no divergence
    TEACHER_BIAS,  # [classes] or None
    TARGET,  # [n] int64 or None
    LOSS,  # [n] float32
    STATS,  # [n, 6] float32
    temperature,
    stride_s,
    stride_t,
    classes,
    ignore_index,
    inv_t,  # 1 / T
    soft,  # (1 - hard_weight) T
    hard_weight,
    beta,
    rest,  # 1 - beta
    log_beta,
    log_rest,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,  # with the cross-entropy
    OWN: tl.constexpr,  # whose exponentials are not those of the divergence
    GRAIN: tl.constexpr,  # divides classes and strides
    LONG: tl.constexpr,  # a row has several blocks
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    counted = True
    if TARGET is not None:
        target = tl.load(TARGET + row)
        counted = target != ignore_index
    end = tl.where(counted, classes // GRAIN * GRAIN, 0)
    STUDENT += row * (stride_s // GRAIN * GRAIN)
    if TEACHER is not None:
        TEACHER += row * (stride_t // GRAIN * GRAIN)
    cols = tl.arange(0, BLOCK)
    top_s = tl.full((), -float("inf"), tl.float32)
    sum_s = tl.full((), 0.0, tl.float32)
    top_p, sum_p, cross, hard = top_s, sum_s, sum_s, sum_s
    if LONG:
        for first in range(0, end, BLOCK):
            z, q = _both(STUDENT, STUDENT_BIAS, TEACHER, TEACHER_BIAS, first + cols, end)
            top_s, sum_s, top_p, sum_p, cross, hard = _take_in(
                z, q, top_s, sum_s, top_p, sum_p, cross, hard, inv_t, DIVERGENCE, OWN
            )
    else:
        z, q = _both(STUDENT, STUDENT_BIAS, TEACHER, TEACHER_BIAS, cols, end)
        top_s, sum_s, top_p, sum_p, cross, hard = _take_in(
            z, q, top_s, sum_s, top_p, sum_p, cross, hard, inv_t, DIVERGENCE, OWN
        )
    if not OWN:
        hard = sum_s
    loss = tl.full((), 0.0, tl.float32)
    mean = loss
    if DIVERGENCE == "forward_kl":
        loss = cross / sum_p + tl.log(sum_s / sum_p)
    if DIVERGENCE == "reverse_kl":
        loss = cross / sum_s + tl.log(sum_p / sum_s)
        mean = loss
    if DIVERGENCE == "jsd":
        offset = (log_beta - log_rest) - tl.log(sum_p / sum_s)
        of_s = tl.full((), 0.0, tl.float32)
        of_p = of_s
        if LONG:
            for first in range(0, end, BLOCK):
                z, q = _both(STUDENT, STUDENT_BIAS, TEACHER, TEACHER_BIAS, first + cols, end)
                more_s, more_p = _jsd_sums(z, q, top_s, top_p, inv_t, offset, log_rest, log_beta)
                of_s += more_s
                of_p += more_p
        else:
            of_s, of_p = _jsd_sums(z, q, top_s, top_p, inv_t, offset, log_rest, log_beta)
        mean = -(of_s / sum_s)
        loss = rest * mean - beta * (of_p / sum_p)
    if DIVERGENCE != "none":
        loss = soft * (temperature * loss)
    if HARD:
        is_class = (target >= 0) & (target < end)
        logit = tl.load(STUDENT + target, mask=is_class, other=0.0).to(tl.float32)
        if STUDENT_BIAS is not None:
            logit += tl.load(STUDENT_BIAS + target, mask=is_class, other=0.0).to(tl.float32)
        loss += hard_weight * (tl.log(hard) - (logit - top_s))
    tl.store(LOSS + row, tl.where(counted, loss, 0.0))
    STATS += row * 6
    tl.store(STATS, tl.where(counted, top_s, 0.0))
    tl.store(STATS + 1, tl.where(counted, sum_s, 0.0))
    tl.store(STATS + 2, tl.where(counted, top_p, 0.0))
    tl.store(STATS + 3, tl.where(counted, sum_p, 0.0))
    tl.store(STATS + 4, tl.where(counted, mean, 0.0))
    tl.store(STATS + 5, tl.where(counted, hard, 0.0))


@triton.jit
def _backward(
    STUDENT,  # [n, classes]
    STUDENT_BIAS,  # [classes] or None
    TEACHER,  # [n, classes] or None: no divergence
    TEACHER_BIAS,  # [classes] or None
    TARGET,  # [n] int64 or None
    STATS,  # [n, 6]
    DLOSS,  # [1] or [n]; or None: 1
    SHARE,  # [1] float32: of a row in the mean; or None
    OUT,  # [n, classes]
    stride_dloss,
    share,  # as SHARE, where the host knows it
    stride_s,
    stride_t,
    classes,
    ignore_index,
    inv_t,  # 1 / T
    soft,  # (1 - hard_weight) T
    hard_weight,
    beta,
    rest,  # 1 - beta
    log_beta,
    log_rest,
    DIVERGENCE: tl.constexpr,
    HARD: tl.constexpr,  # with the cross-entropy
    OWN: tl.constexpr,  # whose exponentials are not those of the divergence
    GRAIN: tl.constexpr,  # divides classes and strides
    BLOCK: tl.constexpr,
):
    classes = classes // GRAIN * GRAIN
    blocks = tl.cdiv(classes, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    counted = True
    if TARGET is not None:
        target = tl.load(TARGET + row)
        counted = target != ignore_index
    STUDENT += row * (stride_s // GRAIN * GRAIN)
    if TEACHER is not None:
        TEACHER += row * (stride_t // GRAIN * GRAIN)
    z, q = _both(STUDENT, STUDENT_BIAS, TEACHER, TEACHER_BIAS, cols, tl.where(counted, classes, 0))
    STATS += row * 6
    top_s, sum_s = tl.load(STATS).to(tl.float32), tl.load(STATS + 1).to(tl.float32)
    u = share
    if DLOSS is not None:
        u *= tl.load(DLOSS + row * stride_dloss).to(tl.float32)
    if SHARE is not None:
        u *= tl.load(SHARE)
    above = z - top_s
    a = above * inv_t
    s = _exp(a) * (1.0 / sum_s)
    g = tl.zeros([BLOCK], tl.float32)
    if DIVERGENCE != "none":
        top_p, sum_p = tl.load(STATS + 2).to(tl.float32), tl.load(STATS + 3).to(tl.float32)
        b = (q - top_p) * inv_t
        p = _exp(b) * (1.0 / sum_p)
        log_sums = tl.log(sum_p / sum_s)
        if DIVERGENCE == "forward_kl":
            g = s - p
        else:
            mean = tl.load(STATS + 4).to(tl.float32)
            if DIVERGENCE == "reverse_kl":
                g = _weighted(s, (a - b) + (log_sums - mean))
            else:
                odds = _log_odds(a, b, (log_beta - log_rest) - log_sums)
                log = (tl.maximum(odds, 0.0) + log_rest) + _log_1p_exp(-tl.abs(odds))
                g = (s * rest) * (-log - mean)
        g *= u * soft
    if HARD:
        if OWN:
            s = _exp(above) * (1.0 / tl.load(STATS + 5).to(tl.float32))
        g += (u * hard_weight) * tl.where(cols == target, s - 1.0, s)
    g = tl.where(counted, g, 0.0)
    tl.store(OUT + row * classes + cols, g.to(OUT.dtype.element_ty), mask=cols < classes)


def losses_of(
    student: Tensor,  # [n, classes]
    teacher: Tensor | None,  # [n, classes]; None if hard_weight is 1
    target: Tensor | None,  # [n] int64, contiguous
    losses: Tensor,  # [n] float32
    stats: Tensor,  # [n, 6] float32
    *options,  # from temperature to ignore_index
    biases: Biases = (None, None),
) -> None:
    """Writes the losses of the rows and what their gradients need."""
    student, teacher, temperature, form = _form(student, teacher, *options)
    classes = student.shape[1]
    block = tiles.next_power_of_2(classes)
    if block > (HELD if form[-4] == "jsd" else READ):
        block = READ
    with torch.cuda.device_of(student):
        _forward[(len(student),)](
            student, biases[0], teacher, biases[1], target, losses, stats, temperature, *form,
            classes > block, block, **rows.options(block),
        )  # fmt: skip


def gradients_of(
    dloss: Tensor | None,  # [] or [n]; None: 1
    student: Tensor,  # [n, classes]
    teacher: Tensor | None,  # [n, classes]; None if hard_weight is 1
    target: Tensor | None,  # [n] int64, contiguous
    stats: Tensor,  # [n, 6]
    out: Tensor,  # [n, classes], contiguous
    share: float,  # by which the gradient of the loss is multiplied
    shares: Tensor | None,  # [], likewise
    *options,  # from temperature to ignore_index
    biases: Biases = (None, None),
) -> None:
    """Writes the gradients by the student's logits."""
    student, teacher, _, form = _form(student, teacher, *options)
    n, classes = student.shape
    block = min(tiles.next_power_of_2(classes), WRITTEN)
    with torch.cuda.device_of(student):
        _backward[(n * tiles.cdiv(classes, block),)](
            student, biases[0], teacher, biases[1], target, stats, dloss, shares, out,
            dloss.stride(0) if dloss is not None and dloss.dim() else 0, share, *form, block,
            **rows.options(block),
        )  # fmt: skip


def _form(
    student: Tensor,
    teacher: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor | None, float, tuple]:
    """Student, teacher and temperature as the kernels take them, and the arguments that both kernels have."""
    student = tiles.rows_contiguous(student)
    teacher = None if teacher is None or hard_weight == 1 else tiles.rows_contiguous(teacher)
    strides, classes = [(student if x is None else x).stride(0) for x in (student, teacher)], student.shape[1]
    own = 0 < hard_weight < 1 and temperature != 1
    if teacher is None:
        divergence, temperature = "none", 1.0
    return (
        student,
        teacher,
        temperature,
        (
            *strides, classes, ignore_index, min(1 / temperature, 2.0**127),
            *weights(temperature, beta, hard_weight), divergence, hard_weight > 0, own,
            rows.grain(classes, *strides),
        ),
    )  # fmt: skip


def weights(temperature: float, beta: float, hard_weight: float) -> tuple[float, ...]:
    """The kernels' soft, hard_weight, beta, rest, log_beta and log_rest."""
    return (
        (1 - hard_weight) * temperature,
        hard_weight,
        beta,
        1 - beta,
        math.log(beta),
        math.log1p(-beta),
    )


def reduced(
    op: str,
    losses: Tensor,  # [n] float32
    target: Tensor | None,  # [n] int64, contiguous
    classes: int,
    ignore_index: int,
    reduction: str,
) -> Tensor:  # [] or [n]
    """The losses, their sum, or their mean over the rows that count. Asserts that each target is a class."""
    if reduction == "none" and target is None:
        return losses
    valid = None if target is None else losses.new_empty((), dtype=torch.uint8)
    total = rows.total(
        losses, len(losses), losses, target=target, classes=classes, ignore_index=ignore_index, valid=valid,
        mean=reduction in MEANS,
    )  # fmt: skip
    if valid is not None and valid.is_cuda:  # there it does not wait
        torch._assert_async(valid, f"{op}: target must be in [0, V) or ignore_index")
    return losses if reduction == "none" else total


def share_of(
    student: Tensor,  # [n, ...]
    target: Tensor | None,  # [n] int64, contiguous
    classes: int,
    ignore_index: int,
    reduction: str,
) -> tuple[float, Tensor | None]:
    """Of a row in the result, two factors: the first is known on the host, the second on the device."""
    n = len(student)
    if reduction not in MEANS:
        return 1.0, None
    if target is None:
        return 1 / n, None
    return 1.0, rows.total(student, n, target=target, classes=classes, ignore_index=ignore_index, mean=True)


def _of_reference(student: Tensor, teacher: Tensor) -> bool:
    return torch.float64 in (student.dtype, teacher.dtype) or student.numel() == 0


def distillation(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    target: Tensor | None,  # [N] int64
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
    reduction: str,
    need_student: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; what the backward needs of the rows, [N, 6]; and dstudent, of size 0 if it is not needed."""
    options = (temperature, divergence, beta, hard_weight, ignore_index, reduction)
    if _of_reference(student_logits, teacher_logits):
        return reference_fwd(student_logits, teacher_logits, target, *options, need_student)
    check("distillation", student_logits, teacher_logits, target, *options)
    target = target if target is None else target.contiguous()
    n, classes = student_logits.shape
    losses, stats = (student_logits.new_empty(shape, dtype=torch.float32) for shape in ((n,), (n, 6)))
    losses_of(student_logits, teacher_logits, target, losses, stats, *options[:-1])
    loss = reduced("distillation", losses, target, classes, ignore_index, reduction)
    dstudent = student_logits.new_empty(0)
    if need_student:
        dstudent = _gradients(None, student_logits, teacher_logits, target, stats, *options)
    return loss, stats, dstudent


def distillation_bwd(
    dloss: Tensor,  # [] or [N]
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    target: Tensor | None,  # [N] int64
    stats: Tensor,  # [N, 6]
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
    reduction: str,
    needs: Sequence[bool],
) -> Tensor:
    """dstudent, of size 0 if it is not needed."""
    options = (temperature, divergence, beta, hard_weight, ignore_index, reduction)
    if _of_reference(student_logits, teacher_logits):
        return reference_bwd(dloss, student_logits, teacher_logits, target, stats, *options, needs)
    check("distillation_bwd", student_logits, teacher_logits, target, *options, stats=stats, dloss=dloss)
    if not needs[0]:
        return student_logits.new_empty(0)
    target = target if target is None else target.contiguous()
    return _gradients(dloss, student_logits, teacher_logits, target, stats.contiguous(), *options)


def _gradients(dloss, student, teacher, target, stats, *options) -> Tensor:
    out = student.new_empty(student.shape)
    shares = share_of(student, target, student.shape[1], *options[-2:])
    gradients_of(dloss, student, teacher, target, stats, out, *shares, *options[:-1])
    return out
