"""Distance of a student's features to a teacher's, row by row.

With u and v the rows of student and teacher, as they are or divided by max(|x|, 1e-12), and weights w:

    l_i = w_i sum_d f(u_id - v_id),    f(x) = |x|, x^2, or x^2 / 2 for |x| < 1 and |x| - 1/2 beyond
    cosine: l_i = w_i (1 - <u_i, v_i>), always normalised
    mean: sum l_i / sum w_i, 0 if the weights sum to 0

A row of weight 0 is not counted, whatever it holds. With c_i = w_i dL/dl_i, times 1 / sum w for the mean, and
e = f'(u - v), or -v for cosine:

    dstudent = c e, and normalised: c (e - u <u, e>) / |student|, without <u, e> where |student| < 1e-12
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DISTANCES = ("l1", "l2", "cosine", "smooth_l1")
EPS = 1e-12


def embedding_distillation(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    *,
    distance: str = "l1",
    normalize: bool = True,
    weight: Tensor | None = None,  # [N]
    reduction: str = "mean",
) -> Tensor:
    """The definition, differentiable by autograd."""
    check("embedding_distillation", student, teacher, weight, distance, reduction)
    u, v, w = _rows(student, teacher, weight)
    if normalize or distance == "cosine":
        u, v = F.normalize(u, dim=1, eps=EPS), F.normalize(v, dim=1, eps=EPS)
    if distance == "cosine":
        losses = w * (1 - (u * v).sum(1))
    elif distance == "l1":
        losses = w * (u - v).abs().sum(1)
    elif distance == "l2":
        losses = w * (u - v).square().sum(1)
    else:
        losses = w * F.smooth_l1_loss(u, v, reduction="none").sum(1)
    if reduction == "none":
        return losses
    return losses.sum() * _share(w) if reduction == "mean" else losses.sum()


def embedding_distillation_fwd(student, teacher, weight, distance, normalize, reduction, need_student):
    """The raw op: (loss, dstudent), dstudent of size 0 unless `need_student`."""
    options = {"distance": distance, "normalize": normalize, "weight": weight, "reduction": reduction}
    loss = embedding_distillation(student, teacher, **options)
    rest = (distance, normalize, reduction, [need_student])
    return loss, embedding_distillation_bwd(loss.new_ones(loss.shape), student, teacher, weight, *rest)


def embedding_distillation_bwd(
    dloss: Tensor,  # [] or [N]
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    weight: Tensor | None,  # [N]
    distance: str,
    normalize: bool,
    reduction: str,
    needs: Sequence[bool],
) -> Tensor:
    """dstudent, of size 0 if it is not needed."""
    check("embedding_distillation_bwd", student, teacher, weight, distance, reduction, dloss=dloss)
    if not needs[0]:
        return student.new_empty(0)
    u, v, w = _rows(student, teacher, weight)
    normalize = normalize or distance == "cosine"
    norm = u.norm(dim=1, keepdim=True)  # [N, 1]
    if normalize:
        u, v = u / norm.clamp_min(EPS), F.normalize(v, dim=1, eps=EPS)
    c = (dloss.to(w.dtype) * w * (_share(w) if reduction == "mean" else 1)).expand(len(w))[:, None]
    if distance == "cosine":
        e = -v
    elif distance == "l1":
        e = (u - v).sign()
    else:
        e = 2 * (u - v) if distance == "l2" else (u - v).clamp(-1, 1)
    if normalize:
        along = (u * e).sum(1, keepdim=True).where(norm >= EPS, 0)
        e = (e - u * along) / norm.clamp_min(EPS)
    return (c * e).where(w[:, None] != 0, 0).to(student.dtype).contiguous()


def _rows(student: Tensor, teacher: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Features in the precision of sums, 0 in rows of weight 0, and the weights."""
    work = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    teacher = teacher.detach().to(work)
    if weight is None:
        return student.to(work), teacher, teacher.new_ones(len(teacher))
    w = weight.detach().to(work)
    return student.to(work).where(w[:, None] != 0, 0), teacher.where(w[:, None] != 0, 0), w


def _share(w: Tensor) -> Tensor:
    """1 / sum w, 0 without weight."""
    total = w.sum()
    return (1 / total).where(total != 0, 0)


def check(
    op: str,
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None,
    distance: str,
    reduction: str,
    *,
    dloss: Tensor | None = None,
) -> None:
    """The raw ops get any tensors."""
    faults = option_faults(distance, reduction)
    n = student.shape[0] if student.dim() else 0
    if student.dim() != 2 or student.shape != teacher.shape:
        faults.append(
            "student and teacher must have the same shape [N, D], "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if weight is not None and weight.shape != (n,):
        faults.append(f"weight must be {[n]}, got {list(weight.shape)}")
    wanted = (n,) if reduction == "none" else ()
    if dloss is not None and dloss.shape != wanted:
        faults.append(f"dloss must be {list(wanted)}, got {list(dloss.shape)}")
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))


def option_faults(distance: str, reduction: str) -> list[str]:
    faults = []
    if distance not in DISTANCES:
        faults.append(f"distance must be 'l1', 'l2', 'cosine' or 'smooth_l1', got {distance!r}")
    if reduction not in ("mean", "sum", "none"):
        faults.append(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    return faults
