"""The weights of torchvision's detectors with a ResNet and a pyramid, and the sizes that they determine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlmkernels.models.parts.pretrained import naming
from vlmkernels.models.parts.weight_files import Source, read_state_dict

# Names until torchvision 0.13, in which the weights of its first versions are published, and the names since.
RENAMED = (
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)"), r"\1.0.0.\2"),
    (re.compile(r"(backbone\.fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)"), r"\1.0.\2"),
)
OLD_MASK_LAYER = re.compile(r"roi_heads\.mask_head\.mask_fcn(\d+)\.(weight|bias)")
COUNTER = "num_batches_tracked"


def from_torchvision(source: Source, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields of DetectorConfig that the weights determine, `fields` over them, and the weights by our
    names.
    """
    given = {_renamed(name): value for name, value in read_state_dict(source).items()}
    with naming(source):
        try:
            shown = {**_shown(given), **fields}
        except KeyError as missing:
            raise ValueError(f"state_dict must be that of a detector, but it has no {missing}") from None
    if shown["frozen_norm"]:
        given = {
            name: value
            for name, value in given.items()
            if not (name.startswith("backbone.body.") and name.endswith(COUNTER))
        }
    return shown, given


def _renamed(name: str) -> str:
    for old, new in RENAMED:
        if old.fullmatch(name):
            return old.sub(new, name)
    if found := OLD_MASK_LAYER.fullmatch(name):
        return f"roi_heads.mask_head.{int(found[1]) - 1}.0.{found[2]}"
    return name


def _count(given: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers stand where the pattern has its group."""
    return len({found[1] for name in given if (found := re.match(pattern, name))})


def _shown(given: Mapping[str, Tensor]) -> dict[str, Any]:
    stages = _count(given, r"backbone\.body\.layer(\d+)\.")
    logits, codes = (
        given["roi_heads.box_predictor.cls_score.weight"],
        "roi_heads.box_predictor.bbox_pred.bias",
    )
    box_convs = _count(given, r"roi_heads\.box_head\.(\d+)\.0\.weight")
    linears = _count(given, r"roi_heads\.box_head\.(?:fc)?(\d+)\.weight")
    return {
        "classes": logits.shape[0],
        "class_agnostic": len(codes) == 4,
        "masks": "roi_heads.mask_predictor.mask_fcn_logits.weight" in given,
        "conv_blocks": tuple(
            _count(given, rf"backbone\.body\.layer{1 + stage}\.(\d+)\.") for stage in range(stages)
        ),
        "conv_width": given["backbone.body.conv1.weight"].shape[0],
        "frozen_norm": f"backbone.body.bn1.{COUNTER}" not in given,
        "width": given["backbone.fpn.layer_blocks.0.0.weight"].shape[0],
        "head_norm": "convolutions" if "backbone.fpn.layer_blocks.0.1.weight" in given else "none",
        "rpn_convs": _count(given, r"rpn\.head\.conv\.(\d+)\.0\.weight"),
        "box_convs": box_convs,
        "box_linears": linears,
        "box_width": logits.shape[1],
        "mask_convs": _count(given, r"roi_heads\.mask_head\.(\d+)\.0\.weight"),
    }
