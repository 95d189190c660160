"""loss = (1 - h) T^2 divergence(softmax(student / T), softmax(teacher / T)) + h cross_entropy(student)."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, kernel
from vlmkernels.ops import _ahead as ahead
from vlmkernels.reference.distillation import distillation_bwd, distillation_fwd, option_faults


@arguments.public
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
    """A divergence between the softmaxes of a student and a teacher, mixed with the cross-entropy of targets.

    ``(1 - hard_weight) T^2 divergence + hard_weight cross_entropy(student_logits, target)`` in each row, with
    p = softmax(teacher_logits / T) and s = softmax(student_logits / T) (Hinton et al. 2015). The divergence
    is KL(p || s), KL(s || p), or beta KL(p || m) + (1 - beta) KL(s || m) with m = beta p + (1 - beta) s
    (Agarwal et al. 2024, GKD). No softmax is stored.

    Args:
        student_logits: ``[N, V]``, rows any distance apart.
        teacher_logits: ``[N, V]``; gets no gradient.
        temperature: T, positive and finite.
        divergence: "forward_kl", "reverse_kl" or "jsd".
        beta: the teacher's share of the mixture m, in (0, 1); used by "jsd" alone.
        target: int64 ``[N]``; a class in ``[0, V)``, or `ignore_index`: such rows are not read and leave both
            terms.
        hard_weight: in [0, 1]; more than 0 needs `target`.
        ignore_index: the target of rows that are not counted.
        reduction: "batchmean" and "mean" divide by the number of counted rows and are 0 without any, "sum",
            or "none" for ``[N]`` losses, 0 on ignored rows.

    A class may be masked by a logit of -inf. KL(x || y) is infinite where y has no probability and x has, and
    counts 0 where x has none; a term of weight 0 is not computed.

    Returns:
        A scalar or ``[N]``, float32 (float64 if a tensor of logits is). The gradient has the dtype of
        `student_logits`; it is formed in the forward where the loss is a scalar, except in float16. Autocast
        changes nothing.

    Raises:
        ValueError: naming every invalid argument.
        IndexError: a target outside ``[0, V)`` that is not `ignore_index` (a device assertion on CUDA).
    """
    numbers = {"temperature": temperature, "beta": beta, "hard_weight": hard_weight}
    wrong = [name for name, value in numbers.items() if not arguments.is_number(value)]
    if wrong:  # a tensor would get no gradient
        raise TypeError(f"distillation: {' and '.join(wrong)} must be numbers")
    faults = option_faults(target, temperature, divergence, beta, hard_weight, reduction)
    logits = {"student_logits": student_logits, "teacher_logits": teacher_logits}
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        faults.append(
            "student_logits and teacher_logits must have the same shape [N, V], "
            f"got {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if target is not None:
        if target.shape != student_logits.shape[:1]:
            wanted = tuple(student_logits.shape[:1])
            faults.append(f"target must be [N] = {wanted}, got {tuple(target.shape)}")
        if target.dtype != torch.int64:
            faults.append(f"target must be int64, got {target.dtype}")
    faults += arguments.int64_faults("ignore_index", ignore_index)
    faults += arguments.dtype_faults(logits)
    faults += arguments.device_faults(logits | {"target": target})
    if faults:
        raise ValueError("distillation: " + "; ".join(faults))
    options = (temperature, divergence, beta, hard_weight, ignore_index, reduction)
    # Kernels of a GPU would write a gradient whose factor they do not know, and then write it again
    forms = reduction != "none" and student_logits.requires_grad and not student_logits.is_cuda
    forms = forms and ahead.forms_ahead(student_logits)
    return _op(student_logits, teacher_logits.detach(), target, *options, forms)[0]


def _fake(student_logits, teacher_logits, target, *options):
    *_, reduction, need_student = options
    shapes = student_logits.shape, teacher_logits.shape
    torch._check(shapes[0] == shapes[1], lambda: f"student_logits {shapes[0]} and teacher_logits {shapes[1]}")
    work = torch.promote_types(student_logits.dtype, teacher_logits.dtype)
    work, rows = torch.promote_types(work, torch.float32), student_logits.shape[0]
    loss = student_logits.new_empty((rows,) if reduction == "none" else (), dtype=work)
    stats = student_logits.new_empty((rows, 6), dtype=work)
    return loss, stats, *empty_grads([student_logits], [need_student])


def _fake_bwd(dloss, student_logits, *rest):
    return student_logits.new_empty(student_logits.shape if rest[-1][0] else 0)


def _setup_context(ctx, inputs, output) -> None:
    student_logits, teacher_logits, target, *ctx.options, _ = inputs
    ctx.save_for_backward(student_logits, teacher_logits, target, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dloss, *unused):
    if not needs["student_logits"]:
        return {}
    *inputs, formed = ctx.saved_tensors
    grads = ahead.scaled([formed], dloss, inputs[:1], [True])
    if grads is None:
        grads = [_bwd(dloss, *inputs, *ctx.options, [True])]
    return {"student_logits": grads[0]}


_TENSORS = "Tensor student_logits, Tensor teacher_logits, Tensor? target"
_OPTIONS = "float temperature, str divergence, float beta, float hard_weight, int ignore_index, str reduction"

_op = define(
    f"distillation({_TENSORS}, {_OPTIONS}, bool need_student)"
    " -> (Tensor loss, Tensor stats, Tensor dstudent)",
    reference=distillation_fwd,
    fake=_fake,
    flops=lambda *_, **__: 0,
    setup_context=_setup_context,
    backward=_backward,
)
_bwd = define(
    f"distillation_bwd(Tensor dloss, {_TENSORS}, Tensor stats, {_OPTIONS}, bool[1] needs) -> Tensor dstudent",
    reference=distillation_bwd,
    fake=_fake_bwd,
    flops=lambda *_, **__: 0,
)

if TRITON:
    from vlmkernels.triton import distillation as _triton

    kernel("distillation", "CUDA", _triton.distillation, "Triton")
    kernel("distillation_bwd", "CUDA", _triton.distillation_bwd, "Triton")
