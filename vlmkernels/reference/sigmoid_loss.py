"""SigLIP: a logistic loss on every pair, L = -(1/N) sum_ij log sigmoid(t_ij z_ij), z = scale * q k^T + bias.

t_ij is +1 on positives and -1 elsewhere. With u_i = dL/dl_i of row i's sum l_i:

    dz_ij = -u_i t_ij sigmoid(-t_ij z_ij)
    dq = scale * dz k    dk = scale * dz^T q    dscale = sum_ij dz_ij <q_i, k_j>    dbias = sum_ij dz_ij
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from vlmkernels.reference._pairwise import check_features, feature_grad, features, matches


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
    """The definition, dense and differentiable by autograd."""
    positives, key_ids = positives if isinstance(positives, tuple) else (positives, None)
    work = torch.promote_types(query.dtype, torch.float32)
    q, k = features(query, normalize, work), features(key, normalize, work)
    scale, bias = (v.to(work).reshape(()) if isinstance(v, Tensor) else v for v in (scale, bias))
    z = scale * (q @ k.T) + bias  # [N, M]
    rows = -logsigmoid(_signs(positives, key_ids, z) * z).sum(1)  # [N]
    return rows if reduction == "none" else rows.sum() / max(len(q), 1) if reduction == "mean" else rows.sum()


def sigmoid_loss_fwd(
    query, key, scale, bias, positives, key_ids, normalize, reduction, need_query, need_key, need_scalars
):
    """The raw op: (loss, dquery, dkey, dscale, dbias); a gradient that is not needed has size 0."""
    check_features("sigmoid_loss", query, key)
    pair = positives if key_ids is None else (positives, key_ids)
    loss = sigmoid_loss(query, key, scale, bias, positives=pair, normalize=normalize, reduction=reduction)
    needs = (need_query, need_key, need_scalars, need_scalars)
    return loss, *sigmoid_loss_bwd(
        loss.new_ones(loss.shape), query, key, scale, bias, positives, key_ids, normalize, reduction, needs
    )


def sigmoid_loss_bwd(dloss, query, key, scale, bias, positives, key_ids, normalize, reduction, needs):
    """(dquery, dkey, dscale, dbias); an output that is not needed has size 0."""
    check_features("sigmoid_loss_bwd", query, key)
    work = torch.promote_types(query.dtype, torch.float32)
    q, k = features(query, normalize, work), features(key, normalize, work)
    cosine = q @ k.T  # [N, M]
    factor = scale.to(work).reshape(())
    z = factor * cosine + bias.to(work).reshape(())
    signs = _signs(positives, key_ids, z)
    u = dloss.to(work) / (max(len(q), 1) if reduction == "mean" else 1)
    dz = -u.reshape(-1, 1) * signs * (-signs * z).sigmoid()  # [N, M]
    dquery, dkey, dscale, dbias = query.new_empty(0), key.new_empty(0), scale.new_empty(0), bias.new_empty(0)
    if needs[0]:
        dquery = feature_grad(factor * (dz @ k), query, normalize)
    if needs[1]:
        dkey = feature_grad(factor * (dz.T @ q), key, normalize)
    if needs[2]:
        dscale = (dz * cosine).sum().to(scale.dtype).reshape(scale.shape)
    if needs[3]:
        dbias = dz.sum().to(bias.dtype).reshape(bias.shape)
    return dquery, dkey, dscale, dbias


def _signs(positives: Tensor | None, key_ids: Tensor | None, z: Tensor) -> Tensor:
    """+1 on positives, -1 elsewhere, [N, M]."""
    same = matches("sigmoid_loss", positives, key_ids, z.shape[0], z.shape[1], z.device)
    return same.to(z.dtype) * 2 - 1
