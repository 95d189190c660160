"""A language model of captions without their images: for Flamingo, which keeps it frozen, and for MAGIC.

With `contrastive_weight` its hidden states are spread by SimCTG's loss (Su et al. 2022), as those of MAGIC
are: a search that penalises repetition then tells the candidates apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vlmkernels.data import CaptionTokenizer
from vlmkernels.models import decoder
from vlmkernels.models.parts.generation import generate
from vlmkernels.models.parts.token_contrast import token_contrast
from vlmkernels.train import objective
from vlmkernels.train.config import TrainConfig, option

from ._captioning import Captioning, RowKind, RowOptions
from ._kind import Values


@dataclasses.dataclass(frozen=True)
class LanguageModelOptions(RowOptions):
    contrastive_weight: float = option(0.0, "lm: of SimCTG's loss, which spreads hidden states; SimCTG has 1")
    contrastive_margin: float = option(0.5, "lm: margin of that loss, in (0, 2)")


class ContrastiveCaptioning(Captioning):
    """The task with SimCTG's loss: the mean over the pairs of tokens in a row, of all processes."""

    scores = (*Captioning.scores, "contrastive")

    kind: LanguageModel

    def __init__(self, weight: float, margin: float, *rest: Any) -> None:
        super().__init__(*rest)
        self.contrastive_weight, self.margin = weight, margin

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        mask = self.kind.attention_mask(self.tokenizer, batch["tokens"])
        labels = self.kind.labels(self.tokenizer, batch["tokens"])
        options = {"labels": labels, "return_logits": measured, "output_hidden_states": True}
        output = model(batch["tokens"], mask, **options)
        found = self.joint(batch, output.loss, output.logits, labels)
        if found is None:
            return None
        loss, measure_captions = found
        term, pairs = token_contrast(output.hidden_states[-1], mask, self.margin)
        share = (pairs.double() / objective.sum_over_processes(pairs).clamp_min(1)).to(term.dtype)

        def measure() -> Values:
            values = measure_captions()
            contrastive = objective.sum_over_processes((term.detach() * share).double()).item()
            return {
                **values,
                "loss": values["loss"] + self.contrastive_weight * contrastive,
                "contrastive": contrastive,
            }

        return loss + self.contrastive_weight * term * (share * objective.process_count()), measure


class LanguageModel(RowKind):
    name = "lm"
    model = decoder.CausalLM
    configs = decoder.CONFIGS
    options = LanguageModelOptions
    layout = "text"
    sees_images = False

    def faults(self, config: TrainConfig) -> list[str]:
        faults, options = super().faults(config), self.own_options(config)
        if options.contrastive_weight < 0:
            faults.append(f"contrastive_weight must not be negative, got {options.contrastive_weight}")
        if not 0 < options.contrastive_margin < 2:
            faults.append(f"contrastive_margin must be in (0, 2), got {options.contrastive_margin}")
        return faults

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Captioning:
        options = self.own_options(config)
        if not options.contrastive_weight:
            return super().build_task(config, tokenizer, image_size)
        collate = self.collate(config, tokenizer, image_size)
        weights = (options.contrastive_weight, options.contrastive_margin)
        return ContrastiveCaptioning(*weights, self, tokenizer, collate, config.seed)

    def token_ids(self, tokenizer: CaptionTokenizer) -> dict[str, int]:
        return {"vocab_size": tokenizer.vocab_size}

    def caption_loss(
        self, model: Any, tokenizer: CaptionTokenizer, batch: dict[str, Any], *, with_logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        tokens = batch["tokens"]
        labels = self.labels(tokenizer, tokens)
        mask = self.attention_mask(tokenizer, tokens)
        output = model(tokens, mask, labels=labels, return_logits=with_logits)
        return output.loss, output.logits, labels

    def generate(
        self, model: Any, tokenizer: CaptionTokenizer, images: Any, prompts: Tensor, **decoding: Any
    ) -> Tensor:
        out = model(prompts, use_cache=True, logits_to_keep=1)
        past = out.past_key_values

        def step(tokens: Tensor) -> Tensor:  # [N] -> [N, V]
            return model(tokens[:, None], past_key_values=past, use_cache=True).logits[:, -1]

        end = tokenizer.endofchunk_id
        return generate(out.logits[:, -1], step, past.reorder_cache, eos_token_id=end, **decoding)
