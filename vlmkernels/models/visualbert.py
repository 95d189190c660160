"""VisualBERT: BERT over the tokens of a text and the regions of an image, in one sequence.

Li et al. 2019 (arXiv:1908.03557). A text token is word + position + type; a region is a linear layer of its
features + a type + a position, which is 0 or the mean of the positions of the words it belongs to. One
LayerNorm for both, then BERT's layers, in which every valid position sees every other. Heads:

- "pretraining": masked language modelling, and whether the text belongs to the image (from [CLS]).
- "vqa": answers, from the [MASK] before the last [SEP] of a question.
- "nlvr2": classes of a text about the regions of two images, from [CLS].
- "vcr": which of several texts is right, one score each from [CLS].
- "phrases": attention from words to regions, for the regions of a phrase.
- "none": hidden states only.

State-dict keys are those of transformers' VisualBert classes, and `tower` of an image tower.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels import intervals
from vlmkernels._activations import ACTIVATIONS
from vlmkernels._modules import is_traced
from vlmkernels.models import _visualbert_sources as sources
from vlmkernels.models._visualbert_inputs import Inputs, JointEmbeddings, got, label_faults
from vlmkernels.models.parts import padding
from vlmkernels.models.parts.bert import Encoder, initialise, runs_of
from vlmkernels.models.parts.image_grid import ImageGrid
from vlmkernels.models.parts.pretrained import Pretrained, below
from vlmkernels.models.parts.resnet import map_stride
from vlmkernels.models.parts.token_loss import IGNORE
from vlmkernels.models.parts.weight_files import Source
from vlmkernels.nn.dense import Linear, table_for, take_rows

HEADS = ("pretraining", "vqa", "nlvr2", "vcr", "phrases", "none")
SIZES = (
    *("answers", "visual_dim", "vocab_size", "context_length", "max_positions", "width", "layers", "heads"),
    *("mlp_width", "token_types", "image_size", "conv_blocks", "conv_width"),
)


@dataclass(frozen=True)
class VisualBertConfig:
    """Sizes of a VisualBERT. Defaults: the published one of COCO and VQA.

    `answers` is the number of classes of the heads "vqa" and "nlvr2". `match_label` is the class of the
    pretraining head that means "the text belongs to the image": 1 in the published code and its weights, 0
    in the documentation of transformers. `region_type` is the type of a region for which none is given: 0 in
    the published code, 1 in transformers. `context_length` is the number of tokens to which a text is
    truncated, `max_positions` the size of the position table. `dropout` acts on hidden states and attention.
    `init_std` is the standard deviation of new weights: BERT's for its width; a narrow model needs about
    1 / sqrt(width), or its matching stays at chance for long.
    Regions of `visual_dim` numbers are given, or with `conv_blocks` they come from an image tower for images
    of `image_size`: a ResNet of these blocks, width `conv_width` and pooling `conv_pool` (`ImageGrid`).
    """

    head: str = "pretraining"
    answers: int = 2
    match_label: int = 1
    region_type: int = 0
    visual_dim: int = 2048
    vocab_size: int = 30522
    context_length: int = 128
    max_positions: int = 512
    token_types: int = 2
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.1
    activation: str = "gelu"
    eps: float = 1e-12
    init_std: float = 0.02
    pad_id: int = 0
    image_size: int = 224
    conv_blocks: tuple[int, ...] = ()
    conv_width: int = 64
    conv_pool: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "conv_blocks", tuple(self.conv_blocks))
        if too_small := below(self, 1, *SIZES):
            raise ValueError("VisualBertConfig: " + "; ".join(too_small))
        faults = []
        if self.head not in HEADS:
            faults.append(f"head must be one of {', '.join(HEADS)}, got {self.head!r}")
        if self.conv_blocks and self.image_size % self.stride:
            faults.append(f"image_size must be a multiple of {self.stride}, got {self.image_size}")
        if self.width % self.heads:
            faults.append(f"heads must be a divisor of width {self.width}, got {self.heads}")
        if not 2 <= self.context_length <= self.max_positions:
            length = f"{self.context_length} and {self.max_positions}"
            faults.append(f"context_length must be in [2, max_positions], got {length}")
        if self.match_label not in (0, 1):
            faults.append(f"match_label must be 0 or 1, got {self.match_label}")
        if not 0 <= self.region_type < self.token_types:
            faults.append(f"region_type must be a type below {self.token_types}, got {self.region_type}")
        if not 0 <= self.pad_id < self.vocab_size:
            faults.append(f"pad_id must be an id below {self.vocab_size}, got {self.pad_id}")
        if self.activation not in ACTIVATIONS:
            faults.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        for name in ("eps", "init_std"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            faults.append(f"dropout must be in [0, 1), got {self.dropout}")
        if faults:
            raise ValueError("VisualBertConfig: " + "; ".join(faults))

    @property
    def stride(self) -> int:
        """Pixels a side of a region of the tower."""
        return map_stride(self.conv_blocks, pool=self.conv_pool)

    @property
    def region_width(self) -> int:
        """Numbers of a region: channels of the tower, or `visual_dim`."""
        return 2 ** (len(self.conv_blocks) + 1) * self.conv_width if self.conv_blocks else self.visual_dim

    @property
    def cells(self) -> int:
        """Regions of an image by the tower, without boxes."""
        return (self.image_size // self.stride) ** 2 if self.conv_blocks else 0


class JointEncoder(nn.Module):
    """The embeddings of text and regions, BERT's layers, and its tanh layer on [CLS]."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.embeddings = JointEmbeddings(config)
        sizes = config.layers, config.width, config.heads, config.mlp_width
        self.encoder = Encoder(*sizes, config.dropout, config.activation, config.eps)
        self.pooler = nn.ModuleDict({"dense": Linear(config.width, config.width)})

    def hidden(
        self,
        x: Tensor,  # [B, T, D]
        mask: Tensor,  # [B, T] bool
        rows: Tensor | None = None,  # [R] int64, of the B T positions
    ) -> Tensor:  # [R, D], or [B, T, D]
        """Hidden states of the last layer, of all positions or of `rows`.

        For rows on a CPU the valid positions are packed, so that padding costs nothing and the last layer is
        computed for the rows alone (not in compiled or traced code, nor with dropout).
        """
        x = F.dropout(x, self.dropout, self.training)
        flat = mask.flatten()
        dropout = self.training and self.dropout
        if rows is None or dropout or not padding.can_drop(x) or not bool(flat[rows].all()):
            hidden = self.encoder(x, mask, runs_of(mask), None)
            return hidden if rows is None else hidden.flatten(0, 1)[rows]
        packed = x.flatten(0, 1)[flat][None]  # [1, N, D]
        bounds = F.pad(mask.sum(1).cumsum(0), (1, 0))
        seen = intervals.packed(bounds, packed.shape[1], causal=False)
        wanted = (flat.cumsum(0) - 1)[rows][None]
        return self.encoder(packed, flat[flat][None], seen, wanted)[0]

    def pool(self, first: Tensor) -> Tensor:  # [..., D], of [CLS]
        return self.pooler["dense"](first).tanh()


