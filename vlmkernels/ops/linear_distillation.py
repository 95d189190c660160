"""loss = `distillation` of the logits student_hidden student_weight^T and teacher_hidden teacher_weight^T."""

from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, has_kernel, kernel
from vlmkernels._modules import are_plain
from vlmkernels.ops import _ahead as ahead
from vlmkernels.ops import _linear_distillation_sweep as sweep
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.reference import linear_distillation as composition
from vlmkernels.reference.linear_distillation import (
    input_faults,
    linear_distillation_bwd,
    linear_distillation_fwd,
    work_dtype,
)


@arguments.public
def linear_distillation(
    student_hidden: Tensor,  # [N, D_s]
    student_weight: Tensor,  # [V, D_s]
    teacher_hidden: Tensor | None = None,  # [N, D_t]
    teacher_weight: Tensor | None = None,  # [V, D_t]
    *,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    teacher_topk: tuple[Tensor, Tensor] | None = None,  # log-probabilities [N, k] and classes [N, k]
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    target: Tensor | None = None,  # [N] int64
    hard_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: str = "batchmean",
) -> Tensor:
    """`distillation` from the hidden states of student and teacher, whose logits are never held at once.

    The student's logits are ``student_hidden @ student_weight.T + student_bias``, the teacher's likewise and
    of another width. Rows whose target is `ignore_index` are dropped before the products. Logits are float32
    and are not rounded.

    Instead of hidden states, an offline teacher is given by `teacher_topk`, the log-probabilities of k
    different classes of each row and these classes, of softmax(teacher / T) at the `temperature` of this
    call. What is left, ``max(1 - sum p, 0)``, is one more outcome, which is compared with what the student
    gives to all other classes together; with k = V there are none.

    Args:
        student_hidden: ``[N, D_s]``, any strides.
        student_weight: ``[V, D_s]``, dtype and device of `student_hidden`, as is `student_bias`.
        teacher_hidden: ``[N, D_t]``; nothing of the teacher gets a gradient.
        teacher_weight: ``[V, D_t]``, dtype of `teacher_hidden`, which may differ from the student's.
        student_bias: ``[V]``.
        teacher_bias: ``[V]``.
        teacher_topk: a floating-point and an int64 tensor ``[N, k]``, k from 0 to V.
        temperature: T, positive and finite.
        divergence: "forward_kl", "reverse_kl" (not with `teacher_topk`) or "jsd", as in `distillation`.
        beta: the teacher's share of the mixture, in (0, 1); used by "jsd" alone.
        target: int64 ``[N]``; a class in ``[0, V)``, or `ignore_index`: such rows are not read and leave both
            terms.
        hard_weight: in [0, 1]: the share of the cross-entropy of `target`; more than 0 needs it. With 1 the
            teacher is not read.
        ignore_index: the target of rows that are not counted.
        reduction: "batchmean" and "mean" divide by the number of counted rows and are 0 without any, "sum",
            or "none" for ``[N]`` losses, 0 on ignored rows.

    Returns:
        A scalar or ``[N]``, float32 (float64 if the student's or the teacher's hidden states are). Gradients
        have the dtypes of their inputs; where one incoming gradient scales all of them ("none" and float16
        excepted) they are formed in the forward. Autocast casts hidden states, weights and biases.

    On subclasses of Tensor (distributed, quantized weights) the operations of torch run, as they define them.

    Raises:
        ValueError: naming every invalid argument; a class twice in a row of `teacher_topk`.
        IndexError: a target or a class of `teacher_topk` outside ``[0, V)`` in a row that is counted. (A
            device assertion on CUDA, as for a class twice.)
    """
    numbers = {"temperature": temperature, "beta": beta, "hard_weight": hard_weight}
    wrong = [name for name, value in numbers.items() if not arguments.is_number(value)]
    if wrong:  # a tensor would get no gradient
        raise TypeError(f"linear_distillation: {' and '.join(wrong)} must be numbers")
    log_probs, indices = (None, None) if teacher_topk is None else teacher_topk
    layers = (student_hidden, student_weight, teacher_hidden, teacher_weight, student_bias, teacher_bias)
    options = (temperature, divergence, beta, hard_weight, ignore_index, reduction)
    faults = input_faults(*layers, log_probs, indices, target, *options)
    student = _given(student_hidden=student_hidden, student_weight=student_weight, student_bias=student_bias)
    teacher = _given(teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_bias=teacher_bias)
    topk = _given(teacher_topk=log_probs)
    faults += arguments.int64_faults("ignore_index", ignore_index)
    faults += arguments.dtype_faults(student, student) + arguments.dtype_faults(teacher, teacher)
    faults += arguments.dtype_faults(topk)
    faults += arguments.device_faults(student | teacher | topk | {"indices": indices, "target": target})
    if faults:
        raise ValueError("linear_distillation: " + "; ".join(faults))
    if not are_plain(*layers):
        return composition(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            teacher_topk=teacher_topk,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            target=target,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            reduction=reduction,
        )
    forms = reduction != "none" and ahead.forms_ahead(student_hidden)
    needs = [
        forms and t is not None and t.requires_grad for t in (student_hidden, student_weight, student_bias)
    ]
    taught = (None if t is None else t.detach() for t in (teacher_hidden, teacher_weight))
    teacher_bias, log_probs = (None if t is None else t.detach() for t in (teacher_bias, log_probs))
    biases = student_bias, teacher_bias
    return _op(
        student_hidden, student_weight, *taught, *biases, log_probs, indices, target, *options, *needs
    )[0]


