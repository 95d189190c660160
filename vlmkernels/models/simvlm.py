"""SimVLM: one prefix language model of images and text, L = -sum_{t >= p} log P(x_t | image, x_<t).

Wang et al. 2022 (arXiv:2108.10904). The prefix is the image and a random number p of leading tokens;
positions in it attend to each other, the tokens after it are predicted one by one, and the loss counts those
only. The image goes through the first three stages of a ResNet, each position of the result is a token, and
the tokens of image and text go through one transformer. Two forms:

- "encoder_decoder", the paper's: the encoder reads the prefix, the decoder the tokens after it, with
  cross-attention to the encoder's result.
- "prefix_lm": the same layers without cross-attention in one stack, every position at once, with the prefix
  mask [0, max(prefix, i + 1)).

Names of parameters are the same in both but for those of cross-attention, which only the first has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels._modules import is_traced
from vlmkernels.intervals import Intervals
from vlmkernels.models.parts.attention import CrossAttention, Keep, MultiheadSelfAttention
from vlmkernels.models.parts.generation import StepOutput, generate
from vlmkernels.models.parts.pretrained import Pretrained, below
from vlmkernels.models.parts.resnet import ResNet, map_stride
from vlmkernels.models.parts.token_loss import IGNORE
from vlmkernels.models.parts.transformer import Block, LayerNorm
from vlmkernels.nn.dense import Linear, table_for, tied_logits
from vlmkernels.nn.kv_cache import KVCache

FORMS = ("encoder_decoder", "prefix_lm")


@dataclass(frozen=True)
class SimVLMConfig:
    """Sizes of a SimVLM. Defaults: the published base size.

    `conv_blocks` and `conv_width` are the blocks of the three ResNet stages and the width of its stem;
    `conv_pool=False` omits the stem's pooling, so that a token covers 8 pixels a side instead of 16.
    `decoder_layers` may be 0 in the form "prefix_lm", whose stack is `encoder_layers + decoder_layers` deep.
    `heads` of None means heads of 64 channels. `context_length` is the most tokens of a text, `bos_id` the
    token every text starts with. `dropout` (embeddings and branches) and `stochastic_depth` (conv stage and
    encoder), 0 in pretraining, were 0.1 in the paper's fine-tuning.
    """

    form: str = "encoder_decoder"
    image_size: int = 224
    conv_blocks: tuple[int, int, int] = (3, 4, 23)
    conv_width: int = 64
    conv_pool: bool = True
    width: int = 768
    encoder_layers: int = 12
    decoder_layers: int = 12
    heads: int | None = None
    context_length: int = 256
    vocab_size: int = 32000
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = 0
    dropout: float = 0.0
    stochastic_depth: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_blocks", tuple(self.conv_blocks))
        sizes = ("image_size", "conv_blocks", "conv_width", "width", "encoder_layers", "heads", "vocab_size")
        if too_small := [*below(self, 1, *sizes), *below(self, 0, "decoder_layers")]:
            raise ValueError("SimVLMConfig: " + "; ".join(too_small))
        heads = max(self.width // 64, 1) if self.heads is None else self.heads
        object.__setattr__(self, "heads", heads)
        stride = map_stride(self.conv_blocks, pool=self.conv_pool)
        faults = []
        if self.form not in FORMS:
            faults.append(f"form must be one of {FORMS}, got {self.form!r}")
        if self.image_size < 1 or self.image_size % stride:
            faults.append(f"image_size must be a multiple of {stride}, got {self.image_size}")
        if len(self.conv_blocks) != 3 or min(self.conv_blocks) < 1:
            faults.append(f"conv_blocks must be three numbers of 1 or more, got {self.conv_blocks}")
        if self.width % heads:
            faults.append(f"heads must be a divisor of width {self.width}, got {heads}")
        if self.encoder_layers < 1 or self.decoder_layers < (self.form == "encoder_decoder"):
            got = f"{self.encoder_layers}, {self.decoder_layers}"
            faults.append(f"encoder_layers and decoder_layers must each be at least 1, got {got}")
        if self.context_length < 2:
            faults.append(f"context_length must be at least 2, got {self.context_length}")
        for name in ("bos_id", "eos_id", "pad_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                faults.append(f"{name} must be an id below {self.vocab_size}, got {getattr(self, name)}")
        for name in ("dropout", "stochastic_depth"):
            if not 0.0 <= getattr(self, name) < 1.0:
                faults.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if faults:
            raise ValueError("SimVLMConfig: " + "; ".join(faults))

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of image tokens."""
        side = self.image_size // map_stride(self.conv_blocks, pool=self.conv_pool)
        return side, side


