"""Average precision of a detector, by COCO's definition, over base and novel classes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy
import torch

from vlmkernels.data import BrokenImageError
from vlmkernels.data.coco import runs_of

from .scores import Scores

GROUPS = ("all", "base", "novel")


@dataclasses.dataclass(frozen=True)
class DetectionScores(Scores):
    """``box`` and ``mask``: for each of ``GROUPS`` that has classes, ``AP`` (the mean over IoU 0.5 to 0.95)
    and ``AP50``, means over the classes with objects; ``classes`` counts these. ``proposed`` is the fraction
    of objects with a detection of any class at IoU 0.5 or more.
    """

    objects: int
    classes: dict[str, int]
    box: dict[str, dict[str, float]]
    mask: dict[str, dict[str, float]]
    proposed: float

    def __str__(self) -> str:
        lines = [f"{self.counted()}, {self.objects} objects, {self.proposed:.3f} with a box at IoU 0.5"]
        for name in ("box", "mask"):
            for group, scores in getattr(self, name).items():
                told = ", ".join(f"{score} {value:.3f}" for score, value in scores.items())
                lines.append(f"{name}, {group} {self.classes[group]} classes: {told}")
        return "\n".join(lines)


def evaluate_detection(detect: Callable[[Any], Any], dataset: Any) -> DetectionScores:
    """Evaluate ``detect``: image [3, H, W] to `Detections`, whose labels are places in ``dataset.names``.

    ``dataset.picture(i)`` is the i-th `Picture` with all its boxes. ModuleNotFoundError without pycocotools
    (of pycocoevalcap), ValueError when no image can be read.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for index in range(len(dataset)):
        try:
            picture, _ = dataset.picture(index)
        except BrokenImageError:
            continue
        height, width = picture.image.shape[1:]
        images.append({"id": index, "height": height, "width": width})
        for box, label, mask in zip(picture.boxes, picture.labels, picture.masks, strict=True):
            truth.append(
                {**_region(index, box, mask), "category_id": int(label), "id": 1 + len(truth), "iscrowd": 0}
            )
        detections = detect(picture.image)
        masks = [None] * len(detections.boxes) if detections.masks is None else detections.masks > 0.5
        for box, score, label, mask in zip(
            detections.boxes, detections.scores, detections.labels, masks, strict=True
        ):
            row = {"category_id": 1 + int(label), "score": float(score), "id": 1 + len(found), "iscrowd": 0}
            found.append({**_region(index, box, mask), **row})
    skipped = dict(dataset.skipped)
    if not images:
        raise ValueError(f"data: no sample can be read, {len(skipped)} skipped")
    categories = [{"id": 1 + i, "name": name} for i, name in enumerate(dataset.names)]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress
        gold, guess = (_indexed(COCO, images, rows, categories) for rows in (truth, found))
        precision = {}
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            if found and any("segmentation" not in row for row in found) and kind == "segm":
                continue
            precision[name] = _precision(COCOeval(gold, guess, kind))
        unlabelled = COCOeval(gold, guess, "bbox")
        unlabelled.params.useCats = 0
        recall = _recall(unlabelled)
    places = {
        "all": list(range(len(dataset.names))),
        "base": [i for i, name in enumerate(dataset.names) if name not in dataset.novel],
        "novel": [i for i, name in enumerate(dataset.names) if name in dataset.novel],
    }
    seen = {row["category_id"] - 1 for row in truth}
    places = {group: [i for i in places[group] if i in seen] for group in GROUPS}
    places = {group: rows for group, rows in places.items() if rows}
    scores = {
        name: {
            group: {"AP": float(each[:, rows].mean()), "AP50": float(each[0, rows].mean())}
            for group, rows in places.items()
        }
        for name, each in precision.items()
    }
    return DetectionScores(
        samples=len(images),
        skipped=skipped,
        objects=len(truth),
        classes={group: len(rows) for group, rows in places.items()},
        box=scores.get("box", {}),
        mask=scores.get("mask", {}),
        proposed=recall,
    )


def _region(image: int, box: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
    from pycocotools import mask as coder

    left, top, right, bottom = box.tolist()
    row = {"image_id": image, "bbox": [left, top, right - left, bottom - top]}
    if mask is None:
        return {**row, "area": (right - left) * (bottom - top)}
    runs = runs_of(mask.cpu())
    return {**row, "area": float(mask.sum()), "segmentation": coder.frPyObjects(runs, *runs["size"])}


def _indexed(cls: Any, images: list[Any], rows: list[Any], categories: list[Any]) -> Any:
    coco = cls()
    coco.dataset = {"images": images, "annotations": rows, "categories": categories}
    coco.createIndex()
    return coco


def _precision(evaluation: Any) -> numpy.ndarray:  # [10 IoUs, classes]
    """The mean over recalls, 0 for classes without detections."""
    evaluation.evaluate()
    evaluation.accumulate()
    values = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class]; -1 without objects
    return numpy.where(values < 0, 0, values).mean(1)


def _recall(evaluation: Any) -> float:
    evaluation.evaluate()
    evaluation.accumulate()
    return float(max(evaluation.eval["recall"][0, 0, 0, -1], 0))
