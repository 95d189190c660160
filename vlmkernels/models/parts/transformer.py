"""The transformer block, pre-LayerNorm or post-LayerNorm, and a stack of blocks as CLIP's towers have it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.intervals import Intervals
from vlmkernels.models.parts.attention import CrossAttention, Keep, MultiheadSelfAttention, SelfAttention
from vlmkernels.models.parts.stochastic_depth import drop_branch
from vlmkernels.nn.dense import MLP, Linear, add, take_rows


class LayerNorm(nn.LayerNorm):
    """LayerNorm whose result has its input's dtype: under autocast F.layer_norm would return float32."""

    def forward(self, x: Tensor) -> Tensor:  # [..., D]
        return super().forward(x).to(x.dtype)


class Block(nn.Module):
    """x += attention(LN x); with cross-attention x += cross(LN x, memory); x += W2 act(W1 LN x).

    With `post_norm` each LayerNorm follows its sum, x = LN(x + branch(x)), as in Vaswani et al. 2017. In
    training, `dropout` acts on the output of each branch, `mlp_dropout` on the hidden layer of the MLP, and
    `stochastic_depth` drops branches.
    """

    def __init__(
        self,
        width: int,
        attn: SelfAttention,
        mlp_width: int,
        activation: Callable[[], nn.Module] = nn.GELU,
        eps: float = 1e-5,
        *,
        cross: CrossAttention | None = None,
        post_norm: bool = False,
        dropout: float = 0.0,
        mlp_dropout: float = 0.0,
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        self.post_norm, self.dropout, self.stochastic_depth = post_norm, dropout, stochastic_depth
        self.ln_1 = LayerNorm(width, eps)
        self.attn = attn
        if cross is not None:
            self.ln_cross = LayerNorm(width, eps)
            self.cross = cross
        self.ln_2 = LayerNorm(width, eps)
        c_fc, c_proj = Linear(width, mlp_width), Linear(mlp_width, width)
        self.mlp = MLP(OrderedDict([("c_fc", c_fc), ("gelu", activation()), ("c_proj", c_proj)]))
        self.mlp.dropout = mlp_dropout

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals,  # [T] or [B, T] each
        wanted: Tensor | None = None,  # [B, n] int64, all tokens when None
        keep: Keep | None = None,
        *,
        has_image: bool = False,
        memory: tuple[Tensor | tuple[Tensor, Tensor], Intervals] | None = None,
    ) -> Tensor:  # [B, n or T, D]
        residual = x if wanted is None else take_rows(x, wanted)
        relative = (True,) if has_image else ()
        x = self._sublayer(self.ln_1, residual, self.attn, x, seen, wanted, keep, *relative)
        if memory is not None:
            x = self._sublayer(self.ln_cross, x, self.cross, x, *memory)
        return self._sublayer(self.ln_2, x, self.mlp, x)

    def _sublayer(
        self,
        norm: nn.Module,
        residual: Tensor,  # [B, n, D]
        branch: nn.Module,
        x: Tensor,  # [B, T, D]
        *inputs: Any,
    ) -> Tensor:  # [B, n, D]
        if self.post_norm:
            return norm(self._add(residual, branch, x, *inputs))
        return self._add(residual, branch, norm(x), *inputs)

    def _add(self, x: Tensor, branch: nn.Module, *inputs: Any) -> Tensor:  # [B, T, D]
        if not self.training or self.dropout == self.stochastic_depth == 0:
            return add(x, branch, *inputs)
        out = F.dropout(branch(*inputs), self.dropout)
        return x + drop_branch(out, self.stochastic_depth, True)


class Transformer(nn.Module):
    """A stack of blocks; the last one computes only the wanted tokens, those that a tower pools."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int | None,
        activation: type[nn.Module],
        eps: float,
    ) -> None:
        super().__init__()
        mlp_width = 4 * width if mlp_width is None else mlp_width
        self.resblocks = nn.ModuleList(
            Block(width, MultiheadSelfAttention(width, heads), mlp_width, activation, eps)
            for _ in range(layers)
        )
        branch_std = width**-0.5 * (2 * layers) ** -0.5  # 2 * layers branches are summed
        for block in self.resblocks:
            nn.init.normal_(block.get_parameter("attn.in_proj_weight"), std=width**-0.5)
            nn.init.normal_(block.get_parameter("attn.out_proj.weight"), std=branch_std)
            nn.init.zeros_(block.get_parameter("attn.out_proj.bias"))
            nn.init.normal_(block.get_parameter("mlp.c_fc.weight"), std=(2 * width) ** -0.5)
            nn.init.normal_(block.get_parameter("mlp.c_proj.weight"), std=branch_std)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        seen: Intervals,  # [T] each
        wanted: Tensor | None = None,  # [B, n] int64, all tokens when None
    ) -> Tensor:  # [B, n or T, D]
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, seen)
        return last(x, seen, wanted)
