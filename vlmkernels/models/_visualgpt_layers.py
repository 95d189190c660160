"""The layers of VisualGPT: the encoder of regions, and a block of GPT-2 with meshed attention and gates."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels._activations import ACTIVATIONS
from vlmkernels.intervals import Intervals
from vlmkernels.models.decoder import DecoderAttention
from vlmkernels.models.parts.attention import (
    CrossAttention,
    Keep,
    MultiheadSelfAttention,
    attend,
    split_heads,
)
from vlmkernels.models.parts.pretrained import below
from vlmkernels.models.parts.resnet import map_stride
from vlmkernels.models.parts.transformer import LayerNorm
from vlmkernels.nn.dense import MLP, Linear, add

FUSIONS = ("srau", "residual")


@dataclass(frozen=True)
class VisualGPTConfig:
    """Sizes of a VisualGPT. Defaults: the published model on region features of 2048 numbers.

    With an `image_size` the model has a ResNet of `conv_blocks`, whose positions are the regions; without one
    it is given regions of `region_width` numbers each. `layers`, `heads`, `width` and `context_length` are
    those of the GPT-2, `activation` is that of its MLPs. `tau` and `orientation`: see `vlmkernels.srau`.
    `fusion="residual"` is plain cross-attention for comparison: r = a + sum_l e_l / sqrt(L), without gates.
    `dropout` acts on the results of self-attention and MLP and in the encoder, `cross_dropout` on the
    probabilities of cross-attention. `start_id` and `end_id` are the tokens around a caption; the authors
    take `<?` and `<|endoftext|>` of GPT-2's vocabulary, and `+=` as padding. `strict_compat` repeats two
    habits of the authors' code: the padding of regions is found in their normalised features, whose sums are
    0 up to rounding, and a text of an image without regions attends to the padding evenly.
    """

    image_size: int | None = None
    conv_blocks: tuple[int, ...] = (3, 4, 6, 3)
    conv_width: int = 64
    conv_pool: bool = True
    region_width: int = 2048
    width: int = 768
    encoder_layers: int = 3
    encoder_mlp_width: int = 2048
    layers: int = 12
    heads: int = 12
    context_length: int = 1024
    mlp_ratio: int = 4
    activation: str = "gelu_tanh"
    vocab_size: int = 50257
    start_id: int = 50256
    end_id: int = 50256
    pad_id: int = 47932
    tau: float = 0.2
    orientation: str = "code"
    fusion: str = "srau"
    dropout: float = 0.1
    cross_dropout: float = 0.2
    strict_compat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_blocks", tuple(self.conv_blocks))
        sizes = ("conv_blocks", "conv_width", "region_width", "width", "encoder_layers", "encoder_mlp_width")
        faults = below(self, 1, *sizes, "layers", "heads", "mlp_ratio", "vocab_size")
        faults += below(self, 2, "context_length")
        if self.heads > 0 and self.width % self.heads:
            faults.append(f"heads must be a divisor of width {self.width}, got {self.heads}")
        if not self.conv_blocks:
            faults.append("conv_blocks must have at least one stage, got ()")
        elif self.image_size is not None and (self.image_size < 1 or self.image_size % self.stride):
            faults.append(f"image_size must be a multiple of {self.stride}, got {self.image_size}")
        if self.activation not in ACTIVATIONS:
            faults.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.fusion not in FUSIONS:
            faults.append(f"fusion must be one of {FUSIONS}, got {self.fusion!r}")
        if self.orientation not in ("code", "paper"):
            faults.append(f"orientation must be 'code' or 'paper', got {self.orientation!r}")
        if not 0 <= self.tau <= 0.5:
            faults.append(f"tau must be in [0, 0.5], got {self.tau}")
        for name in ("start_id", "end_id", "pad_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                faults.append(f"{name} must be an id below {self.vocab_size}, got {getattr(self, name)}")
        for name in ("dropout", "cross_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                faults.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if faults:
            raise ValueError("VisualGPTConfig: " + "; ".join(faults))

    @property
    def stride(self) -> int:
        """Pixels a side of a position of the grid."""
        return map_stride(self.conv_blocks, pool=self.conv_pool)

    @property
    def grid(self) -> int:
        """Positions of the grid."""
        assert self.image_size is not None
        return (self.image_size // self.stride) ** 2


class Regions(NamedTuple):
    """What an image's texts attend to."""

    levels: Tensor  # [B, L, N, D]
    mask: Tensor | None  # [B, N] bool; None: all of them

    def seen(self, queries: int) -> Intervals | None:
        """The regions as an interval; those of `mask` are the first ones."""
        return None if self.mask is None else intervals.padding(self.mask.sum(1), queries)


