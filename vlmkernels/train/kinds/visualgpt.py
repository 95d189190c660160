"""VisualGPT (Chen et al. 2022): a GPT-2 that reads an image through gates, by cross-entropy or CIDEr-D."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.data import (
    CaptionCollate,
    CaptionTokenizer,
    ClipTokenizer,
    ImageTransform,
    WordPieceTokenizer,
    image_transform,
)
from vlmkernels.data.samples import sample_rng
from vlmkernels.models import visualgpt
from vlmkernels.models.few_shot import media_labels
from vlmkernels.models.parts.pretrained import read_config
from vlmkernels.train import kinds, objective
from vlmkernels.train.config import TrainConfig, option
from vlmkernels.use.bundle import inference, load_bundle, read_tokenizer
from vlmkernels.use.cider import CiderD

from ._captioning import Captioning, CaptionKind
from ._kind import HALF, Options, Values

LANGUAGE_MODEL = "lm"
REGION_PIXELS = 224  # of pictures beside region features, which no model sees


@dataclasses.dataclass(frozen=True)
class VisualGPTOptions(Options):
    language_model: str | None = option(
        None,
        "flamingo, visualgpt: folder of a trained language model (RUN/final of train lm), which a flamingo "
        "keeps frozen and a visualgpt starts from",
    )
    self_critical: int = option(
        0,
        "visualgpt: captions to draw for each image, whose CIDEr-D is the reward; 0: cross-entropy",
        least=0,
    )


class VisualGPT(CaptionKind):
    """Rows ``<image>caption<|endofchunk|>``, as a language model of the house has them."""

    name = "visualgpt"
    model = visualgpt.VisualGPT
    configs = visualgpt.CONFIGS
    options = VisualGPTOptions
    layout = "interleaved"
    captions = True

    def faults(self, config: TrainConfig) -> list[str]:
        faults, options = super().faults(config), self.own_options(config)
        folder = options.language_model
        if folder is not None:
            if config.init is not None:
                faults.append(
                    f"language_model may only be given for a {self.name} without init, got {folder}"
                )
            elif (given := kinds.name_of(read_config(folder))) != LANGUAGE_MODEL:
                wanted = f"must contain a model for {LANGUAGE_MODEL}, got one for {given}"
                faults.append(f"language_model: {folder} {wanted}")
        if options.self_critical == 1:
            faults.append("self_critical must be 0, or at least 2 to compare captions of an image, got 1")
        if options.self_critical and config.streams:
            faults.append(
                f"self_critical needs data whose captions are known before training, got tars: {config.data}"
            )
        return faults

    def new_transform(self, config: TrainConfig) -> ImageTransform:
        side = self.sizes(config).image_size
        return image_transform(side or REGION_PIXELS, HALF, HALF, interpolation="bilinear")

    def new_tokenizer(self, config: TrainConfig, source: Any) -> ClipTokenizer | WordPieceTokenizer:
        folder = self.own_options(config).language_model
        return super().new_tokenizer(config, source) if folder is None else read_tokenizer(Path(folder))

    def token_ids(self, tokenizer: CaptionTokenizer) -> dict[str, int]:
        own = {"start_id": tokenizer.image_id, "end_id": tokenizer.endofchunk_id}
        return {**super().token_ids(tokenizer), **own}

    def new_model(self, config: TrainConfig, tokenizer: CaptionTokenizer) -> visualgpt.VisualGPT:
        folder = self.own_options(config).language_model
        if folder is None:
            model: Any = super().new_model(config, tokenizer)
            return model
        language: Any = load_bundle(folder).model
        sizes = self.sizes(config)
        fixed = {name: getattr(language.config, name) for name in visualgpt.SHARED}
        asked = {name: getattr(sizes, name) for name in visualgpt.SHARED if name in config.model_options}
        fields = {**dataclasses.asdict(sizes), **fixed, **asked, **self.token_ids(tokenizer)}
        return visualgpt.VisualGPT.from_language_model(language, **fields)

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Captioning:
        collate = CaptionCollate(tokenizer, self.layout, image_size=image_size)
        if count := self.own_options(config).self_critical:
            return SelfCritical(self, tokenizer, collate, config.seed, count)
        return Captioning(self, tokenizer, collate, config.seed)

    def seen(self, model: Any, images: Tensor) -> Tensor:  # [B, 1, 1, ...] -> what the model takes
        config = _bare(model).config
        if config.image_size is None and not len(images):
            return images.new_zeros(0, 1, config.region_width)
        return images[:, 0, 0]

    def labels(self, tokenizer: CaptionTokenizer, tokens: Tensor) -> Tensor:  # [B, T]
        """Labels [B, T]: the caption and its end."""
        return media_labels(
            tokens,
            media_token_id=tokenizer.image_id,
            endofchunk_token_id=tokenizer.endofchunk_id,
            pad_token_id=tokenizer.pad_id,
        )

    def caption_loss(
        self, model: Any, tokenizer: CaptionTokenizer, batch: dict[str, Any], *, with_logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        tokens = batch["tokens"]
        labels = self.labels(tokenizer, tokens)
        output = model(self.seen(model, batch["images"]), tokens, labels, return_logits=with_logits)
        return output["loss"], output.get("logits"), labels

    def first_token(self, tokenizer: CaptionTokenizer) -> int:
        return tokenizer.image_id

    def generate(
        self, model: Any, tokenizer: CaptionTokenizer, images: Any, prompts: Tensor, **decoding: Any
    ) -> Tensor:
        return model.generate(images, prompts, **decoding)


def _bare(model: Any) -> Any:
    """The model that DistributedDataParallel wraps."""
    return getattr(model, "module", model)


class SelfCritical(Captioning):
    """Policy gradient (Rennie et al. 2017) of CIDEr-D, whose document frequencies are those of the data.

    For each image `count` captions are drawn from the model in evaluation mode, from the seed, the step and
    the sample's key, so that every process draws as one would; they end at the length of the longest caption
    of the data, in tokens, with its end. With r their scores against the sample's text,

        L = mean over images and captions of (r - mean of r over the image's other captions) * sum_t -log p_t

    whose gradient is an unbiased estimate of that of the negated expected score, but for the dropout and the
    batch statistics of its pass, and for the start and padding tokens, which are never drawn. A mean over t
    would give the tokens of short captions more weight. VisualGPT and Meshed-Memory Transformer take the
    beams of a search instead of samples, and the same number of tokens for each, padded ones counting 0.
    """

    scores = ("reward",)

    def __init__(
        self, kind: VisualGPT, tokenizer: CaptionTokenizer, collate: CaptionCollate, seed: int, count: int
    ) -> None:
        super().__init__(kind, tokenizer, collate, seed)
        self.count = count
        self.reward: CiderD | None = None
        self.room = tokenizer.context_length - 1  # tokens of a drawn caption

    def prepare(self, source: Any, device: torch.device) -> None:
        names = source.names
        self.reward = CiderD(names)
        self.room = min(self.room, 1 + max(len(self.tokenizer.encode(name)) for name in names))

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        kind: Any = self.kind
        images, device = kind.seen(model, batch["images"]), batch["tokens"].device
        joint = objective.sum_over_processes(torch.tensor(len(batch["keys"]), device=device))
        if not batch["keys"] and not joint:
            return None
        tokens, rewards = self._drawn(_bare(model), images, batch, step)
        advantage = (rewards - rewards.mean(1, keepdim=True)) * (self.count / (self.count - 1))
        labels = kind.labels(self.tokenizer, tokens)
        nll = model(images, tokens, labels, per_token=True)["loss"]  # [B count, T]
        each = advantage.flatten().to(nll.dtype) * nll.sum(1)
        scale = objective.process_count() / (joint * self.count)

        def measure() -> Values:
            sums = torch.stack([each.detach().double().sum(), rewards.double().sum().to(each.device)])
            total = objective.sum_over_processes(sums) / (joint * self.count)
            return {"loss": total[0].item(), "reward": total[1].item()}

        return each.sum() * scale, measure

    @torch.no_grad()
    def _drawn(
        self, model: Any, images: Tensor, batch: dict[str, Any], step: int
    ) -> tuple[Tensor, Tensor]:  # [B count, T] int64, [B, count]
        """Captions with start and end, and their scores."""
        tokenizer, room = self.tokenizer, self.room
        numbers = []
        for key in batch["keys"]:
            rng = sample_rng(self.seed, "self-critical", step, key)
            numbers += [[rng.random() for _ in range(room)] for _ in range(self.count)]
        chance = torch.tensor(numbers, dtype=torch.float64, device=images.device).view(len(numbers), room)
        with inference(model):
            session = visualgpt.VisualDecoding(model, images)
            session.reorder(torch.arange(len(images), device=images.device).repeat_interleave(self.count))
            logits = session.first_logits.repeat_interleave(self.count, 0)
            never = torch.tensor([tokenizer.image_id, tokenizer.pad_id], device=images.device)
            rows = [torch.full_like(chance[:, 0], tokenizer.image_id, dtype=torch.int64)]
            ended = torch.zeros_like(rows[0], dtype=torch.bool)
            for t in range(room):
                reached = logits.double().softmax(-1).index_fill(1, never, 0.0).cumsum(-1)
                token = torch.searchsorted(reached, chance[:, t : t + 1] * reached[:, -1:], right=True)[:, 0]
                token = token.clamp_max(logits.shape[-1] - 1).masked_fill(ended, tokenizer.pad_id)
                rows.append(token)
                ended |= token == tokenizer.endofchunk_id
                if t + 1 == room or bool(ended.all()):
                    break
                logits = session.step(token)
        tokens = torch.stack(rows, 1)
        assert self.reward is not None, "prepare was called"
        texts = [tokenizer.decode(row) for row in tokens[:, 1:].tolist()]
        wanted = [text for text in batch["texts"] for _ in range(self.count)]
        scores = [self.reward(text, [reference]) for text, reference in zip(texts, wanted, strict=True)]
        values = torch.tensor(scores, dtype=torch.float64, device=tokens.device)
        return tokens, values.view(len(batch["texts"]), self.count)
