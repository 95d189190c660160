"""ViLD: a detector whose classes are texts, taught by the image embeddings of a CLIP or ALIGN.

Gu et al. 2022 (arXiv:2104.13921). The box head of a two-stage detector ends in the space of a teacher's
embeddings. A region e is classified by its cosines to the teacher's embeddings t_c of the names of classes,
and to a learned background b,

    z(e) = [cos(e, b), cos(e, t_1), ..., cos(e, t_C)] / tau,    L_text = cross-entropy of softmax(z),

and the embeddings of regions follow those v of the teacher for the same crops of the image (equation 4),

    L_image = 1/M sum_m || e_m / |e_m| - v_m / |v_m| ||_1,    L = L_detector + L_text + w L_image.

Only base classes have boxes; any other text is a class at inference. Variants: "text" (L_text alone), "image"
(L_image alone), "vild" (both on one head), and "ensemble": a second head for L_image, whose probabilities are
averaged geometrically with those of the first (equation 5), the first weighing more for base classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import vlmkernels
from vlmkernels.models._vild_teacher import TEMPLATES, TextEncoder, text_embeddings
from vlmkernels.models._vild_teacher import crop_embeddings as crop_embeddings
from vlmkernels.models._vild_teacher import relative_encoders as relative_encoders
from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.models.detector import (
    BOX_SIDE,
    Detections,
    Detector,
    DetectorConfig,
    Losses,
    RoIHeads,
    Sampled,
    box_head,
)
from vlmkernels.models.parts import boxes as box
from vlmkernels.models.parts.boxes import wide
from vlmkernels.models.parts.pretrained import Pretrained, below
from vlmkernels.nn.dense import Linear

VARIANTS = ("text", "image", "vild", "ensemble")
STD = 0.01  # of the new background
DETECTOR = DetectorConfig(
    classes=2,
    class_agnostic=True,
    frozen_norm=False,
    norm_eps=1e-4,
    head_norm="all",
    rpn_convs=2,
    box_convs=4,
    min_size=1024,
    max_size=1024,
    rpn_after_nms=(1000, 1000),
    box_beta=1.0,
    score_threshold=0.0,
    detections=300,
)


@dataclass(frozen=True)
class ViLDConfig:
    """Sizes of a ViLD. Defaults: the published one with a ResNet-50 and the embeddings of CLIP ViT-B/32.

    `detector` has the sizes of the detector, whose boxes and masks must be `class_agnostic`; its `classes`
    are not used. `embed_dim` is the width of the teacher's embeddings. `temperature` divides cosines,
    `distill_weight` is w. `text_share` is the exponent of the first head's probabilities for base classes in
    an ensemble, and of the second's for novel ones. `base` are the names of the classes that had boxes in
    training, if it is known. With `teacher` the model contains that CLIP or ALIGN, frozen, so that its
    classes can be any texts wherever it is loaded.
    """

    detector: DetectorConfig = field(default=DETECTOR)
    variant: str = "vild"
    embed_dim: int = 512
    temperature: float = 0.01
    distill_weight: float = 0.5
    text_share: float = 2 / 3
    base: tuple[str, ...] = ()
    teacher: ClipConfig | AlignConfig | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", tuple(self.base))
        faults = below(self, 1, "embed_dim") + below(self, 0, "distill_weight")
        if self.variant not in VARIANTS:
            faults.append(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if not self.detector.class_agnostic:
            faults.append("detector must be class_agnostic, since classes are known only in a call")
        if self.teacher is not None and self.teacher.embed_dim != self.embed_dim:
            got = f"{self.embed_dim} and {self.teacher.embed_dim}"
            faults.append(f"embed_dim must be that of the teacher, got {got}")
        if not self.temperature > 0:
            faults.append(f"temperature must be positive, got {self.temperature}")
        if not 0 <= self.text_share <= 1:
            faults.append(f"text_share must be in [0, 1], got {self.text_share}")
        if faults:
            raise ValueError("ViLDConfig: " + "; ".join(faults))


class Classes(NamedTuple):
    """What regions are classified against; class c has label c + 1, the background label 0."""

    embeddings: Tensor  # [C, D], the teacher's, of the names
    novel: Tensor | None = None  # [C] bool, of classes without boxes in training


class Background(nn.Module):
    """The learned embedding of what is no object, before those of classes; a module, whose hooks fetch it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(STD * torch.randn(width))

    def forward(self, classes: Tensor) -> Tensor:  # [C, D] -> [1 + C, D]
        return F.normalize(torch.cat([self.embedding[None].to(classes), classes]), dim=1)


