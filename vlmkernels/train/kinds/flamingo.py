"""Flamingo (Alayrac et al. 2022): layers trained between a frozen CLIP and a frozen language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmkernels.data import CaptionTokenizer, ClipTokenizer, ImageTransform, WordPieceTokenizer
from vlmkernels.models import flamingo
from vlmkernels.models.parts.pretrained import read_config
from vlmkernels.train import kinds
from vlmkernels.train.config import TrainConfig, option
from vlmkernels.use.bundle import load_bundle, read_tokenizer, read_transform

from ._captioning import RowKind, RowOptions

PARTS = {"vision": ("clip", "siglip"), "language_model": ("lm",)}  # options that are folders, and of what


@dataclasses.dataclass(frozen=True)
class FlamingoOptions(RowOptions):
    vision: str | None = option(
        None,
        "flamingo: folder of a trained CLIP (RUN/final), whose image tower it keeps frozen",
    )
    language_model: str | None = option(
        None,
        "flamingo, visualgpt: folder of a trained language model (RUN/final of train lm), which a flamingo "
        "keeps frozen and a visualgpt starts from",
    )
    gate_lr: float | None = option(
        None,
        "flamingo: peak learning rate of the gates, which have no weight decay then; as lr when not given",
    )


class Flamingo(RowKind):
    """The rows of a language model with their images; transform and tokenizer are those of the two parts."""

    name = "flamingo"
    model = flamingo.Flamingo
    configs = flamingo.CONFIGS
    options = FlamingoOptions
    layout = "interleaved"
    captions = True

    def faults(self, config: TrainConfig) -> list[str]:
        faults, options = super().faults(config), self.own_options(config)
        if options.gate_lr is not None and options.gate_lr <= 0:
            faults.append(f"gate_lr must be positive, got {options.gate_lr}")
        for name, wanted in PARTS.items():
            folder = getattr(options, name)
            if config.init is not None:
                if folder is not None:
                    faults.append(f"{name} may only be given for a flamingo without init, got {folder}")
            elif folder is None:
                faults.append(f"{name} must be the folder of a trained {wanted[0]} (RUN/final), got None")
            elif (given := kinds.name_of(read_config(folder))) not in wanted:
                faults.append(f"{name}: {folder} must contain a model for {wanted[0]}, got one for {given}")
        return faults

    def new_transform(self, config: TrainConfig) -> ImageTransform:
        return read_transform(Path(self.own_options(config).vision))

    def new_tokenizer(self, config: TrainConfig, source: Any) -> ClipTokenizer | WordPieceTokenizer:
        return read_tokenizer(Path(self.own_options(config).language_model))

    def new_model(self, config: TrainConfig, tokenizer: CaptionTokenizer) -> flamingo.Flamingo:
        options = self.own_options(config)
        tower: Any = load_bundle(options.vision).model
        language: Any = load_bundle(options.language_model).model
        sizes = dataclasses.replace(
            self.sizes(config),
            vision=tower.config,
            language=language.config,
            media_token_id=tokenizer.image_id,
            endofchunk_token_id=tokenizer.endofchunk_id,
        )
        return flamingo.Flamingo(sizes, vision_encoder=tower.visual, lang_encoder=language)

    def parameter_groups(self, config: TrainConfig, module: Any) -> list[dict] | None:
        rate = self.own_options(config).gate_lr
        if rate is None:
            return None
        gates = [gate for block in module.gated_blocks() for gate in (block.attn_gate, block.ff_gate)]
        known = {id(gate) for gate in gates}
        rest = [
            {**group, "params": [p for p in group["params"] if id(p) not in known]}
            for group in module.parameter_groups(config.weight_decay)
        ]
        return [*rest, {"params": gates, "weight_decay": 0.0, "lr_scale": rate / config.lr}]

    def caption_loss(
        self, model: Any, tokenizer: CaptionTokenizer, batch: dict[str, Any], *, with_logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        tokens = batch["tokens"]
        labels, mask = self.labels(tokenizer, tokens), self.attention_mask(tokenizer, tokens)
        options = {"attention_mask": mask, "labels": labels, "return_logits": with_logits}
        output = model(batch["images"], tokens, **options)
        return output["loss"], output.get("logits"), labels

    def generate(
        self, model: Any, tokenizer: CaptionTokenizer, images: Any, prompts: Tensor, **decoding: Any
    ) -> Tensor:
        return model.generate(images[:, None, None], prompts, **decoding)

    def text_config(self, config: Any) -> Any:
        return config.language

    def image_side(self, config: Any) -> int:
        return config.vision.image_size