class Predictions(nn.Module):
    """The masked language model's head: a layer and BERT's table of words, with a bias of its own."""

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__()
        norm = nn.LayerNorm(config.width, eps=config.eps)
        self.transform = nn.ModuleDict({"dense": Linear(config.width, config.width), "LayerNorm": norm})
        self.activation = ACTIVATIONS[config.activation].module()
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(
        self,
        hidden: Tensor,  # [..., D]
        table: Tensor,  # [V, D]
        labels: Tensor | None = None,  # [...]
    ) -> Tensor:  # [..., V], or with labels the loss []
        hidden = self.transform["LayerNorm"](self.activation(self.transform["dense"](hidden)))
        if labels is None:
            return vlmkernels.linear(hidden, table, self.bias)
        return vlmkernels.linear_cross_entropy(hidden, table, labels, bias=self.bias, ignore_index=IGNORE)


class VisualBERT(Pretrained):
    """The joint encoder, its head, and an image tower if the config has one; texts are BERT's rows of ids."""

    model_type: ClassVar[str] = "visualbert"
    config_class: ClassVar[type] = VisualBertConfig
    config: VisualBertConfig

    def __init__(self, config: VisualBertConfig) -> None:
        super().__init__(config)
        self.visual_bert = JointEncoder(config)
        width, head = config.width, config.head
        if head in ("pretraining", "phrases"):
            self.cls: Any = nn.ModuleDict(
                {"predictions": Predictions(config), "seq_relationship": Linear(width, 2)}
            )
        elif head != "none":
            self.cls = Linear(width, 1 if head == "vcr" else config.answers)
        if head == "phrases":
            inner = width // config.heads
            self.attention = nn.ModuleDict({name: Linear(width, inner) for name in ("query", "key", "value")})
        self.apply(partial(initialise, std=config.init_std))
        nn.init.zeros_(self.visual_bert.embeddings.word_embeddings.weight[config.pad_id])
        sources.copy_text_tables(self.visual_bert.embeddings)
        self.tower: ImageGrid | None = None
        if config.conv_blocks:
            sizes = config.image_size, config.conv_blocks, config.conv_width
            self.tower = ImageGrid(*sizes, pool=config.conv_pool)
        # Weights that the published classes have and do not use; data-parallel training would wait for them.
        if head in ("vqa", "phrases"):
            self.visual_bert.pooler.requires_grad_(False)
        if head == "phrases":
            self.cls.requires_grad_(False)
            self.attention["value"].requires_grad_(False)

    def encode_image(
        self,
        images: Tensor,  # [B, 3, R, R]
        boxes: Tensor | None = None,  # [B, V, 4]
    ) -> Tensor:  # [B, V, E]
        """Regions by the image tower: the cells of its map, or the boxes, given as fractions of the image
        (left, top, right, bottom). ValueError without a tower, or for another shape or dtype.
        """
        if self.tower is None:
            raise ValueError("images: this VisualBERT has no image tower (conv_blocks); pass regions")
        side = self.config.image_size
        faults = []
        if images.shape[1:] != (3, side, side) or not images.is_floating_point():
            faults.append(f"images must be floating [B, 3, {side}, {side}], got {got(images)}")
        if boxes is not None and (boxes.dim() != 3 or boxes.shape[::2] != (len(images), 4)):
            faults.append(f"boxes must be [B = {len(images)}, V, 4], got {list(boxes.shape)}")
        if faults:
            raise ValueError("VisualBERT: " + "; ".join(faults))
        return self.tower(images, boxes)

    def forward(
        self,
        tokens: Tensor,  # [B, L], for "vcr" [B, C, L]
        regions: Tensor | None = None,  # [B, V, E], for "vcr" also [B, C, V, E]
        labels: Tensor | None = None,
        *,
        match: Tensor | None = None,  # [B] bool
        images: Tensor | None = None,  # [B, 3, R, R]
        boxes: Tensor | None = None,  # [B, V, 4]
        attention_mask: Tensor | None = None,  # like tokens
        region_mask: Tensor | None = None,  # like regions without E
        token_types: Tensor | None = None,  # like tokens
        region_types: Tensor | None = None,  # like region_mask
        positions: Tensor | None = None,  # like tokens
        alignment: Tensor | None = None,  # [B, V, A]
        phrases: Tensor | None = None,  # [B, P]
        return_logits: bool = False,
    ) -> dict[str, Tensor]:
        """The loss of the head for its labels, and its logits.

        Args:
            tokens: integer ids, L <= max_positions; for "vcr" C texts for each image.
            regions: floating features; None for texts without an image. For "vcr" those of an image are
                shared by its texts if they are given once.
            labels: for "pretraining" int64 [B, L], the ids of the masked tokens, -100 elsewhere; for "vqa"
                floating [B, answers], the probability of each answer; for "nlvr2" int64 [B], the class; for
                "vcr" int64 [B], the right text; for "phrases" floating [B, P, V], the probability of each
                region.
            match: for "pretraining", whether each text belongs to its image. Which of the head's two classes
                that is, is `config.match_label`.
            images, boxes: instead of regions, see `encode_image`.
            attention_mask, region_mask: non-zero where valid; all are when None.
            token_types, region_types: 0 and `config.region_type` when None; positions: 0 to L - 1.
            alignment: int64 positions of the words that each region belongs to, -1 for none: their mean is
                added to a region's position.
            phrases: for "phrases", int64 positions in the joint sequence, -1 (none) reads position 0.
            return_logits: for "pretraining", also those of words.

        Returns:
            `loss` with labels or match: the head's cross-entropy, mean over masked tokens, images or texts;
            for "vqa" and "phrases" the KL divergence from the labels, its sum over B; for "pretraining" the
            sum of `masked_lm_loss` and `match_loss`, of which it has those whose labels are given. `logits`:
            "vqa" and "nlvr2" [B, answers], "vcr" [B, C], "phrases" [B, P, V]; with `return_logits`, those
            [R, V] of the R labelled tokens in order, or without labels, and in compiled code, of all
            positions [B, L + V, V].
            `match_logits` [B, 2] for "pretraining"; `hidden` [B, L + V, D] and `pooled` [B, D] for "none".

        Raises:
            ValueError: naming every argument that does not fit.
        """
        if images is not None and regions is not None:
            raise ValueError("VisualBERT: images or regions must be given, got both")
        if boxes is not None and images is None:
            raise ValueError("VisualBERT: boxes may only be given with images")
        if images is not None:
            regions = self.encode_image(images, boxes)
        inputs = Inputs(
            tokens, regions, attention_mask, region_mask, token_types, region_types, positions, alignment
        )
        head, choices = self.config.head, None
        if head == "vcr" and tokens.dim() == 3:
            choices, inputs = tokens.shape[1], inputs.flattened()
        faults = inputs.faults(self.config.region_width, self.config.max_positions)
        faults = faults or label_faults(self.config, inputs, choices, labels, match, phrases)
        if faults:
            raise ValueError("VisualBERT: " + "; ".join(faults))
        x, mask = self.visual_bert.embeddings(inputs), inputs.mask()
        length = inputs.tokens.shape[1]
        first = torch.arange(len(x), device=x.device) * x.shape[1]  # of [CLS] among all B (L + V) positions
        if head == "none":
            hidden = self.visual_bert.hidden(x, mask)
            return {"hidden": hidden, "pooled": self.visual_bert.pool(hidden[:, 0])}
        if head == "pretraining":
            return self._pretraining(x, mask, first, length, labels, match, return_logits)
        if head == "phrases":
            assert phrases is not None, "checked above"
            return _with_divergence(self._phrases(x, mask, length, phrases), labels)
        # The published code reads the answer two before the end of the text: [MASK], [SEP].
        place = (mask[:, :length].sum(1) - 2).clamp_min(0) if head == "vqa" else 0
        feature = self.visual_bert.hidden(x, mask, first + place)
        if head != "vqa":
            feature = self.visual_bert.pool(feature)
        logits = self.cls(F.dropout(feature, self.config.dropout, self.training))
        if head == "vqa":
            return _with_divergence(logits, labels)
        logits = logits if choices is None else logits.view(-1, choices)
        return {"logits": logits} | ({} if labels is None else {"loss": _cross_entropy(logits, labels)})

    @classmethod
    def from_hf_state_dict(cls, source: Source, **fields: Any) -> VisualBERT:
        """A VisualBERT with the weights of one of transformers' VisualBert classes, in evaluation mode.

        `source` is a state dict, a file or a folder. What shapes do not determine is read from config.json
        beside a file; for a state dict `heads` must be given. Nothing says which class of a pretraining head
        means that a text belongs to its image: `match_label` must be given, 1 for weights of the published
        code (those that transformers offers were converted from it), 0 where training followed the
        documentation of transformers. `fields` of VisualBertConfig override all. ValueError lists what does
        not fit.
        """
        return cls.with_weights(*sources.from_hf(VisualBertConfig, source, fields))

    @classmethod
    def from_uclanlp_state_dict(cls, source: Source, *, heads: int, **fields: Any) -> VisualBERT:
        """A VisualBERT with weights of the published code (uclanlp/visualbert), in evaluation mode.

        `source` is a state dict or a file (.th); a detector in it is left out. `fields` of VisualBertConfig
        override what shapes and that code determine.
        """
        return cls.with_weights(*sources.from_uclanlp(VisualBertConfig, source, {"heads": heads, **fields}))

    @classmethod
    def from_bert(cls, source: Source, **fields: Any) -> VisualBERT:
        """A new VisualBERT that starts from the weights of any BERT, in training mode.

        `source` is a state dict, a file or a folder of BertModel or of a class with one, with the names of
        transformers. Sizes are those of the weights; `heads` must be given if there is no config.json beside
        them; other `fields` of VisualBertConfig are free. The types and positions of regions start as those
        of words, a head that BERT has (of masked words) as BERT's. ValueError lists what is missing.
        """
        config, weights = sources.from_bert(VisualBertConfig, source, fields)
        model = cls(config)
        model.load_weights({**model.state_dict(), **weights})
        sources.copy_text_tables(model.visual_bert.embeddings)
        return model

    def hf_state_dict(self) -> dict[str, Tensor]:
        """The weights as transformers has them, its tied ones included. ValueError with an image tower."""
        return sources.to_hf(self.config, self.state_dict())

    def uclanlp_state_dict(self) -> dict[str, Tensor]:
        """The weights by the names of the published code. ValueError with an image tower."""
        return sources.to_uclanlp(self.config, self.state_dict())

    def save_pretrained(self, folder: str | os.PathLike[str], *, layout: str = "vlmkernels") -> None:
        """Writes config.json and model.safetensors; with `layout="transformers"` as transformers reads them.

        The second has no place for an image tower (ValueError).
        """
        if layout == "vlmkernels":
            super().save_pretrained(folder)
        elif layout == "transformers":
            sources.write_hf(self.config, self.state_dict(), Path(folder))
        else:
            raise ValueError(f"layout must be 'vlmkernels' or 'transformers', got {layout!r}")

    def _pretraining(
        self,
        x: Tensor,  # [B, L + V, D]
        mask: Tensor,  # [B, L + V] bool
        first: Tensor,  # [B]
        length: int,
        labels: Tensor | None,  # [B, L]
        match: Tensor | None,  # [B] bool
        return_logits: bool,
    ) -> dict[str, Tensor]:
        every = is_traced() or (labels is None and return_logits)
        if labels is not None:
            labels = F.pad(labels, (0, x.shape[1] - length), value=IGNORE).flatten()
        if every:
            hidden = self.visual_bert.hidden(x, mask)
            cls, words = hidden[:, 0], hidden if labels is None else hidden.flatten(0, 1)
        else:
            rows = first
            if labels is not None:
                masked = (labels != IGNORE).nonzero()[:, 0]
                rows, labels = torch.cat([first, masked]), labels[masked]
            hidden = self.visual_bert.hidden(x, mask, rows)
            cls, words = hidden[: len(first)], hidden[len(first) :]
        out = {"match_logits": self.cls["seq_relationship"](self.visual_bert.pool(cls))}
        if labels is not None or return_logits:
            predictions = self.cls["predictions"]
            table = table_for(words, self.visual_bert.embeddings.word_embeddings)
            if labels is not None:
                out["masked_lm_loss"] = predictions(words, table, labels)
            if return_logits:
                logits = predictions(words, table)
                out["logits"] = logits.view(*x.shape[:2], -1) if every else logits
        if match is not None:
            label = self.config.match_label
            out["match_loss"] = _cross_entropy(out["match_logits"], torch.where(match, label, 1 - label))
        losses = [out[name] for name in ("masked_lm_loss", "match_loss") if name in out]
        return {**out, "loss": torch.stack(losses).sum()} if losses else out

    def _phrases(
        self,
        x: Tensor,  # [B, L + V, D]
        mask: Tensor,  # [B, L + V] bool
        length: int,
        phrases: Tensor,  # [B, P]
    ) -> Tensor:  # [B, P, V]
        """Scores of one head of attention, without its softmax."""
        hidden = self.visual_bert.hidden(x, mask)
        query = self.attention["query"](take_rows(hidden, phrases.clamp_min(0)))
        key = self.attention["key"](hidden[:, length:])
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        return scores.masked_fill(~mask[:, None, length:], torch.finfo(scores.dtype).min)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:  # [B, C], [B] -> []
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="sum") / max(len(labels), 1)


def _with_divergence(logits: Tensor, labels: Tensor | None) -> dict[str, Tensor]:  # [B, ..., C] each
    """With KL(labels || softmax(logits)), summed and divided by B."""
    if labels is None:
        return {"logits": logits}
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.kl_div(wide.log_softmax(-1), labels.to(wide.dtype), reduction="sum") / max(len(labels), 1)
    return {"logits": logits, "loss": loss}


CONFIGS: dict[str, VisualBertConfig] = {
    "visualbert-vqa": VisualBertConfig(),
    "visualbert-nlvr2": VisualBertConfig(visual_dim=1024),
    "visualbert-vcr": VisualBertConfig(visual_dim=512),
    "emoji-tiny": VisualBertConfig(
        vocab_size=4096,
        context_length=32,
        max_positions=64,
        width=128,
        layers=3,
        heads=4,
        mlp_width=512,
        dropout=0.0,
        init_std=0.09,
        image_size=48,
        conv_blocks=(1, 1, 1),
        conv_width=16,
        conv_pool=False,
    ),
}