class ViLDHeads(RoIHeads):
    """Heads whose classifier is a projection to the teacher's space."""

    def __init__(self, config: ViLDConfig) -> None:
        sizes = config.detector
        super().__init__(sizes, {"projection": Linear(sizes.box_width, config.embed_dim)})
        self.vild = config
        if config.variant != "image":
            self.background = Background(config.embed_dim)
        if config.variant == "ensemble":
            self.image_head = box_head(sizes)
            self.image_projection = Linear(sizes.box_width, config.embed_dim)

    def image_embeddings(
        self,
        pooled: Tensor,  # [K, C, 7, 7]
        features: Tensor | None = None,  # [K, F]
    ) -> Tensor:  # [K, D]
        """Those that follow the teacher's embeddings of crops; `features` are the box head's if known."""
        if self.vild.variant == "ensemble":
            return self.image_projection(self.image_head(pooled))
        return self.box_predictor["projection"](self.box_head(pooled) if features is None else features)

    def class_losses(self, pooled: Tensor, features: Tensor, labels: Tensor, classes: Classes) -> Losses:
        """Cross-entropy against the background and all classes; logits of novel ones are 0, as published."""
        if self.vild.variant == "image":
            return {}
        projected = wide(self.box_predictor["projection"](features))
        table = self.background(classes.embeddings.to(projected))
        scale = None
        if classes.novel is not None:
            scale = 1 - F.pad(classes.novel.to(projected), (1, 0))
        with torch.autocast(projected.device.type, enabled=False):  # at 1 / tau, 16 bits are too few
            loss = vlmkernels.linear_cross_entropy(
                F.normalize(projected, dim=1) / self.vild.temperature,
                table,
                labels,
                column_scale=scale,
                reduction="sum",
            )
        return {"class": (loss, len(labels))}

    def scores(self, pooled: Tensor, features: Tensor, classes: Classes) -> Tensor:  # [K, C]
        variant = self.vild.variant
        if variant == "image":
            return self._image_scores(pooled, features, classes)
        projected = wide(self.box_predictor["projection"](features))
        text = self._logits(projected, self.background(classes.embeddings.to(projected))).softmax(1)[:, 1:]
        if variant != "ensemble":
            return text
        share = torch.full_like(text[0], self.vild.text_share)
        if classes.novel is not None:
            share = torch.where(classes.novel, 1 - share, share)
        return text**share * self._image_scores(pooled, features, classes) ** (1 - share)

    def class_count(self, classes: Classes) -> int:
        return 1 + len(classes.embeddings)

    def losses(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[int],
        sampled: Sampled,
        targets: Sequence[Mapping[str, Tensor]],
        classes: Classes,
    ) -> Losses:
        found = super().losses(maps, strides, sampled, targets, classes)
        return found if self.vild.variant == "text" else found | self._distillation(maps, strides, targets)

    def _distillation(
        self, maps: Sequence[Tensor], strides: Sequence[int], targets: Sequence[Mapping[str, Tensor]]
    ) -> Losses:
        boxes = [target["proposals"].to(wide(maps[0])) for target in targets]
        pooled = box.pool(maps, strides, boxes, BOX_SIDE)
        count = len(pooled)
        if not count:  # every weight keeps a gradient, for which data-parallel training would wait
            return {"distillation": (0 * torch.stack([each.sum() for each in self.parameters()]).sum(), 0)}
        student = wide(self.image_embeddings(pooled))
        teacher = torch.cat([target["embeddings"] for target in targets]).to(student)
        loss = vlmkernels.embedding_distillation(student, teacher, distance="l1", reduction="sum")
        return {"distillation": (self.vild.distill_weight * loss, count)}

    def _image_scores(self, pooled: Tensor, features: Tensor, classes: Classes) -> Tensor:  # [K, C]
        """Over the classes alone: this branch has no background."""
        projected = wide(self.image_embeddings(pooled, features))
        return self._logits(projected, F.normalize(classes.embeddings.to(projected), dim=1)).softmax(1)

    def _logits(self, projected: Tensor, table: Tensor) -> Tensor:  # [K, D], [V, D] -> [K, V]
        with torch.autocast(projected.device.type, enabled=False):
            return F.normalize(projected, dim=1) @ table.T / self.vild.temperature


