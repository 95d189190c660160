"""loss = -(1/N) sum_ij log sigmoid(t_ij (scale * <q_i, k_j> + bias)), t = +1 on positives, -1 elsewhere."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, has_kernel, kernel
from vlmkernels.ops import _ahead as ahead
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _pairwise_small
from vlmkernels.ops import _pairwise_targets as targets
from vlmkernels.ops import _sigmoid_loss_sweep as sweep
from vlmkernels.reference.sigmoid_loss import sigmoid_loss_bwd, sigmoid_loss_fwd


@arguments.public
def sigmoid_loss(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: float | Tensor,
    bias: float | Tensor,
    *,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    normalize: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The pairwise logistic loss of SigLIP (Zhai et al. 2023, equation 1); the logits are never materialised.

    Args:
        query: ``[N, D]``.
        key: ``[M, D]``, same dtype and device.
        scale: multiplies the similarities; a float, or a tensor with one element, whose gradient has the
            same shape.
        bias: added to them; likewise.
        positives: ``None``: key i belongs to query i, ``M >= N``, the other keys are negatives. ``[N]``
            int64: index of each query's key, -100 for a row without one. ``(query_ids [N], key_ids [M])``
            int64: every pair of equal ids. A row without positives is included: all its pairs are negatives.
        normalize: divide the features by their L2 norm first, as ``torch.nn.functional.normalize`` does.
        reduction: "mean" divides by N, "sum", or "none" for the ``[N]`` sums of the rows.

    In the plain form (neither `positives` nor `reduction`) up to 1024 x 1024 logits are materialised on a
    CPU, outside compiled code: streaming them would cost more than it saves.

    Returns:
        float32 (float64 for float64 features): a scalar, or ``[N]``. Logits and sums are in that dtype.

    Raises:
        ValueError: naming every invalid argument.
        IndexError: a positive outside ``[0, M)`` (a device assertion on CUDA).
    """
    positives, key_ids = targets.as_targets(positives)
    faults = pairwise.feature_faults(query, key)
    faults += targets.positives_faults(query, key, positives, key_ids)
    faults += pairwise.scalar_faults("scale", scale, query)
    faults += pairwise.scalar_faults("bias", bias, query)
    if positives is None and query.dim() == key.dim() == 2 and key.shape[0] < query.shape[0]:
        faults.append(
            f"without positives, M must be at least N, got N = {query.shape[0]} and M = {key.shape[0]}"
        )
    if reduction not in ("mean", "sum", "none"):
        faults.append(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if faults:
        raise ValueError("sigmoid_loss: " + "; ".join(faults))
    scale = pairwise.as_scalar("sigmoid_loss", "scale", scale, query)
    bias = pairwise.as_scalar("sigmoid_loss", "bias", bias, query)
    if positives is None and reduction == "mean" and _pairwise_small.serves(query, key):
        return _pairwise_small.loss(query, key, scale, bias, False, 0.0, normalize)
    forms = reduction != "none" and ahead.forms_ahead(query)
    needs = [forms and t.requires_grad for t in (query, key, scale, bias)]
    tensors = (query, key, scale, bias, positives, key_ids)
    return _op(*tensors, normalize, reduction, needs[0], needs[1], needs[2] or needs[3])[0]


def _fake(
    query, key, scale, bias, positives, key_ids, normalize, reduction, need_query, need_key, need_scalars
):
    work = torch.promote_types(query.dtype, torch.float32)
    needs = (need_query, need_key, need_scalars, need_scalars)
    loss = query.new_empty((query.shape[0],) if reduction == "none" else (), dtype=work)
    return loss, *empty_grads((query, key, scale, bias), needs)


def _fake_bwd(dloss, query, key, scale, bias, *rest):
    return empty_grads((query, key, scale, bias), rest[-1])


def _flops(query, key, *_, out_shape):
    formed = sum(grad == x for grad, x in zip(out_shape[1:], (query, key), strict=False))
    return pairwise.flops(query, key, 1 + formed)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.normalize, ctx.reduction, _, _, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dloss, *unused):
    names = ("query", "key", "scale", "bias")
    wanted = [needs[name] for name in names]
    saved = ctx.saved_tensors
    inputs, formed = saved[:6], saved[6:]
    grads = ahead.scaled(formed, dloss, inputs[:4], wanted)
    if grads is None:
        grads = _bwd(dloss, *inputs, ctx.normalize, ctx.reduction, wanted)
    return dict(zip(names, grads, strict=True))


_TENSORS = "Tensor query, Tensor key, Tensor scale, Tensor bias, Tensor? positives, Tensor? key_ids"
_OPTIONS = "bool normalize, str reduction"
_GRADS = "Tensor dquery, Tensor dkey, Tensor dscale, Tensor dbias"

_op = define(
    f"sigmoid_loss({_TENSORS}, {_OPTIONS}, bool need_query, bool need_key, bool need_scalars)"
    f" -> (Tensor loss, {_GRADS})",
    reference=sigmoid_loss_fwd,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("query", "key"),
)
_bwd = define(
    f"sigmoid_loss_bwd(Tensor dloss, {_TENSORS}, {_OPTIONS}, bool[4] needs) -> ({_GRADS})",
    reference=sigmoid_loss_bwd,
    fake=_fake_bwd,
    flops=lambda dloss, query, key, *rest, **_: pairwise.flops(query, key, sum(rest[-1][:2])),
)
if has_kernel("sigmoid_sweep", "CPU"):
    kernel("sigmoid_loss", "CPU", sweep.forward, pairwise.label("CPU"))
    kernel("sigmoid_loss_bwd", "CPU", sweep.backward, pairwise.label("CPU"))

if TRITON:
    from vlmkernels.triton import sigmoid_loss as _cuda

    kernel("sigmoid_loss", "CUDA", pairwise.unless_float64(0, _cuda.sigmoid_loss, sweep.forward), "Triton")
    _bwd_on_gpu = pairwise.unless_float64(1, _cuda.sigmoid_loss_bwd, sweep.backward)
    kernel("sigmoid_loss_bwd", "CUDA", _bwd_on_gpu, "Triton")
