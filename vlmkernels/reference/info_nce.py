"""Contrastive cross-entropy of S = scale * q k^T along its rows, and along its columns when symmetric.

With r_i = logsumexp_j S_ij, c_j = logsumexp_i S_ij, targets T (rows sum to 1) and T' (columns sum to 1):

    l_i  = r_i - sum_j T_ij S_ij            l'_j = c_j - sum_i T'_ij S_ij
    dS_ij = u_i (exp(S_ij - r_i) - T_ij) + v_j (exp(S_ij - c_j) - T'_ij)
    dq = scale * dS k        dk = scale * dS^T q        dscale = sum_ij dS_ij <q_i, k_j>

where u_i = dL/dl_i and v_j = dL/dl'_j contain the weights, the reduction and the incoming gradient. When the
features are normalised, q = x / |x| and dx = (dq - q <q, dq>) / |x|.
"""

import torch
from torch import Tensor

from vlmkernels.reference._pairwise import check_features, feature_grad, features, matches


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
    store_bytes: int = 0,
) -> Tensor:
    """The definition, dense and differentiable by autograd; `store_bytes` has no meaning here."""
    positives, key_ids = positives if isinstance(positives, tuple) else (positives, None)
    return info_nce_fwd(
        query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize, reduction
    )


def info_nce_fwd(
    query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize, reduction
) -> Tensor:
    check_features("info_nce", query, key)
    work = torch.promote_types(query.dtype, torch.float32)
    q, k = features(query, normalize, work), features(key, normalize, work)
    scale = scale.to(work).reshape(()) if isinstance(scale, Tensor) else scale
    logits = scale * (q @ k.T)  # [N, M]
    positive = matches("info_nce", positives, key_ids, len(q), len(k), logits.device)  # [N, M]
    losses = []
    for dim in _softmaxes(symmetric):
        target = _target(positive, dim, label_smoothing, work)
        w = _weight(positive, dim, weight, work)
        loss = w * -(target * logits.log_softmax(dim)).sum(dim)
        if reduction != "none":
            loss = loss.sum()
        losses.append(loss / _mass(w) if reduction == "mean" else loss)
    return sum(losses) / len(losses)


def info_nce_bwd(
    dloss, query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize, reduction,
    needs,
):  # fmt: skip
    """(dquery, dkey, dscale); an output that is not needed has size 0."""
    check_features("info_nce_bwd", query, key)
    work = torch.promote_types(query.dtype, torch.float32)
    q, k = features(query, normalize, work), features(key, normalize, work)
    cosine = q @ k.T  # [N, M]
    factor = scale.to(work).reshape(())
    logits = factor * cosine
    positive = matches("info_nce", positives, key_ids, len(q), len(k), logits.device)
    dlogits = torch.zeros_like(logits)
    for dim in _softmaxes(symmetric):
        w = _weight(positive, dim, weight, work)
        u = dloss.to(work) * (w / _mass(w) if reduction == "mean" else w) / len(_softmaxes(symmetric))
        dlogits += u.unsqueeze(dim) * (logits.softmax(dim) - _target(positive, dim, label_smoothing, work))
    dquery, dkey, dscale = query.new_empty(0), key.new_empty(0), scale.new_empty(0)
    if needs[0]:
        dquery = feature_grad(factor * (dlogits @ k), query, normalize)
    if needs[1]:
        dkey = feature_grad(factor * (dlogits.T @ q), key, normalize)
    if needs[2]:
        dscale = (dlogits * cosine).sum().to(scale.dtype).reshape(scale.shape)
    return dquery, dkey, dscale


def _softmaxes(symmetric: bool) -> tuple[int, ...]:
    """The dimensions that the softmaxes run over: keys for each query, queries for each key."""
    return (1, 0) if symmetric else (1,)


def _target(positive: Tensor, dim: int, smoothing: float, work: torch.dtype) -> Tensor:
    """Distributions along `dim` of [N, M]; 0 where there is no positive."""
    count = positive.sum(dim, keepdim=True).to(work)
    uniform = positive / count.clamp_min(1)
    smooth = (1 - smoothing) * uniform + smoothing / max(positive.shape[dim], 1)
    return torch.where(count > 0, smooth, 0)


def _weight(positive: Tensor, dim: int, weight: Tensor | None, work: torch.dtype) -> Tensor:
    """The weight of each softmax along `dim`; 0 where there is no positive."""
    counted = positive.any(dim).to(work)
    return counted if weight is None else counted * weight.to(work)


def _mass(weight: Tensor) -> Tensor:
    return torch.where(weight.sum() > 0, weight.sum(), 1)
