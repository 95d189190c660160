"""loss = cross-entropy of (hidden weight^T + bias) * column_scale against target."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import define, empty_grads, has_kernel, kernel
from vlmkernels._modules import are_plain
from vlmkernels.ops import _ahead as ahead
from vlmkernels.ops import _linear_cross_entropy_sweep as sweep
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.reference import linear_cross_entropy as composition
from vlmkernels.reference.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd


@arguments.public
def linear_cross_entropy(
    hidden: Tensor,  # [..., D]
    weight: Tensor,  # [V, D]
    target: Tensor,  # [...] int64
    *,
    bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    column_scale: Tensor | None = None,  # [V]
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of the logits ``(hidden @ weight.T + bias) * column_scale``, never held at once.

    The loss of a language model from its last hidden states and the weight of its head, tied to the token
    embedding or not. Rows whose target is `ignore_index` are dropped before the product: a masked language
    model computes the logits of its masked tokens alone. Logits are float32 and are not rounded.

    Args:
        hidden: ``[..., D]``, any strides.
        weight: ``[V, D]``, as in ``torch.nn.Linear``; dtype and device of ``hidden``.
        target: int64 ``[...]``, the leading shape of ``hidden``; a class in ``[0, V)``, or `ignore_index`.
        bias: ``[V]``.
        ignore_index: the target of rows that are not counted.
        label_smoothing: in [0, 1); mixes the targets with the uniform distribution over all V classes.
        column_scale: ``[V]``, no gradient; multiplies the logits of each class, before the smoothing.
        reduction: "mean" over the counted rows, "sum", or "none" for ``[...]`` losses, 0 on ignored rows.
            With no row counted the loss is 0.

    Returns:
        float32 (float64 for float64 inputs): a scalar, or ``[...]``. Gradients have the dtypes of their
        inputs; they are formed in the forward, from the same logits, where one incoming gradient scales
        all of them ("mean" and "sum", except in float16). Autocast casts ``hidden``, ``weight`` and ``bias``.

    On subclasses of Tensor (distributed, quantized weights) the operations of torch run, as they define them.

    Raises:
        ValueError: naming every argument that does not fit.
        IndexError: a target outside ``[0, V)`` that is not `ignore_index` (a device assertion on CUDA).
    """
    faults = []
    if hidden.dim() == 0 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        faults.append(f"hidden must be [..., D] and weight [V, D], got {shapes}")
    else:
        if target.shape != hidden.shape[:-1]:
            faults.append(f"target must be {tuple(hidden.shape[:-1])}, got {tuple(target.shape)}")
        for name, vector in (("bias", bias), ("column_scale", column_scale)):
            if vector is not None and vector.shape != weight.shape[:1]:
                faults.append(f"{name} must be [V] = {tuple(weight.shape[:1])}, got {tuple(vector.shape)}")
    if target.dtype != torch.int64:
        faults.append(f"target must be int64, got {target.dtype}")
    operands = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    tensors = operands if column_scale is None else operands | {"column_scale": column_scale}
    faults += arguments.int64_faults("ignore_index", ignore_index)
    faults += arguments.dtype_faults(tensors, operands)
    faults += arguments.device_faults(tensors | {"target": target})
    if not arguments.is_number(label_smoothing):  # a tensor would get no gradient
        raise TypeError("label_smoothing must be a number")
    if not 0 <= label_smoothing < 1:
        faults.append(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        faults.append(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if faults:
        raise ValueError("linear_cross_entropy: " + "; ".join(faults))
    if column_scale is not None:
        column_scale = column_scale.detach()
    if not are_plain(hidden, weight, bias):
        return composition(
            hidden,
            weight,
            target,
            bias=bias,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            column_scale=column_scale,
            reduction=reduction,
        )
    rows = hidden.reshape(target.numel(), hidden.shape[-1])
    forms = reduction != "none" and ahead.forms_ahead(hidden)
    needs = [forms and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    flat = target.reshape(-1)
    options = (ignore_index, label_smoothing, reduction)
    loss = _op(rows, weight, flat, bias, column_scale, *options, *needs)[0]
    return loss.reshape(target.shape) if reduction == "none" else loss


def _fake(hidden, weight, target, bias, column_scale, ignore_index, label_smoothing, reduction, *needs):
    work = torch.promote_types(hidden.dtype, torch.float32)
    loss = hidden.new_empty(target.shape if reduction == "none" else (), dtype=work)
    return loss, *_empty(hidden, weight, bias, needs)


def _fake_bwd(dloss, hidden, weight, target, bias, *rest):
    return _empty(hidden, weight, bias, rest[-1])


def _empty(hidden, weight, bias, needs):
    return empty_grads((hidden, weight, weight.new_empty(weight.shape[0]) if bias is None else bias), needs)


def _flops(hidden, weight, *_, out_shape):
    formed = sum(grad == x for grad, x in zip(out_shape[1:], (hidden, weight), strict=False))
    return pairwise.flops(hidden, weight, 1 + formed)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.ignore_index, ctx.label_smoothing, ctx.reduction, _, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dloss, *unused):
    names = ("hidden", "weight", "bias")
    wanted = [needs[name] for name in names]
    saved = ctx.saved_tensors
    inputs, formed = saved[:5], saved[5:]
    options = (ctx.ignore_index, ctx.label_smoothing, ctx.reduction)
    grads = ahead.scaled(formed, dloss, [inputs[0], inputs[1], inputs[3]], wanted)
    if grads is None:
        grads = _bwd(dloss, *inputs, *options, wanted)
    return dict(zip(names, grads, strict=True))


_TENSORS = "Tensor hidden, Tensor weight, Tensor target, Tensor? bias, Tensor? column_scale"
_OPTIONS = "int ignore_index, float label_smoothing, str reduction"
_GRADS = "Tensor dhidden, Tensor dweight, Tensor dbias"

_op = define(
    f"linear_cross_entropy({_TENSORS}, {_OPTIONS}, bool need_hidden, bool need_weight, bool need_bias)"
    f" -> (Tensor loss, {_GRADS})",
    reference=linear_cross_entropy_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("hidden", "weight", "bias"),
)
_bwd = define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_TENSORS}, {_OPTIONS}, bool[3] needs) -> ({_GRADS})",
    reference=linear_cross_entropy_bwd,
    fake=_fake_bwd,
    flops=lambda dloss, hidden, weight, *rest, **_: pairwise.flops(hidden, weight, sum(rest[-1][:2])),
)
for _device in ("CPU", "CUDA"):
    if has_kernel("linear_cross_entropy_sweep", _device):
        kernel("linear_cross_entropy", _device, sweep.forward, pairwise.label(_device))
        kernel("linear_cross_entropy_bwd", _device, sweep.backward, pairwise.label(_device))
