"""InfoNCE from two streaming sweeps, on every device that has kernels for them.

With S = scale a_i b_j <q_i, k_j>, where a, b are inverse norms or 1, `info_nce_stats` gives the maxima and
sums of exponentials of the rows and columns of S, `info_nce_grads` the products of the softmaxes with the
features. Everything that is O((N + M) D) or less, targets, smoothing, weights and reductions, is here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmkernels._library import TRITON, define_part, kernel
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _pairwise_targets as targets
from vlmkernels.ops import _sums as sums
from vlmkernels.reference._pairwise import check_features, check_pair

# Of every row, and of every column where `columns` (else size 0):
#   max_i = max_j S_ij    sum_i = sum_j e^{S_ij - max_i}    moment_i = sum_j e^{S_ij - max_i} (S_ij - max_i)
# positives [N] holds key indices, -1 where a row has none and positive_logit is -inf.
_stats = define_part(
    "info_nce_stats(Tensor query, Tensor key, Tensor scale, Tensor? query_inv_norm, Tensor? key_inv_norm,"
    " Tensor positives, bool columns, int store_bytes)"
    " -> (Tensor row_max, Tensor row_sum, Tensor row_moment, Tensor positive_logit,"
    " Tensor col_max, Tensor col_sum, Tensor col_moment, Tensor store)",
    flops=lambda query, key, *_, **__: pairwise.flops(query, key),
)
# With p_i the positive of row i, u = row_coef, v = col_coef, w = positive_coef (col_* have size 0 when there
# are no columns), and the log-sum-exps in two parts, r_i = row_max_i + row_log_i, c_j = col_max_j + col_log_j
# (at large logits their float32 sum would lose what the exponential needs: subtract the maximum first, then
# the logarithm):
#   g_ij = u_i e^{S_ij - r_i} + v_j e^{S_ij - c_j}
#   D_i  = query_extra_i + sum_{j != p_i} g_ij b_j k_j + w_i b_{p_i} k_{p_i}
#   D'_j = key_extra_j   + sum_{i: p_i != j} g_ij a_i q_i + sum_{i: p_i = j} w_i a_i q_i
#   query_dot_i = <q_i, D_i>    dquery_i = scale a_i (D_i - a_i^2 query_dot_i q_i)
#   key_dot_j  = <k_j, D'_j>    dkey_j  = scale b_j (D'_j - b_j^2 key_dot_j k_j)
# The second terms of the gradients only when normalised.
_grads = define_part(
    "info_nce_grads(Tensor query, Tensor key, Tensor scale, Tensor? query_inv_norm, Tensor? key_inv_norm,"
    " Tensor positives, Tensor row_max, Tensor row_log, Tensor col_max, Tensor col_log, Tensor row_coef,"
    " Tensor col_coef, Tensor positive_coef, Tensor? query_extra, Tensor? key_extra, Tensor store,"
    " int store_bytes, bool need_query, bool need_key)"
    " -> (Tensor dquery, Tensor dkey, Tensor query_dot, Tensor key_dot)",
    flops=lambda query, key, *rest, **_: pairwise.flops(query, key, sum(rest[-2:])),
)


@dataclass
class _Groups:
    """Labels of equal ids."""

    query_label: Tensor  # [N]
    key_label: Tensor  # [M]
    query_count: Tensor  # [N + M] how many queries carry each label
    key_count: Tensor  # [N + M]

    def seen_from(self, columns: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Labels of the rows of x, of the rows of y, and how many rows of y carry each label."""
        if columns:
            return self.key_label, self.query_label, self.query_count
        return self.query_label, self.key_label, self.key_count


@dataclass
class _Targets:
    """Which keys are positive: an index for each row, and the groups of equal ids when they were given."""

    index: Tensor  # [N] one positive key of each row, -1 where it has none
    groups: _Groups | None = None
    all_rows: bool = False  # every row, and every column when symmetric, is counted

    @classmethod
    def of(cls, positives: Tensor | None, key_ids: Tensor | None, n: int, m: int, device) -> "_Targets":
        check_pair("info_nce", positives, key_ids)
        if positives is None:
            return cls(torch.arange(n, device=device), all_rows=True)
        if key_ids is None:
            return cls(targets.checked_indices("info_nce", positives, m))
        query_label, key_label = targets.group_labels(positives, key_ids)
        zeros = torch.zeros(n + m, dtype=torch.int64, device=device)
        query_count = zeros.scatter_add(0, query_label, torch.ones_like(query_label))
        key_count = zeros.scatter_add(0, key_label, torch.ones_like(key_label))
        first = zeros.scatter_reduce(0, key_label, torch.arange(m, device=device), "amin", include_self=False)
        index = torch.where(key_count[query_label] > 0, first[query_label], -1)
        return cls(index, _Groups(query_label, key_label, query_count, key_count))

    def at_positives(self, *columns: Tensor) -> list[Tensor]:
        """Of each row, what the column of its positive holds; of rows without one, anything."""
        if columns[0].shape[0] == 0:
            return [column.new_zeros(self.index.shape[0]) for column in columns]
        at = self.index.clamp_min(0)
        return [column[at] for column in columns]

    def row_weight(self, weight: Tensor | None, like: Tensor) -> Tensor:
        counted = torch.ones_like(like) if self.all_rows else (self.index >= 0).to(like.dtype)
        return counted if weight is None else counted * weight.to(like.dtype)

    def col_weight(self, weight: Tensor | None, like: Tensor) -> Tensor:
        counted = torch.ones_like(like)
        if self.groups is not None:
            counted = (self.groups.query_count[self.groups.key_label] > 0).to(like.dtype)
        return counted if weight is None else counted * weight.to(like.dtype)


