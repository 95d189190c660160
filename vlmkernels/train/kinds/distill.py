"""Distillation: a CLIP learns images against texts as `clip` does, and from a trained model, its teacher.

Relational: KL(teacher || student) of the softmaxes over the batch, as open_clip's DistillClipLoss and
TinyCLIP's affinity mimicking; feature: the distance of the embeddings; interactive: the student's embeddings
against the teacher's as in InfoNCE (CLIP-KD, Yang et al. 2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.data import Collate, ImageTransform, ImageViews
from vlmkernels.models.parts.pretrained import Pretrained, read_config
from vlmkernels.ops import contrastive_distillation, embedding_distillation, info_nce
from vlmkernels.reference.embedding_distillation import DISTANCES
from vlmkernels.train import kinds, objective
from vlmkernels.train.config import TrainConfig, option
from vlmkernels.train.teacher import Teacher, TeacherCollate, teacher_digest
from vlmkernels.use.bundle import read_transform

from ._contrastive import Contrastive
from ._kind import Options, Values
from .clip import Clip

TERMS = ("relational", "feature", "interactive")


@dataclasses.dataclass(frozen=True)
class DistillOptions(Options):
    teacher: str | None = option(
        None, "distill: folder of a trained model that embeds images and texts (RUN/final)"
    )
    relational_weight: float = option(
        1.0, "distill: of the divergence between the softmaxes of teacher and student over the batch"
    )
    feature_weight: float = option(0.0, "distill: of the distance between their embeddings")
    interactive_weight: float = option(
        0.0, "distill: of the contrastive loss of the student's embeddings with the teacher's"
    )
    feature_distance: str = option("l2", f"distill: of feature_weight: {', '.join(DISTANCES)}")
    teacher_scale: float | None = option(
        None, "distill: factor of the teacher's similarities; its own when not given"
    )
    teacher_cache: bool = option(
        True, "distill: keep the teacher's features on disk, unless images are augmented or from tars"
    )

    def weights(self) -> dict[str, float]:
        """Of the terms that are used."""
        weights = {name: getattr(self, f"{name}_weight") for name in TERMS}
        return {name: weight for name, weight in weights.items() if weight}


class Student(nn.Module):
    """A model and, for training only, projections of its embeddings to the teacher's width."""

    def __init__(self, model: Any, teacher_width: int) -> None:
        super().__init__()
        self.model = model
        self.image_projection = nn.Linear(model.config.embed_dim, teacher_width)
        self.text_projection = nn.Linear(model.config.embed_dim, teacher_width)

    def forward(self, images: Tensor, tokens: Tensor) -> dict[str, Any]:  # [B, 3, H, W], [B, L]
        output = self.model(images, tokens)
        projected = {
            "image_features": self.image_projection(output["image_features"]),
            "text_features": self.text_projection(output["text_features"]),
        }
        return {**output, "projected": projected}

    def clamp_logit_scale_(self) -> None:
        self.model.clamp_logit_scale_()


class Distillation(Contrastive):
    """The task: the loss of `clip` and the weighted terms of the teacher.

    ``teacher_size`` is that of the teacher's own views of the images, if it has any.
    """

    def __init__(
        self, config: TrainConfig, options: DistillOptions, tokenizer: Any, image_size: Any, teacher_size: Any
    ) -> None:
        super().__init__(tokenizer, image_size, label_smoothing=config.label_smoothing or 0.0)
        self.config, self.options = config, options
        self.teacher = Teacher(str(options.teacher))
        own = Collate(tokenizer, image_size)
        self.collate: Any = TeacherCollate(own, self.teacher.tokenizer, teacher_size)

    def prepare(self, source: Any, device: torch.device) -> None:
        if keeps_features(self.config, self.options):
            names = ("data", "data_options", "seed")
            settings = {name: getattr(self.config, name) for name in names}
            self.teacher.prepare(source, device, settings, self.config.num_workers)

    def loss(
        self, model: nn.Module, batch: dict[str, Any], step: int, measured: bool
    ) -> tuple[Tensor, Callable[[], Values]] | None:
        output, taught = model(batch["images"], batch["tokens"]), self.teacher(batch)
        images, texts = objective.joint_features(output)
        teacher_images, teacher_texts = (x.to(images.dtype) for x in objective.joint_features(taught))
        own_images, own_texts = images, texts
        if "projected" in output:
            own_images, own_texts = objective.joint_features(output["projected"])
        if not len(images):
            return None
        options, scale = self.options, output["logit_scale"]

        def relational() -> Tensor:
            theirs = options.teacher_scale or taught["logit_scale"]
            return contrastive_distillation(images, texts, scale, teacher_images, teacher_texts, theirs)

        def feature() -> Tensor:
            distance = options.feature_distance
            return 0.5 * (
                embedding_distillation(own_images, teacher_images, distance=distance)
                + embedding_distillation(own_texts, teacher_texts, distance=distance)
            )

        def interactive() -> Tensor:
            return 0.5 * (
                info_nce(own_images, teacher_texts, scale, symmetric=False, normalize=True)
                + info_nce(own_texts, teacher_images, scale, symmetric=False, normalize=True)
            )

        computed = {"relational": relational, "feature": feature, "interactive": interactive}
        weights = options.weights()
        own_loss = objective.contrastive_loss(
            images, texts, scale, None, label_smoothing=self.label_smoothing
        )
        terms = {name: computed[name]() for name in weights}
        loss = own_loss + torch.stack([weights[name] * term for name, term in terms.items()]).sum()

        def measure() -> Values:
            return {
                "loss": loss.item(),
                "contrastive": own_loss.item(),
                **{name: term.item() for name, term in terms.items()},
                "logit_scale": scale.item(),
                "retrieval_at_1": objective.retrieval_at_1(images, texts).item(),
            }

        return loss, measure


