"""Distillation of the classes of a linear layer, from the hidden states of a student and of a teacher.

The student's logits are z = h W^T + b, the teacher's likewise, of another width; loss and dz are those of
`distillation`. Or the teacher is given by the log-probabilities of k classes of each row, at temperature T.
Then K = k + 1 outcomes are compared, the last of which is any other class (none if k = V):

    p = [p_1, ..., p_k, max(1 - sum p, 0)]        s = [s_1, ..., s_k, sum of the s_j of other classes]

With b(j) the outcome of class j and r_b the derivative of the divergence d by s_b, up to a constant:

    dz_ij = u_i ((1 - hard_weight) T s_ij (r_b(j) - sum_b s_b r_b) + hard_weight (softmax(z_i)_j - onehot))
    forward_kl: r = -p / s                 jsd: r = (1 - beta) log(s / m)
    dh = dz W    dW = dz^T h    db = sum_i dz_i
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.reference.distillation import (
    _centred,
    _log_mixture,
    check_targets,
    distillation_bwd,
    distillation_fwd,
    mixed_loss,
    option_faults,
)
from vlmkernels.reference.distillation import distillation as of_logits

TopK = tuple[Tensor, Tensor]


def linear_distillation(
    student_hidden: Tensor,  # [N, D_s]
    student_weight: Tensor,  # [V, D_s]
    teacher_hidden: Tensor | None = None,  # [N, D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    *,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    teacher_topk: TopK | None = None,  # log-probabilities [N, k] and classes [N, k] int64
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    target: Tensor | None = None,  # [N] int64
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> Tensor:
    """The definition, with all logits, differentiable by autograd."""
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    log_probs, indices = (None, None) if teacher_topk is None else teacher_topk
    options = (temperature, divergence, beta, hard_weight, ignore_index, reduction)
    check("linear_distillation", *tensors, log_probs, indices, target, *options)
    counted, student, teacher = _logits(*tensors, target, hard_weight, ignore_index)
    if teacher is not None:
        return of_logits(student, teacher, target=target, **_named(options))
    log_s = log_p = None
    if log_probs is not None and indices is not None and hard_weight < 1:
        log_s, log_p = _outcomes(student, *_kept(log_probs, indices, counted, student), temperature)
    return mixed_loss(student, log_s, log_p, counted, target, *options)


def _named(options: tuple) -> dict:
    names = ("temperature", "divergence", "beta", "hard_weight", "ignore_index", "reduction")
    return dict(zip(names, options, strict=True))


def work_dtype(student_hidden: Tensor, teacher_hidden: Tensor | None) -> torch.dtype:
    """Of logits, softmaxes and sums."""
    work = torch.promote_types(student_hidden.dtype, torch.float32)
    return work if teacher_hidden is None else torch.promote_types(work, teacher_hidden.dtype)


def _logits(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    target: Tensor | None,
    hard_weight: float,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which rows count, [N], and the logits of student and teacher, [N, V]; without a teacher None."""
    counted = torch.ones(len(student_hidden), dtype=torch.bool, device=student_hidden.device)
    if target is not None:
        counted = target != ignore_index
    work = work_dtype(student_hidden, teacher_hidden)

    def product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        bias = None if bias is None else bias.to(work)
        return F.linear(hidden.where(counted[:, None], 0).to(work), weight.to(work), bias)

    student = product(student_hidden, student_weight, student_bias)
    if teacher_hidden is None or teacher_weight is None:
        return counted, student, None
    if hard_weight == 1:  # the teacher is not read
        return counted, student, student.detach()
    return counted, student, product(teacher_hidden, teacher_weight, teacher_bias).detach()


def _kept(log_probs: Tensor, indices: Tensor, counted: Tensor, student: Tensor) -> TopK:
    """What rows that do not count hold is replaced: it may be anything."""
    return log_probs.detach().where(counted[:, None], 0).to(student.dtype), _classes(indices, counted)


def _classes(indices: Tensor, counted: Tensor) -> Tensor:
    return indices.where(counted[:, None], torch.arange(indices.shape[1], device=indices.device))