def _drop(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate) if rate else x


class EncoderLayer(nn.Module):
    """x = LN(x + attention(x)); x = LN(x + W2 relu(W1 x))."""

    def __init__(self, config: VisualGPTConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.encoder_mlp_width
        self.dropout, self.strict = config.dropout, config.strict_compat
        self.attn = MultiheadSelfAttention(width, config.heads)
        self.norm_1 = LayerNorm(width)
        self.mlp = MLP(OrderedDict(c_fc=Linear(width, hidden), relu=nn.ReLU(), c_proj=Linear(hidden, width)))
        self.mlp.dropout = config.dropout
        self.norm_2 = LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # [B, N, D], [B, N] bool -> [B, N, D]
        seen = None
        if not self.strict:
            whole = intervals.full(x.shape[1], device=x.device)
            seen, mask = whole if mask is None else intervals.padding(mask.sum(1), x.shape[1]), None
        if not (self.training and self.dropout):
            x = self.norm_1(add(x, self.attn, x, seen, None, None, False, mask))
            return self.norm_2(add(x, self.mlp, x))
        x = self.norm_1(x + F.dropout(self.attn(x, seen, mask=mask), self.dropout))
        return self.norm_2(x + F.dropout(self.mlp(x), self.dropout))


class Encoder(nn.Module):
    """LN(gelu(W x)) and the layers; the results of all layers."""

    def __init__(self, config: VisualGPTConfig, region_width: int) -> None:
        super().__init__()
        self.dropout, self.strict = config.dropout, config.strict_compat
        self.projection = Linear(region_width, config.width)
        self.norm = LayerNorm(config.width)
        self.position: nn.Parameter | None = None
        if config.image_size is not None:
            self.position = nn.Parameter(0.02 * torch.randn(config.grid, config.width))
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(self, regions: Tensor) -> Regions:  # [B, N, F]
        x = F.dropout(F.gelu(self.projection(regions), approximate="tanh"), self.dropout, self.training)
        x = self.norm(x)
        mask = None
        if self.strict:
            mask = x.sum(-1) != 0
        elif self.position is None:
            # Rows of zeros at the end are padding
            last = torch.arange(1, x.shape[1] + 1, device=x.device) * (regions != 0).any(-1)
            mask = torch.arange(x.shape[1], device=x.device) < last.amax(1, keepdim=True)
        if self.position is not None:
            x = x + self.position.to(x.dtype)
        levels = []
        for layer in self.layers:
            x = layer(x, mask)
            levels.append(x)
        return Regions(torch.stack(levels, 1), mask)


class MeshedAttention(CrossAttention):
    """From texts to every level of their image, with the same weights for all levels."""

    def __init__(self, config: VisualGPTConfig) -> None:
        super().__init__(config.width, config.heads)
        self.dropout, self.strict = config.cross_dropout, config.strict_compat

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:  # [B, L, N, D] -> [B, L heads, N, Dh]
        parts = self.kv_proj(memory).unflatten(-1, (2, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        key, value = parts.flatten(2, 3)
        return key, value

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [B, T, D]
        memory: Tensor | tuple[Tensor, Tensor],  # [B, L, N, D], or its keys_values
        regions: Regions,
    ) -> Tensor:  # [L, B, T, D]
        key, value = self.keys_values(memory) if isinstance(memory, Tensor) else memory
        levels = key.shape[1] // self.heads
        (query,) = split_heads(self.q_proj(x), self.heads)
        query = query.repeat(1, levels, 1, 1)  # [B, L heads, T, Dh]
        rate = self.dropout if self.training else 0.0
        if self.strict and regions.mask is not None:
            scores = query @ key.mT / math.sqrt(query.shape[-1])
            scores = scores.masked_fill(~regions.mask[:, None, None], -1e4)
            out = (_drop(scores.softmax(-1), rate) @ value).transpose(1, 2).flatten(2)
        else:
            seen = regions.seen(x.shape[1])
            if seen is None:
                seen = intervals.full(x.shape[1], key.shape[2], device=x.device)
            out = attend(query, key, value, seen, mask=regions.mask, dropout=rate)  # [B, T, L D]
        return self.out_proj(out.unflatten(-1, (levels, -1)).permute(2, 0, 1, 3))


class VisualBlock(nn.Module):
    """A layer of the decoder: see the formulas of the module."""

    def __init__(self, config: VisualGPTConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.config = config
        self.ln_1 = LayerNorm(width)
        self.attn = DecoderAttention(width, config.heads)
        self.cross = MeshedAttention(config)
        if config.fusion == "srau":
            levels = range(config.encoder_layers)
            self.gate_text = Linear(width, len(levels) * width)
            self.gate_visual = nn.ModuleList(Linear(width, width, bias=False) for _ in levels)
        self.ln_2 = LayerNorm(width)
        activation = ACTIVATIONS[config.activation].module()
        c_fc, c_proj = Linear(width, hidden), Linear(hidden, width)
        self.mlp = MLP(OrderedDict([("c_fc", c_fc), ("gelu", activation), ("c_proj", c_proj)]))

    def keys_values(self, regions: Regions) -> tuple[Tensor, Tensor]:  # [B, L heads, N, Dh] each
        return self.cross.keys_values(self.ln_1(regions.levels))

    def forward(
        self,
        x: Tensor,  # [B k, T, D]
        seen: Intervals,
        memory: tuple[Tensor, Tensor] | None,  # [B, L heads, N, Dh] each: keys_values, if they are kept
        regions: Regions,
        row_mask: Tensor | None = None,  # [B k, T] bool
        keep: Keep | None = None,
    ) -> Tensor:  # [B k, T, D]
        rate = self.config.dropout if self.training else 0.0
        a = _drop(add(x, self.attn, self.ln_1(x), seen, None, keep), rate)
        together, images = self.ln_1(a), regions.levels.shape[0]
        if images != a.shape[0]:  # the texts of an image in one row
            together = together.reshape(images, a.shape[0] // images * a.shape[1], a.shape[2])
        e = self.cross(together, self.ln_1(regions.levels) if memory is None else memory, regions)
        if images != a.shape[0]:
            e = e.reshape(e.shape[0], *a.shape)  # [L, B k, T, D]
        r = self.fused(a, e, row_mask)
        y = _drop(add(r, self.mlp, self.ln_2(r)), rate)
        if self.config.strict_compat and row_mask is not None:
            y = y.masked_fill(~row_mask[..., None], 0.0)
        return y

    def fused(self, a: Tensor, e: Tensor, row_mask: Tensor | None) -> Tensor:  # [B k, T, D], [L, B k, T, D]
        if self.config.fusion == "residual":
            return a + e.sum(0) / math.sqrt(e.shape[0])
        texts = self.gate_text(a).chunk(len(self.gate_visual), -1)
        logits = [
            add(text, gate, level)
            for gate, level, text in zip(self.gate_visual, e.unbind(), texts, strict=True)
        ]
        tau, orientation = self.config.tau, self.config.orientation
        return vlmkernels.srau(a, e, torch.stack(logits), tau, row_mask=row_mask, orientation=orientation)
