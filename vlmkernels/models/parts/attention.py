"""Self-attention of all models and cross-attention of decoders: softmax(q k^T / sqrt(Dh)) v on intervals."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels.intervals import Intervals
from vlmkernels.nn.dense import Linear, add, take_rows

# Takes the keys and values of new tokens, returns those of all tokens to attend to: `KVCache.update`.
Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def split_heads(
    x: Tensor,  # [B, T, parts D]
    heads: int,
    parts: int = 1,
) -> list[Tensor]:  # [B, heads, T, Dh] each
    return [part.transpose(1, 2) for part in x.unflatten(-1, (parts, heads, -1)).unbind(2)]


def attend(
    query: Tensor,  # [B, heads, n, Dh]
    key: Tensor,  # [B, heads, T, Dh]
    value: Tensor,  # [B, heads, T, Dh]
    seen: Intervals | None,
    *,
    mask: Tensor | None = None,  # [B, T] bool
    dropout: float = 0.0,
    **relative: Any,
) -> Tensor:  # [B, n, D]
    """Attention with its heads merged, to `seen`, and to `mask` where there is one and `seen` is None.

    With `dropout` of its probabilities it is also to `mask`, or without one to `seen` as a dense mask.
    """
    if seen is None or dropout:
        allowed = None if mask is None else mask[:, None, None]
        if allowed is None and seen is not None:
            allowed = dense_mask(seen, key.shape[2])
        out = F.scaled_dot_product_attention(query, key, value, allowed, dropout_p=dropout)
    else:
        out = cast(Tensor, vlmkernels.interval_attention(query, key, value, seen, **relative))
    return out.transpose(1, 2).flatten(2)


def dense_mask(seen: Intervals, keys: int) -> Tensor:  # [T or 1, keys] or [B, 1, T, keys] bool
    """Whether each query sees each key."""
    start, end = (bound[..., None] for bound in seen)
    place = torch.arange(keys, device=start.device)
    inside = (place >= start) & (place < end)
    return inside if inside.dim() == 2 else inside[:, None]


def attend_beside(
    query: Tensor,  # [B, heads, k, Dh]
    own: tuple[Tensor, Tensor],  # keys and values of the same tokens, [B, heads, k, Dh] each
    others: tuple[Tensor, Tensor],  # [B, heads, T, Dh] each
    seen: Intervals,
) -> Tensor:  # [B, k, D]
    """Attention of tokens that do not see one another: each to `seen` of the others, and to itself.

    The softmax over both is that over the others, of log-sum-exp l, moved towards the token's own value by
    its share e^s / (e^s + e^l) = sigmoid(s - l), s being the logit of its own key.
    """
    (key, value), (others_key, others_value) = own, others
    out, lse = vlmkernels.interval_attention(query, others_key, others_value, seen, return_lse=True)
    logit = (query.to(lse) * key.to(lse)).sum(-1) * query.shape[-1] ** -0.5  # [B, heads, k]
    share = torch.sigmoid(logit - lse)[..., None]
    return out.to(lse).lerp(value.to(lse), share).to(out.dtype).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module, abc.ABC):
    """Multi-head self-attention, for all tokens or for the wanted ones, without its last projection.

    A subclass has the projections, under the names of its weight files.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    @abc.abstractmethod
    def project(
        self,
        x: Tensor,  # [B, T, D]
        wanted: Tensor | None,  # [B, n] int64
    ) -> tuple[Tensor, Tensor, Tensor]:  # [B, heads, n or T, Dh], twice [B, heads, T, Dh]
        """The queries of the wanted tokens, keys and values of all."""

    def mix(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals | None,  # [T] or [B, T] each, over the tokens of x, or all that `keep` returns
        wanted: Tensor | None,  # [B, n] int64
        keep: Keep | None = None,
        **options: Any,
    ) -> Tensor:  # [B, n or T, D]
        """The result of `attend` with these options for each wanted token."""
        query, key, value = self.project(x, wanted)
        if wanted is not None and seen is not None:
            start, end = (bound.expand(x.shape[0], -1).gather(1, wanted) for bound in seen)
            seen = Intervals(start, end)
        if keep is not None:
            key, value = keep(key, value)
        return attend(query, key, value, seen, **options)


class MultiheadSelfAttention(SelfAttention):
    """With the names of nn.MultiheadAttention: one projection for q, k and v.

    With `grid`, image tokens have a learned 2-D relative bias: head a adds
    b_a[r - r' + R - 1, c - c' + C - 1] to the logit of the patches (r, c) and (r', c'), and nothing to a pair
    with a text token. `std` is that of the projection's first weights; None leaves them to the owner.
    `dropout` is of the probabilities, in training.
    """

    linear_weights: ClassVar = ("in_proj_weight",)
    adds_residual: ClassVar = True

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: tuple[int, int] | None = None,
        std: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(heads)
        self.grid, self.dropout = grid, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        if std is not None:
            nn.init.normal_(self.in_proj_weight, std=std)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        self.relative_bias: nn.Parameter | None = None
        if grid is not None:
            self.relative_bias = nn.Parameter(torch.zeros(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))

    def project(self, x: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        weight, bias, width = self.in_proj_weight, self.in_proj_bias, x.shape[-1]
        if wanted is None:
            query, key, value = split_heads(vlmkernels.linear(x, weight, bias), self.heads, 3)
            return query, key, value
        (query,) = split_heads(
            vlmkernels.linear(take_rows(x, wanted), weight[:width], bias[:width]), self.heads
        )
        key, value = split_heads(vlmkernels.linear(x, weight[width:], bias[width:]), self.heads, 2)
        return query, key, value

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals | None,
        wanted: Tensor | None = None,  # [B, n] int64
        keep: Keep | None = None,
        has_image: bool = False,
        mask: Tensor | None = None,  # [B, T] bool
        residual: Tensor | None = None,  # [B, n or T, D]
    ) -> Tensor:  # [B, n or T, D]
        options: dict[str, Any] = {"dropout": self.dropout if self.training else 0.0, "mask": mask}
        if has_image:
            options |= {"relative_bias": self.relative_bias, "grid": self.grid}
        return add(residual, self.out_proj, self.mix(x, seen, wanted, keep, **options))


class CrossAttention(nn.Module):
    """Multi-head attention from a decoder to an encoder's result; `dropout` is of its probabilities."""

    adds_residual: ClassVar = True

    def __init__(self, width: int, heads: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q_proj = Linear(width, width)
        self.kv_proj = Linear(width, 2 * width)
        self.out_proj = Linear(width, width)

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:  # [B, T, D] -> [B, heads, T, Dh] each
        key, value = split_heads(self.kv_proj(memory), self.heads, 2)
        return key, value

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        memory: Tensor
        | tuple[Tensor, Tensor],  # [B', T', D], B' = 1 for texts in one row; or its keys_values
        seen: Intervals,
        residual: Tensor | None = None,  # [B, T, D]
    ) -> Tensor:  # [B, T, D]
        (query,) = split_heads(self.q_proj(x), self.heads)
        key, value = self.keys_values(memory) if isinstance(memory, Tensor) else memory
        rate = self.dropout if self.training else 0.0
        return add(residual, self.out_proj, attend(query, key, value, seen, dropout=rate))
