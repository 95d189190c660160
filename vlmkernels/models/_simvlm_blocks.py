"""SimVLM's transformer block: self-attention with a 2-D relative bias, cross-attention, MLP."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels.intervals import Intervals
from vlmkernels.models.clip import LayerNorm
from vlmkernels.models.parts.stochastic_depth import drop_branch
from vlmkernels.nn.dense import MLP, Linear, add


class KeysValues(NamedTuple):
    """What attention reads: keys and values of all positions, [B, T, heads, Dh] each."""

    key: Tensor
    value: Tensor

    def select(self, rows: Tensor) -> KeysValues:  # [B']
        return KeysValues(self.key[rows], self.value[rows])


class SelfAttention(nn.Module):
    """Multi-head self-attention over intervals; with `grid`, image tokens have a learned 2-D relative bias.

    Head a adds b_a[r - r' + R - 1, c - c' + C - 1] to the logit of the patches (r, c) and (r', c'), and
    nothing to a pair with a text token. The paper speaks of relative attention for image patches and gives no
    table; one table a layer and head, as in CoAtNet (Dai et al. 2021), is this code's reading.
    """

    linear_weights: ClassVar = ("in_proj_weight",)
    adds_residual: ClassVar = True

    def __init__(self, width: int, heads: int, grid: tuple[int, int] | None) -> None:
        super().__init__()
        self.heads, self.grid = heads, grid
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        self.relative_bias: nn.Parameter | None = None
        if grid is not None:
            self.relative_bias = nn.Parameter(torch.zeros(heads, 2 * grid[0] - 1, 2 * grid[1] - 1))

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        interval: Intervals,  # over the positions of x, or of the cache
        has_image: bool,
        cache: tuple[KeysValues, Tensor] | None = None,  # room for all positions, and those of x [B, T]
        residual: Tensor | None = None,  # [B, T, D]
    ) -> Tensor:  # [B, T, D]
        qkv = vlmkernels.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.unbind(2)  # each [B, T, heads, Dh]
        if cache is not None:
            kept, slots = cache
            rows = torch.arange(x.shape[0], device=x.device)[:, None]
            kept.key[rows, slots] = key.to(kept.key.dtype)
            kept.value[rows, slots] = value.to(kept.value.dtype)
            key, value = kept
        table, grid = (self.relative_bias, self.grid) if has_image else (None, None)
        out = _attend(query, key, value, interval, relative_bias=table, grid=grid)
        return add(residual, self.out_proj, out)


class CrossAttention(nn.Module):
    """Multi-head attention from the decoder to the encoder's result."""

    adds_residual: ClassVar = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = Linear(width, width)
        self.kv_proj = Linear(width, 2 * width)
        self.out_proj = Linear(width, width)

    def keys_values(self, memory: Tensor) -> KeysValues:  # [B, T, D]
        return KeysValues(*self.kv_proj(memory).unflatten(-1, (2, self.heads, -1)).unbind(2))

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        memory: KeysValues | Tensor,  # [B', T', D], B' = 1 for texts in one row
        interval: Intervals,
        residual: Tensor | None = None,  # [B, T, D]
    ) -> Tensor:  # [B, T, D]
        query = self.q_proj(x).unflatten(-1, (self.heads, -1))
        memory = self.keys_values(memory) if isinstance(memory, Tensor) else memory
        return add(residual, self.out_proj, _attend(query, *memory, interval))


def _attend(query: Tensor, key: Tensor, value: Tensor, interval: Intervals, **relative: Any) -> Tensor:
    """interval_attention of [B, T, heads, Dh] tensors, heads merged: [B, T, D]."""
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out = cast(Tensor, vlmkernels.interval_attention(query, key, value, *interval, **relative))
    return out.transpose(1, 2).flatten(2)


class Block(nn.Module):
    """x += attention(LN x); with cross-attention x += cross(LN x, memory); x += W2 gelu(W1 LN x)."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        grid: tuple[int, int] | None = None,
        cross: bool = False,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout, self.stochastic_depth = dropout, stochastic_depth
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads, grid)
        if cross:
            self.ln_cross = LayerNorm(width)
            self.cross = CrossAttention(width, heads)
        self.ln_2 = LayerNorm(width)
        c_fc, c_proj = Linear(width, 4 * width), Linear(4 * width, width)
        self.mlp = MLP(OrderedDict([("c_fc", c_fc), ("gelu", nn.GELU()), ("c_proj", c_proj)]))

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        interval: Intervals,
        *,
        has_image: bool = False,
        memory: tuple[KeysValues | Tensor, Intervals] | None = None,
        cache: tuple[KeysValues, Tensor] | None = None,
    ) -> Tensor:  # [B, T, D]
        x = self._add(x, self.attn, self.ln_1(x), interval, has_image, cache)
        if memory is not None:
            x = self._add(x, self.cross, self.ln_cross(x), *memory)
        return self._add(x, self.mlp, self.ln_2(x))

    def _add(self, x: Tensor, branch: nn.Module, *inputs: Any) -> Tensor:  # [B, T, D]
        if not self.training or self.dropout == self.stochastic_depth == 0:
            return add(x, branch, *inputs)
        out = F.dropout(branch(*inputs), self.dropout)
        return x + drop_branch(out, self.stochastic_depth, True)
