"""linear_cross_entropy from one sweep over chunks of rows, on every device that has a kernel for it.

The softmax of a row is complete once its logits are there, so loss and gradients come from one look at them.
"""

import torch
from torch import Tensor

from vlmkernels._library import TRITON, define_part, empty_grads, kernel
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _sums as sums
from vlmkernels.reference.linear_cross_entropy import check

# z_ij = (<h_i, w_j> + bias_j) column_scale_j; u = row_coef; t = target. On a CPU every row counts; elsewhere
# a row with t = -1 does not: it has loss 0 and no gradient, and no product if the kernel can avoid it.
#   e = label_smoothing
#   row_loss_i = logsumexp_j z_ij - (1 - e) z_i,t_i - (e / V) sum_j z_ij
#   g_ij = u_i column_scale_j (softmax(z_i)_j - (1 - e) [j = t_i] - e / V)
#   dh = g W        dW = g^T h        dbias_j = sum_i g_ij
# Gradients that are not needed have size 0.
_parts = define_part(
    "linear_cross_entropy_sweep(Tensor hidden, Tensor weight, Tensor target, Tensor? bias,"
    " Tensor? column_scale, Tensor row_coef, float label_smoothing, bool need_hidden, bool need_weight,"
    " bool need_bias) -> (Tensor row_loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    flops=lambda hidden, weight, *rest, **_: pairwise.flops(hidden, weight, 1 + sum(rest[-3:-1])),
)


def forward(hidden, weight, target, bias, column_scale, ignore_index, label_smoothing, reduction, *needs):
    one = hidden.new_ones((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    rest = (bias, column_scale, ignore_index, label_smoothing, reduction, needs)
    return _sweep("linear_cross_entropy", one, hidden, weight, target, *rest)


def backward(dloss, hidden, weight, target, *rest):
    return _sweep("linear_cross_entropy_bwd", dloss, hidden, weight, target, *rest)[1:]


def _host_knows(x: Tensor) -> bool:
    """Whether values of x can be read without waiting for a device."""
    return x.device.type == "cpu"


def _sweep(
    op, dloss, hidden, weight, target, bias, column_scale, ignore_index, label_smoothing, reduction, needs
) -> tuple[Tensor, ...]:
    every = check(op, hidden, weight, target, bias, column_scale, ignore_index, label_smoothing, reduction)
    work = torch.promote_types(hidden.dtype, torch.float32)
    u = dloss.to(work).expand(target.shape)
    size: int | Tensor
    if every:
        counted, size = target, len(target)
    elif _host_knows(target):
        counted = (target != ignore_index).nonzero().squeeze(1)
        every, size = len(counted) == len(target), max(len(counted), 1)
    else:  # without waiting for the device to know which rows there are
        every, counted = True, target != ignore_index
        target, size = target.where(counted, -1), counted.sum().clamp_min(1)
    few = (lambda x: x) if every else (lambda x: x.index_select(0, counted))
    u = few(u / size if reduction == "mean" else u).contiguous()
    h, w = pairwise.with_width(few(hidden)), pairwise.with_width(weight)
    if len(weight):
        rows, dhidden, dweight, dbias = _parts(
            h, w, few(target), bias, column_scale, u, label_smoothing, *needs
        )
    else:  # and so no row is counted
        rows, dhidden, dweight, dbias = (
            u.new_zeros(u.shape),
            *(x.zero_() for x in empty_grads((h, w, weight.new_empty(0) if bias is None else bias), needs)),
        )
    if needs[0]:
        dhidden = pairwise.without_width(dhidden, hidden)
        dhidden = dhidden if every else hidden.new_zeros(hidden.shape).index_copy(0, counted, dhidden)
    if needs[1]:
        dweight = pairwise.without_width(dweight, weight)
    if reduction == "none":
        loss = rows if every else rows.new_zeros(target.shape).index_copy(0, counted, rows)
    else:
        loss = sums.total(rows)
        loss = loss / size if reduction == "mean" else loss
    return loss, dhidden, dweight, dbias


if TRITON:
    from vlmkernels.triton.linear_cross_entropy import linear_cross_entropy_sweep as _cuda_sweep

    kernel("linear_cross_entropy_sweep", "CUDA", _cuda_sweep, "Triton")