def forward(
    query, key, scale, positives, key_ids, weight, symmetric, smoothing, normalize, reduction, store_bytes
):
    check_features("info_nce", query, key)
    store_size = pairwise.store_size(query, key, store_bytes)
    n, m = query.shape[0], key.shape[0]
    work = torch.promote_types(query.dtype, torch.float32)
    if n == 0:  # no loss, and columns without a maximum
        rows = [query.new_zeros(0, dtype=work) for _ in range(5)]
        cols = [query.new_zeros(m if symmetric else 0, dtype=work) for _ in range(3)]
        loss = query.new_zeros((0,) if reduction == "none" else (), dtype=work)
        store = query.new_zeros(0, dtype=torch.uint8)
        return loss, *rows[:2], *cols[:2], *rows[2:], cols[2], store
    query, key = pairwise.with_width(query), pairwise.with_width(key)
    a, b = pairwise.inverse_norms(query, normalize), pairwise.inverse_norms(key, normalize)
    targets = _Targets.of(positives, key_ids, n, m, query.device)
    row_max, row_sum, row_moment, positive, col_max, col_sum, col_moment, store = _stats(
        query, key, scale, a, b, targets.index, symmetric, store_size
    )
    row_log, col_log = row_sum.log(), col_sum.log()
    row_short = row_max - positive
    row_gap, col_gap = row_short + row_log, col_max.new_empty(0)
    s = scale.to(work).reshape(())
    w = targets.row_weight(weight, row_max)
    sides = [(query, a, key, b, row_max, row_log, row_moment / row_sum, row_short, w)]
    if symmetric:
        top, log = (col_max, col_log) if targets.all_rows else targets.at_positives(col_max, col_log)
        col_short = top - positive
        col_gap = col_short + log
        w = targets.col_weight(weight, col_max)
        sides.append((key, b, query, a, col_max, col_log, col_moment / col_sum, col_short, w))
    total, slopes = None, [col_gap.new_empty(0)] * 2
    for columns, (x, x_inv, y, y_inv, top, log, mean, short, w) in enumerate(sides):
        if targets.groups is not None:
            short = top - s * _label_mean(x, x_inv, y, y_inv, targets.groups, columns)
        if smoothing:
            overall = _dots(x, x_inv, _weighted_sum(y, y_inv)) / max(len(y), 1)
            short = (1 - smoothing) * short + smoothing * (top - s * overall)
        # The slope is the mean logit under the softmax minus that of the targets. Both are counted from the
        # maximum: all terms are as small as the scale, which divides the slope in the end.
        loss, slope = short + log, short + mean
        if not targets.all_rows:
            loss, slope = (torch.where(w > 0, each, 0) for each in (loss, slope))
        slopes[columns] = slope
        loss = _reduce(loss, w, reduction)
        total = loss if total is None else (total + loss) * 0.5
    return total, row_max, row_log, col_max, col_log, row_gap, col_gap, *slopes, store


