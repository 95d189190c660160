"""The sweeps as torch operations on chunks of rows: float64, which Triton does not multiply on every GPU."""

import torch
from torch import Tensor

CHUNK_BYTES = 1 << 28


def _chunks(query: Tensor, key: Tensor):
    held = max(1, CHUNK_BYTES // (8 * max(key.shape[0], 1)))
    return (slice(start, min(start + held, len(query))) for start in range(0, len(query), held))


def _unit(x: Tensor, inv_norm: Tensor | None) -> Tensor:
    return x if inv_norm is None else x * inv_norm[:, None]


def _feature_grad(total: Tensor, x: Tensor, inv_norm: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """scale a (D - a^2 <x, D> x) and <x, D>."""
    dot = (x * total).sum(1)
    if inv_norm is None:
        return x.new_empty(x.shape).copy_(scale * total), dot
    unit = _unit(x, inv_norm)
    return x.new_empty(x.shape).copy_(
        (scale * inv_norm)[:, None] * (total - (inv_norm * dot)[:, None] * unit)
    ), dot


def info_nce_stats(
    query, key, scale, query_inv_norm, key_inv_norm, positives, columns, store_size, workspace_bytes
):
    n, m = len(query), len(key)
    q, k, scale = _unit(query, query_inv_norm), _unit(key, key_inv_norm), scale.to(query.dtype).reshape(())
    row_max, positive = (query.new_full((n,), -float("inf")) for _ in range(2))
    row_sum, row_moment = query.new_zeros(n), query.new_zeros(n)
    col_max = query.new_full((m if columns else 0,), -float("inf"))
    col_sum, col_moment = col_max.new_zeros(col_max.shape), col_max.new_zeros(col_max.shape)
    for rows in _chunks(query, key) if m else ():
        logits = scale * (q[rows] @ k.T)
        row_max[rows] = logits.amax(1)
        below = logits - row_max[rows, None]
        row_sum[rows], row_moment[rows] = below.exp().sum(1), (below.exp() * below).sum(1)
        target = positives[rows]
        taken = logits.gather(1, target.clamp_min(0)[:, None])[:, 0]
        positive[rows] = torch.where(target >= 0, taken, -float("inf"))
        if columns:
            high = torch.maximum(col_max, logits.amax(0))
            shift, below = torch.where(col_sum > 0, col_max - high, 0), logits - high
            col_moment = (col_moment + shift * col_sum) * shift.exp() + (below.exp() * below).sum(0)
            col_sum = col_sum * shift.exp() + below.exp().sum(0)
            col_max = high
    store = query.new_empty(0, dtype=torch.uint8)
    return row_max, row_sum, row_moment, positive, col_max, col_sum, col_moment, store


def info_nce_grads(
    query, key, scale, query_inv_norm, key_inv_norm, positives, row_max, row_log, col_max, col_log,
    row_coef, col_coef, positive_coef, query_extra, key_extra, store, workspace_bytes, need_query, need_key,
):  # fmt: skip
    q, k, scale = _unit(query, query_inv_norm), _unit(key, key_inv_norm), scale.to(query.dtype).reshape(())
    query_total = query.new_zeros(query.shape) if query_extra is None else query_extra.clone()
    key_total = key.new_zeros(key.shape) if key_extra is None else key_extra.clone()
    for rows in _chunks(query, key) if len(key) else ():
        logits = scale * (q[rows] @ k.T)
        grads = row_coef[rows, None] * (logits - row_max[rows, None] - row_log[rows, None]).exp()
        if col_coef.numel():
            grads += col_coef * (logits - col_max - col_log).exp()
        target = positives[rows, None]
        at = target.clamp_min(0)
        grads.scatter_(1, at, torch.where(target >= 0, positive_coef[rows, None], grads.gather(1, at)))
        if need_query:
            query_total[rows] += grads @ k
        if need_key:
            key_total.addmm_(grads.T, q[rows])
    none = (query.new_empty(0), query.new_empty(0))
    dquery, query_dot = _feature_grad(query_total, query, query_inv_norm, scale) if need_query else none
    dkey, key_dot = _feature_grad(key_total, key, key_inv_norm, scale) if need_key else none
    return dquery, dkey if need_key else dkey.clone(), query_dot.clone(), key_dot.clone()


def linear_cross_entropy_sweep(
    hidden, weight, target, bias, column_scale, row_coef, label_smoothing, need_hidden, need_weight, need_bias
):
    loss, dhidden = row_coef.new_zeros(len(hidden)), hidden.new_zeros(hidden.shape if need_hidden else 0)
    dweight = weight.new_zeros(weight.shape if need_weight else 0)
    dbias = (weight if bias is None else bias).new_zeros(len(weight) if need_bias else 0)
    classes = torch.arange(len(weight), device=weight.device)
    for rows in _chunks(hidden, weight):
        at = target[rows, None]
        counted = at >= 0
        h = hidden[rows].where(counted, 0)
        z = h @ weight.T
        z = z if bias is None else z + bias
        z = z if column_scale is None else z * column_scale
        logs, hits = z.log_softmax(1), classes == at
        losses = -logs.gather(1, at.clamp_min(0))
        if label_smoothing:
            losses = (1 - label_smoothing) * losses - label_smoothing * logs.mean(1, keepdim=True)
        loss[rows] = losses.where(counted, 0)[:, 0]
        q = (1 - label_smoothing) * hits.to(z.dtype) + label_smoothing / len(weight)
        grads = row_coef[rows, None] * (logs.exp() - q)
        grads = grads if column_scale is None else grads * column_scale
        grads = grads.where(counted, 0)
        if need_hidden:
            dhidden[rows] = (grads @ weight).where(counted, 0)
        if need_weight:
            dweight.addmm_(grads.T, h)
        if need_bias:
            dbias += grads.sum(0)
    return loss, dhidden, dweight, dbias


def sigmoid_sweep(
    query, key, scale, bias, query_inv_norm, key_inv_norm, positives, query_ids, key_ids, row_coef,
    need_loss, need_query, need_key, need_scalars,
):  # fmt: skip
    q, k = _unit(query, query_inv_norm), _unit(key, key_inv_norm)
    scale, bias = scale.to(query.dtype).reshape(()), bias.to(query.dtype).reshape(())
    row_loss = query.new_zeros(len(query) if need_loss else 0)
    row_dscale, row_dbias = (query.new_zeros(len(query) if need_scalars else 0) for _ in range(2))
    query_total, key_total = query.new_zeros(query.shape), key.new_zeros(key.shape)
    index = torch.arange(len(key), device=key.device)
    for rows in _chunks(query, key):
        cosine = q[rows] @ k.T
        z = scale * cosine + bias
        same = positives[rows, None] == index if positives is not None else query_ids[rows, None] == key_ids
        x = torch.where(same, -z, z)
        if need_loss:
            row_loss[rows] = (x.clamp_min(0) + (-x.abs()).exp().log1p()).sum(1)
        grads = torch.where(same, -row_coef[rows, None], row_coef[rows, None]) * x.sigmoid()
        if need_scalars:
            row_dscale[rows], row_dbias[rows] = (grads * cosine).sum(1), grads.sum(1)
        if need_query:
            query_total[rows] = grads @ k
        if need_key:
            key_total.addmm_(grads.T, q[rows])
    dquery = _feature_grad(query_total, query, query_inv_norm, scale)[0] if need_query else query.new_empty(0)
    dkey = _feature_grad(key_total, key, key_inv_norm, scale)[0] if need_key else key.new_empty(0)
    return row_loss, dquery, dkey, row_dscale, row_dbias