def _given(**tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: t for name, t in tensors.items() if t is not None}


def _fake(student_hidden, student_weight, teacher_hidden, *rest):
    student_bias, reduction, needs = rest[1], rest[-4], rest[-3:]
    loss = student_hidden.new_empty(
        student_hidden.shape[:1] if reduction == "none" else (),
        dtype=work_dtype(student_hidden, teacher_hidden),
    )
    return loss, *_empty(student_hidden, student_weight, student_bias, needs)


def _fake_bwd(dloss, student_hidden, student_weight, *rest):
    return _empty(student_hidden, student_weight, rest[2], rest[-1])


def _empty(hidden, weight, bias, needs):
    return empty_grads((hidden, weight, weight.new_empty(weight.shape[0]) if bias is None else bias), needs)


def _flops(*inputs, out_shape):
    formed = sum(grad == x for grad, x in zip(out_shape[1:], inputs[:2], strict=False))
    return sweep.flops(inputs[:4], inputs[-6], 1 + formed)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.temperature, ctx.divergence, ctx.beta, ctx.hard_weight = inputs[:-5]
    ctx.ignore_index, ctx.reduction = inputs[-5:-3]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dloss, *unused):
    names = ("student_hidden", "student_weight", "student_bias")
    wanted = [needs[name] for name in names]
    saved = ctx.saved_tensors
    inputs, formed = saved[:9], saved[9:]
    options = (ctx.temperature, ctx.divergence, ctx.beta, ctx.hard_weight, ctx.ignore_index, ctx.reduction)
    grads = ahead.scaled(formed, dloss, [inputs[0], inputs[1], inputs[4]], wanted)
    if grads is None:
        grads = _bwd(dloss, *inputs, *options, wanted)
    return dict(zip(names, grads, strict=True))


_TENSORS = (
    "Tensor student_hidden, Tensor student_weight, Tensor? teacher_hidden, Tensor? teacher_weight,"
    " Tensor? student_bias, Tensor? teacher_bias, Tensor? teacher_log_probs, Tensor? teacher_indices,"
    " Tensor? target"
)
_OPTIONS = "float temperature, str divergence, float beta, float hard_weight, int ignore_index, str reduction"
_GRADS = "Tensor dhidden, Tensor dweight, Tensor dbias"

_op = define(
    f"linear_distillation({_TENSORS}, {_OPTIONS}, bool need_hidden, bool need_weight, bool need_bias)"
    f" -> (Tensor loss, {_GRADS})",
    reference=linear_distillation_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=(
        *("student_hidden", "student_weight", "teacher_hidden"),
        *("teacher_weight", "student_bias", "teacher_bias"),
    ),
)
_bwd = define(
    f"linear_distillation_bwd(Tensor dloss, {_TENSORS}, {_OPTIONS}, bool[3] needs) -> ({_GRADS})",
    reference=linear_distillation_bwd,
    fake=_fake_bwd,
    flops=lambda dloss, hidden, weight, *rest, **_: pairwise.flops(hidden, weight, sum(rest[-1][:2])),
)
if has_kernel("linear_distillation_sweep", "CPU"):
    kernel("linear_distillation", "CPU", sweep.forward, pairwise.label("CPU"))
    kernel("linear_distillation_bwd", "CPU", sweep.backward, pairwise.label("CPU"))
if TRITON:
    from vlmkernels.triton import linear_distillation as _triton

    kernel("linear_distillation", "CUDA", _triton.linear_distillation, "Triton")
    kernel("linear_distillation_bwd", "CUDA", _triton.linear_distillation_bwd, "Triton")
