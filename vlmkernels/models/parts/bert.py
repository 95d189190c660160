"""BERT encoder: token ids [B, L] -> hidden states [B, L, D] or the [CLS] row [B, D].

Devlin et al. 2018 (arXiv:1810.04805): learned positions, post-norm blocks x = LN(x + attention(x)), x = LN(x
+ mlp(x)), with GELU by default. In `Bert` there is one sentence per row, so every token type is 0. Parameter
names are those of Hugging Face's ALIGN text model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels import intervals
from vlmkernels._activations import ACTIVATIONS
from vlmkernels._modules import is_traced
from vlmkernels.intervals import Intervals
from vlmkernels.models.parts import padding
from vlmkernels.models.parts.attention import SelfAttention, split_heads
from vlmkernels.nn.dense import Linear, add, mlp, take_rows


class BertAttention(SelfAttention):
    """LN(x + W_o softmax(q k^T / sqrt(Dh)) v), for all tokens or for the wanted ones."""

    def __init__(self, width: int, heads: int, dropout: float, eps: float):
        super().__init__(heads)
        self.dropout = dropout
        self.self = nn.ModuleDict({name: Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict(
            {"dense": Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=eps)}
        )

    def project(self, x: Tensor, wanted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        asking = x if wanted is None else take_rows(x, wanted)
        sources = {"query": asking, "key": x, "value": x}
        query, key, value = (split_heads(self.self[name](sources[name]), self.heads)[0] for name in sources)
        return query, key, value

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        mask: Tensor,  # [B, L] bool
        seen: Intervals | None,  # [B, L] or [L] each: the mask, where it is one run of tokens in each row
        wanted: Tensor | None,  # [B, n] int64
    ) -> Tensor:  # [B, n or L, D]
        p = self.dropout if self.training else 0.0
        mixed = self.mix(x, seen, wanted, mask=mask, dropout=p)
        asking = x if wanted is None else take_rows(x, wanted)
        if not p:
            return self.output["LayerNorm"](add(asking, self.output["dense"], mixed))
        return self.output["LayerNorm"](F.dropout(self.output["dense"](mixed), p) + asking)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float, activation: str, eps: float):
        super().__init__()
        self.dropout = dropout
        self.attention = BertAttention(width, heads, dropout, eps)
        self.intermediate = nn.ModuleDict(
            {"dense": Linear(width, mlp_width), "activation": ACTIVATIONS[activation].module()}
        )
        self.output = nn.ModuleDict(
            {"dense": Linear(mlp_width, width), "LayerNorm": nn.LayerNorm(width, eps=eps)}
        )

    def forward(
        self, x: Tensor, mask: Tensor, seen: Intervals | None, wanted: Tensor | None = None
    ) -> Tensor:  # [B, L, D] -> [B, n or L, D]
        x = self.attention(x, mask, seen, wanted)
        layers = *self.intermediate.values(), self.output["dense"]
        if self.training and self.dropout:
            return self.output["LayerNorm"](F.dropout(mlp(x, *layers), self.dropout) + x)
        return self.output["LayerNorm"](mlp(x, *layers, residual=x))


class Embeddings(nn.Module):
    """LN(word + type + position)."""

    def __init__(
        self, vocab_size: int, width: int, max_positions: int, token_types: int, pad_id: int, eps: float
    ):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocab_size, width, padding_idx=pad_id)
        self.position_embeddings = nn.Embedding(max_positions, width)
        self.token_type_embeddings = nn.Embedding(token_types, width)
        self.LayerNorm = nn.LayerNorm(width, eps=eps)

    def words(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B, L, D]
        return self.word_embeddings(tokens)

    def total(
        self,
        tokens: Tensor,  # [B, L]
        positions: Tensor | None = None,  # [B, L], 0 to L - 1 when None
        types: Tensor | None = None,  # [B, L], 0 when None
    ) -> Tensor:  # [B, L, D]
        """The sum before LN."""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        if types is None:
            types = tokens.new_zeros(1, 1)
        words, places = self.words(tokens), self.position_embeddings(positions)
        return words + self.token_type_embeddings(types) + places

    def forward(
        self,
        tokens: Tensor,  # [B, L]
        positions: Tensor | None = None,  # [B, L]
    ) -> Tensor:  # [B, L, D]
        return self.LayerNorm(self.total(tokens, positions))


class Encoder(nn.Module):
    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        mlp_width: int,
        dropout: float,
        activation: str,
        eps: float,
    ):
        super().__init__()
        sizes = width, heads, mlp_width
        self.layer = nn.ModuleList(Layer(*sizes, dropout, activation, eps) for _ in range(layers))

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        mask: Tensor,  # [B, L] bool
        seen: Intervals | None,  # [B, L] or [L] each
        wanted: Tensor | None,  # [B, n] int64
    ) -> Tensor:  # [B, n or L, D]
        *layers, last = self.layer
        for layer in layers:
            x = layer(x, mask, seen)
        return last(x, mask, seen, wanted)


def runs_of(mask: Tensor) -> Intervals | None:  # [B, L] bool -> [B, L] each
    """The mask as intervals; None where a row is not one run, or that is not known.

    Only on the CPU: elsewhere it would wait for the device.
    """
    if mask.device.type != "cpu" or is_traced():
        return None
    start, end = intervals.runs(mask)
    if not intervals.are_runs(mask, start, end) or not bool((end > start).all()):
        return None
    return Intervals(start[:, None].expand_as(mask), end[:, None].expand_as(mask))


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """N(0, std^2) for a linear layer or a table, biases and the padding row 0, as in BERT."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=std)
        if module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])


