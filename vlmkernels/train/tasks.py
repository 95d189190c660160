"""What a kind of model does with a batch: putting it together, its loss over all processes, its scores."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlmkernels.data import CaptionCollate, CaptionTokenizer, Collate
from vlmkernels.data.samples import sample_rng
from vlmkernels.models.decoder import IGNORE, next_token_loss
from vlmkernels.models.few_shot import media_labels

from . import objective
from .config import CAPTIONERS, TrainConfig

Values = dict[str, float]
LAYOUTS = {"lm": "text", "flamingo": "interleaved", "simvlm": "prefix"}


class Task(Protocol):
    """The part of a training step that depends on the kind of model.

    ``loss`` gives the loss of this process, whose gradient averaged over the processes is that of the joint
    batch, and a function that measures the joint batch; all processes call it, or none. It is None, on all
    processes, for a joint batch without samples; the part of one process may be empty.
    """

    @property
    def scores(self) -> tuple[str, ...]:
        """Of the measured values, those that a summary names."""

    @property
    def collate(self) -> Callable[[Any], dict[str, Any]]:
        """Samples to a batch."""

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None: ...

    def after_step(self, model: Any) -> None: ...


def build_task(kind: str, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Task:
    """The task of a kind of model, with images of ``image_size``: an int, (H, W), or None for no images."""
    return (Captioning if kind in CAPTIONERS else Contrastive)(kind, config, tokenizer, image_size)


class Contrastive:
    """Images against texts: clip, align, siglip. Every process computes the loss of the joint batch."""

    scores = ("retrieval_at_1",)

    def __init__(self, kind: str, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> None:
        self.collate = Collate(tokenizer, image_size)
        given = config.label_smoothing
        self.label_smoothing = objective.LABEL_SMOOTHING[kind] if given is None else given

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        output = model(batch["images"], batch["tokens"])
        images, texts = objective.joint_features(output)
        if not len(images):
            return None
        scale, bias = output["logit_scale"], output.get("logit_bias")
        loss = objective.contrastive_loss(images, texts, scale, bias, label_smoothing=self.label_smoothing)

        def measure() -> Values:
            return {
                "loss": loss.item(),
                "logit_scale": scale.item(),
                "retrieval_at_1": objective.retrieval_at_1(images, texts).item(),
            }

        return loss, measure

    def after_step(self, model: Any) -> None:
        model.clamp_logit_scale_()


class Captioning:
    """Text token by token: lm, flamingo, simvlm. The loss is the mean over all processes' counted tokens.

    Counted are, of the rows ``<image>caption<|endofchunk|>`` of lm and flamingo, the caption and its end; of
    those of simvlm the tokens after the prefix, whose length is drawn anew in every step, from the seed, the
    step and the sample's key alone.
    """

    scores = ("perplexity", "token_accuracy")

    def __init__(
        self, kind: str, config: TrainConfig, tokenizer: CaptionTokenizer, image_size: Any = None
    ) -> None:
        self.kind, self.seed, self.tokenizer = kind, config.seed, tokenizer
        self.collate = CaptionCollate(tokenizer, LAYOUTS[kind], config.images_per_row, image_size)

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        prefixes = None
        if self.kind == "simvlm":
            lengths = self.tokenizer.lengths(batch["tokens"]).tolist()
            prefixes = prefix_lengths(self.seed, step, batch["keys"], lengths)
        own_loss, logits, labels = caption_loss(
            self.kind, model, self.tokenizer, batch, prefixes, with_logits=measured
        )
        count = (labels[:, 1:] != IGNORE).sum()
        total = objective.sum_over_processes(count)
        if not batch["keys"] and not total:  # asks the device only where this process has nothing
            return None
        share = (count.double() / total).to(own_loss.dtype)

        def measure() -> Values:
            targets = labels[:, 1:]
            assert logits is not None, "asked for with measured"
            right = objective.sum_over_processes((logits[:, :-1].argmax(dim=-1) == targets).sum())
            joint = objective.sum_over_processes((own_loss.detach() * share).double()).item()
            return {
                "loss": joint,
                "perplexity": math.exp(min(joint, 700.0)),
                "token_accuracy": (right / total).item(),
            }

        return own_loss * (share * objective.process_count()), measure

    def after_step(self, model: Any) -> None:
        pass


def caption_loss(
    kind: str,
    model: nn.Module,
    tokenizer: CaptionTokenizer,
    batch: dict[str, Any],
    prefixes: Tensor | None = None,  # [B]
    *,
    with_logits: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Mean loss of the counted tokens, logits [B, L, V] (or None) and labels [B, L], -100 where not counted.

    ``batch`` is a ``CaptionCollate``'s. ``prefixes`` are simvlm's; None: the start token alone.
    """
    tokens = batch["tokens"]
    if kind == "simvlm":
        prefixes = tokens.new_ones(len(tokens)) if prefixes is None else prefixes.to(tokens.device)
        output = model(batch["images"], tokens, prefixes, return_logits=with_logits)
        return output["loss"], output.get("logits"), prefix_labels(tokenizer, tokens, prefixes)
    labels = media_labels(
        tokens,
        media_token_id=tokenizer.image_id,
        endofchunk_token_id=tokenizer.endofchunk_id,
        pad_token_id=tokenizer.pad_id,
    )
    given = (tokens != tokenizer.pad_id).long()
    if kind == "lm":
        logits = model(tokens, given).logits
        return next_token_loss(logits, labels), logits, labels
    output = model(batch["images"], tokens, attention_mask=given, labels=labels)
    return output["loss"], output["logits"], labels


def prefix_labels(
    tokenizer: CaptionTokenizer,
    tokens: Tensor,  # [B, L]
    prefixes: Tensor,  # [B]
) -> Tensor:
    """Labels [B, L] of start, caption, end: the tokens after each row's prefix, its end among them."""
    place = torch.arange(tokens.shape[1], device=tokens.device)
    counted = (place >= prefixes[:, None]) & (place < tokenizer.lengths(tokens)[:, None])
    return tokens.masked_fill(~counted, IGNORE)


def prefix_lengths(seed: int, step: int, keys: list[str], lengths: list[int]) -> Tensor:
    """int64 [B]: uniform over 1 (the start token alone) to n - 1 of n tokens, for each sample."""
    drawn = [
        sample_rng(seed, "prefix", step, key).randint(1, length - 1)
        for key, length in zip(keys, lengths, strict=True)
    ]
    return torch.tensor(drawn, dtype=torch.int64)