class ViLD(Pretrained):
    """The detector with these heads. Build with `ViLD(CONFIGS["vild-r50"])`."""

    model_type: ClassVar[str] = "vild"
    config_class: ClassVar[type] = ViLDConfig
    config: ViLDConfig

    def __init__(self, config: ViLDConfig) -> None:
        super().__init__(config)
        self.detector = Detector(config.detector, ViLDHeads(config))
        self.teacher: CLIP | ALIGN | None = None
        if config.teacher is not None:
            teacher = (
                ALIGN(config.teacher) if isinstance(config.teacher, AlignConfig) else CLIP(config.teacher)
            )
            self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> ViLD:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,  # [3, H, W] each
        targets: Sequence[Mapping[str, Tensor]],
        classes: Classes,
        *,
        generators: Sequence[torch.Generator] | None = None,
    ) -> dict[str, Any]:
        """The losses of a batch of images, and their sum, as `Detector.forward`.

        Args:
            images, generators: see there.
            targets: see there; and unless the variant is "text", `proposals` [P, 4], boxes of any kind, and
                `embeddings` [P, D], the teacher's for these crops. P may be 0.
            classes: embeddings floating [C, D], novel bool [C]. Logits of novel classes are 0.

        Returns:
            The parts of `Detector.forward`, without `class_loss` for the variant "image", and unless the
            variant is "text" `distillation_loss`, w times the mean over the proposals of the batch.

        Raises:
            ValueError: naming every argument that does not fit.
        """
        self._check(classes, targets)
        return self.detector(images, targets, classes=classes, generators=generators)

    def detect(self, images: Sequence[Tensor] | Tensor, classes: Classes) -> list[Detections]:
        """What is in each image, in its own pixels. Put the model in evaluation mode first.

        Args and errors as in `forward`. Labels are those of `classes`, from 1 on; `classes.novel` matters for
        an ensemble only, for which classes are base ones where it is None.
        """
        self._check(classes, None)
        return self.detector.detect(images, classes=classes)

    def _check(self, classes: Classes, targets: Sequence[Mapping[str, Tensor]] | None) -> None:
        width, given, novel = self.config.embed_dim, classes.embeddings, classes.novel
        faults = []
        if given.dim() != 2 or given.shape[1] != width or not len(given) or not given.is_floating_point():
            got = f"{given.dtype} {list(given.shape)}"
            faults.append(f"classes.embeddings must be floating [C, {width}], C at least 1, got {got}")
        elif novel is not None and (novel.shape != given.shape[:1] or novel.dtype != torch.bool):
            got = f"{novel.dtype} {list(novel.shape)}"
            faults.append(f"classes.novel must be bool [C] = [{len(given)}], got {got}")
        if self.config.variant != "text":
            for number, target in enumerate(targets or ()):
                faults += [f"targets[{number}]: {fault}" for fault in _proposal_faults(target, width)]
        if faults:
            raise ValueError("ViLD: " + "; ".join(faults))


def _proposal_faults(target: Mapping[str, Tensor], width: int) -> list[str]:
    missing = [name for name in ("proposals", "embeddings") if name not in target]
    if missing:
        return [f"must have {' and '.join(missing)}, got {', '.join(target)}"]
    boxes, embeddings = target["proposals"], target["embeddings"]
    if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        return [f"proposals must be floating [P, 4], got {boxes.dtype} {list(boxes.shape)}"]
    if embeddings.shape != (len(boxes), width) or not embeddings.is_floating_point():
        got = f"{embeddings.dtype} {list(embeddings.shape)}"
        return [f"embeddings must be floating [P, D] = {[len(boxes), width]}, got {got}"]
    if not (boxes[:, 2:] > boxes[:, :2]).all():
        return ["proposals must have positive sides, left < right and top < bottom"]
    return []


