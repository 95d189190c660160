"""Shared by the kinds that learn images against texts: the loss of the joint batch, retrieval as score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.data import Collate
from vlmkernels.train import objective
from vlmkernels.train.config import TrainConfig
from vlmkernels.use.evaluate import ContrastiveScores, evaluate_model, template_texts

from ._kind import Kind, Values


class Contrastive:
    """The task: every process computes the loss of the joint batch."""

    scores = ("retrieval_at_1",)

    def __init__(self, tokenizer: Any, image_size: Any = None, *, label_smoothing: float = 0.0) -> None:
        self.collate = Collate(tokenizer, image_size)
        self.label_smoothing = label_smoothing

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

    def prepare(self, source: Any, device: torch.device) -> None:
        pass

    def after_step(self, model: Any) -> None:
        model.clamp_logit_scale_()


class ContrastiveKind(Kind):
    """A kind whose model has ``encode_image`` and ``encode_text`` and returns features and scale."""

    embeds = True
    has_features = True

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Contrastive:
        given, own = config.label_smoothing, self.label_smoothing or 0.0
        return Contrastive(tokenizer, image_size, label_smoothing=own if given is None else given)

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
    ) -> ContrastiveScores:
        texts = None if templates is None else template_texts(templates, dataset)
        return evaluate_model(model, tokenizer, transform, dataset, batch_size=batch_size, class_texts=texts)
