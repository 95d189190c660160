"""Distillation of a teacher's logits: a divergence of softmaxes at temperature T, and a cross-entropy.

With s = softmax(student / T), p = softmax(teacher / T), m = beta p + (1 - beta) s and h = hard_weight:

    l_i = (1 - h) T^2 d_i + h cross_entropy(student_i, target_i)
    forward_kl: d = KL(p || s)
    reverse_kl: d = KL(s || p)
    jsd:        d = beta KL(p || m) + (1 - beta) KL(s || m)

A class without probability adds 0 to KL(x || y), whatever y gives it; a term of weight 0 is not computed.
With u_i = dL/dl_i, 0 on ignored rows:

    dstudent = u ((1 - h) T D + h (softmax(student) - onehot(target)))
    forward_kl: D = s - p
    reverse_kl: D = s (log(s / p) - d)
    jsd:        D = (1 - beta) s (log(s / m) - KL(s || m))
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("batchmean", "mean", "sum", "none")


def distillation(
    student_logits: Tensor,  # [N, V]
    teacher_logits: Tensor,  # [N, V]
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    target: Tensor | None = None,  # [N] int64
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> Tensor:
    """The definition, differentiable by autograd."""
    options = (temperature, divergence, beta, hard_weight, ignore_index, reduction)
    check("distillation", student_logits, teacher_logits, target, *options)
    check_targets("distillation", target, student_logits.shape[1], ignore_index)
    student, teacher, counted = _rows(student_logits, teacher_logits, target, ignore_index)
    log_s = log_p = None
    if hard_weight < 1:
        log_s = _centred(student, temperature).log_softmax(1)
        log_p = _centred(teacher, temperature).log_softmax(1)
    return mixed_loss(student, log_s, log_p, counted, target, *options)


def mixed_loss(
    student: Tensor,  # [N, V]
    log_s: Tensor | None,  # [N, K], of what the divergence compares; None if hard_weight is 1
    log_p: Tensor | None,  # [N, K]
    counted: Tensor,  # [N] bool
    target: Tensor | None,  # [N] int64
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """The divergence of two distributions with the cross-entropy of the student's logits, reduced."""
    losses = student.new_zeros(len(student))
    if log_s is not None and log_p is not None:
        losses = (1 - hard_weight) * temperature * (temperature * _divergence(log_s, log_p, divergence, beta))
    if target is not None and hard_weight > 0:
        hard = F.cross_entropy(student, target, reduction="none", ignore_index=ignore_index)
        losses = losses + hard_weight * hard
    losses = losses.where(counted, 0)
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp_min(1)


def distillation_fwd(
    student_logits,
    teacher_logits,
    target,
    temperature,
    divergence,
    beta,
    hard_weight,
    ignore_index,
    reduction,
    need_student,
):
    """The raw op: loss, what the backward needs of the rows, [N, 6], and dstudent, of size 0 unless needed.

    The maximum of the student's logits, the sum of exp((student - maximum) / T), the same of the teacher; the
    mean of D's factor in brackets, d or KL(s || m); the sum of exp(student - maximum).
    """
    loss = distillation(
        student_logits,
        teacher_logits,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        target=target,
        hard_weight=hard_weight,
        ignore_index=ignore_index,
        reduction=reduction,
    )
    student, teacher, _ = _rows(student_logits, teacher_logits, target, ignore_index)
    stats = student.new_zeros(len(student), 6)
    if student.shape[1]:
        stats[:, 0], stats[:, 2] = student.amax(1), teacher.amax(1)
        stats[:, 1] = _centred(student, temperature).exp().sum(1)
        stats[:, 3] = _centred(teacher, temperature).exp().sum(1)
        stats[:, 5] = _centred(student, 1.0).exp().sum(1)
        log_s, log_p = (_centred(x, temperature).log_softmax(1) for x in (student, teacher))
        if divergence == "reverse_kl":
            s = _centred(student, temperature).softmax(1)
            ratio = _log_ratio(student, teacher, stats[:, :4, None].unbind(1), temperature)
            stats[:, 4] = (s * ratio.where(s != 0, 0)).sum(1)
        elif divergence == "jsd":
            stats[:, 4] = _kl(log_s, _log_mixture(log_s, log_p, beta))
    rest = (temperature, divergence, beta, hard_weight, ignore_index, reduction, [need_student])
    dloss = loss.new_ones(loss.shape)
    return loss, stats, distillation_bwd(dloss, student_logits, teacher_logits, target, stats, *rest)


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
    check("distillation_bwd", student_logits, teacher_logits, target, *options, stats=stats, dloss=dloss)
    check_targets("distillation_bwd", target, student_logits.shape[1], ignore_index)
    if not needs[0]:
        return student_logits.new_empty(0)
    student, teacher, counted = _rows(student_logits, teacher_logits, target, ignore_index)
    top_s, sum_s, top_p, sum_p, mean, hard_sum = stats.to(student.dtype)[:, :, None].unbind(1)  # [N, 1] each
    u = dloss.to(student.dtype) / (1 if reduction in ("sum", "none") else counted.sum().clamp_min(1))
    u = u.expand(len(student))[:, None]
    dstudent = torch.zeros_like(student)
    if hard_weight < 1:
        log_s = (student - top_s) / temperature - sum_s.log()
        log_p = (teacher - top_p) / temperature - sum_p.log()
        s, p = log_s.exp(), log_p.exp()
        if divergence == "forward_kl":
            d = s - p
        elif divergence == "reverse_kl":
            ratio = _log_ratio(student, teacher, (top_s, sum_s, top_p, sum_p), temperature)
            d = s * (ratio - mean).where(s != 0, 0)
        else:
            d = (1 - beta) * s * (log_s - _log_mixture(log_s, log_p, beta) - mean).where(s != 0, 0)
        dstudent = (1 - hard_weight) * temperature * u * d
    if target is not None and hard_weight > 0:
        one_hot = torch.arange(student.shape[1], device=target.device) == target[:, None]  # [N, V]
        dstudent = dstudent + hard_weight * u * ((student - top_s).exp() / hard_sum - one_hot.to(u.dtype))
    return dstudent.where(counted[:, None], 0).to(student_logits.dtype).contiguous()


