"""Small detectors, torchvision's and ours with its weights, and pictures with boxes for them."""

import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from tests.parity import peer
from vlmkernels.models.detector import Detector, DetectorConfig

CLASSES, NARROW, WIDTH, FEATURES = 5, 4, 8, 16
LIMITS = {
    "min_size": 64, "max_size": 96, "rpn_batch_size_per_image": 32, "box_batch_size_per_image": 16,
    "rpn_pre_nms_top_n_train": 60, "rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_train": 30,
    "rpn_post_nms_top_n_test": 20, "box_score_thresh": 0.1, "box_detections_per_img": 8,
}  # fmt: skip
OURS = {
    "min_size": 64, "max_size": 96, "rpn_samples": 32, "box_samples": 16, "rpn_before_nms": (60, 40),
    "rpn_after_nms": (30, 20), "score_threshold": 0.1, "detections": 8,
}  # fmt: skip
TINY = DetectorConfig(
    classes=4, class_agnostic=True, conv_blocks=(1, 1, 1), conv_width=8, frozen_norm=False, width=8,
    head_norm="all", box_convs=1, box_width=16, mask_convs=1, min_size=64, max_size=64,
    anchor_sides=(16, 32, 48, 64), rpn_before_nms=(40, 20), rpn_after_nms=(20, 10), rpn_samples=32,
    box_samples=16, detections=5, score_threshold=0.0, candidates=20,
)  # fmt: skip
needs_torchvision = pytest.mark.skipif(
    peers.why_not("torchvision") is not None, reason=f"torchvision: {peers.why_not('torchvision')}"
)


def suppress(boxes, scores, threshold):
    """Non-maximum suppression as a loop; torchvision's own is in its extension."""
    iou = peer("torchvision").ops.box_iou(boxes, boxes)
    left, kept = scores.sort(descending=True, stable=True).indices.tolist(), []
    while left:
        kept.append(left.pop(0))
        left = [each for each in left if not iou[kept[-1], each] > threshold]
    return torch.tensor(kept, dtype=torch.int64)


def averages(features, row, side):
    """RoI align of one box of an image with as many points as pixels; torchvision's own needs much memory."""
    number, low, high = int(row[0]), row[1:3], row[3:5]
    size = (high - low).clamp_min(1)
    points = (size / side).ceil().long().tolist()
    x, y = (
        low[axis] + (torch.arange(side * n).to(row) + 0.5) * size[axis] / (side * n)
        for axis, n in enumerate(points)
    )
    extent = torch.tensor(features.shape[:1:-1]).to(row) - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1) * 2 / extent - 1
    sampled = F.grid_sample(features[number, None], grid[None], padding_mode="border", align_corners=True)
    return F.avg_pool2d(sampled, points[::-1])


def use_python(monkeypatch):
    """Makes torchvision run without its extension and without the compiler."""
    peer("torchvision")
    module = sys.modules["torchvision.ops.roi_align"]
    eager = getattr(module._roi_align, "__wrapped__", module._roi_align)

    def align(features, rois, scale, height, width, ratio, aligned):
        if ratio > 0 or not len(rois):
            return eager(features, rois, scale, height, width, ratio, aligned)
        return torch.cat([averages(features, row, height) for row in rois])

    monkeypatch.setattr(module, "_roi_align", align)
    monkeypatch.setattr(module, "_has_ops", lambda: False)
    monkeypatch.setattr(sys.modules["torchvision.ops.boxes"], "nms", suppress)


def torchvision_detector(version, *, masks=True):
    """A detector of torchvision's parts, with few and narrow layers, away from its initial weights."""
    detection, resnets = (peer(f"torchvision.models.{name}") for name in ("detection", "resnet"))
    utilities, ops = peer("torchvision.models.detection.backbone_utils"), peer("torchvision.ops")
    norm = torch.nn.BatchNorm2d if version == 2 else None
    frozen = ops.FrozenBatchNorm2d if version == 1 else torch.nn.BatchNorm2d
    with torch.device("meta"):
        resnet = resnets.ResNet(resnets.Bottleneck, [1, 1, 1, 1], norm_layer=frozen)
    resnet.conv1, resnet.bn1 = torch.nn.Conv2d(3, NARROW, 7, 2, 3, bias=False), frozen(NARROW)
    resnet.inplanes = NARROW
    for index in range(4):
        stage = resnet._make_layer(resnets.Bottleneck, NARROW * 2**index, 1, stride=1 if index == 0 else 2)
        setattr(resnet, f"layer{1 + index}", stage)
    stages = {f"layer{1 + index}": str(index) for index in range(4)}
    channels = [4 * NARROW * 2**index for index in range(4)]
    backbone = utilities.BackboneWithFPN(resnet, stages, channels, WIDTH, norm_layer=norm)
    faster, masked = detection.faster_rcnn, detection.mask_rcnn
    parts = {"box_predictor": faster.FastRCNNPredictor(FEATURES, CLASSES)}
    if version == 1:
        parts["box_head"] = faster.TwoMLPHead(WIDTH * 49, FEATURES)
    else:
        parts["box_head"] = faster.FastRCNNConvFCHead((WIDTH, 7, 7), [WIDTH] * 2, [FEATURES], norm)
        parts["rpn_head"] = detection.rpn.RPNHead(WIDTH, 3, conv_depth=2)
    if masks:
        parts["mask_head"] = masked.MaskRCNNHeads(WIDTH, [WIDTH] * 2, 1, norm)
        parts["mask_predictor"] = masked.MaskRCNNPredictor(WIDTH, WIDTH, CLASSES)
    model = (masked.MaskRCNN if masks else faster.FasterRCNN)(backbone, **parts, **LIMITS)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var") or (value.dim() == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif value.is_floating_point() and value.dim() == 1:
                value.normal_(std=0.1)
            elif name.startswith("rpn.head.") or "_pred" in name:
                value.mul_(8)
    model.transform.torch_choice = lambda sizes: sizes[0]  # without a draw
    assign = model.rpn.assign_targets_to_anchors

    def in_float64(*arguments):
        labels, boxes = assign(*arguments)
        return [each.double() for each in labels], boxes

    model.rpn.assign_targets_to_anchors = in_float64
    return model.double()


def ours_of(theirs, **fields):
    """Ours with these weights, in the mode of theirs."""
    state = {name: value.float() if value.is_floating_point() else value
             for name, value in theirs.state_dict().items()}  # fmt: skip
    model = Detector.from_torchvision_state_dict(state, **{**OURS, **fields}).double()
    model.load_state_dict(theirs.state_dict())  # strict, in float64
    return model.train(theirs.training)


def pictures(seed=0):
    """Two images of different sizes and shapes, and their targets; boxes have whole and broken corners."""
    generator = torch.Generator().manual_seed(seed)
    images, targets = [], []
    for (height, width), boxes in (
        ((64, 96), [[4.0, 6.0, 40.0, 50.0], [30.5, 10.25, 90.0, 60.0]]),
        ((48, 40), [[2.0, 3.0, 30.0, 44.0]]),
    ):
        images.append(torch.rand(3, height, width, generator=generator, dtype=torch.float64))
        masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
            mask[int(top) : int(bottom) - 2, int(left) : int(right)] = 1
        labels = torch.randint(1, CLASSES, (len(boxes),), generator=generator)
        targets.append({"boxes": torch.tensor(boxes).double(), "labels": labels, "masks": masks})
    return images, targets
