"""CLIP (Radford et al. 2021): images against texts, by the softmax loss (InfoNCE) both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from vlmkernels.data import CLIP_MEAN, CLIP_STD, ClipTokenizer, ImageTransform, image_transform
from vlmkernels.models import clip
from vlmkernels.train import kinds
from vlmkernels.train.config import TrainConfig

from ._contrastive import ContrastiveKind


class Clip(ContrastiveKind):
    name = "clip"
    model = clip.CLIP
    configs = clip.CONFIGS
    label_smoothing: ClassVar[float | None] = 0.0
    has_bias: ClassVar[bool] = False  # in its logits

    def trains(self, fields: Mapping[str, Any]) -> bool:
        has_bias = fields.get("init_logit_bias") is not None
        return super().trains(fields) and has_bias == self.has_bias

    def faults(self, config: TrainConfig) -> list[str]:
        faults = super().faults(config)
        if config.init is None:
            fields = {"model_type": self.model.model_type, **dataclasses.asdict(self.sizes(config))}
            if not self.trains(fields):
                found = kinds.name_of(fields)
                faults.insert(
                    0,
                    f"model_options: init_logit_bias must make a model for {self.name}, got one for {found}",
                )
        return faults

    def new_transform(self, config: TrainConfig) -> ImageTransform:
        return image_transform(self.sizes(config).image_size, CLIP_MEAN, CLIP_STD)

    def new_tokenizer(self, config: TrainConfig, source: Any) -> ClipTokenizer:
        sizes = self.sizes(config)
        return ClipTokenizer(sizes.context_length, sizes.vocab_size)
