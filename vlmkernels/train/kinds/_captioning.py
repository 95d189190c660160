"""Shared by the kinds that learn captions token by token: the loss over all counted tokens, perplexity."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlmkernels.data import CaptionCollate, CaptionTokenizer, ClipTokenizer, WordPieceTokenizer
from vlmkernels.data.renaming import Renaming
from vlmkernels.models.decoder import IGNORE
from vlmkernels.models.few_shot import media_labels
from vlmkernels.train import objective
from vlmkernels.train.config import TrainConfig, option
from vlmkernels.use.caption_scores import CaptionScores, evaluate_captions

from ._kind import Kind, Options, Values


class CaptionKind(Kind):
    """A kind whose model predicts the tokens of a caption."""

    layout: ClassVar[str]  # of the rows of tokens, see CaptionCollate

    def new_tokenizer(self, config: TrainConfig, source: Any) -> ClipTokenizer | WordPieceTokenizer:
        """CLIP's byte pairs and two more ids."""
        sizes = self.sizes(config)
        return CaptionTokenizer(sizes.context_length, sizes.vocab_size)

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Captioning:
        collate = CaptionCollate(tokenizer, self.layout, image_size=image_size)
        return Captioning(self, tokenizer, collate, config.seed)

    def with_draws(
        self, batch: dict[str, Any], tokenizer: CaptionTokenizer, seed: int, step: int
    ) -> dict[str, Any]:
        """A batch with what a training step draws at random for it."""
        return batch

    @abc.abstractmethod
    def caption_loss(
        self, model: Any, tokenizer: CaptionTokenizer, batch: dict[str, Any], *, with_logits: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Mean loss of the counted tokens, logits [R, L, V] (or None), labels [R, L], -100 where not counted.

        ``batch`` is a ``CaptionCollate``'s; the logits of position t are those of label t + 1.
        """

    @abc.abstractmethod
    def first_token(self, tokenizer: CaptionTokenizer) -> int:
        """The token before the caption."""

    @abc.abstractmethod
    def generate(
        self,
        model: Any,
        tokenizer: CaptionTokenizer,
        images: Any,  # [B, 3, H, W], or their number for a kind without images
        prompts: Tensor,  # [B, T] int64
        **decoding: Any,
    ) -> Tensor:
        """Tokens [B, T'] that follow ``prompts``; the options are those of ``generation.generate``."""

    def evaluate(
        self,
        model: nn.Module,
        tokenizer: Any,
        transform: Any,
        dataset: Any,
        *,
        batch_size: int,
        templates: Any = None,
        num_beams: int = 1,
    ) -> CaptionScores:
        return evaluate_captions(
            model, tokenizer, transform, dataset, batch_size=batch_size, num_beams=num_beams
        )


class Captioning:
    """The task: the loss is the mean over the counted tokens of all processes, times ``weight``."""

    scores: tuple[str, ...] = ("perplexity", "token_accuracy")

    def __init__(
        self,
        kind: CaptionKind,
        tokenizer: CaptionTokenizer,
        collate: CaptionCollate,
        seed: int,
        weight: int = 1,
    ) -> None:
        self.kind, self.tokenizer, self.collate, self.seed = kind, tokenizer, collate, seed
        self.weight = weight

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        batch = self.kind.with_draws(batch, self.tokenizer, self.seed, step)
        return self.joint(batch, *self.kind.caption_loss(model, self.tokenizer, batch, with_logits=measured))

    def joint(
        self, batch: dict[str, Any], own_loss: Tensor, logits: Tensor | None, labels: Tensor
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        """What `loss` returns, from what `caption_loss` does."""
        count = (labels[:, 1:] != IGNORE).sum()
        total = objective.sum_over_processes(count)
        if not batch["keys"] and not total:  # waits for the device only if this process has no samples
            return None
        share = (count.double() / total).to(own_loss.dtype)

        def measure() -> Values:
            targets = labels[:, 1:]
            assert logits is not None, "requested by measured"
            right = objective.sum_over_processes((logits[:, :-1].argmax(dim=-1) == targets).sum())
            joint = objective.sum_over_processes((own_loss.detach() * share).double()).item()
            return {
                "loss": self.weight * joint,
                "perplexity": math.exp(min(joint, 700.0)),
                "token_accuracy": (right / total).item(),
            }

        return own_loss * (share * self.weight * objective.process_count()), measure

    def prepare(self, source: Any, device: torch.device) -> None:
        pass

    def after_step(self, model: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class RowOptions(Options):
    images_per_row: int = option(
        1,
        "lm, flamingo: consecutive pairs in one row of tokens; the other kinds have one per row",
        least=1,
    )
    renamed: float = option(
        0.0,
        "lm, flamingo: fraction of the words that several captions of a row have which are replaced by "
        "made-up ones throughout the row, so that it has to be read to be understood",
    )


class RowKind(CaptionKind):
    """A kind that learns rows ``<image>caption<|endofchunk|>``: counted are the captions and their ends."""

    options = RowOptions

    def faults(self, config: TrainConfig) -> list[str]:
        faults, options = super().faults(config), self.own_options(config)
        if not 0 <= options.renamed <= 1:
            faults.append(f"renamed must be in [0, 1], got {options.renamed}")
        if options.renamed and options.images_per_row == 1:
            faults.append("images_per_row must be at least 2 with renamed, got 1")
        return faults

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Captioning:
        return Captioning(self, tokenizer, self.collate(config, tokenizer, image_size), config.seed)

    def collate(self, config: TrainConfig, tokenizer: Any, image_size: Any) -> CaptionCollate:
        options = self.own_options(config)
        renaming = Renaming(options.renamed, config.seed) if options.renamed else None
        return CaptionCollate(tokenizer, self.layout, options.images_per_row, image_size, renaming)

    def labels(self, tokenizer: CaptionTokenizer, tokens: Tensor) -> Tensor:  # [R, T]
        """Labels [R, T] of the rows, -100 where not counted."""
        return media_labels(
            tokens,
            media_token_id=tokenizer.image_id,
            endofchunk_token_id=tokenizer.endofchunk_id,
            pad_token_id=tokenizer.pad_id,
        )

    def attention_mask(self, tokenizer: CaptionTokenizer, tokens: Tensor) -> Tensor:  # [R, T]
        """int64 [R, T]: 0 at padding."""
        return (tokens != tokenizer.pad_id).long()

    def first_token(self, tokenizer: CaptionTokenizer) -> int:
        return tokenizer.image_id
