"""contrastive_distillation from two streaming sweeps, on every device that has kernels for them.

`contrastive_distillation_stats` gives the losses and log-sum-exps of all rows and columns,
`contrastive_distillation_grads` the products of the softmaxes' differences with the features. Reductions are
here.
"""

import torch
from torch import Tensor

from vlmkernels._library import define_part, empty_grads
from vlmkernels._native import TILE_COLS, TILE_ROWS
from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _sums as sums
from vlmkernels.reference.contrastive_distillation import check_distillation, sum_dtype


def store_size(query: Tensor, key: Tensor, work: torch.dtype, store_bytes: int) -> int:
    """Bytes of the pairs of tiles of logits, the student's and the teacher's, that the forward keeps."""
    return pairwise.kept(query, key, 2 * TILE_ROWS * TILE_COLS * work.itemsize, store_bytes)


def forward_flops(query, key, scale, teacher_query, teacher_key, *_, **__) -> int:
    return pairwise.flops(query, key) + pairwise.flops(teacher_query, teacher_key)


# With S = scale q k^T and T = teacher_scale q' k'^T, s and p their softmaxes along a row, and log-sum-exps in
# two parts (at large logits their float32 sum would lose the digits that the exponential needs):
#   row_loss_i = sum_j p_ij (log p_ij - log s_ij), or -sum_j p_ij log s_ij if `cross_entropy`
#   rows = [max S_i, log sum_j e^{S_ij - max}, max T_i, log sum_j e^{T_ij - max}, sum_j (s_ij - p_ij) S_ij]
# and of every column where `columns` (else size 0). All features are of one dtype. The store, of exactly
# store_size bytes, keeps logits for the gradients.
_stats = define_part(
    "contrastive_distillation_stats(Tensor query, Tensor key, Tensor scale, Tensor teacher_query,"
    " Tensor teacher_key, Tensor teacher_scale, bool columns, bool cross_entropy, int store_size)"
    " -> (Tensor row_loss, Tensor rows, Tensor col_loss, Tensor cols, Tensor store)",
    flops=forward_flops,
)
# With u = row_coef [N], v = col_coef [M] (of size 0 when there are no columns), s' and p' along the columns:
#   g_ij = u_i (s_ij - p_ij) + v_j (s'_ij - p'_ij)
#   dquery = scale g k    dkey = scale g^T q    dot = sum_j g_ij <q_i, k_j>, of each query, else of each key
# workspace_bytes may be spent while this runs.
_grads = define_part(
    "contrastive_distillation_grads(Tensor query, Tensor key, Tensor scale, Tensor teacher_query,"
    " Tensor teacher_key, Tensor teacher_scale, Tensor rows, Tensor cols, Tensor row_coef, Tensor col_coef,"
    " Tensor store, int workspace_bytes, bool need_query, bool need_key)"
    " -> (Tensor dquery, Tensor dkey, Tensor dot)",
    flops=lambda query, key, *rest, **_: pairwise.flops(query, key, sum(rest[-2:])),
)


def forward(
    query, key, scale, teacher_query, teacher_key, teacher_scale, symmetric, divergence, reduction,
    store_bytes,
):  # fmt: skip
    features = (query, key, teacher_query, teacher_key)
    check_distillation("contrastive_distillation", *features, symmetric, divergence, reduction)
    (n, m), work = (len(query), len(key)), sum_dtype(query, teacher_query)
    size = store_size(query, key, work, store_bytes)
    if n == 0 or m == 0:  # no softmaxes
        loss = query.new_zeros((n,) if reduction == "none" else (), dtype=work)
        stats = (loss.new_zeros((5, count)) for count in (n, m if symmetric else 0))
        return loss, *stats, query.new_zeros(size, dtype=torch.uint8)
    query, key, teacher_query, teacher_key = _operands(*features)
    row_loss, rows, col_loss, cols, store = _stats(
        query, key, scale, teacher_query, teacher_key, teacher_scale, symmetric,
        divergence == "cross_entropy", size,
    )  # fmt: skip
    loss = _reduce(row_loss, reduction)
    if symmetric:
        loss = (loss + _reduce(col_loss, reduction)) * 0.5
    return loss, rows, cols, store


def backward(
    dloss, query, key, scale, teacher_query, teacher_key, teacher_scale, rows, cols, store, symmetric,
    divergence, reduction, store_bytes, needs,
):  # fmt: skip
    features = (query, key, teacher_query, teacher_key)
    check_distillation("contrastive_distillation_bwd", *features, symmetric, divergence, reduction)
    if query.numel() == 0 or key.numel() == 0:
        return tuple(grad.zero_() for grad in empty_grads((query, key, scale), needs))
    share = (0.5 if symmetric else 1.0) * dloss.to(rows.dtype)

    def coefficients(count: int) -> Tensor:  # [count]
        return (share / count if reduction == "mean" else share).expand(count).contiguous()

    u = coefficients(len(query))
    v = coefficients(len(key)) if symmetric else u.new_empty(0)
    need_query, need_key, need_scale = needs
    # dscale comes from the slopes; only at scale 0 (which the host cannot read from a GPU) from a product
    zero_scale = need_scale and (scale.device.type != "cpu" or float(scale) == 0)
    with_query = need_query or (zero_scale and not need_key)
    query_, key_, teacher_query, teacher_key = _operands(*features)
    dquery, dkey, dot = _grads(
        query_, key_, scale, teacher_query, teacher_key, teacher_scale, rows, cols, u, v, store,
        max(0, store_bytes - store.numel()), with_query, need_key,
    )  # fmt: skip
    dscale = scale.new_empty(0)
    if need_scale:
        # sum_ij dS_ij S_ij / scale from the sums of the first sweep: operands of products may be rounded
        slope = sums.total(u * rows[4])
        if symmetric:
            slope = slope + sums.total(v * cols[4])
        s = scale.to(slope.dtype).reshape(())
        dscale = slope / s
        if zero_scale:
            dscale = torch.where(s == 0, sums.total(dot), dscale)
        dscale = dscale.to(scale.dtype).reshape(scale.shape)
    given = zip((dquery, dkey), (query, key), (need_query, need_key), strict=True)
    return *(grad.to(x.dtype) if need else x.new_empty(0) for grad, x, need in given), dscale


def _operands(*features: Tensor) -> list[Tensor]:
    """In one dtype, that of the products; features of width 0 as a single zero."""
    dtype = torch.promote_types(features[0].dtype, features[2].dtype)
    return [pairwise.with_width(x.to(dtype)) for x in features]


def _reduce(loss: Tensor, reduction: str) -> Tensor:  # [rows]
    if reduction == "none":
        return loss
    return sums.total(loss) / len(loss) if reduction == "mean" else sums.total(loss)