def _outcomes(
    student: Tensor,  # [N, V]
    log_probs: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """log s and log p of the outcomes, [N, K]."""
    log_all = _centred(student, temperature).log_softmax(1)
    log_s = log_all.gather(1, indices)
    if indices.shape[1] == student.shape[1]:
        return log_s, log_probs
    others = log_all.scatter(1, indices, -torch.inf)
    some = (others != -torch.inf).any(1, keepdim=True)  # without any, logsumexp has no gradient
    others = others.where(some, 0).logsumexp(1, keepdim=True).where(some, -torch.inf)
    tail = (1 - log_probs.exp().sum(1, keepdim=True)).clamp_min(0).log()
    return torch.cat([log_s, others], 1), torch.cat([log_probs, tail], 1)


def linear_distillation_fwd(*inputs):
    """The raw op: (loss, dhidden, dweight, dbias); a gradient that `needs` does not ask for has size 0."""
    (
        student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias,
        log_probs, indices, target, *options, need_hidden, need_weight, need_bias,
    ) = inputs  # fmt: skip
    check("linear_distillation", *inputs[:-3])
    loss = linear_distillation(
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        student_bias=student_bias,
        teacher_bias=teacher_bias,
        teacher_topk=None if log_probs is None else (log_probs, indices),
        target=target,
        **_named(tuple(options)),
    )
    needs = (need_hidden, need_weight, need_bias)
    return loss, *linear_distillation_bwd(loss.new_ones(loss.shape), *inputs[:-3], needs)


def linear_distillation_bwd(
    dloss: Tensor,  # [] or [N]
    student_hidden: Tensor,  # [N, D_s]
    student_weight: Tensor,  # [V, D_s]
    teacher_hidden: Tensor | None,  # [N, D_t]
    teacher_weight: Tensor | None,  # [V, D_t]
    student_bias: Tensor | None,  # [V]
    teacher_bias: Tensor | None,  # [V]
    teacher_log_probs: Tensor | None,  # [N, k]
    teacher_indices: Tensor | None,  # [N, k] int64
    target: Tensor | None,  # [N] int64
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
    reduction: str,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias); an output that `needs` does not ask for has size 0."""
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    log_probs, indices = teacher_log_probs, teacher_indices
    options = (temperature, divergence, beta, hard_weight, ignore_index, reduction)
    check("linear_distillation_bwd", *tensors, log_probs, indices, target, *options, dloss=dloss)
    dhidden, dweight = student_hidden.new_empty(0), student_weight.new_empty(0)
    dbias = (student_weight if student_bias is None else student_bias).new_empty(0)
    if not any(needs):
        return dhidden, dweight, dbias
    counted, student, teacher = _logits(*tensors, target, hard_weight, ignore_index)
    if teacher is not None:
        _, stats, _ = distillation_fwd(student, teacher, target, *options, False)
        dz = distillation_bwd(dloss.to(student.dtype), student, teacher, target, stats, *options, [True])
    else:
        u = dloss.to(student.dtype) / (1 if reduction in ("sum", "none") else counted.sum().clamp_min(1))
        slope = torch.zeros_like(student)
        if log_probs is not None and indices is not None and hard_weight < 1:
            kept = _kept(log_probs, indices, counted, student)
            slope = (1 - hard_weight) * temperature * _slope(student, *kept, temperature, divergence, beta)
        if target is not None and hard_weight > 0:
            one_hot = torch.arange(student.shape[1], device=target.device) == target[:, None]
            slope = slope + hard_weight * (_centred(student, 1.0).softmax(1) - one_hot.to(student.dtype))
        dz = (u.expand(len(student))[:, None] * slope).where(counted[:, None], 0)
    h = student_hidden.where(counted[:, None], 0).to(student.dtype)
    if needs[0]:
        dhidden = dz @ student_weight.to(student.dtype)
        dhidden = dhidden.where(counted[:, None], 0).to(student_hidden.dtype).contiguous()
    if needs[1]:
        dweight = (dz.T @ h).to(student_weight.dtype).contiguous()
    if needs[2]:
        dbias = dz.sum(0).to(dbias.dtype)
    return dhidden, dweight, dbias


def _slope(
    student: Tensor,  # [N, V]
    log_probs: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    temperature: float,
    divergence: str,
    beta: float,
) -> Tensor:  # [N, V]
    """s_ij (r_b(j) - sum_b s_b r_b), without the quotient of r = -p / s where it cancels."""
    k = indices.shape[1]
    log_s, log_p = _outcomes(student, log_probs, indices, temperature)
    s, p = log_s.exp(), log_p.exp()
    if divergence == "forward_kl":
        s_r = -p
    else:
        s_r = (1 - beta) * s * (log_s - _log_mixture(log_s, log_p, beta)).where(s != 0, 0)
    of_outcomes = s_r - s * s_r.sum(1, keepdim=True)
    if k == student.shape[1]:
        return torch.zeros_like(student).scatter(1, indices, of_outcomes)
    among_others = _centred(student, temperature).log_softmax(1) - log_s[:, k:]
    among_others = among_others.exp().where(log_s[:, k:] != -torch.inf, 0)
    return (among_others * of_outcomes[:, k:]).scatter(1, indices, of_outcomes[:, :k])


def input_faults(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    student_bias: Tensor | None,
    teacher_bias: Tensor | None,
    log_probs: Tensor | None,
    indices: Tensor | None,
    target: Tensor | None,
    temperature: float,
    divergence: str,
    beta: float,
    hard_weight: float,
    ignore_index: int,
    reduction: str,
) -> list[str]:
    """What is wrong with sizes, with what is given, and with options."""
    faults = option_faults(target, temperature, divergence, beta, hard_weight, reduction)
    n, v = (x.shape[0] if x.dim() else 0 for x in (student_hidden, student_weight))
    faults += _layer_faults("student", student_hidden, student_weight, student_bias)
    teacher = {
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
        "teacher_topk": log_probs if log_probs is not None else indices,
    }
    given = [name for name, x in teacher.items() if x is not None]
    if given not in (["teacher_topk"], ["teacher_hidden", "teacher_weight"], [*teacher][:3]):
        faults.append(
            "exactly one teacher must be given, teacher_hidden and teacher_weight or teacher_topk, "
            f"got {', '.join(given) or 'none'}"
        )
    elif teacher_hidden is not None and teacher_weight is not None:
        faults += _layer_faults("teacher", teacher_hidden, teacher_weight, teacher_bias)
        for name, x, rows in (("hidden", teacher_hidden, n), ("weight", teacher_weight, v)):
            if x.shape[:1] != (rows,):
                as_many = f"as many rows as student_{name}, {rows}"
                faults.append(f"teacher_{name} must have {as_many}, got {list(x.shape)}")
    elif log_probs is None or indices is None:
        faults.append("teacher_topk must be log-probabilities and indices, got only one of them")
    else:
        if indices.dtype != torch.int64:
            faults.append(f"the indices of teacher_topk must be int64, got {indices.dtype}")
        if log_probs.shape != indices.shape or log_probs.shape[:-1] != (n,):
            shapes = f"{list(log_probs.shape)} and {list(indices.shape)}"
            faults.append(
                f"teacher_topk must be log-probabilities and indices, both [N = {n}, k], got {shapes}"
            )
        elif log_probs.shape[1] > v:
            faults.append(f"teacher_topk must have at most V = {v} classes, got {log_probs.shape[1]}")
        if divergence == "reverse_kl":
            faults.append(f"divergence must be 'forward_kl' or 'jsd' with teacher_topk, got {divergence!r}")
    if target is not None and (target.shape != (n,) or target.dtype != torch.int64):
        faults.append(f"target must be int64 {[n]}, got {target.dtype} {list(target.shape)}")
    return faults


def _layer_faults(whose: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    faults = []
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        faults.append(
            f"{whose}_hidden must be [N, D] and {whose}_weight [V, D], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    elif bias is not None and bias.shape != weight.shape[:1]:
        faults.append(f"{whose}_bias must be [V] = {list(weight.shape[:1])}, got {list(bias.shape)}")
    return faults


def check(op: str, *inputs, dloss: Tensor | None = None) -> None:
    """The raw ops get any tensors."""
    check_sizes(op, *inputs, dloss=dloss)
    classes, indices, target = len(inputs[1]), *inputs[7:9]
    hard_weight, ignore_index = inputs[-3:-1]
    check_targets(op, target, classes, ignore_index)
    _check_indices(op, indices, target, classes, hard_weight, ignore_index)


def check_sizes(op: str, *inputs, dloss: Tensor | None = None) -> None:
    """Of all arguments, and options: what is known without reading a tensor."""
    faults = input_faults(*inputs)
    n = inputs[0].shape[0] if inputs[0].dim() else 0
    wanted = (n,) if inputs[-1] == "none" else ()
    if dloss is not None and dloss.shape != wanted:
        faults.append(f"dloss must be {list(wanted)}, got {list(dloss.shape)}")
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))


def _check_indices(
    op: str, indices: Tensor | None, target: Tensor | None, v: int, hard_weight: float, ignore_index: int
) -> None:
    """Each in [0, V), and none twice in a row that counts; nothing where the teacher is not read."""
    if indices is None or hard_weight == 1:
        return
    if target is not None:
        indices = _classes(indices, target != ignore_index)
    inside = (indices >= 0) & (indices < v)
    ordered = indices.sort(1).values
    twice = ordered[:, 1:] == ordered[:, :-1]
    if indices.is_cuda:  # without waiting for the device
        torch._assert_async(inside.all(), f"{op}: the indices of teacher_topk must be in [0, V)")
        torch._assert_async(~twice.any(), f"{op}: the indices of teacher_topk must differ in each row")
    elif not inside.all():
        got = int(indices[~inside][0])
        raise IndexError(f"{op}: the indices of teacher_topk must be in [0, V = {v}), got {got}")
    elif twice.any():
        got = int(ordered[:, 1:][twice][0])
        raise ValueError(f"{op}: the indices of teacher_topk must differ in each row, got {got} twice")
