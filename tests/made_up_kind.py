"""A kind of training as a contributor would add it: mean colours against bags of words.

``python -m tests.made_up_kind`` is the command with this kind in it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels.data import ClipTokenizer
from vlmkernels.models.parts.pretrained import Pretrained
from vlmkernels.train.config import TrainConfig, option
from vlmkernels.train.kinds import KINDS
from vlmkernels.train.kinds._contrastive import ContrastiveKind
from vlmkernels.train.kinds._kind import Options

PLACE = "tests.made_up_kind:MadeUp"


@dataclasses.dataclass(frozen=True)
class ColoursConfig:
    embed_dim: int = 4
    image_size: int = 8
    context_length: int = 12
    vocab_size: int = 514
    pad_id: int = 0
    brightness: float = 1.0


class Colours(Pretrained):
    model_type: ClassVar[str] = "colours"
    config_class: ClassVar[type] = ColoursConfig

    def __init__(self, config: ColoursConfig) -> None:
        super().__init__(config)
        self.colour = nn.Linear(3, config.embed_dim)
        self.words = nn.EmbeddingBag(config.vocab_size, config.embed_dim, padding_idx=config.pad_id)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:  # [B, 3, H, W]
        features = self.colour(self.config.brightness * images.mean((2, 3)))
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:  # [B, L]
        features = self.words(tokens)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        both = self.encode_image(images, normalize=True), self.encode_text(tokens, normalize=True)
        return {"image_features": both[0], "text_features": both[1], "logit_scale": self.logit_scale.exp()}

    def clamp_logit_scale_(self) -> None:
        self.logit_scale.data.clamp_(0, 4)


@dataclasses.dataclass(frozen=True)
class MadeUpOptions(Options):
    brightness: float = option(1.0, "made-up: factor of the mean colours")


class MadeUp(ContrastiveKind):
    name = "made-up"
    model = Colours
    configs: ClassVar = {"emoji-tiny": ColoursConfig()}
    options = MadeUpOptions

    def new_tokenizer(self, config: TrainConfig, source: Any) -> ClipTokenizer:
        sizes = self.sizes(config)
        return ClipTokenizer(sizes.context_length, sizes.vocab_size)

    def sizes(self, config: TrainConfig) -> ColoursConfig:
        return dataclasses.replace(super().sizes(config), brightness=self.own_options(config).brightness)


if __name__ == "__main__":
    KINDS["made-up"] = PLACE
    from vlmkernels.cli import main

    main()
