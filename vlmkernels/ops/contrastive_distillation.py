"""loss = divergence of a teacher's softmaxes of all pairs from a student's, along rows and columns."""

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define, empty_grads, has_kernel, kernel
from vlmkernels.ops import _contrastive_distillation_sweeps as sweeps
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _pairwise_small
from vlmkernels.reference.contrastive_distillation import (
    DIVERGENCES,
    contrastive_distillation_bwd,
    contrastive_distillation_fwd,
    sum_dtype,
)


@arguments.public
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
    store_bytes: int = 2**28,
) -> Tensor:
    """Divergence of the teacher's softmaxes of all pairs from the student's, whose logits are never held.

    The logits are ``scale * query @ key.T`` and ``teacher_scale * teacher_query @ teacher_key.T``. The
    symmetric form, ``(rows + columns) / 2``, is the affinity mimicking of TinyCLIP (Wu et al. 2023) and, with
    "kl", the contrastive relational distillation of CLIP-KD (Yang et al. 2024).

    Args:
        query: ``[N, D]``, of the student.
        key: ``[M, D]``, same dtype and device.
        scale: multiplies the student's similarities; a float, or a tensor with one element, whose gradient
            has the same shape.
        teacher_query: ``[N, E]``, any width, no gradient.
        teacher_key: ``[M, E]``, dtype of `teacher_query`.
        teacher_scale: a float, or a tensor with one element, without gradient.
        symmetric: average with the divergence along the columns.
        divergence: "kl", ``sum p (log p - log s)`` of the teacher's p and the student's s, or
            "cross_entropy", ``-sum p log s``, which is larger by the teacher's entropy and has the same
            gradient.
        reduction: "mean" over the rows, and over the columns, "sum", or "none" for ``[N]`` losses (symmetric:
            half the row's plus half the column's, needs ``M == N``). With no rows the loss is 0.
        store_bytes: memory that may be spent to keep logits between the forward and the backward, which then
            performs ``(8 - 2 f) N M D + (4 - 2 f) N M E`` operations in all, f being the fraction that fits.

    With `reduction` "mean" or "sum", and a teacher of the student's dtype, up to 1024 x 1024 logits are
    materialised on a CPU, outside compiled code, for any `store_bytes`: streaming them would cost more than
    it saves.

    Returns:
        float32 (float64 if student or teacher are): a scalar, or ``[N]``. Logits, softmaxes and sums are in
        that dtype.

    Raises:
        ValueError: naming every invalid argument.
    """
    faults = pairwise.feature_faults(query, key)
    faults += pairwise.feature_faults(teacher_query, teacher_key, "teacher_")
    faults += arguments.device_faults({"query": query, "teacher_query": teacher_query})
    faults += pairwise.scalar_faults("scale", scale, query)
    faults += pairwise.scalar_faults("teacher_scale", teacher_scale, query)
    n, m = (x.shape[0] if x.dim() else 0 for x in (query, key))
    teachers = tuple(x.shape[0] if x.dim() else 0 for x in (teacher_query, teacher_key))
    if teachers != (n, m):
        faults.append(
            f"teacher_query and teacher_key must have as many rows as query and key, {n} and {m}, "
            f"got {teachers[0]} and {teachers[1]}"
        )
    if divergence not in DIVERGENCES:
        faults.append(f"divergence must be 'kl' or 'cross_entropy', got {divergence!r}")
    if reduction not in ("mean", "sum", "none"):
        faults.append(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if symmetric and n != m and reduction == "none":
        faults.append(f"reduction='none' needs M == N when symmetric, got N = {n} and M = {m}")
    if not 0 <= store_bytes < 2**63:
        faults.append(f"store_bytes must be in [0, 2**63), got {store_bytes}")
    if n > 0 and m == 0:
        faults.append(f"key must have rows, since query has {n}")
    if faults:
        raise ValueError("contrastive_distillation: " + "; ".join(faults))
    scale = pairwise.as_scalar("contrastive_distillation", "scale", scale, query)
    teacher_scale = pairwise.as_scalar("contrastive_distillation", "teacher_scale", teacher_scale, query)
    teacher = (teacher_query.detach(), teacher_key.detach(), teacher_scale.detach())
    if reduction != "none" and _pairwise_small.serves(query, key, *teacher[:2]):
        forms = (symmetric, divergence == "cross_entropy", reduction == "mean")
        return _pairwise_small.distillation(query, key, scale, *teacher, *forms)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, scale))):
        store_bytes = 0
    return _op(query, key, scale, *teacher, symmetric, divergence, reduction, store_bytes)[0]


