"""The region proposal network of a detector (Ren et al. 2015, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels.models.parts import boxes as box
from vlmkernels.models.parts.boxes import wide
from vlmkernels.models.parts.pyramid import convolution

WEIGHTS = (1.0, 1.0, 1.0, 1.0)
BETA = 1 / 9
LEAST = 1e-3  # the sides of a box that is kept
Losses = dict[str, tuple[Tensor, int]]  # by name, a sum and of how many it is


class Proposed(NamedTuple):
    """What the RPN says of all A anchors, those of the largest map first."""

    logits: Tensor  # [B, A]
    codes: Tensor  # [B, A, 4]
    anchors: Tensor  # [A, 4]
    counts: list[int]  # anchors of each map


class RPN(nn.Module):
    """Scores and codes of all anchors, the proposals that they give, and the losses."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, width, count = config, config.width, len(config.anchor_ratios)
        layer = partial(convolution, width, width, 3, norm=config.head_norm == "all", relu=True)
        conv = nn.Sequential(*(layer() for _ in range(config.rpn_convs)))
        logits, codes = nn.Conv2d(width, count, 1), nn.Conv2d(width, 4 * count, 1)
        self.head = nn.ModuleDict({"conv": conv, "cls_logits": logits, "bbox_pred": codes})

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> Proposed:
        hidden = [self.head["conv"](x) for x in maps]
        logits = [self.head["cls_logits"](x).permute(0, 2, 3, 1).flatten(1) for x in hidden]
        codes = [self.head["bbox_pred"](x).permute(0, 2, 3, 1).reshape(len(x), -1, 4) for x in hidden]
        grids = [(x.shape[2], x.shape[3]) for x in maps]
        like = wide(logits[0].detach())
        anchors = box.anchors(grids, size, self.config.anchor_sides, self.config.anchor_ratios, like)
        counts = [len(each) for each in anchors]
        return Proposed(wide(torch.cat(logits, 1)), wide(torch.cat(codes, 1)), torch.cat(anchors), counts)

    @torch.no_grad()
    def proposals(self, found: Proposed, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:  # [P, 4] each
        """The best boxes of each image, the best first, none of which repeats another of the same map."""
        config = self.config
        most, kept = (
            pair[0 if self.training else 1] for pair in (config.rpn_before_nms, config.rpn_after_nms)
        )
        logits = found.logits.split(found.counts, 1)
        starts = [sum(found.counts[:index]) for index in range(len(logits))]
        tops = [part.topk(min(most, part.shape[1]), 1).indices for part in logits]
        level = torch.cat([torch.full_like(top[0], index) for index, top in enumerate(tops)])
        best = torch.cat([top + start for top, start in zip(tops, starts, strict=True)], 1)  # [B, T]
        result = []
        for rows, scores, codes, size in zip(best, found.logits, found.codes, sizes, strict=True):
            boxes = box.decode(codes[rows, None], found.anchors[rows], WEIGHTS)[:, 0]
            boxes, scores = box.clip(boxes, size), scores[rows].sigmoid()
            large = box.sides_of_at_least(boxes, LEAST)
            boxes, scores, groups = boxes[large], scores[large], level[large]
            result.append(boxes[vlmkernels.nms(boxes, scores, config.rpn_nms, groups=groups)[:kept]])
        return result

    def losses(
        self,
        found: Proposed,
        targets: Sequence[Tensor],  # [G, 4] of each image
        generators: Sequence[torch.Generator | None],
    ) -> Losses:
        """Cross-entropy of a sample of the anchors, smooth L1 distance of the codes of its positives."""
        config, logits, labels, codes, wanted = self.config, [], [], [], []
        for row, (boxes, generator) in enumerate(zip(targets, generators, strict=True)):
            low, high = config.rpn_overlaps
            partner = box.match(box.overlaps(boxes, found.anchors), high, low, rescue=True)
            label = (partner >= 0).long() - (partner == box.BETWEEN).long()
            chosen = box.sample(label, config.rpn_samples, config.rpn_positive, generator)
            positive = chosen[label[chosen] == 1]
            logits.append(found.logits[row, chosen])
            labels.append(label[chosen])
            codes.append(found.codes[row, positive])
            wanted.append(box.encode(boxes[partner[positive]], found.anchors[positive], WEIGHTS))
        logit, label, code, target = (torch.cat(each) for each in (logits, labels, codes, wanted))
        entropy = F.binary_cross_entropy_with_logits(logit, label.to(logit.dtype), reduction="sum")
        distance = F.smooth_l1_loss(code, target, beta=BETA, reduction="sum")
        return {"objectness": (entropy, len(logit)), "rpn_box": (distance, len(logit))}
