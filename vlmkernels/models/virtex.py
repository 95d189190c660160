"""VirTex: image features from captions, L = -sum_t log P(w_t | image, w_<t) + log P(w_t | image, w_>t).

Desai and Johnson 2021 (arXiv:2006.06666). A ResNet without its head gives a grid of features; a transformer
decoder with cross-attention to the grid predicts the caption from left to right, and a second one, which
shares every weight outside of its layers, from right to left (`task` "bicaptioning"). The other tasks are
those that the paper compares with: one direction only ("captioning"), masked language modelling
("masked_lm"), and the set of the caption's tokens from the pooled features ("token_classification").
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels.models import _virtex_convert as convert
from vlmkernels.models.parts.attention import CrossAttention, MultiheadSelfAttention
from vlmkernels.models.parts.generation import StepOutput, generate
from vlmkernels.models.parts.pretrained import Pretrained, below, config_from_dict, naming
from vlmkernels.models.parts.resnet import ResNet
from vlmkernels.models.parts.token_loss import IGNORE, label_faults
from vlmkernels.models.parts.transformer import Block, LayerNorm
from vlmkernels.models.parts.weight_files import Source
from vlmkernels.nn.dense import Linear, table_for
from vlmkernels.nn.kv_cache import KVCache

TASKS = ("bicaptioning", "captioning", "masked_lm", "token_classification")
CAPTIONING = TASKS[:2]
STD = 0.02


@dataclass(frozen=True)
class VirTexConfig:
    """Sizes of a VirTex. Defaults: the published ResNet-50 with one layer of width 1024.

    `conv_blocks` are the blocks of the ResNet's stages, `conv_width` is the width of its stem, `conv_widen`
    that of the 3x3 convolutions as a multiple (2: wide_resnet50_2); `conv_pool=False` omits the stem's
    pooling. `image_size` is that of the training images; any other can be read. `heads` of None means heads
    of 64 channels. `pre_norm` moves the LayerNorms of the decoder before its sublayers. `context_length` is
    the most tokens of a caption, its start and end included. `pad_id` may be `eos_id`: a caption then ends at
    the first of them. `mask_id` replaces tokens in masked language modelling.
    """

    task: str = "bicaptioning"
    image_size: int = 224
    conv_blocks: tuple[int, ...] = (3, 4, 6, 3)
    conv_width: int = 64
    conv_widen: int = 1
    conv_pool: bool = True
    width: int = 1024
    layers: int = 1
    heads: int | None = None
    pre_norm: bool = False
    dropout: float = 0.1
    context_length: int = 30
    vocab_size: int = 10000
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    mask_id: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_blocks", tuple(self.conv_blocks))
        sizes = ("image_size", "conv_blocks", "conv_width", "conv_widen", "width", "layers", "heads")
        faults = [*below(self, 1, *sizes, "vocab_size"), *below(self, 2, "context_length")]
        if not self.conv_blocks:
            faults.append("conv_blocks must be one number or more, got none")
        if faults:
            raise ValueError("VirTexConfig: " + "; ".join(faults))
        heads = max(self.width // 64, 1) if self.heads is None else self.heads
        object.__setattr__(self, "heads", heads)
        if self.task not in TASKS:
            faults.append(f"task must be one of {TASKS}, got {self.task!r}")
        if self.width % heads:
            faults.append(f"heads must be a divisor of width {self.width}, got {heads}")
        for name in ("pad_id", "bos_id", "eos_id", "mask_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                faults.append(f"{name} must be an id below {self.vocab_size}, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            faults.append(f"dropout must be in [0, 1), got {self.dropout}")
        if faults:
            raise ValueError("VirTexConfig: " + "; ".join(faults))


def reverse(
    rows: Tensor,  # [B, L]
    lengths: Tensor,  # [B]
) -> Tensor:  # [B, L]
    """The first `lengths` columns of each row in reverse order, the others as they are."""
    place = torch.arange(rows.shape[1], device=rows.device)
    mirrored = lengths[:, None] - 1 - place
    return rows.gather(1, torch.where(mirrored >= 0, mirrored, place))


class CaptionEmbedding(nn.Module):
    """LayerNorm of word + position, with dropout, and 0 at padding."""

    def __init__(self, config: VirTexConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context_length, config.width)
        self.layer_norm = LayerNorm(config.width, eps=1e-8)

    def forward(
        self,
        tokens: Tensor,  # [B, L]
        counted: Tensor,  # [B, L] bool
        first: int = 0,
    ) -> Tensor:  # [B, L, D]
        """Embeddings of tokens at the positions from `first` on, 0 where not counted."""
        places = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = self.layer_norm(self.words(tokens) + self.positions(places))
        x = F.dropout(x, self.dropout, self.training)
        return x * counted[..., None].to(x.dtype)


class VirTex(Pretrained):
    """Trunk, decoders and tied head. Build with `VirTex(CONFIGS["bicaptioning_R_50_L1_H1024"])`.

    Captions are rows of token ids `[B, L]`: the start token, the words, the end token, padding; a caption
    without end token (cut off) ends at its last token that is not padding. Padding inside a caption, where
    the original's vocabulary has its unknown words, is embedded as 0 and not predicted.
    """

    model_type: ClassVar[str] = "virtex"
    config_class: ClassVar[type] = VirTexConfig
    config: VirTexConfig

    def __init__(self, config: VirTexConfig) -> None:
        super().__init__(config)
        self.visual = ResNet(
            config.conv_blocks, config.conv_width, pool=config.conv_pool, widen=config.conv_widen
        )
        if config.task == "token_classification":
            self.classifier = Linear(self.visual.channels, config.vocab_size)
            nn.init.normal_(self.classifier.weight, std=STD)
            nn.init.zeros_(self.classifier.bias)
            return
        self.visual_projection = Linear(self.visual.channels, config.width)
        self.embedding = CaptionEmbedding(config)
        self.decoder = Decoder(config)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self._initialise()
        if config.task == "bicaptioning":
            self.backward_decoder = copy.deepcopy(self.decoder)

    def _initialise(self) -> None:
        """Linear layers and embeddings N(0, 0.02), biases and padding 0."""
        for part in (self.visual_projection, self.embedding, self.decoder):
            for name, parameter in part.named_parameters():
                if parameter.dim() >= 2:
                    nn.init.normal_(parameter, std=STD)
                elif name.endswith("bias"):
                    nn.init.zeros_(parameter)
        if self.config.pad_id != self.config.eos_id:
            with torch.no_grad():
                self.embedding.words.weight[self.config.pad_id].zero_()

    def grid_features(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C, H / stride, W / stride]
        """The trunk's last map. ValueError for anything but a floating [B, 3, H, W]."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be floating [B, 3, H, W], got {images.dtype} of shape {list(images.shape)}"
            )
        return self.visual(images)

    def features(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, C]
        """The grid's average, what is transferred to other tasks (section 4 of the paper)."""
        return self.grid_features(images).mean((2, 3))

    def encode_image(self, images: Tensor) -> Tensor:  # [B, 3, H, W] -> [B, N, D]
        """The grid, row by row, projected to the width of the decoder: what its cross-attention reads.

        ValueError for task "token_classification", which has no decoder.
        """
        self._need_decoder("encode_image")
        return self.visual_projection(self.grid_features(images).flatten(2).transpose(1, 2))

    def text_lengths(self, tokens: Tensor) -> Tensor:  # [B, L] -> [B]
        """Tokens up to and including the first `eos_id`, or without it up to the last that is not padding."""
        place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        ends, pad = tokens == self.config.eos_id, self.config.pad_id
        last = (place * (tokens != pad)).amax(1) if pad != self.config.eos_id else place[-1]
        return torch.where(ends.any(1), ends.int().argmax(1) + 1, last)

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
        tokens: Tensor,  # [B, L]
        labels: Tensor | None = None,  # [B, L]
        *,
        forward_only: bool = False,
        return_logits: bool = False,
    ) -> dict[str, Tensor]:
        """The loss of the config's task, which forms no logits over the tokens.

        Args:
            images: floating, of any size.
            tokens: integer ids, L <= context_length; for "masked_lm" with its tokens replaced.
            labels: int64, for "masked_lm" only, which requires them: the token to predict at each position,
                -100 where none is.
            forward_only: leaves the direction from right to left of "bicaptioning" away.
            return_logits: also return logits.

        Returns:
            `loss`: of a direction, the mean over all tokens but the first of -log P; of "bicaptioning" the
            sum of both, one call of `linear_cross_entropy`; of "masked_lm" the mean over labels; of
            "token_classification" the mean over captions of the mean over their different words (a caption
            without any counts 0). `logits` [B, L, V]: position t predicts token t + 1, for "masked_lm" token
            t; for "token_classification" [B, V]. `backward_logits` [B, L, V]: position t is that of the
            reversed caption (`reverse`).

        Raises:
            ValueError: for wrong shapes, dtypes or options.
        """
        self._check(images, tokens, labels, forward_only)
        counted = self._counted(tokens)
        if self.config.task == "token_classification":
            return self._token_set_loss(images, tokens, counted, return_logits)
        memory = self.encode_image(images)
        if labels is not None:
            seen = intervals.padding(self.text_lengths(tokens), tokens.shape[1])
            rows = [self.decoder(self.embedding(tokens, counted), memory, seen)]
            targets, directions = labels, 1
        else:
            passes = [(self.decoder, tokens, counted)]
            if self.config.task == "bicaptioning" and not forward_only:
                lengths = self.text_lengths(tokens)
                ends_first = reverse(tokens, lengths), reverse(counted, lengths)
                passes.append((self.backward_decoder, *ends_first))
            seen = intervals.causal(tokens.shape[1], device=tokens.device)
            rows = [decoder(self.embedding(ids, real), memory, seen) for decoder, ids, real in passes]
            given = torch.cat([ids.long().masked_fill(~real, IGNORE) for _, ids, real in passes])
            targets, directions = F.pad(given[:, 1:], (0, 1), value=IGNORE), len(passes)
        hidden = torch.cat(rows)  # [directions B, L, D]
        table = table_for(hidden, self.embedding.words)
        # Both directions count the same tokens of a caption, all but one at its end: the sum of the means.
        loss = directions * vlmkernels.linear_cross_entropy(
            hidden, table, targets, bias=self.output_bias, ignore_index=IGNORE
        )
        names = ("logits", "backward_logits")
        shown = dict(zip(names, map(self._logits, rows), strict=False)) if return_logits else {}
        return {"loss": loss, **shown}

    def _counted(self, tokens: Tensor) -> Tensor:  # [B, L] bool
        """Tokens of the captions, without padding inside."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        return (place < self.text_lengths(tokens)[:, None]) & self._real(tokens)

    def _real(self, tokens: Tensor) -> Tensor:  # [B, L] bool
        """Tokens that are not padding; an end is none, also where captions are padded with it."""
        return (tokens != self.config.pad_id) | (tokens == self.config.eos_id)

    def _token_set_loss(
        self, images: Tensor, tokens: Tensor, counted: Tensor, return_logits: bool
    ) -> dict[str, Tensor]:
        """Cross-entropy against the uniform distribution over each caption's words."""
        logits = self.classifier(self.features(images))  # [B, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        words = counted & (tokens != self.config.bos_id) & (tokens != self.config.eos_id)
        target = torch.zeros_like(logits)
        target.scatter_reduce_(1, tokens.long(), words.to(target.dtype), "amax")
        target = target / target.sum(1, keepdim=True).clamp_min(1.0)
        loss = -(target * logits.log_softmax(1)).sum() / max(len(logits), 1)
        return {"loss": loss, "logits": logits} if return_logits else {"loss": loss}

    def _logits(self, hidden: Tensor) -> Tensor:  # [..., D] -> [..., V]
        return vlmkernels.linear(hidden, table_for(hidden, self.embedding.words), self.output_bias)

    def _need_decoder(self, caller: str) -> None:
        if self.config.task == "token_classification":
            raise ValueError(f"{caller}: task must be one of {TASKS[:3]}, got {self.config.task!r}")

    def _check(self, images: Tensor, tokens: Tensor, labels: Tensor | None, forward_only: bool) -> None:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            got = f"{tokens.dtype} of shape {list(tokens.shape)}"
            raise ValueError(f"VirTex: tokens must be integer ids [B, L], got {got}")
        task, limit = self.config.task, self.config.context_length
        faults = label_faults(labels, tokens, "tokens")
        if not 1 <= tokens.shape[1] <= limit:
            faults.append(f"tokens must have 1 to context_length {limit} columns, got {tokens.shape[1]}")
        if images.shape[0] != tokens.shape[0]:
            got = f"{images.shape[0]} and {tokens.shape[0]}"
            faults.append(f"images and tokens must have the same number of rows, got {got}")
        if (labels is not None) != (task == "masked_lm"):
            faults.append(f"labels must be given for task 'masked_lm' and for no other, got task {task!r}")
        if forward_only and task not in CAPTIONING:
            faults.append(f"forward_only is for tasks {CAPTIONING}, got task {task!r}")
        if faults:
            raise ValueError("VirTex: " + "; ".join(faults))

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,  # [B, 3, H, W]
        prefix_tokens: Tensor | None = None,  # [B, P]
        *,
        max_new_tokens: int | None = None,
        num_beams: int = 5,
        candidates_per_beam: int | None = 2,
        repeated_log_probability: float | None = -10000.0,
        length_penalty: float = 0.0,
        eos_token_id: int | None = None,
        **options: Any,
    ) -> Tensor:  # [B, n]
        """Captions from left to right; keys and values are cached. Put the model in evaluation mode first.

        The defaults are the original's: the largest sum of log-probabilities of five beams, each with its two
        best continuations, and -10000 for a token directly after itself. Nucleus sampling is `num_beams=1,
        do_sample=True, top_p=0.9`.

        Args:
            images: as in `forward`.
            prefix_tokens: start token first, then words that the caption continues, no padding; None: only
                the start token.
            max_new_tokens: P + max_new_tokens <= context_length; None: as many.
            eos_token_id: ends a caption; None: the config's.
            num_beams, candidates_per_beam, repeated_log_probability, length_penalty, options: see
                `vlmkernels.models.generation.generate`.

        Returns:
            The new tokens only, the config's `pad_id` after the end.

        Raises:
            ValueError: for invalid arguments, or a task that writes no captions.
        """
        if self.config.task not in CAPTIONING:
            raise ValueError(f"generate: task must be one of {CAPTIONING}, got {self.config.task!r}")
        if prefix_tokens is None:
            prefix_tokens = torch.full((images.shape[0], 1), self.config.bos_id, device=images.device)
        self._check(images, prefix_tokens, None, False)
        room = self.config.context_length - prefix_tokens.shape[1]
        max_new_tokens = room if max_new_tokens is None else max_new_tokens
        if not 1 <= max_new_tokens <= room:
            raise ValueError(f"max_new_tokens must be in [1, {room}] after the prefix, got {max_new_tokens}")
        decoding = _Decoding(self, images)
        return generate(
            decoding.read(prefix_tokens),
            decoding.step,
            decoding.reorder,
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            candidates_per_beam=candidates_per_beam,
            repeated_log_probability=repeated_log_probability,
            length_penalty=length_penalty,
            eos_token_id=self.config.eos_id if eos_token_id is None else eos_token_id,
            pad_token_id=self.config.pad_id,
            **options,
        )

    def original_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of kdexd/virtex, those that its decoders share twice."""
        return convert.to_original(self.state_dict())

    @classmethod
    def from_original_state_dict(cls, source: Source, **fields: Any) -> VirTex:
        """A VirTex with the weights of kdexd/virtex, in evaluation mode.

        Shapes determine the config except for heads, which are of 64 channels, the norms and the task of one
        decoder, which are taken to be post-norm and "captioning"; `fields` override them. ValueError for keys
        or shapes that are not those of a VirTex.
        """
        weights, shown = convert.from_original(source)
        with naming(source):
            return cls.with_weights(config_from_dict(VirTexConfig, {**shown, **fields}), weights)


class Decoder(nn.Module):
    """Layers with cross-attention, and after pre-norm layers a LayerNorm."""

    def __init__(self, config: VirTexConfig) -> None:
        super().__init__()
        assert config.heads is not None  # set by VirTexConfig
        width, heads, rate = config.width, config.heads, config.dropout
        self.layers = nn.ModuleList(
            Block(
                width,
                MultiheadSelfAttention(width, heads, dropout=rate),
                4 * width,
                cross=CrossAttention(width, heads, dropout=rate),
                post_norm=not config.pre_norm,
                dropout=rate,
                mlp_dropout=rate,
            )
            for _ in range(config.layers)
        )
        self.norm = LayerNorm(width) if config.pre_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,  # [B, L, D]
        memory: Tensor,  # [B, N, D]
        seen: intervals.Intervals,  # [L] or [B, L] each
    ) -> Tensor:  # [B, L, D]
        everything = intervals.full(x.shape[1], memory.shape[1], device=x.device)
        for layer in self.layers:
            x = layer(x, seen, memory=(memory, everything))
        return self.norm(x)


class _Decoding:
    """Captions being generated: keys and values of every layer, all captions equally long."""

    def __init__(self, model: VirTex, images: Tensor) -> None:
        self.model, self.length = model, 0
        self.layers = [cast(Block, layer) for layer in model.decoder.layers]
        self.cache, self.memory = KVCache(), KVCache()
        memory = model.encode_image(images)
        for index, layer in enumerate(self.layers):
            self.memory.update(*layer.cross.keys_values(memory), index)

    def read(self, tokens: Tensor, return_hidden: bool = False) -> Any:  # [B, t] -> [B, V] or StepOutput
        """Logits of the token after these, which join the cache."""
        model, count = self.model, tokens.shape[1]
        x = model.embedding(tokens, model._real(tokens), self.length)
        seen = intervals.causal(count, self.length, device=x.device)
        for index, layer in enumerate(self.layers):
            memory = self.memory.layers[index]
            everything = intervals.full(count, memory[0].shape[2], device=x.device)
            keep = partial(self.cache.update, layer_idx=index)
            x = layer(x, seen, keep=keep, memory=(memory, everything))
        self.length += count
        hidden = model.decoder.norm(x[:, -1])
        logits = model._logits(hidden)
        return StepOutput(logits, hidden) if return_hidden else logits

    def step(self, tokens: Tensor, return_hidden: bool = False) -> Any:  # [N] -> [N, V] or StepOutput
        """Logits of the token after the given one of each caption."""
        return self.read(tokens[:, None], return_hidden)

    def reorder(self, rows: Tensor) -> None:  # [M]
        """Selects rows of the captions; M may differ from N."""
        self.cache.reorder_cache(rows)
        self.memory.reorder_cache(rows)


def _published() -> Mapping[str, VirTexConfig]:
    """The configurations of the original's model zoo, by its names."""
    sizes: dict[str, dict[str, Any]] = {
        **{f"bicaptioning_R_50_L1_H{width}": {"width": width} for width in (512, 768, 1024, 2048)},
        **{f"bicaptioning_R_50_L{layers}_H1024": {"layers": layers} for layers in (2, 3, 4)},
        "bicaptioning_R_50W2X_L1_H1024": {"conv_widen": 2},
        "bicaptioning_R_101_L1_H1024": {"conv_blocks": (3, 4, 23, 3)},
        "captioning_R_50_L1_H2048": {"task": "captioning", "width": 2048},
        "masked_lm_R_50_L1_H2048": {"task": "masked_lm", "width": 2048},
        "token_classification_R_50": {"task": "token_classification"},
    }
    return {name: VirTexConfig(**fields) for name, fields in sizes.items()}


CONFIGS: dict[str, VirTexConfig] = {
    **_published(),
    "emoji-tiny": VirTexConfig(
        image_size=48,
        conv_blocks=(1, 1, 1),
        conv_width=16,
        conv_pool=False,
        width=128,
        heads=4,
        context_length=32,
        vocab_size=4098,
        bos_id=4094,
        eos_id=4095,
    ),
}