def _reference(*args):
    """The results that only kernels read are 0, and the store is not filled; graphs always contain both."""
    _, rows, cols, store = _fake(*args)
    return contrastive_distillation_fwd(*args[:-1]), rows.zero_(), cols.zero_(), store


def _reference_bwd(dloss, *args):
    tensors, (symmetric, divergence, reduction, _, needs) = args[:6], args[9:]
    return contrastive_distillation_bwd(dloss, *tensors, symmetric, divergence, reduction, needs)


def _fake(
    query, key, scale, teacher_query, teacher_key, teacher_scale, symmetric, divergence, reduction,
    store_bytes,
):  # fmt: skip
    n, m = query.shape[0], key.shape[0]
    stats = query.new_empty(0, dtype=sum_dtype(query, teacher_query))
    return (
        stats.new_empty((n,) if reduction == "none" else ()),
        stats.new_empty((5, n)),
        stats.new_empty((5, m if symmetric else 0)),
        query.new_empty(sweeps.store_size(query, key, stats.dtype, store_bytes), dtype=torch.uint8),
    )


def _fake_bwd(dloss, query, key, scale, *rest):
    return empty_grads((query, key, scale), rest[-1])


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.symmetric, ctx.divergence, ctx.reduction, ctx.store_bytes = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, needs, dloss, *unused):
    names = ("query", "key", "scale")
    options = (ctx.symmetric, ctx.divergence, ctx.reduction, ctx.store_bytes)
    grads = _bwd(dloss, *ctx.saved_tensors, *options, [needs[name] for name in names])
    return dict(zip(names, grads, strict=True))


_TENSORS = (
    "Tensor query, Tensor key, Tensor scale, Tensor teacher_query, Tensor teacher_key, Tensor teacher_scale"
)
_STATS = "Tensor rows, Tensor cols, Tensor store"
_OPTIONS = "bool symmetric, str divergence, str reduction, SymInt store_bytes"

_op = define(
    f"contrastive_distillation({_TENSORS}, {_OPTIONS}) -> (Tensor loss, {_STATS})",
    reference=_reference,
    fake=_fake,
    flops=sweeps.forward_flops,
    setup_context=_setup_context,
    backward=_backward,
    autocast=("query", "key", "teacher_query", "teacher_key"),
)
_bwd = define(
    f"contrastive_distillation_bwd(Tensor dloss, {_TENSORS}, {_STATS}, {_OPTIONS}, bool[3] needs)"
    " -> (Tensor dquery, Tensor dkey, Tensor dscale)",
    reference=_reference_bwd,
    fake=_fake_bwd,
    flops=lambda dloss, query, key, *rest, **_: pairwise.flops(query, key, sum(rest[-1][:2])),
)
if has_kernel("contrastive_distillation_stats", "CPU"):
    kernel("contrastive_distillation", "CPU", sweeps.forward, pairwise.label("CPU"))
    kernel("contrastive_distillation_bwd", "CPU", sweeps.backward, pairwise.label("CPU"))

if TRITON:
    from vlmkernels.triton import _contrastive_distillation_bwd as _cuda_bwd
    from vlmkernels.triton import contrastive_distillation as _cuda

    kernel("contrastive_distillation", "CUDA", _cuda.contrastive_distillation, "Triton")
    kernel("contrastive_distillation_bwd", "CUDA", _cuda_bwd.contrastive_distillation_bwd, "Triton")
