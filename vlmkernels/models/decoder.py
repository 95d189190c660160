"""A small causal language model: pre-LayerNorm, learned positions, attention on intervals, tied head.

The layout is GPT-2's (Radford et al. 2019): x += Attention(LN x); x += W2 gelu(W1 LN x); logits = LN(x) E^T.
`CausalLM` is called like a decoder of transformers, so `Flamingo` takes either.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels.models.clip import LayerNorm
from vlmkernels.models.parts.pretrained import Pretrained, below
from vlmkernels.nn.dense import MLP, Linear, add, tied_logits

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `CausalLM`; `context_length` is the longest text, what is generated included."""

    vocab_size: int
    width: int = 128
    layers: int = 4
    heads: int = 4
    context_length: int = 256
    mlp_ratio: int = 4

    def __post_init__(self) -> None:
        faults = below(self, 1, *(field.name for field in dataclasses.fields(self)))
        if self.heads > 0 and self.width % self.heads:
            faults.append(f"heads is {self.heads}, wants a divisor of the width {self.width}")
        if faults:
            raise ValueError("DecoderConfig: " + "; ".join(faults))


class CausalLMOutput(NamedTuple):
    logits: Tensor  # [B, T, V]
    past_key_values: KVCache | None


class KVCache:
    """Keys and values of the tokens read so far, [B, heads, T, Dh] for each layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def get_seq_length(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0

    def update(
        self,
        key: Tensor,  # [B, heads, t, Dh]
        value: Tensor,  # [B, heads, t, Dh]
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """Appends to a layer; returns all its keys and values."""
        if layer == len(self.layers):
            self.layers.append((key, value))
        else:
            old_key, old_value = self.layers[layer]
            self.layers[layer] = (torch.cat([old_key, key], 2), torch.cat([old_value, value], 2))
        return self.layers[layer]

    def reorder_cache(
        self,
        rows: Tensor,  # [B'] int64
    ) -> None:
        """The batch becomes its `rows`, of which there may be more than before."""
        self.layers = [(key.index_select(0, rows), value.index_select(0, rows)) for key, value in self.layers]


class DecoderAttention(nn.Module):
    adds_residual: ClassVar = True

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = Linear(width, 3 * width)
        self.to_out = Linear(width, width)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        start: Tensor,  # [T] or [B, T]
        end: Tensor,  # as start
        past_key_values: KVCache | None,
        layer: int,
        residual: Tensor | None = None,  # [B, T, D]
    ) -> Tensor:
        query, key, value = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, layer)
        out = vlmkernels.interval_attention(query, key, value, start, end)  # [B, heads, T, Dh]
        return add(residual, self.to_out, out.transpose(1, 2).flatten(2))


class DecoderLayer(nn.Module):
    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.norm_attn = LayerNorm(width)
        self.attn = DecoderAttention(width, config.heads)
        self.norm_mlp = LayerNorm(width)
        self.mlp = MLP(Linear(width, hidden), nn.GELU(), Linear(hidden, width))

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        start: Tensor,  # [T] or [B, T]
        end: Tensor,  # as start
        past_key_values: KVCache | None,
        layer: int,
    ) -> Tensor:
        x = add(x, self.attn, self.norm_attn(x), start, end, past_key_values, layer)
        return add(x, self.mlp, self.norm_mlp(x))


class CausalLM(Pretrained):
    """A causal language model of the library's own, for training from nothing on a small machine."""

    model_type: ClassVar[str] = "decoder"
    config_class: ClassVar[type] = DecoderConfig
    config: DecoderConfig

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        c = self.config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.width)
        self.embed_positions = nn.Embedding(c.context_length, c.width)
        self.layers = nn.ModuleList(DecoderLayer(c) for _ in range(c.layers))
        self.norm = LayerNorm(c.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # 2 * layers branches are summed
                branch = name.endswith(("to_out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 * (2 * c.layers) ** -0.5 if branch else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def forward(
        self,
        input_ids: Tensor,  # [B, T] int64
        attention_mask: Tensor | None = None,  # [B, past + T], 0 at padding
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits [B, T, V] of the next token at each position, of the last `logits_to_keep` if not 0.

        The ones of a row of `attention_mask` are one run: padding is on the left, on the right or both.
        Positions count from the first one. With `use_cache` the result holds the keys and values, to be given
        back with the tokens that follow. ValueError for other shapes, and beyond `config.context_length`.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = past + input_ids.shape[-1]
        faults = []
        if input_ids.ndim != 2:
            faults.append(f"input_ids: wants [B, T], got {list(input_ids.shape)}")
        elif attention_mask is not None and attention_mask.shape != (input_ids.shape[0], length):
            wanted, got = [input_ids.shape[0], length], list(attention_mask.shape)
            faults.append(f"attention_mask: wants {wanted} with the cached tokens, got {got}")
        if length > self.config.context_length:
            faults.append(f"input_ids: {length} tokens, context_length is {self.config.context_length}")
        if faults:
            raise ValueError("CausalLM: " + "; ".join(faults))
        if use_cache and past_key_values is None:
            past_key_values = KVCache()
        start, end = intervals.causal(length - past, past, device=input_ids.device)  # [T]
        positions = torch.arange(past, length, device=input_ids.device)
        if attention_mask is not None:
            real = attention_mask.bool()
            first = real.int().argmax(1, keepdim=True)  # [B, 1]
            start = torch.maximum(start, first).to(torch.int32)  # [B, T]
            end = torch.minimum(end, first + real.sum(1, keepdim=True)).to(torch.int32)
            positions = (positions - first).clamp_min(0)
        x = self.embed_tokens(input_ids) + self.embed_positions(positions)  # [B, T, D]
        for index, layer in enumerate(self.layers):
            x = layer(x, start=start, end=end, past_key_values=past_key_values, layer=index)
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        return CausalLMOutput(tied_logits(self.norm(x), self.embed_tokens), past_key_values)

    def loss(
        self,
        tokens: Tensor,  # [B, T] int64
        labels: Tensor | None = None,  # [B, T] int64
        attention_mask: Tensor | None = None,  # [B, T], 0 at padding
    ) -> Tensor:
        """Mean negative log-likelihood of the labels (of the tokens, padding excluded, when not given)."""
        if labels is None:
            labels = tokens if attention_mask is None else tokens.masked_fill(~attention_mask.bool(), IGNORE)
        return next_token_loss(self(tokens, attention_mask).logits, labels)


def next_token_loss(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T] int64
) -> Tensor:
    """Mean over t of -log softmax(logits_t)[labels_(t+1)], labels of -100 not counted; 0 if none counts.

    In float32 (float64 for float64 logits).
    """
    if labels.shape != logits.shape[:2]:
        raise ValueError(f"labels: wants {list(logits.shape[:2])} as the tokens, got {list(labels.shape)}")
    labels = labels[:, 1:].flatten()
    wide = torch.promote_types(logits.dtype, torch.float32)
    flat = logits[:, :-1].flatten(0, 1).to(wide)
    total = F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)


CONFIGS: dict[str, DecoderConfig] = {"emoji-tiny": DecoderConfig(vocab_size=4098, context_length=128)}