def transformer_block(
    width: int, heads: int, *, grid: tuple[int, int] | None = None, cross: bool = False, **rates: Any
) -> Block:
    """A layer of the encoder, whose image tokens have places on the grid, or of the decoder.

    The paper has relative attention for image patches without details; here each layer and head has a table,
    as in CoAtNet (Dai et al. 2021).
    """
    attn = MultiheadSelfAttention(width, heads, grid=grid, std=width**-0.5)
    return Block(width, attn, 4 * width, cross=CrossAttention(width, heads) if cross else None, **rates)


class SimVLM(Pretrained):
    """The conv stage, the transformer and the tied head. Build with `SimVLM(CONFIGS["emoji-tiny"])`.

    Texts are rows of token ids `[B, L]`: the start token, the words, the end token, padding. The start token
    is always given and never predicted. A prefix length p counts tokens of the row, the start token among
    them: `tokens[:, :p]` belongs to the prefix, the rest is predicted. p = 1 is captioning from the image
    only.
    """

    model_type: ClassVar[str] = "simvlm"
    config_class: ClassVar[type] = SimVLMConfig
    config: SimVLMConfig

    def __init__(self, config: SimVLMConfig) -> None:
        super().__init__(config)
        assert config.heads is not None  # set by SimVLMConfig
        width, grid = config.width, config.grid
        self.image_tokens = grid[0] * grid[1]
        self.conv_stage = ResNet(
            config.conv_blocks,
            config.conv_width,
            pool=config.conv_pool,
            stochastic_depth=config.stochastic_depth,
        )
        self.image_projection = Linear(self.conv_stage.channels, width)
        self.image_position = nn.Parameter(0.02 * torch.randn(self.image_tokens, width))
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.text_position = nn.Parameter(0.02 * torch.randn(config.context_length, width))
        self.encoder = nn.ModuleList(
            transformer_block(
                width,
                config.heads,
                grid=grid,
                dropout=config.dropout,
                stochastic_depth=config.stochastic_depth,
            )
            for _ in range(config.encoder_layers)
        )
        cross = config.form == "encoder_decoder"
        self.cross_norm = LayerNorm(width) if cross else None
        self.decoder = nn.ModuleList(
            transformer_block(width, config.heads, cross=cross, dropout=config.dropout)
            for _ in range(config.decoder_layers)
        )
        self.ln_final = LayerNorm(width)
        self._initialise()

    def _initialise(self) -> None:
        """Linear layers N(0, 1 / inputs), those that end one of n branches N(0, 1 / (n inputs)), biases 0."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        branches = 2 * (len(self.encoder) + len(self.decoder))
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                summed = branches if name.endswith(("out_proj", "c_proj")) else 1
                nn.init.normal_(module.weight, std=(module.in_features * summed) ** -0.5)
                nn.init.zeros_(module.bias)

    def check_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """As in `Pretrained`, with a separate error for weights of the other form."""
        if "image_projection.weight" in state_dict:
            form = FORMS["cross_norm.weight" not in state_dict]
            if form != self.config.form:
                raise ValueError(
                    f"state_dict must be of form {self.config.form!r}, got {form!r}: the forms have "
                    "different weights, since a decoder is trained with or without cross-attention"
                )
        super().check_weights(state_dict)

    def encode_image(self, images: Tensor) -> Tensor:  # [B, 3, R, R] -> [B, image_tokens, D]
        """Image tokens with their positions. ValueError for anything but a floating [B, 3, R, R]."""
        side = self.config.image_size
        if images.shape[1:] != (3, side, side) or not images.is_floating_point():
            raise ValueError(
                f"images must be floating [B, 3, {side}, {side}], "
                f"got {images.dtype} of shape {list(images.shape)}"
            )
        patches = self.image_projection(self.conv_stage(images).flatten(2).transpose(1, 2))
        return patches + self.image_position.to(patches.dtype)

    def text_lengths(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B]
        """Tokens up to and including the first `eos_id` of each row; L if there is none."""
        open_rows = (tokens == self.config.eos_id).cumsum(1) == 0
        return (open_rows.sum(1) + 1).clamp(max=tokens.shape[1])

    def sample_prefix(self, text_lengths: Tensor, generator: torch.Generator | None = None) -> Tensor:  # [B]
        """A prefix length for each text, [B] int64: 1 (the start token) + uniform over 0 .. n - 1.

        n = text_lengths - 1 is the number of tokens to predict, of which at least one is left. The paper
        requires T_p >= T_i, the image tokens, and gives no range; this one is consistent with it.
        """
        n = (text_lengths - 1).clamp(min=1)
        drawn = torch.rand(n.shape, generator=generator, device=n.device)
        return 1 + torch.minimum((drawn * n).long(), n - 1)

    def forward(
        self,
        images: Tensor | None,  # [B, 3, R, R]
        tokens: Tensor,  # [B, L]
        prefix_length: int | Tensor | None = None,  # [B]
        text_lengths: Tensor | None = None,  # [B]
        *,
        return_logits: bool = False,
    ) -> dict[str, Tensor]:
        """The loss, which forms no logits; with `return_logits` the logits as well.

        Args:
            images: None for a batch of texts only.
            tokens: integer ids, L <= context_length.
            prefix_length: tokens of each row in the prefix, 0 <= p <= its length; None draws them
                (`sample_prefix`), as training does.
            text_lengths: tokens of each row before its padding; None: as `text_lengths()` counts them.
            return_logits: also return them.

        Returns:
            `loss`: mean over the predicted tokens, positions max(p, 1) .. length - 1 of each row, of -log P;
            0 if there are none. `logits` [B, L, V]: position t predicts token t + 1, for max(p, 1) - 1 <= t <
            length; the others are 0.

        Raises:
            ValueError: for wrong shapes or dtypes; on the CPU also for lengths out of range.
        """
        lengths = self._checked_lengths(images, tokens, text_lengths, prefix_length)
        if prefix_length is None:
            prefix_length = self.sample_prefix(lengths)
        position = torch.arange(tokens.shape[1], device=tokens.device)
        first = prefix_length[:, None] if isinstance(prefix_length, Tensor) else prefix_length
        counted = (position >= first - 1) & (position < lengths[:, None] - 1)  # [B, L] predicts its successor
        kept = (position >= first - 1) & (position < lengths[:, None]) if return_logits else counted
        hidden = self._hidden(images, tokens, prefix_length, kept)  # [R, D]
        successors = tokens.roll(-1, 1).long().masked_fill(~counted, IGNORE)[kept]
        table = table_for(hidden, self.token_embedding)
        loss = vlmkernels.linear_cross_entropy(hidden, table, successors, ignore_index=IGNORE)
        if not return_logits:
            return {"loss": loss}
        rows = self._logits(hidden)  # [R, V]
        logits = rows.new_zeros(*tokens.shape, rows.shape[1])
        logits[kept] = rows
        return {"loss": loss, "logits": logits}

    def _logits(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return tied_logits(hidden, self.token_embedding)

    def _checked_lengths(
        self,
        images: Tensor | None,
        tokens: Tensor,
        lengths: Tensor | None,
        prefix: int | Tensor | None = None,
        names: tuple[str, str] = ("tokens", "text_lengths"),
    ) -> Tensor:  # [B]
        """`lengths`, or those of `tokens`; ValueError listing every invalid argument."""
        rows, counts = names
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            got = f"{tokens.dtype} of shape {list(tokens.shape)}"
            raise ValueError(f"SimVLM: {rows} must be integer ids [B, L], got {got}")
        faults = []
        if not 1 <= tokens.shape[1] <= self.config.context_length:
            limit = self.config.context_length
            faults.append(f"{rows} must have 1 to context_length {limit} columns, got {tokens.shape[1]}")
        if images is not None and images.shape[0] != tokens.shape[0]:
            got = f"{images.shape[0]} and {tokens.shape[0]}"
            faults.append(f"images and {rows} must have the same number of rows, got {got}")
        for name, value in ((counts, lengths), ("prefix_length", prefix)):
            if isinstance(value, Tensor):
                if value.shape != tokens.shape[:1] or value.is_floating_point():
                    got = f"{value.dtype} of shape {list(value.shape)}"
                    faults.append(f"{name} must be {tokens.shape[0]} integers, got {got}")
            elif value is not None and not (name == "prefix_length" and isinstance(value, int)):
                faults.append(f"{name} must be a tensor of {tokens.shape[0]} integers, got {value!r}")
        if lengths is None:
            lengths = self.text_lengths(tokens)
        if not faults and tokens.device.type == "cpu" and not is_traced():
            if not ((lengths >= 1) & (lengths <= tokens.shape[1])).all():
                faults.append(f"{counts} must be in [1, {tokens.shape[1]}], got {lengths.tolist()}")
            given = lengths.new_tensor(prefix) if isinstance(prefix, int) else prefix
            if given is not None and not ((given >= 0) & (given <= lengths)).all():
                most = f"{counts} = {lengths.tolist()}"
                faults.append(f"prefix_length must be in [0, {most}], got {given.tolist()}")
        if faults:
            raise ValueError("SimVLM: " + "; ".join(faults))
        return lengths

    def _embed(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:  # [B, L] -> [B, L, D]
        rows = slice(tokens.shape[1]) if positions is None else positions
        return self.token_embedding(tokens) + self.text_position[rows]

    def _encoder_input(self, images: Tensor | None, text: Tensor) -> Tensor:  # [B, L, D] -> [B, N + L, D]
        x = text if images is None else torch.cat([self.encode_image(images).to(text.dtype), text], dim=1)
        return F.dropout(x, self.config.dropout, self.training)

    def _encode(self, images: Tensor | None, text: Tensor, prefix: int | Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's result [B, N + P, D] of image and P text tokens, and how much of it is valid [B]."""
        x = self._encoder_input(images, text)
        length = torch.as_tensor(x.shape[1] - text.shape[1] + prefix, device=x.device).expand(x.shape[0])
        interval = intervals.padding(length, x.shape[1])
        for block in self.encoder:
            x = block(x, interval, has_image=images is not None)
        assert self.cross_norm is not None
        return self.cross_norm(x), length

    def _hidden(self, images: Tensor | None, tokens: Tensor, prefix: int | Tensor, kept: Tensor) -> Tensor:
        """Normalised last hidden states [R, D] of the R text positions where `kept` [B, L] is True."""
        text = self._embed(tokens)
        if self.config.form == "prefix_lm":
            x = self._encoder_input(images, text)
            before = x.shape[1] - text.shape[1]
            interval = intervals.prefix_lm(before + prefix, x.shape[1], device=x.device)
            for block in _blocks(self.encoder, self.decoder):
                x = block(x, interval, has_image=images is not None)
            return self.ln_final(x[:, before:][kept])
        longest = tokens.shape[1] if isinstance(prefix, Tensor) else prefix
        memory, memory_length = self._encode(images, text[:, :longest], prefix)
        # The decoder reads the positions kept, from the last of the prefix on, of all texts in one row.
        bounds = F.pad(kept.sum(1).cumsum(0), (1, 0))
        y = F.dropout(text[kept], self.config.dropout, self.training)[None]  # [1, R, D]
        interval = intervals.packed(bounds, y.shape[1])
        sample = kept.nonzero()[:, 0]  # [R]
        start = sample * memory.shape[1]
        memory_interval = Intervals(start, start + memory_length[sample])
        memory = memory.flatten(0, 1)[None]
        for block in _blocks(self.decoder):
            y = block(y, interval, memory=(memory, memory_interval))
        return self.ln_final(y[0])

    @torch.no_grad()
    def generate(
        self,
        images: Tensor | None,  # [B, 3, R, R]
        prefix_tokens: Tensor | None = None,  # [B, P]
        *,
        prefix_lengths: Tensor | None = None,  # [B]
        max_new_tokens: int,
        num_beams: int = 1,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        length_penalty: float = 1.0,
        early_stopping: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # [B, n]
        """Text after the prefix; keys and values are cached. Put the model in evaluation mode first.

        Args:
            images: None continues texts only.
            prefix_tokens: start token first, then a text the caption continues ("a picture of"); None: only
                the start token.
            prefix_lengths: tokens of each row before padding on its right; None: P.
            max_new_tokens: P + max_new_tokens <= context_length.
            num_beams, do_sample, temperature, top_k, top_p, length_penalty, early_stopping, generator: see
                `vlmkernels.models.generation.generate`.
            eos_token_id: ends a text; None: the config's.

        Returns:
            The new tokens only, the config's `pad_id` after the end.

        Raises:
            ValueError: for invalid arguments; without images and prefix.
        """
        if prefix_tokens is None:
            if images is None:
                raise ValueError("generate: images, prefix_tokens or both must be given")
            prefix_tokens = torch.full((images.shape[0], 1), self.config.bos_id, device=images.device)
        length = prefix_tokens.shape[-1]
        if prefix_lengths is None:
            prefix_lengths = torch.full(prefix_tokens.shape[:1], length, device=prefix_tokens.device)
        names = "prefix_tokens", "prefix_lengths"
        prefix_lengths = self._checked_lengths(images, prefix_tokens, prefix_lengths, names=names)
        room = self.config.context_length - length
        if not 1 <= max_new_tokens <= room:
            raise ValueError(f"max_new_tokens must be in [1, {room}] after the prefix, got {max_new_tokens}")
        decoding = _Decoding(self, images, prefix_tokens, prefix_lengths, max_new_tokens)
        return generate(
            decoding.first_logits,
            decoding.step,
            decoding.reorder,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            eos_token_id=self.config.eos_id if eos_token_id is None else eos_token_id,
            pad_token_id=self.config.pad_id,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            generator=generator,
        )


class _Decoding:
    """Texts being generated: keys and values of every layer, and the place of the next token of each row."""

    def __init__(
        self, model: SimVLM, images: Tensor | None, tokens: Tensor, lengths: Tensor, new_tokens: int
    ) -> None:
        self.model = model
        self.memory = KVCache()  # of the encoder's result, for cross-attention
        self.memory_length = lengths
        text, rows = model._embed(tokens), torch.arange(tokens.shape[0], device=tokens.device)
        if model.config.form == "encoder_decoder":
            memory, self.memory_length = model._encode(images, text, lengths)
            self.blocks = _blocks(model.decoder)
            for index, block in enumerate(self.blocks):
                self.memory.update(*block.cross.keys_values(memory), index)
            self.cache = KVCache(new_tokens)
            # The decoder starts with the last token of the prefix. The place of the next token, [N] each:
            self.slot, self.position = torch.zeros_like(lengths), lengths - 1  # in the cache, in its text
            self.first_logits = self.step(tokens[rows, lengths - 1])
        else:
            x = model._encoder_input(images, text)
            self.blocks = _blocks(model.encoder, model.decoder)
            self.cache = KVCache(x.shape[1] + new_tokens)
            # New tokens follow their own prefix and overwrite its padding.
            self.slot, self.position = x.shape[1] - text.shape[1] + lengths, lengths
            seen = intervals.prefix_lm(self.slot, x.shape[1])
            slots = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            for index, block in enumerate(self.blocks):
                x = block(x, seen, keep=self._keep(index, slots), has_image=images is not None)
            self.first_logits = model._logits(model.ln_final(x[rows, self.slot - 1]))

    def _keep(self, layer: int, slots: Tensor) -> Keep:  # [N, t]
        return partial(self.cache.update, layer_idx=layer, slots=slots)

    def step(self, tokens: Tensor, return_hidden: bool = False) -> Any:  # [N] -> [N, V] or StepOutput
        """Logits of the tokens after `tokens`, which are added to the cache."""
        x = self.model._embed(tokens[:, None], self.position[:, None])
        seen = intervals.padding(self.slot + 1, 1)
        memory_seen = intervals.padding(self.memory_length, 1)
        for index, block in enumerate(self.blocks):
            memory = (self.memory.layers[index], memory_seen) if self.memory.layers else None
            x = block(x, seen, keep=self._keep(index, self.slot[:, None]), memory=memory)
        self.slot, self.position = self.slot + 1, self.position + 1
        hidden = self.model.ln_final(x[:, 0])
        logits = self.model._logits(hidden)
        return StepOutput(logits, hidden) if return_hidden else logits

    def reorder(self, rows: Tensor) -> None:  # [M]
        """Selects rows of the texts; M may differ from N."""
        self.cache.reorder_cache(rows)
        self.memory.reorder_cache(rows)
        self.memory_length = self.memory_length[rows]
        self.slot, self.position = self.slot[rows], self.position[rows]


def _blocks(*stacks: nn.ModuleList) -> list[Block]:
    return [cast(Block, block) for stack in stacks for block in stack]


CONFIGS: dict[str, SimVLMConfig] = {
    "simvlm-base": SimVLMConfig(),
    "simvlm-large": SimVLMConfig(conv_blocks=(3, 8, 36), width=1024, encoder_layers=24, decoder_layers=24),
    "simvlm-huge": SimVLMConfig(
        conv_blocks=(3, 8, 36), conv_width=80, width=1280, encoder_layers=32, decoder_layers=32, heads=16
    ),
    "emoji-tiny": SimVLMConfig(
        image_size=48,
        conv_blocks=(1, 1, 1),
        conv_width=16,
        conv_pool=False,
        width=128,
        encoder_layers=3,
        decoder_layers=3,
        heads=4,
        context_length=32,
        vocab_size=4096,
        bos_id=4094,
        eos_id=4095,
    ),
}
