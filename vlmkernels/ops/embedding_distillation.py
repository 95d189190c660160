"""loss = distance of a student's features to a teacher's, summed over the features, in each row."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, kernel
from vlmkernels.ops import _ahead as ahead
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
    """Distance of a student's features to a teacher's, normalised, and its gradient in the same pass.

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
        `student`; it is formed in the forward where the loss is a scalar, except in float16. Autocast changes
        nothing.

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
    # Kernels of a GPU would write a gradient whose factor they do not know, and then write it again
    forms = reduction != "none" and student.requires_grad and not student.is_cuda
    forms = forms and ahead.forms_ahead(student)
    return _op(student, teacher.detach(), weight, distance, normalize, reduction, forms)[0]


def _fake(student, teacher, weight, distance, normalize, reduction, need_student):
    shapes = student.shape, teacher.shape
    torch._check(shapes[0] == shapes[1], lambda: f"student {shapes[0]} and teacher {shapes[1]} differ")
    work = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    loss = student.new_empty(student.shape[:1] if reduction == "none" else (), dtype=work)
    return loss, *empty_grads([student], [need_student])


def _fake_bwd(dloss, student, *rest):
    return student.new_empty(student.shape if rest[-1][0] else 0)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.distance, ctx.normalize, ctx.reduction, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dloss, *unused):
    if not needs["student"]:
        return {}
    *inputs, formed = ctx.saved_tensors
    grads = ahead.scaled([formed], dloss, inputs[:1], [True])
    if grads is None:
        grads = [_bwd(dloss, *inputs, ctx.distance, ctx.normalize, ctx.reduction, [True])]
    return {"student": grads[0]}


_TENSORS, _OPTIONS = (
    "Tensor student, Tensor teacher, Tensor? weight",
    "str distance, bool normalize, str reduction",
)

_op = define(
    f"embedding_distillation({_TENSORS}, {_OPTIONS}, bool need_student) -> (Tensor loss, Tensor dstudent)",
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
