"""loss = distance of a student's features to a teacher's, summed over the features, in each row."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, kernel
from vlmkernels.reference.embedding_distillation import (
    embedding_distillation_bwd,
    embedding_distillation_fwd,
    option_faults,
)


@arguments.public
def embedding_distillation(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, D]
    *,
    distance: str = "l1",
    normalize: bool = True,
    weight: Tensor | None = None,  # [N]
    reduction: str = "mean",
) -> Tensor:
    """Distance of a student's features to a teacher's, with the normalisation, in one pass each way.

    ViLD distils image embeddings by "l1" (Gu et al. 2022, equation 4), CLIP-KD its features by "l2" (Yang et
    al. 2024, section 3.2), both of normalised features.

    Args:
        student: ``[N, D]``.
        teacher: ``[N, D]``; gets no gradient.
        distance: summed over D: "l1", "l2" (squared), "smooth_l1" (quadratic below 1); or "cosine", 1 minus
            the cosine, whatever `normalize` is.
        normalize: divide rows by their L2 norm first, as ``torch.nn.functional.normalize`` does.
        weight: ``[N]``, not negative, no gradient. Rows of weight 0 are not read.
        reduction: "mean" is the sum of weighted rows over the sum of the weights (0 if that is 0), "sum", or
            "none" for ``[N]`` weighted rows.

    Returns:
        A scalar or ``[N]``, float32 (float64 if student or teacher is). The gradient has the dtype of
        `student`. Autocast changes nothing.

    Raises:
        ValueError: naming every invalid argument.
    """
    faults = option_faults(distance, reduction)
    features = {"student": student, "teacher": teacher}
    if student.dim() != 2 or student.shape != teacher.shape:
        faults.append(
            "student and teacher must have the same shape [N, D], "
            f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if weight is not None:
        if weight.shape != student.shape[:1]:
            faults.append(f"weight must be [N] = {tuple(student.shape[:1])}, got {tuple(weight.shape)}")
        if not arguments.known(weight.dtype):
            faults.append(f"weight must be {arguments.FLOATS_LISTED}, bool or integers, got {weight.dtype}")
    faults += arguments.dtype_faults(features)
    faults += arguments.device_faults(features | {"weight": weight})
    if faults:
        raise ValueError("embedding_distillation: " + "; ".join(faults))
    if weight is not None:
        weight = weight.detach().to(torch.promote_types(student.dtype, torch.float32))
    return _op(student, teacher.detach(), weight, distance, normalize, reduction)


def _fake(student, teacher, weight, distance, normalize, reduction):
    shapes = student.shape, teacher.shape
    torch._check(shapes[0] == shapes[1], lambda: f"student {shapes[0]} and teacher {shapes[1]} differ")
    work = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.new_empty(student.shape[:1] if reduction == "none" else (), dtype=work)


def _fake_bwd(dloss, student, *rest):
    return student.new_empty(student.shape if rest[-1][0] else 0)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.distance, ctx.normalize, ctx.reduction = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, needs, dloss):
    if not needs["student"]:
        return {}
    options = (ctx.distance, ctx.normalize, ctx.reduction, [True])
    return {"student": _bwd(dloss, *ctx.saved_tensors, *options)}


_TENSORS, _OPTIONS = (
    "Tensor student, Tensor teacher, Tensor? weight",
    "str distance, bool normalize, str reduction",
)

_op = define(
    f"embedding_distillation({_TENSORS}, {_OPTIONS}) -> Tensor",
    reference=embedding_distillation_fwd,
    fake=_fake,
    flops=lambda *_, **__: 0,
    setup_context=_setup_context,
    backward=_backward,
)
_bwd = define(
    f"embedding_distillation_bwd(Tensor dloss, {_TENSORS}, {_OPTIONS}, bool[1] needs) -> Tensor dstudent",
    reference=embedding_distillation_bwd,
    fake=_fake_bwd,
    flops=lambda *_, **__: 0,
)

if TRITON:
    from vlmkernels.triton import embedding_distillation as _triton

    kernel("embedding_distillation", "CUDA", _triton.embedding_distillation, "Triton")
    kernel("embedding_distillation_bwd", "CUDA", _triton.embedding_distillation_bwd, "Triton")
