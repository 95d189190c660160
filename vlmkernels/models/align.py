"""ALIGN: EfficientNet and BERT under a label-smoothed contrastive loss, s_ij = x_i . y_j / temperature.

Jia et al. 2021 (arXiv:2102.05918). Image feature: pooled EfficientNet without its 1x1 head convolution (an
optional linear layer brings backbones of other widths to one embedding width, as in the paper's ablation).
Text feature: BERT's [CLS] of the last layer and one linear layer. Both are L2-normalised; the temperature is
one learned scalar that *divides* the similarities. Loss: label-smoothed cross-entropy over images and over
texts.

State-dict keys are those of Hugging Face's AlignModel: its weights load as they are
(`ALIGN.from_hf_state_dict`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels._activations import ACTIVATIONS
from vlmkernels.models._align_sources import hf_fields
from vlmkernels.models.parts.bert import Bert
from vlmkernels.models.parts.efficientnet import (
    CHANNELS,
    COEFFICIENTS,
    PADDINGS,
    REPEATS,
    STRIDES,
    EfficientNet,
    round_channels,
    round_repeats,
)
from vlmkernels.models.parts.pretrained import CONFIG_FILE, LATER, Pretrained, below, config_from_dict, naming
from vlmkernels.models.parts.weight_files import Source, read_json, read_state_dict
from vlmkernels.nn._bounds import within
from vlmkernels.nn.dense import Linear

SIZES = (
    *("embed_dim", "image_size", "image_strides", "vocab_size", "context_length", "max_positions"),
    *("text_width", "text_layers", "text_heads", "text_mlp_width"),
)
BERT_SIZES = {  # name: (width, layers), heads of 64 channels
    "mini": (256, 4),
    "medium": (512, 8),
    "base": (768, 12),
    "large": (1024, 24),
}


@dataclass(frozen=True)
class AlignConfig:
    """Sizes of an ALIGN. Defaults: EfficientNet-B7 and BERT-base.

    `image_width` and `image_depth` are the compound coefficients of the EfficientNet. `image_padding` of
    convolutions with stride 2 is "same", TensorFlow's rule, or "fixed", Hugging Face's; they are equal while
    every side is even. `image_projection` adds a linear layer from the pooled features to `embed_dim`.
    `batch_norm_momentum` is torch's, the weight of the new statistic. `text_heads` of None means a head width
    of 64. `context_length` is the number of tokens to which a text is truncated, `max_positions` the size of
    the position table. `text_pooler` keeps BERT's unused pooler in the state dict, frozen. `min_temperature`
    is the floor of the learned temperature: 1 / it bounds the scale. `text_activation` is that of BERT's MLP,
    by its name in `vlmkernels.mlp`; `text_eps` and `batch_norm_eps` are the epsilons of the normalisations.
    """

    embed_dim: int = 640
    image_size: int = 289
    image_width: float = 2.0
    image_depth: float = 3.1
    image_strides: tuple[int, ...] = STRIDES
    image_padding: str = "same"
    image_projection: bool = False
    drop_rate: float = 0.2
    batch_norm_momentum: float = 0.01
    vocab_size: int = 30522
    context_length: int = 64
    max_positions: int = 512
    text_width: int = 768
    text_layers: int = 12
    text_heads: int | None = None
    text_mlp_width: int = 3072
    text_dropout: float = 0.1
    text_pooler: bool = True
    pad_id: int = 0
    init_temperature: float = 1.0
    min_temperature: float = 0.01
    text_activation: str = field(default="gelu", metadata=LATER)
    text_eps: float = field(default=1e-12, metadata=LATER)
    batch_norm_eps: float = field(default=1e-3, metadata=LATER)

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_strides", tuple(self.image_strides))
        if too_small := below(self, 1, *SIZES):
            raise ValueError("AlignConfig: " + "; ".join(too_small))
        heads = max(self.text_width // 64, 1) if self.text_heads is None else self.text_heads
        object.__setattr__(self, "text_heads", heads)
        faults = []
        if self.image_padding not in PADDINGS:
            faults.append(f"image_padding must be one of {PADDINGS}, got {self.image_padding!r}")
        if len(self.image_strides) != 7 or not set(self.image_strides) <= {1, 2}:
            faults.append(f"image_strides must be seven values of 1 or 2, got {self.image_strides}")
        if not (0 < self.image_width <= 100 and 0 < self.image_depth <= 100):
            got = f"{self.image_width}, {self.image_depth}"
            faults.append(f"image_width and image_depth must be in (0, 100], got {got}")
        elif not self.image_projection and self.embed_dim != (
            features := round_channels(CHANNELS[-1], self.image_width)
        ):
            faults.append(
                f"embed_dim must be {features}, the image channels, without image_projection, "
                f"got {self.embed_dim}"
            )
        if self.text_activation not in ACTIVATIONS:
            faults.append(
                f"text_activation must be one of {tuple(ACTIVATIONS)}, got {self.text_activation!r}"
            )
        if self.text_width % heads:
            faults.append(f"text_heads must be a divisor of text_width {self.text_width}, got {heads}")
        if not 1 <= self.context_length <= self.max_positions:
            faults.append(
                f"context_length must be in [1, max_positions = {self.max_positions}], "
                f"got {self.context_length}"
            )
        if not 0 <= self.pad_id < self.vocab_size:
            faults.append(f"pad_id must be in [0, vocab_size = {self.vocab_size}), got {self.pad_id}")
        for name in ("text_eps", "batch_norm_eps"):
            if not getattr(self, name) >= 0.0:
                faults.append(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("drop_rate", "text_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                faults.append(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0.0 < self.min_temperature <= self.init_temperature < math.inf:
            faults.append(
                "min_temperature and init_temperature must satisfy 0 < min_temperature <= init_temperature, "
                f"got {self.min_temperature} and {self.init_temperature}"
            )
        if faults:
            raise ValueError("AlignConfig: " + "; ".join(faults))


def paper_config(image: str, text: str) -> AlignConfig:
    """A cell of the paper's grid: EfficientNet `image` ("b0".."b7", "l2") and BERT `text` ("mini".."large").

    Embedding width 640, through a linear layer on the pooled features if they are not 640 wide; the L2
    model has no such layer and embeds into 1376. Vocabulary of 100,000 word pieces.
    """
    if image not in COEFFICIENTS or text not in BERT_SIZES:
        known = f"one of {', '.join(COEFFICIENTS)} and one of {', '.join(BERT_SIZES)}"
        raise ValueError(f"image and text must be {known}, got {image!r} and {text!r}")
    width, depth, _ = COEFFICIENTS[image]
    text_width, layers = BERT_SIZES[text]
    return AlignConfig(
        embed_dim=1376 if image == "l2" else 640,
        image_width=width,
        image_depth=depth,
        image_projection=image not in ("b7", "l2"),
        vocab_size=100_000,
        text_width=text_width,
        text_layers=layers,
        text_mlp_width=4 * text_width,
    )


CONFIGS: dict[str, AlignConfig] = {
    "align-base": AlignConfig(image_padding="fixed"),
    "align-l2": paper_config("l2", "large"),
    **{
        f"align-{image}-{text}": paper_config(image, text)
        for image in ("b1", "b3", "b5", "b7")
        for text in ("mini", "medium", "base", "large")
    },
    "emoji-tiny": AlignConfig(
        embed_dim=128,
        image_size=48,
        image_width=0.5,
        image_depth=0.5,
        image_strides=(1, 2, 2, 1, 1, 2, 1),
        image_projection=True,
        drop_rate=0.0,
        batch_norm_momentum=0.1,
        vocab_size=4096,
        context_length=32,
        max_positions=32,
        text_width=128,
        text_layers=2,
        text_mlp_width=512,
        text_dropout=0.0,
        text_pooler=False,
        init_temperature=0.07,
    ),
}


class ALIGN(Pretrained):
    """The two towers, their projections and the temperature. Build with `ALIGN(CONFIGS["emoji-tiny"])`."""

    model_type: ClassVar[str] = "align"
    config_class: ClassVar[type] = AlignConfig
    config: AlignConfig

    def __init__(self, config: AlignConfig):
        super().__init__(config)
        assert config.text_heads is not None  # set by AlignConfig
        self.vision_model = EfficientNet(
            config.image_width,
            config.image_depth,
            strides=config.image_strides,
            drop_rate=config.drop_rate,
            padding=config.image_padding,
            eps=config.batch_norm_eps,
            momentum=config.batch_norm_momentum,
        )
        self.text_model = Bert(
            config.vocab_size,
            config.text_width,
            config.text_layers,
            config.text_heads,
            mlp_width=config.text_mlp_width,
            max_positions=config.max_positions,
            pad_id=config.pad_id,
            dropout=config.text_dropout,
            activation=config.text_activation,
            eps=config.text_eps,
            pooler=config.text_pooler,
        )
        if config.image_projection:
            self.image_projection = Linear(self.vision_model.feature_dim, config.embed_dim)
        self.text_projection = Linear(config.text_width, config.embed_dim)
        for layer in self.projections():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.temperature = nn.Parameter(torch.tensor(config.init_temperature))

    def projections(self) -> list[nn.Linear]:
        """The linear layers that map into the joint space."""
        image = [self.image_projection] if self.config.image_projection else []
        return [*image, self.text_projection]

    def scale(self) -> Tensor:
        """1 / temperature (0-dim, with gradient), the factor of the similarities.

        A temperature below its floor counts as the floor: the scale is in (0, 1 / min_temperature].
        """
        return 1.0 / within(self.temperature, low=self.config.min_temperature)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [B, 3, H, W] -> [B, E]
        """Image embeddings; any H and W. ValueError for anything but a floating [B, 3, H, W]."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"images must be floating [B, 3, H, W], got {images.dtype} of shape {tuple(images.shape)}"
            )
        features = self.vision_model(images)
        if self.config.image_projection:
            features = self.image_projection(features)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(
        self,
        tokens: Tensor,  # [B, L] integer ids, [CLS] first
        normalize: bool = False,
        attention_mask: Tensor | None = None,  # [B, L], non-zero = attend; None: tokens != pad_id
    ) -> Tensor:  # [B, E]
        """Text embeddings. ValueError for another shape or dtype, or more tokens than positions."""
        features = self.text_projection(self.text_model(tokens, attention_mask, cls_only=True))
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        images: Tensor,  # [B, 3, H, W]
        tokens: Tensor,  # [B, L]
        attention_mask: Tensor | None = None,  # [B, L]
    ) -> dict[str, Tensor]:
        """Normalised image_features and text_features [B, E], and logit_scale = 1 / temperature."""
        return {
            "image_features": self.encode_image(images, normalize=True),
            "text_features": self.encode_text(tokens, normalize=True, attention_mask=attention_mask),
            "logit_scale": self.scale(),
        }

    def loss(
        self,
        images: Tensor,  # [B, 3, H, W]
        tokens: Tensor,  # [B, L]
        *,
        attention_mask: Tensor | None = None,  # [B, L]
        positives: tuple[Tensor, Tensor] | None = None,  # image ids [B], text ids [B]
        label_smoothing: float = 0.1,
        directions: str = "mean",
    ) -> Tensor:
        """The contrastive loss of one process's batch, a scalar.

        positives: equal ids are positive pairs; None pairs row i with row i. directions: "mean" of
        image-to-text and text-to-image as in Hugging Face's AlignModel, or their "sum" as in the paper.
        """
        if directions not in ("mean", "sum"):
            raise ValueError(f"directions must be 'mean' or 'sum', got {directions!r}")
        image = self.encode_image(images)
        text = self.encode_text(tokens, attention_mask=attention_mask)
        loss = vlmkernels.info_nce(
            image, text, self.scale(), positives=positives, label_smoothing=label_smoothing, normalize=True
        )
        return 2.0 * loss if directions == "sum" else loss

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Call after each optimizer step: keeps the temperature at or above config.min_temperature."""
        self.temperature.clamp_(min=self.config.min_temperature)

    @classmethod
    def from_hf_state_dict(cls, source: Source, config: AlignConfig | None = None, **fields: Any) -> ALIGN:
        """An ALIGN in eval mode with the weights of a Hugging Face AlignModel, a state dict or its file.

        config None: that of config.json beside the file, else that of the shapes and `fields`
        (`infer_config`). `fields` override both. ValueError lists every missing, unknown and mis-shaped
        key; it is also raised for a temperature below the config's min_temperature.
        """
        buffers = ("position_ids", "token_type_ids")  # indices, stored by older releases of transformers
        state = {k: v for k, v in read_state_dict(source).items() if k.rpartition(".")[2] not in buffers}
        if config is None and not isinstance(source, Mapping):
            path = Path(source) if Path(source).is_dir() else Path(source).parent
            if (path / CONFIG_FILE).is_file():
                pooler = "text_model.pooler.dense.weight" in state
                with naming(path / CONFIG_FILE):
                    known = {**hf_fields(read_json(path / CONFIG_FILE)), "text_pooler": pooler, **fields}
                    config, fields = config_from_dict(AlignConfig, known), {}
        with naming(source):
            config = infer_config(state, **fields) if config is None else replace(config, **fields)
            model = cls.with_weights(config, state)
            temperature = float(model.temperature.detach())
            if not temperature >= config.min_temperature:
                floor = config.min_temperature
                raise ValueError(f"temperature must be at least min_temperature {floor}, got {temperature}")
        return model

    @classmethod
    def from_hf_folder(cls, folder: str | os.PathLike[str], **fields: Any) -> ALIGN:
        """An ALIGN from a folder that Hugging Face's AlignModel.save_pretrained wrote, in evaluation mode.

        `fields` of AlignConfig override those of config.json, of which the momentum of BatchNorm is ignored
        (see the page on ALIGN). ValueError lists what an ALIGN here does not support.
        """
        if not (path := Path(folder) / CONFIG_FILE).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return cls.from_hf_state_dict(folder, **fields)


def infer_config(state_dict: Mapping[str, Tensor], **fields: Any) -> AlignConfig:
    """The config of a Hugging Face ALIGN state dict: "fixed" padding, the rest as published.

    Shapes do not determine `text_heads`, which must be given; other `fields` override what they determine.
    ValueError without it, if a key is missing or the image tower is none of B0-B7 and L2 (pass a config
    then).
    """
    if "text_heads" not in fields:
        raise ValueError(
            "text_heads: not determined by shapes, and there is no config beside the weights; pass it, or a "
            f"config, or put Hugging Face's {CONFIG_FILE} beside the file"
        )
    n_blocks = sum(k.endswith(".projection.project_conv.weight") for k in state_dict)
    last_block = f"vision_model.encoder.blocks.{n_blocks - 1}"
    try:
        vocab_size, text_width = state_dict["text_model.embeddings.word_embeddings.weight"].shape
        max_positions = state_dict["text_model.embeddings.position_embeddings.weight"].shape[0]
        mlp_width = state_dict["text_model.encoder.layer.0.intermediate.dense.weight"].shape[0]
        channels = state_dict[f"{last_block}.projection.project_conv.weight"].shape[0]
        embed_dim = state_dict["text_projection.weight"].shape[0]
    except KeyError as missing:
        raise ValueError(f"state_dict must be an ALIGN's, but it has no key {missing}") from None
    published = {
        (sum(round_repeats(n, depth) for n in REPEATS), round_channels(CHANNELS[-1], width)): (width, depth)
        for width, depth, _ in COEFFICIENTS.values()
    }
    if (n_blocks, channels) not in published:
        raise ValueError(
            f"state_dict: {n_blocks} blocks up to {channels} channels are not B0-B7 or L2; pass config"
        )
    width, depth = published[n_blocks, channels]
    shown = {
        "embed_dim": embed_dim,
        "image_width": width,
        "image_depth": depth,
        "image_padding": "fixed",
        "image_projection": "image_projection.weight" in state_dict,
        "vocab_size": vocab_size,
        "context_length": min(64, max_positions),
        "max_positions": max_positions,
        "text_width": text_width,
        "text_layers": sum(k.endswith(".attention.self.query.weight") for k in state_dict),
        "text_mlp_width": mlp_width,
        "text_pooler": "text_model.pooler.dense.weight" in state_dict,
    }
    return config_from_dict(AlignConfig, {**shown, **fields})
