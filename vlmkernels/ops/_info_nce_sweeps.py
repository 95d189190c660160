"""InfoNCE from two streaming sweeps, on every device that has kernels for them.

With S = scale a_i b_j <q_i, k_j>, where a, b are inverse norms or 1, `info_nce_stats` gives the maxima and
sums of exponentials of the rows and columns of S, `info_nce_grads` the products of the softmaxes with the
features. The targets, which need no logits, are in `_info_nce_targets`; weights and reductions are here.
"""

import torch
from torch import Tensor

from vlmkernels._library import TRITON, define_part, empty_grads, kernel
from vlmkernels.ops import _info_nce_targets as targets
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _sums as sums
from vlmkernels.ops._info_nce_targets import Side
from vlmkernels.reference._pairwise import check_features

# Of every row, and of every column where `columns` (else size 0):
#   max_i = max_j S_ij    sum_i = sum_j e^{S_ij - max_i}    moment_i = sum_j e^{S_ij - max_i} (S_ij - max_i)
# positives [N]: key indices, -1 for a row without one, whose positive_logit is -inf. The store, of exactly
# store_size bytes, keeps exponentials for the gradients; workspace_bytes may be spent while this runs.
_stats = define_part(
    "info_nce_stats(Tensor query, Tensor key, Tensor scale, Tensor? query_inv_norm, Tensor? key_inv_norm,"
    " Tensor positives, bool columns, int store_size, int workspace_bytes)"
    " -> (Tensor row_max, Tensor row_sum, Tensor row_moment, Tensor positive_logit,"
    " Tensor col_max, Tensor col_sum, Tensor col_moment, Tensor store)",
    flops=lambda query, key, *_, **__: pairwise.flops(query, key),
)
# With p_i the positive of row i, u = row_coef, v = col_coef, w = positive_coef (col_* have size 0 when there
# are no columns), and the log-sum-exps in two parts, r_i = row_max_i + row_log_i, c_j = col_max_j + col_log_j
# (at large logits their float32 sum would lose the digits that the exponential needs: subtract the maximum
# first, then the logarithm):
#   g_ij = u_i e^{S_ij - r_i} + v_j e^{S_ij - c_j}
#   D_i  = query_extra_i + sum_{j != p_i} g_ij b_j k_j + w_i b_{p_i} k_{p_i}
#   D'_j = key_extra_j   + sum_{i: p_i != j} g_ij a_i q_i + sum_{i: p_i = j} w_i a_i q_i
#   query_dot_i = <q_i, D_i>    dquery_i = scale a_i (D_i - a_i^2 query_dot_i q_i)
#   key_dot_j  = <k_j, D'_j>    dkey_j  = scale b_j (D'_j - b_j^2 key_dot_j k_j)
# The second terms of the gradients apply only to normalised features.
_grads = define_part(
    "info_nce_grads(Tensor query, Tensor key, Tensor scale, Tensor? query_inv_norm, Tensor? key_inv_norm,"
    " Tensor positives, Tensor row_max, Tensor row_log, Tensor col_max, Tensor col_log, Tensor row_coef,"
    " Tensor col_coef, Tensor positive_coef, Tensor? query_extra, Tensor? key_extra, Tensor store,"
    " int workspace_bytes, bool need_query, bool need_key)"
    " -> (Tensor dquery, Tensor dkey, Tensor query_dot, Tensor key_dot)",
    flops=lambda query, key, *rest, **_: pairwise.flops(query, key, sum(rest[-2:])),
)


