"""A two-stage detector: a ResNet with a pyramid of maps, a network that proposes boxes, heads to judge them.

Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) and Mask R-CNN (He et al. 2017, arXiv:1703.06870) on a
feature pyramid (Lin et al. 2017, arXiv:1612.03144). Every cell of every map has anchors; the region proposal
network (RPN) scores them and moves them; the best, without those that repeat each other, are proposals. RoI
align pools each proposal from the map that suits its size, and the heads give it a class, a box and a mask:

    L = L_objectness + L_rpn_box + L_class + L_box + L_mask

State-dict keys are those of torchvision's detectors, of both their versions (`from_torchvision_state_dict`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels.models import _detector_images as frames
from vlmkernels.models import _detector_weights as weights
from vlmkernels.models._detector_images import Detections as Detections
from vlmkernels.models._detector_rpn import RPN
from vlmkernels.models._detector_rpn import Losses as Losses
from vlmkernels.models.parts import boxes as box
from vlmkernels.models.parts.boxes import wide
from vlmkernels.models.parts.pretrained import Pretrained, below, config_from_dict, naming
from vlmkernels.models.parts.pyramid import Pyramid, RowNorm, convolution
from vlmkernels.models.parts.resnet import FrozenBatchNorm, Trunk
from vlmkernels.models.parts.weight_files import Source
from vlmkernels.nn.dense import Linear

NORMS = ("none", "convolutions", "all")
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
BOX_LEAST = 1e-2  # the sides of a box that is kept
BOX_SIDE, MASK_SIDE = 7, 14  # of a pooled region
LARGEST = 8192  # side of an image


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes of a detector. Defaults: torchvision's Mask R-CNN with a ResNet-50, the first version.

    `classes` counts the background, class 0. With `class_agnostic` a region has one box and one mask for all
    classes. `frozen_norm` makes the norms of the ResNet constants; `trainable_layers` of its parts (the stem
    and the stages) are trained, counted from the last: 3 to fine-tune as torchvision does. `head_norm` places
    BatchNorm after the convolutions of the pyramid and of the heads ("convolutions", as in torchvision's
    second version), after those and those of the RPN and the linear layers of the box head ("all", as in
    ViLD), or nowhere ("none").
    Images get a shorter side of `min_size`, or a longer one of `max_size` if that makes them smaller.
    `anchor_sides` has a side for each map, one more than there are `conv_blocks`. `rpn_before_nms` are the
    proposals kept of each map, `rpn_after_nms` those of an image, in training and in inference. `box_beta` is
    that of the smooth L1 loss of boxes. `candidates` is the most pairs of a box and a class that are compared
    in an image, the best; None: all above `score_threshold`.
    """

    classes: int = 91
    masks: bool = True
    class_agnostic: bool = False
    conv_blocks: tuple[int, ...] = (3, 4, 6, 3)
    conv_width: int = 64
    frozen_norm: bool = True
    norm_eps: float = 1e-5
    trainable_layers: int = 5
    width: int = 256
    head_norm: str = "none"
    rpn_convs: int = 1
    box_convs: int = 0
    box_linears: int = 2
    box_width: int = 1024
    mask_convs: int = 4
    min_size: int = 800
    max_size: int = 1333
    image_mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    image_std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    anchor_sides: tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_before_nms: tuple[int, int] = (2000, 1000)
    rpn_after_nms: tuple[int, int] = (2000, 1000)
    rpn_nms: float = 0.7
    rpn_overlaps: tuple[float, float] = (0.3, 0.7)
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    box_overlap: float = 0.5
    box_samples: int = 512
    box_positive: float = 0.25
    box_beta: float = 1 / 9
    box_nms: float = 0.5
    score_threshold: float = 0.05
    candidates: int | None = None
    detections: int = 100

    def __post_init__(self) -> None:
        lists = ("conv_blocks", "image_mean", "image_std", "anchor_sides", "anchor_ratios")
        for name in (*lists, "rpn_before_nms", "rpn_after_nms", "rpn_overlaps"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        sizes = ("conv_blocks", "conv_width", "width", "rpn_convs", "box_linears", "box_width")
        counts = ("rpn_before_nms", "rpn_after_nms", "rpn_samples", "box_samples", "candidates", "detections")
        faults = below(self, 1, *sizes, *counts, "min_size", "max_size", "anchor_sides")
        faults += below(self, 2, "classes") + below(
            self, 0, "box_convs", "mask_convs", "trainable_layers", "norm_eps"
        )
        positive = (*self.image_std, *self.anchor_ratios, self.box_beta)
        if not min(positive) > 0:
            faults.append(f"image_std, anchor_ratios and box_beta must be positive, got {positive}")
        if not self.conv_blocks or len(self.anchor_sides) != len(self.conv_blocks) + 1:
            got = f"{len(self.conv_blocks)} and {len(self.anchor_sides)}"
            faults.append(f"conv_blocks must be one or more and anchor_sides one more of them, got {got}")
        if not self.anchor_ratios:
            faults.append("anchor_ratios must be one or more, got none")
        if self.head_norm not in NORMS:
            faults.append(f"head_norm must be one of {', '.join(NORMS)}, got {self.head_norm!r}")
        for name in ("rpn_nms", "rpn_positive", "box_overlap", "box_positive", "box_nms", "score_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.rpn_overlaps[0] <= self.rpn_overlaps[1] <= 1:
            faults.append(f"rpn_overlaps must be ascending in [0, 1], got {self.rpn_overlaps}")
        for name in ("min_size", "max_size"):
            if getattr(self, name) > LARGEST:
                faults.append(f"{name} must be at most {LARGEST}, got {getattr(self, name)}")
        if faults:
            raise ValueError("DetectorConfig: " + "; ".join(faults))


class Backbone(nn.Module):
    """The ResNet and its pyramid."""

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        norm = partial(FrozenBatchNorm if config.frozen_norm else nn.BatchNorm2d, eps=config.norm_eps)
        self.body = Trunk(config.conv_blocks, config.conv_width, norm=norm)
        channels = [4 * config.conv_width * 2**stage for stage in range(len(config.conv_blocks))]
        self.fpn = Pyramid(channels, config.width, config.head_norm != "none")
        parts = [("conv1", "bn1"), *((stage,) for stage in self.body.stages)]
        for names in parts[: max(len(parts) - config.trainable_layers, 0)]:
            for name in names:
                self.body.get_submodule(name).requires_grad_(False)

    def forward(self, pixels: Tensor) -> list[Tensor]:  # [B, 3, H, W]
        return self.fpn(self.body(pixels))


class Sampled(NamedTuple):
    """Regions of all images of a batch, and what each of them should be."""

    boxes: list[Tensor]  # [k, 4] of each image
    labels: Tensor  # [K] int64, 0 for background
    codes: Tensor  # [K, 4]
    partners: list[Tensor]  # [k] int64 of each image, its targets


class RoIHeads(nn.Module):
    """Classes, boxes and masks of regions.

    A subclass may have another `classifier`, modules by name, with its own `class_losses` and `scores`.
    """

    def __init__(self, config: DetectorConfig, classifier: Mapping[str, nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        self.box_head = box_head(config)
        kinds = 1 if config.class_agnostic else config.classes
        if classifier is None:
            classifier = {"cls_score": Linear(config.box_width, config.classes)}
        codes = Linear(config.box_width, 4 * kinds)
        self.box_predictor = nn.ModuleDict({**classifier, "bbox_pred": codes})
        if config.masks:
            width = config.width
            layer = partial(convolution, width, width, 3, norm=config.head_norm != "none", relu=True)
            self.mask_head = nn.Sequential(*(layer() for _ in range(config.mask_convs)))
            up, logits = nn.ConvTranspose2d(width, width, 2, 2), nn.Conv2d(width, kinds, 1)
            self.mask_predictor = nn.ModuleDict({"conv5_mask": up, "mask_fcn_logits": logits})

    def class_losses(
        self,
        pooled: Tensor,  # [K, C, 7, 7]
        features: Tensor,  # [K, F]
        labels: Tensor,  # [K] int64
        classes: Any,
    ) -> Losses:
        """Of the regions' classes; `classes` is what `Detector.forward` was given."""
        head: Any = self.box_predictor["cls_score"]
        loss = vlmkernels.linear_cross_entropy(features, head.weight, labels, bias=head.bias, reduction="sum")
        return {"class": (loss, len(labels))}

    def scores(
        self,
        pooled: Tensor,  # [K, C, 7, 7]
        features: Tensor,  # [K, F]
        classes: Any,
    ) -> Tensor:  # [K, classes - 1]
        """Probabilities of the classes other than the background."""
        return wide(self.box_predictor["cls_score"](features)).softmax(1)[:, 1:]

    def class_count(self, classes: Any) -> int:
        """How many there are, the background among them."""
        return self.config.classes

    def sample(
        self,
        proposals: Sequence[Tensor],  # [P, 4] of each image
        targets: Sequence[Mapping[str, Tensor]],
        generators: Sequence[torch.Generator | None],
    ) -> Sampled:
        """Some of the proposals, the targets' own boxes among them, and the target of each."""
        config, boxes, labels, codes, partners = self.config, [], [], [], []
        for proposed, target, generator in zip(proposals, targets, generators, strict=True):
            own = target["boxes"].to(proposed)
            every = torch.cat([proposed, own])
            partner = box.match(box.overlaps(own, every), config.box_overlap, config.box_overlap)
            label = every.new_zeros(len(every), dtype=torch.int64)
            label[partner >= 0] = target["labels"][partner[partner >= 0]]
            chosen = box.sample(label, config.box_samples, config.box_positive, generator)
            partner, every = partner[chosen].clamp_min(0), every[chosen]
            wanted = own[partner] if len(own) else every
            boxes.append(every)
            labels.append(label[chosen])
            codes.append(box.encode(wanted, every, BOX_WEIGHTS))
            partners.append(partner)
        return Sampled(boxes, torch.cat(labels), torch.cat(codes), partners)

    def losses(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[int],
        sampled: Sampled,
        targets: Sequence[Mapping[str, Tensor]],
        classes: Any,
    ) -> Losses:
        labels, positive = sampled.labels, (sampled.labels > 0).nonzero()[:, 0]
        pooled = box.pool(maps, strides, sampled.boxes, BOX_SIDE)
        features = self.box_head(pooled)
        kind = torch.zeros_like(labels) if self.config.class_agnostic else labels
        codes = wide(self._codes(features)[positive, kind[positive]])
        distance = F.smooth_l1_loss(
            codes, sampled.codes[positive].to(codes), beta=self.config.box_beta, reduction="sum"
        )
        found = {
            **self.class_losses(pooled, features, labels, classes),
            "box": (distance, len(labels)),
        }
        if self.config.masks:
            found["mask"] = self._mask_loss(maps, strides, sampled, targets, kind[positive])
        return found

    def _codes(self, features: Tensor) -> Tensor:  # [K, F] -> [K, classes or 1, 4]
        return self.box_predictor["bbox_pred"](features).unflatten(1, (-1, 4))

    def _masks(self, maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor]) -> Tensor:
        """Logits [K, classes or 1, 28, 28]."""
        hidden = self.mask_head(box.pool(maps, strides, boxes, MASK_SIDE))
        parts = self.mask_predictor
        return wide(parts["mask_fcn_logits"](F.relu(parts["conv5_mask"](hidden))))

    def _mask_loss(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[int],
        sampled: Sampled,
        targets: Sequence[Mapping[str, Tensor]],
        kind: Tensor,  # [positives]
    ) -> tuple[Tensor, int]:
        positive = (sampled.labels > 0).split([len(part) for part in sampled.boxes])
        boxes = [part[keep] for part, keep in zip(sampled.boxes, positive, strict=True)]
        logits = self._masks(maps, strides, boxes)
        wanted = []
        for part, partner, keep, target in zip(boxes, sampled.partners, positive, targets, strict=True):
            rows = torch.cat([partner[keep][:, None].to(part), part], 1)
            masks = target["masks"][:, None].to(part)
            wanted.append(vlmkernels.roi_align(masks, rows, logits.shape[-1], aligned=False)[:, 0])
        logits = logits[torch.arange(len(kind), device=kind.device), kind]
        loss = F.binary_cross_entropy_with_logits(logits, torch.cat(wanted).to(logits), reduction="sum")
        return loss, logits.numel()

    def detect(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[int],
        proposals: Sequence[Tensor],  # [P, 4] of each image
        sizes: Sequence[tuple[int, int]],
        classes: Any,
    ) -> list[Detections]:
        """Detections in the coordinates of the batch; masks are [n, 28, 28], of the boxes."""
        counts = [len(part) for part in proposals]
        pooled = box.pool(maps, strides, proposals, BOX_SIDE)
        features = self.box_head(pooled)
        scores = self.scores(pooled, features, classes).split(counts)
        decoded = box.decode(wide(self._codes(features)), torch.cat(list(proposals)), BOX_WEIGHTS).split(
            counts
        )
        found = [self._best(*each) for each in zip(scores, decoded, sizes, strict=True)]
        if not self.config.masks:
            return found
        logits = self._masks(maps, strides, [each.boxes for each in found])
        labels = torch.cat([each.labels for each in found])
        kind = torch.zeros_like(labels) if self.config.class_agnostic else labels
        masks = logits[torch.arange(len(kind), device=kind.device), kind].sigmoid()
        parts = masks.split([len(each.boxes) for each in found])
        return [each._replace(masks=part) for each, part in zip(found, parts, strict=True)]

    def _best(
        self,
        scores: Tensor,  # [P, classes - 1]
        boxes: Tensor,  # [P, classes or 1, 4]
        size: tuple[int, int],
    ) -> Detections:
        config = self.config
        row, label = (scores > config.score_threshold).nonzero(as_tuple=True)
        score = scores[row, label]
        if config.candidates is not None and len(score) > config.candidates:
            score, best = score.topk(config.candidates)
            row, label = row[best], label[best]
        label = label + 1
        found = box.clip(boxes[row, 0 if config.class_agnostic else label], size)
        large = box.sides_of_at_least(found, BOX_LEAST)
        found, score, label = found[large], score[large], label[large]
        kept = vlmkernels.nms(found, score, config.box_nms, groups=label)[: config.detections]
        return Detections(found[kept], score[kept], label[kept], None)


def box_head(config: DetectorConfig) -> nn.Sequential:
    """Pooled regions [K, C, 7, 7] to features [K, F]: convolutions, then linear layers."""
    norm, channels = config.head_norm != "none", config.width
    parts: list[tuple[str, nn.Module]] = [
        (str(index), convolution(channels, channels, 3, norm=norm, relu=True))
        for index in range(config.box_convs)
    ]
    parts.append((str(len(parts)), nn.Flatten()))
    width = channels * BOX_SIDE**2
    for index in range(config.box_linears):
        # torchvision names the layers of a head without convolutions
        name = str(len(parts)) if config.box_convs else f"fc{6 + index}"
        parts.append((name, Linear(width, config.box_width)))
        if config.head_norm == "all":
            parts.append((f"norm{index}", RowNorm(config.box_width)))
        parts.append((str(len(parts)), nn.ReLU()))
        width = config.box_width
    return nn.Sequential(OrderedDict(parts))


class Detector(Pretrained):
    """Backbone, RPN and heads. `heads` may be another `RoIHeads` of the same config."""

    model_type: ClassVar[str] = "detector"
    config_class: ClassVar[type] = DetectorConfig
    config: DetectorConfig

    def __init__(self, config: DetectorConfig, heads: RoIHeads | None = None) -> None:
        super().__init__(config)
        self.backbone, self.rpn = Backbone(config), RPN(config)
        self.roi_heads = RoIHeads(config) if heads is None else heads
        first = self.backbone.body.stride // 2 ** (len(config.conv_blocks) - 1)
        self.strides = [first * 2**stage for stage in range(len(config.conv_blocks))]
        self._initialise()

    def _initialise(self) -> None:
        """As torchvision: RPN N(0, 0.01), heads by their fan-out, pyramid by its fan-in; but the logits of
        masks N(0, 0.001), whose fan-out is the number of classes.
        """
        for name, module in self.named_modules():
            if not isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) or name.startswith("backbone.body."):
                continue
            if name.startswith("rpn."):
                nn.init.normal_(module.weight, std=0.01)
            elif name.endswith("mask_fcn_logits"):
                nn.init.normal_(module.weight, std=0.001)
            elif name.startswith("backbone.fpn."):
                nn.init.kaiming_uniform_(module.weight, a=1)
            else:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        images: Sequence[Tensor] | Tensor,  # [3, H, W] each
        targets: Sequence[Mapping[str, Tensor]],
        *,
        classes: Any = None,
        generators: Sequence[torch.Generator] | None = None,
    ) -> dict[str, Any]:
        """The losses of a batch of images of any sizes, and their sum.

        Args:
            images: floating, in [0, 1], on the device of the model.
            targets: of each image, as torchvision has them: `boxes` [G, 4] floating (left, top, right, bottom
                in pixels), `labels` [G] int64 from 1 on, and with a mask head `masks` [G, H, W]. G may be 0.
            classes: what the heads classify against, if they are a subclass that takes it.
            generators: one for each image, for its samples of anchors and of regions; None: torch's own.

        Returns:
            `loss`, and its parts `objectness_loss`, `rpn_box_loss`, `class_loss`, `box_loss`, `mask_loss`:
            means over the sampled anchors or regions of the batch, of masks over the pixels of the positives.
            `counts`: of how many each part is the mean, by its name without "_loss".

        Raises:
            ValueError: naming every argument that does not fit.
        """
        self._check(images, targets, classes, generators)
        batch, maps = self._read(images)
        sides = zip(targets, batch.originals, batch.sizes, strict=True)
        targets = [frames.resized_target(*each, self.config.masks) for each in sides]
        draws: Sequence[Any] = [None] * len(targets) if generators is None else generators
        found = self.rpn(maps, batch.pixels.shape[-2:])
        boxes = [target["boxes"].to(found.anchors) for target in targets]
        losses = self.rpn.losses(found, boxes, draws)
        sampled = self.roi_heads.sample(self.rpn.proposals(found, batch.sizes), targets, draws)
        losses |= self.roi_heads.losses(maps[:-1], self.strides, sampled, targets, classes)
        parts = {f"{name}_loss": total / max(count, 1) for name, (total, count) in losses.items()}
        counts = {name: count for name, (_, count) in losses.items()}
        return {**parts, "loss": torch.stack(list(parts.values())).sum(), "counts": counts}

    @torch.no_grad()
    def detect(
        self, images: Sequence[Tensor] | Tensor, *, classes: Any = None
    ) -> list[Detections]:  # of each image
        """What is in each image, in its own pixels. Put the model in evaluation mode first.

        Args and errors as in `forward`. Labels are from 1 on; masks are probabilities, [n, H, W] of an image.
        """
        self._check(images, None, classes, None)
        batch, maps = self._read(images)
        proposals = self.rpn.proposals(self.rpn(maps, batch.pixels.shape[-2:]), batch.sizes)
        found = self.roi_heads.detect(maps[:-1], self.strides, proposals, batch.sizes, classes)
        result = []
        for each, size, original in zip(found, batch.sizes, batch.originals, strict=True):
            boxes = box.rescale(each.boxes, size, original)
            masks = None if each.masks is None else frames.paste(each.masks, boxes, original)
            result.append(each._replace(boxes=boxes, masks=masks))
        return result

    @torch.no_grad()
    def propose(self, images: Sequence[Tensor] | Tensor) -> list[Tensor]:  # [P, 4] of each image
        """The proposals of each image in its own pixels, the best first; args and errors as in `forward`."""
        self._check(images, None, None, None)
        batch, maps = self._read(images)
        found = self.rpn.proposals(self.rpn(maps, batch.pixels.shape[-2:]), batch.sizes)
        sizes = zip(found, batch.sizes, batch.originals, strict=True)
        return [box.rescale(*each) for each in sizes]

    def _read(self, images: Sequence[Tensor] | Tensor) -> tuple[frames.Batch, list[Tensor]]:
        dtype = next(self.parameters()).dtype
        batch = frames.batch(list(images), self.config, self.strides[-1], dtype)
        return batch, self.backbone(batch.pixels)

    def _check(
        self,
        images: Sequence[Tensor] | Tensor,
        targets: Sequence[Mapping[str, Tensor]] | None,
        classes: Any,
        generators: Sequence[torch.Generator] | None,
    ) -> None:
        faults = frames.faults_of(list(images), next(self.parameters()))
        for name, given in (("targets", targets), ("generators", generators)):
            if given is not None and len(given) != len(images):
                faults.append(f"{name} must be one for each of the {len(images)} images, got {len(given)}")
        if targets is not None and not faults:
            count = self.roi_heads.class_count(classes)
            for number, (target, image) in enumerate(zip(targets, images, strict=True)):
                size = (image.shape[1], image.shape[2])
                own = frames.target_faults(target, size, count, self.config.masks)
                faults += [f"targets[{number}]: {fault}" for fault in own]
        if faults:
            raise ValueError("Detector: " + "; ".join(faults))

    @classmethod
    def from_torchvision_state_dict(cls, source: Source, **fields: Any) -> Detector:
        """A detector with weights of torchvision's Faster or Mask R-CNN, either version, in evaluation mode.

        Shapes determine the sizes of the config; `fields` override them, or set what shapes do not show. The
        published weights of the first version are for `norm_eps=0.0`. ValueError for keys or shapes that are
        not those of a ResNet with a pyramid.
        """
        shown, given = weights.from_torchvision(source, fields)
        with naming(source):
            return cls.with_weights(config_from_dict(DetectorConfig, shown), given)


CONFIGS: dict[str, DetectorConfig] = {
    "mask-rcnn-r50-fpn": DetectorConfig(),
    "faster-rcnn-r50-fpn": DetectorConfig(masks=False),
    **{
        f"{name}-r50-fpn-v2": DetectorConfig(
            masks=masks,
            frozen_norm=False,
            head_norm="convolutions",
            rpn_convs=2,
            box_convs=4,
            box_linears=1,
        )
        for name, masks in (("mask-rcnn", True), ("faster-rcnn", False))
    },
}
