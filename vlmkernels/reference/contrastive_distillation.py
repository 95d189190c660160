"""A teacher's softmaxes over all pairs of features against a student's, along the rows and along the columns.

With S = scale q k^T of the student, T of the teacher, and for row i the softmaxes s_i of S and p_i of T:

    "kl"              l_i = sum_j p_ij (log p_ij - log s_ij)
    "cross_entropy"   l_i = -sum_j p_ij log s_ij

and l'_j likewise, with the softmaxes s' and p' of column j. Both differ by the teacher's entropy alone:

    dS_ij = u_i (s_ij - p_ij) + v_j (s'_ij - p'_ij)
    dq = scale * dS k        dk = scale * dS^T q        dscale = sum_ij dS_ij <q_i, k_j>

where u_i = dL/dl_i and v_j = dL/dl'_j contain the reduction and the incoming gradient.
"""

import torch
from torch import Tensor

from vlmkernels.reference._pairwise import check_features


def contrastive_distillation(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: float | Tensor,
    teacher_query: Tensor,  # [N, E]
    teacher_key: Tensor,  # [M, E]
    teacher_scale: float | Tensor,
    *,
    symmetric: bool = True,
    divergence: str = "kl",
    reduction: str = "mean",
    store_bytes: int = 0,
) -> Tensor:
    """The definition, dense and differentiable by autograd; `store_bytes` has no meaning here."""
    tensors = (query, key, scale, teacher_query, teacher_key, teacher_scale)
    return contrastive_distillation_fwd(*tensors, symmetric, divergence, reduction)


def contrastive_distillation_fwd(
    query, key, scale, teacher_query, teacher_key, teacher_scale, symmetric, divergence, reduction
) -> Tensor:
    tensors = (query, key, teacher_query, teacher_key)
    check_distillation("contrastive_distillation", *tensors, symmetric, divergence, reduction)
    work = sum_dtype(query, teacher_query)
    student = _number(scale, work) * (query.to(work) @ key.to(work).T)  # [N, M]
    with torch.no_grad():
        teacher = _number(teacher_scale, work) * (teacher_query.to(work) @ teacher_key.to(work).T)
    loss = student.new_zeros(())
    for dim in _softmaxes(symmetric):
        log_p, log_s = teacher.log_softmax(dim), student.log_softmax(dim)
        each = (log_p.exp() * (log_p - log_s if divergence == "kl" else -log_s)).sum(dim)
        if reduction != "none":
            each = each.sum() / (max(len(each), 1) if reduction == "mean" else 1)
        loss = loss + each / len(_softmaxes(symmetric))
    return loss


def contrastive_distillation_bwd(
    dloss, query, key, scale, teacher_query, teacher_key, teacher_scale, symmetric, divergence, reduction,
    needs,
):  # fmt: skip
    """(dquery, dkey, dscale); an output that is not needed has size 0."""
    tensors = (query, key, teacher_query, teacher_key)
    check_distillation("contrastive_distillation_bwd", *tensors, symmetric, divergence, reduction)
    work = sum_dtype(query, teacher_query)
    q, k, factor = query.to(work), key.to(work), _number(scale, work)
    cosine = q @ k.T  # [N, M]
    student = factor * cosine
    teacher = _number(teacher_scale, work) * (teacher_query.to(work) @ teacher_key.to(work).T)
    dlogits = torch.zeros_like(student)
    for dim in _softmaxes(symmetric):
        share = dloss.to(work) / len(_softmaxes(symmetric))
        u = share / max(student.shape[1 - dim], 1) if reduction == "mean" else share
        dlogits += u.expand(student.shape[1 - dim]).unsqueeze(dim) * (
            student.softmax(dim) - teacher.softmax(dim)
        )
    dquery, dkey, dscale = query.new_empty(0), key.new_empty(0), scale.new_empty(0)
    if needs[0]:
        dquery = query.new_empty(query.shape).copy_(factor * (dlogits @ k))
    if needs[1]:
        dkey = key.new_empty(key.shape).copy_(factor * (dlogits.T @ q))
    if needs[2]:
        dscale = (dlogits * cosine).sum().to(scale.dtype).reshape(scale.shape)
    return dquery, dkey, dscale


def sum_dtype(query: Tensor, teacher_query: Tensor) -> torch.dtype:
    """Of logits, softmaxes, sums and the loss."""
    return torch.promote_types(torch.promote_types(query.dtype, teacher_query.dtype), torch.float32)


def check_distillation(
    op: str,
    query: Tensor,
    key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    symmetric: bool,
    divergence: str,
    reduction: str,
) -> None:
    """The raw ops accept any tensors and words, so they check them themselves."""
    check_features(op, query, key)
    check_features(op, teacher_query, teacher_key, "teacher_")
    (n, m), teachers = (len(query), len(key)), (len(teacher_query), len(teacher_key))
    if teachers != (n, m):
        raise ValueError(
            f"{op}: teacher_query and teacher_key must have as many rows as query and key, {n} and {m}, "
            f"got {teachers[0]} and {teachers[1]}"
        )
    if divergence not in DIVERGENCES:
        raise ValueError(f"{op}: divergence must be 'kl' or 'cross_entropy', got {divergence!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if symmetric and reduction == "none" and n != m:
        raise ValueError(f"{op}: reduction='none' needs M == N when symmetric, got N = {n} and M = {m}")


DIVERGENCES = ("kl", "cross_entropy")


def _number(scale: float | Tensor, work: torch.dtype) -> float | Tensor:
    return scale.to(work).reshape(()) if isinstance(scale, Tensor) else scale


def _softmaxes(symmetric: bool) -> tuple[int, ...]:
    """The dimensions that the softmaxes run over: keys for each query, queries for each key."""
    return (1, 0) if symmetric else (1,)
