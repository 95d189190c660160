"""loss = cross-entropy of scale * q k^T along its rows; symmetric: averaged with that along its columns."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, has_kernel, kernel
from vlmkernels.ops import _info_nce_sweeps as sweeps
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _pairwise_small
from vlmkernels.ops import _pairwise_targets as targets
from vlmkernels.reference.info_nce import info_nce_bwd, info_nce_fwd


@arguments.public
def info_nce(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: float | Tensor,
    *,
    positives: Tensor | tuple[Tensor, Tensor] | None = None,
    symmetric: bool = True,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    weight: Tensor | None = None,  # [N]
    reduction: str = "mean",
    store_bytes: int = 2**28,
) -> Tensor:
    """Contrastive cross-entropy (InfoNCE) of ``scale * query @ key.T``, never materialised by fused kernels.

    The symmetric form is the loss of CLIP (Radford et al. 2021, figure 3): ``(rows + columns) / 2``; the
    one-directional form is InfoNCE (van den Oord et al. 2018, equation 4); targets uniform over equal ids are
    those of SupCon (Khosla et al. 2020, equation 2).

    Args:
        query: ``[N, D]``.
        key: ``[M, D]``, same dtype and device.
        scale: multiplies the similarities; a float, or a tensor with one element, whose gradient has the
            same shape.
        positives: the targets. ``None``: key i belongs to query i (``M == N`` when symmetric, otherwise
            ``M >= N``, the rest are negatives). ``[N]`` int64: index of each query's key, -100 for a row that
            is not counted; needs ``symmetric=False``. ``(query_ids [N], key_ids [M])`` int64: uniform over
            the keys with an equal id; a row or column without one is not counted.
        symmetric: average with the cross-entropy along the columns.
        label_smoothing: in [0, 1); mixes the targets with the uniform distribution over all keys (queries).
        normalize: divide the features by their L2 norm first, as ``torch.nn.functional.normalize`` does.
        weight: ``[N]``, not negative, no gradient; of row i and column i; needs ``M == N`` when symmetric.
        reduction: "mean" divides each direction by its own sum of weights, "sum", or "none" for ``[N]``
            losses (symmetric: half the row's plus half the column's, needs ``M == N``). With nothing counted
            the loss is 0.
        store_bytes: memory that may be spent to keep exponentials between the forward and the backward, which
            then performs ``(8 - 2 f) N M D`` operations in all, f being the fraction that fits.

    In the plain form (none of `positives`, `weight`, `reduction`) up to 1024 x 1024 logits are materialised
    on a CPU, outside compiled code, for any `store_bytes`: streaming them would cost more than it saves.

    Returns:
        float32 (float64 for float64 features): a scalar, or ``[N]``. Sums, maxima and logits are in that
        dtype.

    Raises:
        ValueError: naming every invalid argument.
        IndexError: a positive outside ``[0, M)`` (a device assertion on CUDA).
    """
    positives, key_ids = targets.as_targets(positives)
    faults = pairwise.feature_faults(query, key)
    faults += targets.positives_faults(query, key, positives, key_ids)
    faults += pairwise.scalar_faults("scale", scale, query)
    n, m = query.shape[0] if query.dim() else 0, key.shape[0] if key.dim() else 0
    if positives is None and (n != m if symmetric else m < n):
        wanted = "equal N when symmetric" if symmetric else "be at least N"
        faults.append(f"without positives, M must {wanted}, got N = {n} and M = {m}")
    if symmetric and positives is not None and key_ids is None:
        faults.append(
            "positives as [N] indices need symmetric=False; for both directions pass (query_ids, key_ids)"
        )
    if weight is not None:
        faults += pairwise.weight_faults(query, weight)
    if symmetric and n != m and (weight is not None or reduction == "none"):
        faults.append(f"weight and reduction='none' need M == N when symmetric, got N = {n} and M = {m}")
    if reduction not in ("mean", "sum", "none"):
        faults.append(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not arguments.is_number(label_smoothing):  # a tensor would get no gradient
        raise TypeError("label_smoothing must be a number")
    if not 0 <= label_smoothing < 1:
        faults.append(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not 0 <= store_bytes < 2**63:
        faults.append(f"store_bytes must be in [0, 2**63), got {store_bytes}")
    if n > 0 and m == 0:
        faults.append(f"key must have rows, since query has {n}")
    if faults:
        raise ValueError("info_nce: " + "; ".join(faults))
    scale = pairwise.as_scalar("info_nce", "scale", scale, query)
    if positives is None and weight is None and reduction == "mean" and _pairwise_small.serves(query, key):
        return _pairwise_small.loss(query, key, scale, None, symmetric, label_smoothing, normalize)
    weight = weight.detach() if weight is not None else None
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, scale))):
        store_bytes = 0
    tensors = (query, key, scale, positives, key_ids, weight)
    return _op(*tensors, symmetric, label_smoothing, normalize, reduction, store_bytes)[0]


def _reference(*args):
    """The results that only kernels read are 0, and the store is not filled; graphs always contain both."""
    _, rows, cols, store = _fake(*args)
    return info_nce_fwd(*args[:-1]), rows.zero_(), cols.zero_(), store


def _reference_bwd(dloss, query, key, scale, positives, key_ids, weight, *rest):
    *_, symmetric, label_smoothing, normalize, reduction, _, needs = rest
    return info_nce_bwd(
        dloss, query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize,
        reduction, needs,
    )  # fmt: skip


def _fake(
    query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize, reduction,
    store_bytes,
):  # fmt: skip
    n, m = query.shape[0], key.shape[0]
    stats = query.new_empty(0, dtype=torch.promote_types(query.dtype, torch.float32))
    return (
        stats.new_empty((n,) if reduction == "none" else ()),
        stats.new_empty((5, n)),
        stats.new_empty((4, m if symmetric else 0)),
        query.new_empty(pairwise.store_size(query, key, store_bytes), dtype=torch.uint8),
    )


def _fake_bwd(dloss, query, key, scale, *rest):
    return empty_grads((query, key, scale), rest[-1])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.symmetric, ctx.label_smoothing, ctx.normalize, ctx.reduction, ctx.store_bytes = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dloss, *unused):
    names = ("query", "key", "scale")
    options = (ctx.symmetric, ctx.label_smoothing, ctx.normalize, ctx.reduction, ctx.store_bytes)
    grads = _bwd(dloss, *ctx.saved_tensors, *options, [needs[name] for name in names])
    return dict(zip(names, grads, strict=True))


_TENSORS = "Tensor query, Tensor key, Tensor scale, Tensor? positives, Tensor? key_ids, Tensor? weight"
_OPTIONS = "bool symmetric, float label_smoothing, bool normalize, str reduction, SymInt store_bytes"
_STATS = "Tensor rows, Tensor cols, Tensor store"  # for the backward of the same kernel

_op = define(
    f"info_nce({_TENSORS}, {_OPTIONS}) -> (Tensor loss, {_STATS})",
    reference=_reference,
    fake=_fake,
    flops=lambda query, key, *_, **__: pairwise.flops(query, key),
    setup_context=_setup_context,
    backward=_backward,
    autocast=("query", "key"),
)
_bwd = define(
    f"info_nce_bwd(Tensor dloss, {_TENSORS}, {_STATS}, {_OPTIONS}, bool[3] needs)"
    " -> (Tensor dquery, Tensor dkey, Tensor dscale)",
    reference=_reference_bwd,
    fake=_fake_bwd,
    flops=lambda dloss, query, key, *rest, **_: pairwise.flops(query, key, sum(rest[-1][:2])),
)
if has_kernel("info_nce_stats", "CPU"):
    kernel("info_nce", "CPU", sweeps.forward, pairwise.label("CPU"))
    kernel("info_nce_bwd", "CPU", sweeps.backward, pairwise.label("CPU"))

if TRITON:
    from vlmkernels.triton import _info_nce_bwd as _cuda_bwd
    from vlmkernels.triton import info_nce as _cuda

    kernel("info_nce", "CUDA", pairwise.unless_float64(0, _cuda.info_nce, sweeps.forward), "Triton")
    _bwd_on_gpu = pairwise.unless_float64(1, _cuda_bwd.info_nce_bwd, sweeps.backward)
    kernel("info_nce_bwd", "CUDA", _bwd_on_gpu, "Triton")