def _rows(student: Tensor, teacher: Tensor, target: Tensor | None, ignore_index: int):
    """The logits in the precision of sums, 0 on ignored rows, and which rows are counted."""
    work = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    if target is None:
        counted = torch.ones(len(student), dtype=torch.bool, device=student.device)
    else:
        counted = target != ignore_index
    kept = counted[:, None]
    return student.where(kept, 0).to(work), teacher.detach().where(kept, 0).to(work), counted


def _centred(logits: Tensor, temperature: float) -> Tensor:
    """(logits - maximum) / T, which rounds less than logits / T."""
    return (logits - logits.detach().amax(1, keepdim=True)) / temperature if logits.shape[1] else logits


def _log_ratio(student: Tensor, teacher: Tensor, stats: Sequence[Tensor], temperature: float) -> Tensor:
    """log s - log p [N, V]: the rounding of its constant, log(sum_p / sum_s), is that of its mean as well."""
    top_s, sum_s, top_p, sum_p = stats  # [N, 1] each
    return ((student - top_s) / temperature - (teacher - top_p) / temperature) + (sum_p.log() - sum_s.log())


def _divergence(log_s: Tensor, log_p: Tensor, divergence: str, beta: float) -> Tensor:  # [N]
    if divergence == "forward_kl":
        return _kl(log_p, log_s)
    if divergence == "reverse_kl":
        return _kl(log_s, log_p)
    log_m = _log_mixture(log_s, log_p, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_s, log_m)


def _kl(log_x: Tensor, log_y: Tensor) -> Tensor:
    """sum x (log x - log y), [N]."""
    x = log_x.exp()
    return (x * (log_x - log_y).where(x != 0, 0)).sum(1)


def _log_mixture(log_s: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """log(beta p + (1 - beta) s); anything where both are 0."""
    some = (log_s.exp() != 0) | (log_p.exp() != 0)
    log_s, log_p = log_s.where(some, 0), log_p.where(some, 0)
    return torch.logaddexp(log_p + math.log(beta), log_s + math.log1p(-beta))


def check(
    op: str,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
    reduction: str,
    *,
    stats: Tensor | None = None,
    dloss: Tensor | None = None,
) -> None:
    """The raw ops get any tensors."""
    faults = option_faults(target, temperature, divergence, beta, hard_weight, reduction)
    n = student.shape[0] if student.dim() else 0
    if student.dim() != 2 or student.shape != teacher.shape:
        faults.append(
            f"student_logits and teacher_logits must have the same shape [N, V], "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if target is not None and (target.shape != (n,) or target.dtype != torch.int64):
        faults.append(f"target must be int64 {[n]}, got {target.dtype} {list(target.shape)}")
    if stats is not None and stats.shape != (n, 6):
        faults.append(f"stats must be {[n, 6]}, got {list(stats.shape)}")
    wanted = (n,) if reduction == "none" else ()
    if dloss is not None and dloss.shape != wanted:
        faults.append(f"dloss must be {list(wanted)}, got {list(dloss.shape)}")
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))


def check_targets(op: str, target: Tensor | None, v: int, ignore_index: int) -> None:
    """Each in [0, V), or the index that is ignored."""
    if target is None:
        return
    valid = ((target == ignore_index) | ((target >= 0) & (target < v))).all()
    if target.is_cuda:  # without waiting for the device
        torch._assert_async(valid, f"{op}: target must be in [0, V) or ignore_index")
    elif not valid:
        outside = target[(target != ignore_index) & ((target < 0) | (target >= v))]
        raise IndexError(f"{op}: target must be in [0, V = {v}) or {ignore_index}, got {int(outside[0])}")


def option_faults(
    target: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    reduction: str,
) -> list[str]:
    faults = []
    if not 0 < temperature < math.inf:
        faults.append(f"temperature must be positive and finite, got {temperature}")
    if divergence not in DIVERGENCES:
        faults.append(f"divergence must be 'forward_kl', 'reverse_kl' or 'jsd', got {divergence!r}")
    if not 0 < beta < 1:
        faults.append(f"beta must be in (0, 1), got {beta}")
    if not 0 <= hard_weight <= 1:
        faults.append(f"hard_weight must be in [0, 1], got {hard_weight}")
    if target is None and hard_weight > 0:
        faults.append(f"target must be given with hard_weight {hard_weight}")
    if reduction not in REDUCTIONS:
        faults.append(f"reduction must be 'batchmean', 'mean', 'sum' or 'none', got {reduction!r}")
    return faults