class Bert(nn.Module):
    """The encoder. `pooler=True` keeps the weights of BERT's tanh layer on [CLS], which nothing here reads:
    frozen, so that checkpoints round-trip and data-parallel training waits for no gradient that never comes.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        *,
        mlp_width: int,
        max_positions: int = 512,
        token_types: int = 2,
        pad_id: int = 0,
        dropout: float = 0.1,
        activation: str = "gelu",
        eps: float = 1e-12,
        pooler: bool = False,
    ):
        super().__init__()
        self.pad_id, self.dropout, self.max_positions = pad_id, dropout, max_positions
        self.embeddings = Embeddings(vocab_size, width, max_positions, token_types, pad_id, eps)
        self.encoder = Encoder(layers, width, heads, mlp_width, dropout, activation, eps)
        self.pooler = (
            nn.ModuleDict({"dense": nn.Linear(width, width)}).requires_grad_(False) if pooler else None
        )
        self.apply(initialise)

    def _mask(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:  # [B, L] bool
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens must be integer ids [B, L], got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        length = tokens.shape[1]
        if not 1 <= length <= self.max_positions:
            raise ValueError(
                f"tokens must have length 1 to {self.max_positions} (the position table), got {length}"
            )
        if attention_mask is None:
            mask = tokens != self.pad_id
            mask[:, 0] = True
            return mask
        if attention_mask.shape != tokens.shape:
            raise ValueError(
                f"attention_mask must be {tuple(tokens.shape)}, got {tuple(attention_mask.shape)}"
            )
        return attention_mask != 0

    def _encode(
        self,
        tokens: Tensor,
        mask: Tensor,
        seen: Intervals | None,
        wanted: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        x = F.dropout(self.embeddings(tokens, positions), self.dropout, self.training)
        return self.encoder(x, mask, seen, wanted)

    def forward(
        self,
        tokens: Tensor,  # [B, L]
        attention_mask: Tensor | None = None,  # [B, L], non-zero = attend; None: tokens != pad_id
        *,
        cls_only: bool = False,
    ) -> Tensor:  # [B, L, D], or [B, D]
        """Hidden states of the last layer, or with `cls_only` that of [CLS], the only one it then computes.

        Without a mask the first token, [CLS], is attended whatever its id. With `cls_only` padding costs
        nothing on a CPU (the rows are packed; not in compiled or traced code, nor with dropout). ValueError
        for a wrong shape or dtype.
        """
        mask = self._mask(tokens, attention_mask)
        seen = runs_of(mask)
        if not cls_only:
            return self._encode(tokens, mask, seen)
        dropout = self.training and self.dropout
        if seen is None or dropout or not padding.can_drop(tokens) or bool(seen[0].any()):
            first = torch.zeros(tokens.shape[0], 1, dtype=torch.int64, device=tokens.device)
            return self._encode(tokens, mask, seen, first)[:, 0]
        tokens, positions, bounds = padding.drop(tokens, seen[1][:, 0])
        seen = intervals.packed(bounds, tokens.shape[1], causal=False)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return self._encode(tokens, mask, seen, bounds[None, :-1], positions)[0]