class ViLDDetector:
    """`detector(image, categories=["a cat", ...])`.

    model: a ViLD, which is put in evaluation mode.
    text_encoder: N texts to [N, D], the teacher's (`vlmkernels.use.encoders.text_encoder`).
    templates: texts with "{}" for a category, over which embeddings are averaged.

    For an ensemble, categories are novel unless they are in the model's `config.base`.
    """

    def __init__(
        self, model: ViLD, text_encoder: TextEncoder, *, templates: Sequence[str] = TEMPLATES
    ) -> None:
        self.model, self.text_encoder, self.templates = model.eval(), text_encoder, tuple(templates)
        self._known: tuple[tuple[str, ...], Tensor] | None = None

    def classes(self, categories: Sequence[str]) -> Classes:
        """What the model classifies against; the embeddings of the last categories are kept."""
        names = categories if isinstance(categories, str) else tuple(categories)
        if self._known is None or self._known[0] != names:
            embeddings = text_embeddings(self.text_encoder, names, self.templates)
            self._known = tuple(names), embeddings
        place = next(self.model.parameters()).device
        base = set(self.model.config.base)
        novel = torch.tensor([name not in base for name in names], device=place)
        return Classes(self._known[1].to(place), novel if base else None)

    def __call__(self, image: Image.Image | Tensor, categories: Sequence[str]) -> Detections:
        """Boxes [n, 4] in pixels, scores [n], labels [n] (places in `categories`), masks [n, H, W].

        `image` is one of PIL, or floating [3, H, W] in [0, 1]. ValueError for invalid arguments.
        """
        classes = self.classes(categories)
        found = self.model.detect([as_tensor(image).to(classes.embeddings.device)], classes)[0]
        return found._replace(labels=found.labels - 1)


def as_tensor(image: Image.Image | Tensor) -> Tensor:  # [3, H, W]
    """An image of PIL as float32 in [0, 1]; tensors stay as they are."""
    if isinstance(image, Tensor):
        return image
    pixels = numpy.array(image.convert("RGB"), dtype=numpy.float32) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1)


CONFIGS: dict[str, ViLDConfig] = {
    "vild-r50": ViLDConfig(),
    "vild-text-r50": ViLDConfig(variant="text"),
    "vild-ensemble-r50": ViLDConfig(variant="ensemble"),
    "vild-r152": ViLDConfig(
        detector=DetectorConfig(**{**vars(DETECTOR), "conv_blocks": (3, 8, 36, 3)}), distill_weight=1.0
    ),
    "vild-ensemble-r152": ViLDConfig(
        detector=DetectorConfig(**{**vars(DETECTOR), "conv_blocks": (3, 8, 36, 3)}),
        variant="ensemble",
        distill_weight=2.0,
    ),
    "emoji-tiny": ViLDConfig(
        detector=DetectorConfig(
            classes=2,
            class_agnostic=True,
            conv_blocks=(1, 1, 1, 1),
            conv_width=16,
            frozen_norm=False,
            width=32,
            head_norm="all",
            box_convs=0,
            box_linears=2,
            box_width=256,
            mask_convs=1,
            min_size=160,
            max_size=160,
            anchor_sides=(32, 48, 72, 100, 128),
            rpn_before_nms=(200, 100),
            rpn_after_nms=(100, 50),
            rpn_samples=64,
            box_samples=32,
            box_beta=1.0,
            score_threshold=0.0,
            candidates=500,
            detections=50,
        ),
        embed_dim=128,
        temperature=0.05,  # near that of a small teacher, as 0.01 is that of the published CLIP
        distill_weight=0.1,  # w sqrt(D) tau is half of that published: at all of it base classes lose AP
        text_share=0.85,  # more for base classes than 2/3, hardly less for novel ones
    ),
}
