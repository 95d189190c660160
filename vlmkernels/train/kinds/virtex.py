"""VirTex (Desai and Johnson 2021): image features learned from captions, in both directions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.data import CaptionCollate, CaptionTokenizer, ImageTransform, image_transform
from vlmkernels.data.samples import sample_rng
from vlmkernels.models import virtex
from vlmkernels.models.decoder import IGNORE
from vlmkernels.models.parts.pretrained import read_config
from vlmkernels.train import objective, optim
from vlmkernels.train.config import TrainConfig, option
from vlmkernels.use.caption_scores import CaptionScores

from ._captioning import Captioning, CaptionKind
from ._kind import Options, Values

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Of masked language modelling: the share of tokens, and what becomes of each.
MASKED, REPLACED_BY_MASK, REPLACED_AT_RANDOM = 0.15, 0.85, 0.10


@dataclasses.dataclass(frozen=True)
class VirTexOptions(Options):
    trunk_lr: float | None = option(
        None, "virtex: peak learning rate of the ResNet, lr being that of the rest; lr when not given"
    )


class VirTex(CaptionKind):
    """Rows of start, caption, end. Training has the task of the model's configuration, an evaluation of a
    captioning model the direction from left to right.
    """

    name = "virtex"
    model = virtex.VirTex
    configs = virtex.CONFIGS
    options = VirTexOptions
    layout = "prefix"
    captions = True
    has_features = True

    def faults(self, config: TrainConfig) -> list[str]:
        rate = self.own_options(config).trunk_lr
        wrong = rate is not None and rate <= 0
        return [*super().faults(config), *([f"trunk_lr must be positive, got {rate}"] if wrong else [])]

    def new_transform(self, config: TrainConfig) -> ImageTransform:
        return image_transform(
            self.sizes(config).image_size, IMAGENET_MEAN, IMAGENET_STD, interpolation="bilinear"
        )

    def token_ids(self, tokenizer: CaptionTokenizer) -> dict[str, int]:
        ids = {"bos_id": tokenizer.sot_id, "eos_id": tokenizer.eot_id, "mask_id": tokenizer.image_id}
        return {**super().token_ids(tokenizer), **ids}

    def parameter_groups(self, config: TrainConfig, module: Any) -> list[dict] | None:
        rate = self.own_options(config).trunk_lr
        if rate is None:
            return None
        trunk = {id(parameter) for parameter in module.visual.parameters()}
        return [
            {**group, "params": [p for p in group["params"] if (id(p) in trunk) == inside], "lr_scale": scale}
            for group in optim.parameter_groups(module, config.weight_decay)
            for inside, scale in ((True, rate / config.lr), (False, 1.0))
        ]

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Pretraining:
        collate = CaptionCollate(tokenizer, self.layout, image_size=image_size)
        fields = vars(self.sizes(config)) if config.init is None else read_config(config.init)
        return Pretraining(self, tokenizer, collate, config.seed, fields["task"])

    def caption_loss(
        self, model: Any, tokenizer: CaptionTokenizer, batch: dict[str, Any], *, with_logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        tokens, labels = batch["tokens"], batch.get("labels")
        if labels is not None:
            output = model(batch["images"], batch["masked"], labels, return_logits=with_logits)
            logits = output["logits"].roll(-1, 1) if with_logits else None
            return output["loss"], logits, labels
        forward_only = not model.training
        output = model(batch["images"], tokens, forward_only=forward_only, return_logits=with_logits)
        lengths = tokenizer.lengths(tokens)
        rows = (
            [tokens] if forward_only or not batch.get("both") else [tokens, virtex.reverse(tokens, lengths)]
        )
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        labels = torch.cat([row.masked_fill(~inside, IGNORE) for row in rows])
        shown = [output[name] for name in ("logits", "backward_logits") if name in output]
        return output["loss"] / len(rows), torch.cat(shown) if with_logits else None, labels

    def image_features(self, model: Any, images: Tensor) -> Tensor:
        return model.features(images)

    def first_token(self, tokenizer: CaptionTokenizer) -> int:
        return tokenizer.sot_id

    def generate(
        self, model: Any, tokenizer: CaptionTokenizer, images: Any, prompts: Tensor, **decoding: Any
    ) -> Tensor:
        return model.generate(images, prompts, **{"num_beams": 1, **decoding})

    def evaluate(self, model: Any, *arguments: Any, **options: Any) -> CaptionScores:
        if model.config.task not in virtex.CAPTIONING:
            raise ValueError(
                f"model: one of task {model.config.task!r} writes no captions; "
                "`vlmkernels probe` measures its features"
            )
        return super().evaluate(model, *arguments, **options)


class Pretraining(Captioning):
    """The task: of bicaptioning both directions, summed; of masked language modelling the masked tokens,
    drawn for each sample in every step; of token classification the mean over the samples.
    """

    def __init__(
        self, kind: VirTex, tokenizer: CaptionTokenizer, collate: CaptionCollate, seed: int, task: str
    ) -> None:
        super().__init__(kind, tokenizer, collate, seed, weight=2 if task == "bicaptioning" else 1)
        self.task = task

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        if self.task == "token_classification":
            return self._token_set_loss(model, batch, measured)
        if self.task == "masked_lm":
            batch = {**batch, **mask_captions(self.tokenizer, batch, self.seed, step)}
        return super().loss(model, {**batch, "both": self.task == "bicaptioning"}, step, measured)

    def _token_set_loss(
        self, model: nn.Module, batch: dict[str, Any], measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        tokens = batch["tokens"]
        output = model(batch["images"], tokens, return_logits=measured)
        own_loss = output["loss"]
        total = objective.sum_over_processes(torch.tensor(len(tokens), device=own_loss.device))
        if not batch["keys"] and not total:
            return None
        share = (len(tokens) / total.double()).to(own_loss.dtype)

        def measure() -> Values:
            best = output["logits"].argmax(1, keepdim=True)
            right = objective.sum_over_processes((tokens[:, 1:] == best).any(1).sum())
            joint = objective.sum_over_processes((own_loss.detach() * share).double()).item()
            return {
                "loss": joint,
                "perplexity": math.exp(min(joint, 700.0)),
                "token_accuracy": (right / total).item(),
            }

        return own_loss * (share * objective.process_count()), measure


def mask_captions(
    tokenizer: CaptionTokenizer, batch: dict[str, Any], seed: int, step: int
) -> dict[str, Tensor]:
    """The tokens with some of them ``masked``, and the ``labels``, both [B, L] int64.

    As published, 15 % of a caption's tokens, at least one, are drawn. Each becomes the mask with probability
    0.85, another token with 0.1, which is then not predicted, and else stays; one alone becomes the mask.
    """
    tokens = batch["tokens"]
    masked, labels = tokens.clone(), torch.full_like(tokens, IGNORE)
    lengths = tokenizer.lengths(tokens).tolist()
    for row, (key, length) in enumerate(zip(batch["keys"], lengths, strict=True)):
        rng = sample_rng(seed, "mask", step, key)
        places = range(1, length - 1)
        chosen = rng.sample(places, math.ceil(MASKED * len(places)))
        for place in chosen:
            drawn = 0.0 if len(chosen) == 1 else rng.random()
            if drawn < REPLACED_BY_MASK:
                labels[row, place], masked[row, place] = tokens[row, place], tokenizer.image_id
            elif drawn < REPLACED_BY_MASK + REPLACED_AT_RANDOM:
                masked[row, place] = rng.randrange(tokenizer.sot_id)
    return {"masked": masked, "labels": labels}
