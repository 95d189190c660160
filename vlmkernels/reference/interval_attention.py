"""out_i = sum_j p_ij v_j, p_i = softmax over start_i <= j < end_i of scale <q_i, k_j> + bias_ij.

With logits s_ij, r_i = lse_i, p_ij = exp(s_ij - r_i), 0 outside the interval, g = dL/dout, h = dL/dlse:

    delta_i = <g_i, out_i> - h_i                     ds_ij = p_ij (<g_i, v_j> - delta_i)
    dq_i = scale sum_j ds_ij k_j                     dk_j = scale sum_i ds_ij q_i
    dv_j = sum_i p_ij g_i                            dbias[h, r_i-r_j+R-1, c_i-c_j+C-1] = sum of its ds_ij

In grouped-query attention the sums over i run over all query heads that share a key head.
"""

import torch
from torch import Tensor

from vlmkernels.reference._attention import empty_heads_merged


def interval_attention(
    query: Tensor,  # [B, H, Tq, Dh]
    key: Tensor,  # [B, Hkv, Tk, Dh]
    value: Tensor,  # [B, Hkv, Tk, Dv]
    start: Tensor,  # [Tq] or [B, Tq]
    end: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    relative_bias: Tensor | None = None,  # [H, 2R-1, 2C-1]
    grid: tuple[int, int] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, differentiable by autograd."""
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    out, lse = interval_attention_fwd(query, key, value, start, end, scale, relative_bias, *(grid or (0, 0)))
    return (out, lse) if return_lse else out


def interval_attention_fwd(
    query, key, value, start, end, scale: float, relative_bias, grid_rows: int, grid_cols: int
) -> tuple[Tensor, Tensor]:
    s = _logits(query, key, start, end, scale, relative_bias, grid_rows, grid_cols)
    lse = _logsumexp(s)
    p = _probabilities(s, lse)
    out = (p @ _for_heads(value, query).to(p.dtype)).to(query.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def interval_attention_bwd(
    dout: Tensor,  # [B, H, Tq, Dv]
    dlse: Tensor | None,  # [B, H, Tq]
    query, key, value, start, end,
    out: Tensor,  # [B, H, Tq, Dv]
    lse: Tensor,  # [B, H, Tq]
    scale: float, relative_bias, grid_rows: int, grid_cols: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of query, key, value and relative_bias; one that is not needed has size 0."""
    s = _logits(query, key, start, end, scale, relative_bias, grid_rows, grid_cols)
    p = _probabilities(s, lse)  # [B, H, Tq, Tk]
    g, q = dout.to(p.dtype), query.to(p.dtype)
    k, v = (_for_heads(x, query).to(p.dtype) for x in (key, value))
    delta = (g * out.to(p.dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    ds = p * (g @ v.mT - delta[..., None])

    no_bias = (query if relative_bias is None else relative_bias).new_empty(0)

    def shared(x: Tensor, like: Tensor) -> Tensor:  # [B, H, Tk, D] summed over the heads of a group
        return _heads_merged(x.unflatten(1, (like.shape[1], -1)).sum(2) if like.shape[1] else x, like)

    return (
        _heads_merged(scale * (ds @ k), query) if needs[0] else query.new_empty(0),
        shared(scale * (ds.mT @ q), key) if needs[1] else key.new_empty(0),
        shared(p.mT @ g, value) if needs[2] else value.new_empty(0),
        _bias_gradient(ds, relative_bias, grid_rows, grid_cols) if needs[3] else no_bias,
    )


def visible(start: Tensor, end: Tensor, keys: int) -> Tensor:  # [Tq, Tk] or [B, 1, Tq, Tk]
    """The intervals as a mask."""
    j = torch.arange(keys, device=start.device)
    mask = (j >= start[..., None]) & (j < end[..., None])
    return mask[:, None] if start.dim() == 2 else mask


def _logits(query, key, start, end, scale, relative_bias, grid_rows, grid_cols) -> Tensor:
    work = torch.promote_types(query.dtype, torch.float32)
    s = scale * (query.to(work) @ _for_heads(key, query).to(work).mT)
    if relative_bias is not None:
        i, j, row, col = _on_grid(s, grid_rows, grid_cols)
        bias = s.new_zeros(s.shape[1:])
        bias[:, : len(i), : len(j)] = relative_bias.to(work)[:, row, col]
        s = s + bias
    return s.masked_fill(~visible(start, end, s.shape[-1]), -torch.inf)


def _for_heads(x: Tensor, query: Tensor) -> Tensor:
    """[B, Hkv, T, D] repeated for the query heads that share each of its heads."""
    return x.repeat_interleave(query.shape[1] // max(x.shape[1], 1), 1)


def _on_grid(s: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The queries and keys on the grid, and the entry of the table with the bias of each pair [i, j]."""
    i, j = (torch.arange(min(tokens, rows * cols), device=s.device) for tokens in s.shape[-2:])
    row = (i // max(cols, 1))[:, None] - j // max(cols, 1) + rows - 1
    col = (i % max(cols, 1))[:, None] - j % max(cols, 1) + cols - 1
    return i, j, row, col


def _bias_gradient(ds: Tensor, relative_bias: Tensor, rows: int, cols: int) -> Tensor:
    i, j, row, col = _on_grid(ds, rows, cols)
    total = ds[:, :, : len(i), : len(j)].sum(0).flatten(1)  # [H, pairs]
    table = ds.new_zeros(relative_bias.shape).flatten(1)
    table.index_add_(1, (row * (2 * cols - 1) + col).flatten(), total)
    return table.reshape(relative_bias.shape).to(relative_bias.dtype)


def _logsumexp(s: Tensor) -> Tensor:  # [B, H, Tq]
    if s.shape[-1] == 0:
        return s.new_full(s.shape[:-1], -torch.inf)
    top = s.detach().amax(-1, keepdim=True)
    top = top.where(top > -torch.inf, 0)
    total = (s - top).exp().sum(-1)
    return torch.where(total > 0, total.where(total > 0, 1).log() + top[..., 0], -torch.inf)


def _probabilities(s: Tensor, lse: Tensor) -> Tensor:
    return (s - lse.where(lse > -torch.inf, 0)[..., None]).exp()


def _heads_merged(x: Tensor, like: Tensor) -> Tensor:
    """In the dtype of `like` and the layout of results."""
    return empty_heads_merged(like, x.shape).copy_(x)
