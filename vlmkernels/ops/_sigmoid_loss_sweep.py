"""The sigmoid loss from one streaming sweep, on every device that has a kernel for it.

The gradient of the logistic loss needs no sum over a row first, so loss and gradients come from one pass over
the logits.
"""

import torch
from torch import Tensor

from vlmkernels._library import TRITON, define_part, kernel
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _pairwise_targets as targets
from vlmkernels.ops import _sums as sums
from vlmkernels.reference._pairwise import check_features, check_pair

# z_ij = scale a_i b_j <q_i, k_j> + bias with a, b inverse norms or 1; u = row_coef; t_ij = +1 on positives,
# -1 elsewhere. One form is given: j = positives_i (-1: none), or query_ids_i = key_ids_j.
#   row_loss_i = sum_j softplus(-t_ij z_ij)       g_ij = -u_i t_ij sigmoid(-t_ij z_ij)
#   row_dbias_i = sum_j g_ij                      row_dscale_i = sum_j g_ij a_i b_j <q_i, k_j>
#   D_i = sum_j g_ij b_j k_j                      dq_i = scale a_i (D_i - a_i^2 <q_i, D_i> q_i); dk likewise
# The second term of dq applies only to normalised features.
# Outputs that are not needed have size 0.
_parts = define_part(
    "sigmoid_sweep(Tensor query, Tensor key, Tensor scale, Tensor bias, Tensor? query_inv_norm,"
    " Tensor? key_inv_norm, Tensor? positives, Tensor? query_ids, Tensor? key_ids, Tensor row_coef,"
    " bool need_loss, bool need_query, bool need_key, bool need_scalars)"
    " -> (Tensor row_loss, Tensor dquery, Tensor dkey, Tensor row_dscale, Tensor row_dbias)",
    flops=lambda query, key, *rest, **_: pairwise.flops(query, key, sum(rest[-4:-1])),
)


def forward(
    query, key, scale, bias, positives, key_ids, normalize, reduction, need_query, need_key, need_scalars
):
    coef = 1 / max(query.shape[0], 1) if reduction == "mean" else 1.0
    row_coef = query.new_full((query.shape[0],), coef, dtype=torch.promote_types(query.dtype, torch.float32))
    needs = (need_query, need_key, need_scalars, need_scalars)
    rows, *grads = _sweep(query, key, scale, bias, positives, key_ids, normalize, row_coef, True, needs)
    return rows if reduction == "none" else sums.total(rows) * coef, *grads


def backward(dloss, query, key, scale, bias, positives, key_ids, normalize, reduction, needs):
    work = torch.promote_types(query.dtype, torch.float32)
    coef = dloss.to(work) / (max(query.shape[0], 1) if reduction == "mean" else 1)
    row_coef = coef.expand(query.shape[0]).contiguous()
    return tuple(_sweep(query, key, scale, bias, positives, key_ids, normalize, row_coef, False, needs)[1:])


def _sweep(
    query, key, scale, bias, positives, key_ids, normalize, row_coef, need_loss, needs
) -> list[Tensor]:
    check_features("sigmoid_loss", query, key)
    check_pair("sigmoid_loss", positives, key_ids)
    index = query_ids = None
    if key_ids is not None:
        query_ids = positives
    elif positives is None:
        index = torch.arange(query.shape[0], device=query.device)
    else:
        index = targets.checked_indices("sigmoid_loss", positives, key.shape[0])
    width = query.shape[1]
    query, key = pairwise.with_width(query), pairwise.with_width(key)
    a, b = pairwise.inverse_norms(query, normalize), pairwise.inverse_norms(key, normalize)
    rows, dquery, dkey, row_dscale, row_dbias = _parts(
        query, key, scale, bias, a, b, index, query_ids, key_ids, row_coef, need_loss, needs[0], needs[1],
        needs[2] or needs[3],
    )  # fmt: skip
    if width == 0:
        dquery, dkey = (x.new_empty((len(x), 0) if x.dim() == 2 else 0) for x in (dquery, dkey))
    dscale, dbias = scale.new_empty(0), bias.new_empty(0)
    if needs[2]:
        dscale = sums.total(row_dscale).to(scale.dtype).reshape(scale.shape)
    if needs[3]:
        dbias = sums.total(row_dbias).to(bias.dtype).reshape(bias.shape)
    return [rows, dquery, dkey, dscale, dbias]


if TRITON:
    from vlmkernels.triton import _pairwise_chunked as _chunked

    kernel("sigmoid_sweep", "CUDA", _chunked.sigmoid_sweep, "PyTorch")