def backward(
    dloss, query, key, scale, positives, key_ids, weight, row_max, row_log, col_max, col_log,
    row_gap, col_gap, row_slope, col_slope, store, symmetric, smoothing, normalize, reduction, store_bytes,
    needs,
):  # fmt: skip
    check_features("info_nce_bwd", query, key)
    if query.numel() == 0:  # no queries, or features of width 0
        return tuple(
            x.new_zeros(x.shape if need else 0) for x, need in zip((query, key, scale), needs, strict=True)
        )
    a, b = pairwise.inverse_norms(query, normalize), pairwise.inverse_norms(key, normalize)
    n, m = query.shape[0], key.shape[0]
    targets = _Targets.of(positives, key_ids, n, m, query.device)
    share = (0.5 if symmetric else 1.0) * dloss.to(row_max.dtype)
    u = share * _mean_weight(targets.row_weight(weight, row_max), reduction)  # [N]
    v = share * _mean_weight(targets.col_weight(weight, col_max), reduction) if symmetric else col_max  # [M]
    hit = 0.0 if targets.groups is not None else 1 - smoothing  # the target of a positive that stands alone
    positive_coef = u * (torch.expm1(-row_gap) + (1 - hit))
    if symmetric and n:
        col_coef = v if targets.all_rows else targets.at_positives(v)[0]
        positive_coef = positive_coef + col_coef * (torch.expm1(-col_gap) + (1 - hit))
    # dscale comes from the slopes; only at scale 0, which a GPU's launcher cannot see, from a product
    zero_scale = needs[2] and (scale.device.type != "cpu" or float(scale) == 0)
    need_query = needs[0] or (zero_scale and not needs[1])
    extra_q = _extra(query, a, key, b, u, v, targets, smoothing, symmetric, False) if need_query else None
    extra_k = _extra(key, b, query, a, v, u, targets, smoothing, symmetric, True) if needs[1] else None
    dquery, dkey, query_dot, key_dot = _grads(
        query, key, scale, a, b, targets.index, row_max, row_log, col_max, col_log, u, v, positive_coef,
        extra_q, extra_k, store, store_bytes, need_query, needs[1],
    )  # fmt: skip
    dscale = scale.new_empty(0)
    if needs[2]:
        # sum_ij dS_ij S_ij / scale from the sums of the first sweep: operands of products may be rounded
        slope = sums.total(u * row_slope)
        if symmetric:
            slope = slope + sums.total(v * col_slope)
        s = scale.to(slope.dtype).reshape(())
        dscale = slope / s
        if zero_scale:
            dot, inv = (query_dot, a) if need_query else (key_dot, b)
            dscale = torch.where(s == 0, sums.total(dot if inv is None else dot * inv), dscale)
        dscale = dscale.to(scale.dtype).reshape(scale.shape)
    return dquery if needs[0] else query.new_empty(0), dkey, dscale


def _label_mean(x, x_inv, y, y_inv, groups: _Groups, columns) -> Tensor:
    """The mean similarity of each row of x and the rows of y with its label, [rows of x]."""
    own, other, counts = groups.seen_from(columns)
    total = sums.segment_sum(_scaled(y, y_inv), other, counts)[own]  # [rows, D]
    dots = (x * total).sum(-1)
    return (dots if x_inv is None else dots * x_inv) / counts[own].clamp_min(1)


def _extra(
    x, x_inv, y, y_inv, own_coef, other_coef, targets: _Targets, smoothing, symmetric, columns
) -> Tensor | None:
    """The targets' part of D [rows of x, D] beyond the single positive of each row, None if there is none.

    own_coef weighs the direction whose softmax runs over y, other_coef the one that runs over x.
    """
    extra = None
    use_own, use_other = symmetric or not columns, symmetric or columns
    if smoothing:
        extra = _scaled(x, None).new_zeros(x.shape)
        if use_own:
            extra.addmm_(own_coef[:, None], _weighted_sum(y, y_inv)[None], alpha=-smoothing / len(y))
        if use_other:
            extra -= smoothing / len(x) * _weighted_sum(_scaled(y, y_inv), other_coef)
    if targets.groups is not None:
        own, other, counts = targets.groups.seen_from(columns)
        own_counts = targets.groups.key_count if columns else targets.groups.query_count
        units = _scaled(y, y_inv)
        part = units.new_zeros(x.shape)
        if use_own:
            per_row = own_coef / counts[own].clamp_min(1)
            part += per_row[:, None] * sums.segment_sum(units, other, counts)[own]
        if use_other:
            weighted = (other_coef / own_counts[other].clamp_min(1))[:, None] * units
            part += sums.segment_sum(weighted, other, counts)[own]
        extra = part.mul_(smoothing - 1) if extra is None else extra.add_(part, alpha=smoothing - 1)
    return extra


def _scaled(x: Tensor, inv_norm: Tensor | None) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if inv_norm is None else x * inv_norm[:, None]


def _weighted_sum(x: Tensor, weight: Tensor | None) -> Tensor:
    """sum_i weight_i x_i, [D]. Not a product, whose order of summation may follow the number of threads."""
    return _scaled(x, weight).sum(0)


def _dots(x: Tensor, inv_norm: Tensor | None, vector: Tensor) -> Tensor:
    dots = x.to(vector.dtype) @ vector
    return dots if inv_norm is None else dots * inv_norm


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
    from vlmkernels.triton import info_nce as _cuda

    kernel("info_nce_stats", "CUDA", _cuda.info_nce_stats, "Triton")
    kernel("info_nce_grads", "CUDA", _cuda.info_nce_grads, "Triton")