def forward(
    query, key, scale, positives, key_ids, weight, symmetric, smoothing, normalize, reduction, store_bytes
):
    check_features("info_nce", query, key)
    store_size = pairwise.store_size(query, key, store_bytes)
    n, m = query.shape[0], key.shape[0]
    work = torch.promote_types(query.dtype, torch.float32)
    if n == 0:  # no loss, and columns without a maximum
        loss = query.new_zeros((0,) if reduction == "none" else (), dtype=work)
        store = query.new_zeros(0, dtype=torch.uint8)
        return loss, loss.new_zeros(5, 0), loss.new_zeros(4, m if symmetric else 0), store
    queries, keys, positive = targets.sides(query, key, normalize, positives, key_ids, symmetric)
    row_max, row_sum, row_moment, positive_logit, col_max, col_sum, col_moment, store = _stats(
        queries.x, keys.x, scale, queries.inv_norm, keys.inv_norm, positive, symmetric, store_size,
        store_bytes - store_size,
    )  # fmt: skip
    row_log, col_log = row_sum.log(), col_sum.log()
    s = scale.to(work).reshape(())

    def direction(own: Side, other: Side, top: Tensor, log: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, reduced, and the slopes [rows]: mean logits under the softmax minus those of the targets.

        Both are relative to the maximum: all terms are then as small as the scale, by which the slopes are
        divided in the end.
        """
        mean_positive = targets.mean_positive(own, other)
        short = top - (positive_logit if mean_positive is None else s * mean_positive)
        if smoothing:
            short = (1 - smoothing) * short + smoothing * (top - s * targets.mean_of_all(own, other))
        loss, slope, w = short + log, short + mean, own.weights(weight)
        if own.counted is not None:
            loss, slope = (torch.where(w > 0, each, 0) for each in (loss, slope))
        return _reduce(loss, w, reduction), slope

    loss, row_slope = direction(queries, keys, row_max, row_log, row_moment / row_sum)
    row_gap = row_max - positive_logit + row_log
    col_gap, col_slope = col_max.new_empty(0), col_max.new_empty(0)
    if symmetric:
        col_loss, col_slope = direction(keys, queries, col_max, col_log, col_moment / col_sum)
        col_gap = targets.at(positive, col_max) - positive_logit + targets.at(positive, col_log)
        loss = (loss + col_loss) * 0.5
    rows = torch.stack((row_max, row_log, row_slope, row_gap, col_gap if symmetric else row_gap))
    return loss, rows, torch.stack((col_max, col_log, col_slope, col_slope)), store


def backward(
    dloss, query, key, scale, positives, key_ids, weight, rows, cols, store, symmetric, smoothing, normalize,
    reduction, store_bytes, needs,
):  # fmt: skip
    check_features("info_nce_bwd", query, key)
    if query.numel() == 0:  # no queries, or features of width 0
        return tuple(grad.zero_() for grad in empty_grads((query, key, scale), needs))
    row_max, row_log, row_slope, row_gap, col_gap = rows
    col_max, col_log, col_slope, _ = cols
    queries, keys, positive = targets.sides(query, key, normalize, positives, key_ids, symmetric)
    share = (0.5 if symmetric else 1.0) * dloss.to(row_max.dtype)
    u = share * _mean_weight(queries.weights(weight), reduction)  # [N]
    v = share * _mean_weight(keys.weights(weight), reduction) if symmetric else None  # [M]
    hit = 0.0 if queries.positives is not None else 1 - smoothing  # the target of a single positive
    positive_coef = u * (torch.expm1(-row_gap) + (1 - hit))
    if v is not None:
        positive_coef = positive_coef + targets.at(positive, v) * (torch.expm1(-col_gap) + (1 - hit))
    need_query, need_key, need_scale = needs
    # dscale comes from the slopes; only at scale 0 (which the host cannot read from a GPU) from a product
    zero_scale = need_scale and (scale.device.type != "cpu" or float(scale) == 0)
    with_query = need_query or (zero_scale and not need_key)
    dquery, dkey, query_dot, key_dot = _grads(
        query, key, scale, queries.inv_norm, keys.inv_norm, positive, row_max, row_log, col_max, col_log,
        u, u.new_empty(0) if v is None else v, positive_coef,
        targets.gradient(queries, keys, u, v, smoothing) if with_query else None,
        targets.gradient(keys, queries, v, u, smoothing) if need_key else None,
        store, max(0, store_bytes - store.numel()), with_query, need_key,
    )  # fmt: skip
    dscale = scale.new_empty(0)
    if need_scale:
        # sum_ij dS_ij S_ij / scale from the sums of the first sweep: operands of products may be rounded
        slope = sums.total(u * row_slope)
        if v is not None:
            slope = slope + sums.total(v * col_slope)
        s = scale.to(slope.dtype).reshape(())
        dscale = slope / s
        if zero_scale:
            dot, inv_norm = (query_dot, queries.inv_norm) if with_query else (key_dot, keys.inv_norm)
            dot = dot if inv_norm is None else dot * inv_norm
            dscale = torch.where(s == 0, sums.total(dot), dscale)
        dscale = dscale.to(scale.dtype).reshape(scale.shape)
    return dquery if need_query else query.new_empty(0), dkey, dscale


def _reduce(loss: Tensor, weight: Tensor, reduction: str) -> Tensor:
    weighted = loss * weight
    if reduction == "none":
        return weighted
    total = sums.total(weighted)
    return total / _mass(weight) if reduction == "mean" else total


def _mean_weight(weight: Tensor, reduction: str) -> Tensor:
    return weight / _mass(weight) if reduction == "mean" else weight


def _mass(weight: Tensor) -> Tensor:
    total = sums.total(weight)
    return total.where(total > 0, 1)


if TRITON:
    from vlmkernels.triton import _pairwise_chunked as _chunked

    kernel("info_nce_stats", "CUDA", _chunked.info_nce_stats, "PyTorch")
    kernel("info_nce_grads", "CUDA", _chunked.info_nce_grads, "PyTorch")
