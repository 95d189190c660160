"""Contrastive cross-entropy of S = scale * q k^T along its rows, and along its columns when symmetric.

With r_i = logsumexp_j S_ij, c_j = logsumexp_i S_ij, targets T (rows sum to 1) and T' (columns sum to 1):

    l_i  = r_i - sum_j T_ij S_ij            l'_j = c_j - sum_i T'_ij S_ij
    dS_ij = u_i (exp(S_ij - r_i) - T_ij) + v_j (exp(S_ij - c_j) - T'_ij)
    dq = scale * dS k        dk = scale * dS^T q        dscale = sum_ij dS_ij <q_i, k_j>

where u_i = dL/dl_i and v_j = dL/dl'_j hold the weights, the reduction and the incoming gradient. When the
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
    return _loss(
        query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize, reduction
    )[0]


def info_nce_fwd(
    query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize, reduction,
    store_bytes,
):  # fmt: skip
    """The raw op: loss and what its backward needs.

    row_max [N] + row_log [N] and col_max [M] + col_log [M] are the log-sum-exps. row_gap [N] and col_gap [N]
    (log-sum-exp minus the logit of the row's positive), row_slope [N] and col_slope [M] (loss minus the
    entropy of the softmax) serve the backward of the fused kernels; here they are 0, and the store is empty.
    What belongs to columns has size 0 unless symmetric.

    Returns:
        (loss, row_max, row_log, col_max, col_log, row_gap, col_gap, row_slope, col_slope, store).
    """
    check_features("info_nce", query, key)
    loss, logits = _loss(
        query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize, reduction
    )
    cols = _lse_parts(logits, 0) if symmetric else (loss.new_empty(0), loss.new_empty(0))
    n, m = logits.shape
    unused = (logits.new_zeros(size) for size in (n, n if symmetric else 0, n, m if symmetric else 0))
    return loss, *_lse_parts(logits, 1), *cols, *unused, query.new_empty(0, dtype=torch.uint8)


def info_nce_bwd(
    dloss, query, key, scale, positives, key_ids, weight, row_max, row_log, col_max, col_log,
    row_gap, col_gap, row_slope, col_slope, store, symmetric, label_smoothing, normalize, reduction,
    store_bytes, needs,
):  # fmt: skip
    """(dquery, dkey, dscale); an output that `needs` does not ask for has size 0."""
    check_features("info_nce_bwd", query, key)
    work = row_max.dtype
    q, k = features(query, normalize, work), features(key, normalize, work)
    cosine = q @ k.T  # [N, M]
    factor = scale.to(work).reshape(())
    logits = factor * cosine
    rows, cols = _targets(positives, key_ids, label_smoothing, len(q), len(k), logits)
    u, v = _coefficients(dloss, rows, cols, weight, symmetric, reduction)
    dlogits = u[:, None] * (((logits - row_max[:, None]) - row_log[:, None]).exp() - rows)  # [N, M]
    if symmetric:
        dlogits += v * (((logits - col_max) - col_log).exp() - cols)
    dquery, dkey, dscale = query.new_empty(0), key.new_empty(0), scale.new_empty(0)
    if needs[0]:
        dquery = feature_grad(factor * (dlogits @ k), query, normalize)
    if needs[1]:
        dkey = feature_grad(factor * (dlogits.T @ q), key, normalize)
    if needs[2]:
        dscale = (dlogits * cosine).sum().to(scale.dtype).reshape(scale.shape)
    return dquery, dkey, dscale


def _loss(query, key, scale, positives, key_ids, weight, symmetric, label_smoothing, normalize, reduction):
    work = torch.promote_types(query.dtype, torch.float32)
    q, k = features(query, normalize, work), features(key, normalize, work)
    scale = scale.to(work).reshape(()) if isinstance(scale, Tensor) else scale
    logits = scale * (q @ k.T)  # [N, M]
    rows, cols = _targets(positives, key_ids, label_smoothing, len(q), len(k), logits)
    row_loss = -(rows * logits.log_softmax(1)).sum(1)  # [N]
    losses = [(row_loss, _weight(rows.sum(1), weight))]
    if symmetric:
        col_loss = -(cols * logits.log_softmax(0)).sum(0)  # [M]
        losses.append((col_loss, _weight(cols.sum(0), weight)))
    loss = sum(_reduce(each, w, reduction) for each, w in losses) / len(losses)
    return loss, logits


def _lse_parts(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and log of the sum of exp(logits - maximum) along `dim`."""
    if logits.shape[dim] == 0:
        return logits.sum(dim), logits.sum(dim)
    top = logits.amax(dim, keepdim=True)
    return top.squeeze(dim), (logits - top).exp().sum(dim).log()


def _targets(positives, key_ids, smoothing: float, n: int, m: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """T [N, M] with rows summing to 1, T' [N, M] with columns summing to 1; 0 where one has no target."""
    same = matches("info_nce", positives, key_ids, n, m, like.device).to(like.dtype)

    def spread(counts: Tensor, classes: int) -> Tensor:
        uniform = same / counts.clamp_min(1)
        return torch.where(counts > 0, (1 - smoothing) * uniform + smoothing / max(classes, 1), 0)

    return spread(same.sum(1, keepdim=True), m), spread(same.sum(0, keepdim=True), n)


def _weight(target_mass: Tensor, weight: Tensor | None) -> Tensor:
    """The weight of each row or column: 0 where it has no target."""
    counted = (target_mass > 0).to(target_mass.dtype)
    return counted if weight is None else counted * weight.to(counted.dtype)


def _reduce(loss: Tensor, weight: Tensor, reduction: str) -> Tensor:
    weighted = loss * weight
    if reduction == "none":
        return weighted
    total = weighted.sum()
    return total / torch.where(weight.sum() > 0, weight.sum(), 1) if reduction == "mean" else total


def _coefficients(dloss, rows, cols, weight, symmetric, reduction) -> tuple[Tensor, Tensor]:
    """u [N] and v [M]: the gradient of the reduced loss by each row's and each column's loss."""

    def of(mass: Tensor) -> Tensor:
        w = _weight(mass, weight)
        if reduction == "mean":
            w = w / torch.where(w.sum() > 0, w.sum(), 1)
        return dloss.to(w.dtype) * w

    if not symmetric:
        return of(rows.sum(1)), cols.new_zeros(cols.shape[1])
    return 0.5 * of(rows.sum(1)), 0.5 * of(cols.sum(0))