def keeps_features(config: TrainConfig, options: DistillOptions) -> bool:
    """Whether the teacher sees the same images in every epoch, and its features of them are kept."""
    return options.teacher_cache and not config.augment and not config.streams


class Distill(Clip):
    """The trained model is a CLIP like that of `clip`; the teacher is of any kind that embeds."""

    name = "distill"
    options = DistillOptions

    def faults(self, config: TrainConfig) -> list[str]:
        faults, options = super().faults(config), self.own_options(config)
        names = " or ".join(dict.fromkeys(kind.name for kind in kinds.embedders() if kind.name != self.name))
        if options.teacher is None:
            faults.append(f"teacher must be the folder of a trained {names} (RUN/final), got None")
        else:
            fields = read_config(options.teacher)
            kind = kinds.of_config(fields)
            if kind is None or not kind.embeds:
                found = kinds.name_of(fields)
                faults.append(
                    f"teacher: {options.teacher} must contain a model for {names}, got one for {found}"
                )
        weights = options.weights()
        faults += [f"{n}_weight must not be negative, got {w}" for n, w in weights.items() if w < 0]
        if not weights:
            every = ", ".join(f"{name}_weight" for name in TERMS)
            faults.append(f"one of {every} must be positive, got 0 for all")
        if options.feature_distance not in DISTANCES:
            faults.append(
                f"feature_distance must be one of {', '.join(DISTANCES)}, got {options.feature_distance!r}"
            )
        if options.teacher_scale is not None and options.teacher_scale <= 0:
            faults.append(f"teacher_scale must be positive, got {options.teacher_scale}")
        return faults

    def drawn_transform(self, config: TrainConfig, transform: ImageTransform | None) -> Any:
        """That of the student; with that of the teacher, if its features are not kept and it differs."""
        drawn, options = super().drawn_transform(config, transform), self.own_options(config)
        if keeps_features(config, options):
            return drawn
        teacher = super().drawn_transform(config, read_transform(Path(options.teacher)))
        return drawn if teacher == drawn else ImageViews((drawn, teacher))

    def own_inputs(self, config: TrainConfig) -> dict[str, Any]:
        return {"files of the teacher": teacher_digest(Path(self.own_options(config).teacher))}

    def trained_module(self, config: TrainConfig, model: Any) -> nn.Module:
        options = self.own_options(config)
        width = read_config(options.teacher)["embed_dim"]
        compared = options.weights().keys() & {"feature", "interactive"}
        return Student(model, width) if compared and width != model.config.embed_dim else model

    def trained_model(self, module: Any) -> Pretrained:
        return module.model if isinstance(module, Student) else module

    def build_task(self, config: TrainConfig, tokenizer: Any, image_size: Any = None) -> Distillation:
        drawn = self.drawn_transform(config, self.build_transform(config))
        teacher_size = drawn.transforms[1].image_size if isinstance(drawn, ImageViews) else None
        return Distillation(config, self.own_options(config), tokenizer, image_size, teacher_size)
