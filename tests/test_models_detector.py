"""The detector against torchvision's: losses, every gradient, proposals, detections, names; and its parts."""

import dataclasses
import re

import pytest
import torch

from tests.detector_tiny import TINY, needs_torchvision, ours_of, pictures, torchvision_detector, use_python
from tests.parity import close, peer
from vlmkernels.models.detector import CONFIGS, Detector, DetectorConfig
from vlmkernels.models.parts import boxes as box

THEIR_LOSSES = {
    "objectness_loss": "loss_objectness",
    "rpn_box_loss": "loss_rpn_box_reg",
    "class_loss": "loss_classifier",
    "box_loss": "loss_box_reg",
    "mask_loss": "loss_mask",
}


@pytest.fixture
def python_torchvision(monkeypatch):
    use_python(monkeypatch)


def as_targets(targets):
    return [dict(target) for target in targets]


@needs_torchvision
@pytest.mark.parametrize("version", [1, 2])
def test_losses_and_every_gradient_are_torchvisions(version, python_torchvision):
    torch.manual_seed(version)
    theirs = torchvision_detector(version).train()
    ours = ours_of(theirs)
    images, targets = pictures()
    torch.manual_seed(5)
    wanted = theirs([image.clone() for image in images], as_targets(targets))
    sum(wanted.values()).backward()
    torch.manual_seed(5)
    found = ours(images, targets)
    found["loss"].backward()
    for name, their in THEIR_LOSSES.items():
        assert wanted[their] > 0
        close(found[name], wanted[their], name, 1e-10)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            close(gradients.pop(name), parameter.grad, f"gradient of {name}", 1e-8)
    assert not gradients or all(value is None for value in gradients.values())


@needs_torchvision
@pytest.mark.parametrize(("version", "masks"), [(1, False), (2, True)])
def test_proposals_and_detections_are_torchvisions(version, masks, python_torchvision, monkeypatch):
    torch.manual_seed(10 + version)
    theirs = torchvision_detector(version, masks=masks).eval()
    ours = ours_of(theirs)
    images, _ = pictures(1)
    proposed = []
    original = theirs.rpn.filter_proposals

    def watching(*arguments):
        result = original(*arguments)
        proposed.extend(result[0])
        return result

    monkeypatch.setattr(theirs.rpn, "filter_proposals", watching)
    with torch.no_grad():
        wanted = theirs(list(images))
        batch, maps = ours._read(images)
        mine = ours.rpn.proposals(ours.rpn(maps, batch.pixels.shape[-2:]), batch.sizes)
    found = ours.detect(images)
    for got, their in zip(mine, proposed, strict=True):
        assert len(their) > 5
        close(got, their, "proposals", 1e-10)
    for got, their in zip(found, wanted, strict=True):
        assert len(their["labels"]) > 3
        assert got.labels.equal(their["labels"])
        close(got.boxes, their["boxes"], "boxes", 1e-10)
        close(got.scores, their["scores"], "scores", 1e-10)
        if masks:
            close(got.masks, their["masks"][:, 0], "masks", 1e-10)
        assert (got.masks is None) == (not masks)


@needs_torchvision
@pytest.mark.parametrize(("name", "count"), [("mask-rcnn-r50-fpn", 1), ("faster-rcnn-r50-fpn-v2", 2)])
def test_published_layout(name, count):
    """Names and shapes of torchvision's own constructors; no memory for the weights."""
    detection, resnet = (peer(f"torchvision.models.{part}") for part in ("detection", "resnet"))
    with torch.device("meta"):
        if count == 2:
            theirs = detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None)
        else:
            frozen = peer("torchvision.ops").FrozenBatchNorm2d
            body = resnet.resnet50(weights=None, norm_layer=frozen)
            extractor = detection.backbone_utils._resnet_fpn_extractor(body, 3)
            theirs = detection.MaskRCNN(extractor, num_classes=91)
        ours = Detector(CONFIGS[name])
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in theirs.state_dict().items()}


@needs_torchvision
def test_weights_of_torchvisions_first_versions_load():
    """By the names of the published files, with the counters of norms that were frozen later."""
    theirs = torchvision_detector(1).float()
    state = dict(theirs.state_dict())
    for name in list(state):
        old = re.sub(r"^(backbone\.fpn\.\w+\.\d|rpn\.head\.conv\.0)\.0\.", r"\1.", name)
        old = old.replace("rpn.head.conv.0.", "rpn.head.conv.")
        old = re.sub(r"mask_head\.(\d)\.0\.", lambda found: f"mask_head.mask_fcn{int(found[1]) + 1}.", old)
        state[old] = state.pop(name)
    assert "roi_heads.mask_head.mask_fcn2.bias" in state
    state["backbone.body.bn1.num_batches_tracked"] = torch.tensor(3)
    model = Detector.from_torchvision_state_dict(state, frozen_norm=True)
    assert model.config.mask_convs == 2
    assert not model.training
    for name, value in theirs.state_dict().items():
        assert model.state_dict()[name].equal(value), name
    with pytest.raises(ValueError, match="it has no 'roi_heads"):
        Detector.from_torchvision_state_dict({"conv1.weight": torch.zeros(1)})


def tiny(**fields):
    torch.manual_seed(2)
    return Detector(dataclasses.replace(TINY, **fields))


def test_images_without_objects_and_without_detections():
    model = tiny(score_threshold=1.0)
    images = [torch.rand(3, 64, 64), torch.rand(3, 40, 64)]
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    targets = [{**none, "masks": torch.zeros(0, *image.shape[1:])} for image in images]
    out = model.train()(images, targets)
    assert out["loss"].isfinite()
    assert [out[name].item() for name in ("rpn_box_loss", "box_loss", "mask_loss")] == [0, 0, 0]
    assert out["class_loss"] > 0
    for found, image in zip(model.eval().detect(images), images, strict=True):
        assert [list(part.shape) for part in found] == [[0, 4], [0], [0], [0, *image.shape[1:]]]


def test_a_detector_learns_where_the_squares_are():
    """One picture; boxes, classes and masks of training come back as the best detection of each class."""
    image, masks = torch.zeros(3, 64, 64), torch.zeros(2, 64, 64)
    boxes = torch.tensor([[6.0, 8.0, 28.0, 30.0], [32.0, 34.0, 60.0, 58.0]])
    for number, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
        image[number, top:bottom, left:right] = masks[number, top:bottom, left:right] = 1
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks}]
    samples = {"box_samples": 32, "box_positive": 0.5, "candidates": None}
    model = tiny(head_norm="none", width=16, detections=10, **samples).train()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(60):
        losses = model([image], targets, generators=[torch.Generator().manual_seed(step)])
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    found = model.detect([image])[0]  # in training mode: the norms by the statistics of the one picture
    first = [found.labels.tolist().index(label) for label in (1, 3)]
    assert found.scores[first].min() > 0.3
    assert box.overlaps(found.boxes[first], boxes).diagonal().min() > 0.5
    assert ((found.masks[first] > 0.5) == masks.bool()).float().mean() > 0.95


def test_what_is_trained():
    def frozen(layers):
        model = tiny(trainable_layers=layers)
        names = [name for name, p in model.named_parameters() if not p.requires_grad]
        assert all(name.startswith("backbone.body.") for name in names)
        return {name.split(".")[2] for name in names}

    assert frozen(4) == frozen(5) == set()
    assert frozen(2) == {"conv1", "bn1", "layer1"}
    assert frozen(0) == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    assert not any(
        isinstance(m, torch.nn.BatchNorm2d) for m in tiny(frozen_norm=True).backbone.body.modules()
    )


def test_boxes_from_codes_and_codes_of_boxes():
    torch.manual_seed(0)
    corner, side = torch.rand(2, 20, 2).double().unbind(0)
    boxes = torch.cat([corner, corner + 0.1 + side], 1)
    weights = (10.0, 10.0, 5.0, 5.0)
    codes = box.encode(boxes.flip(0), boxes, weights)
    close(box.decode(codes[:, None], boxes, weights)[:, 0], boxes.flip(0))
    assert box.clip(torch.tensor([[-3.0, 2.0, 50.0, 60.0]]), (20, 30)).tolist() == [[0, 2, 30, 20]]
    limit = box.decode(torch.full((1, 1, 4), 1e4), torch.tensor([[0.0, 0.0, 1.0, 1.0]]), (1, 1, 1, 1))
    close(limit[0, 0, 2:] - limit[0, 0, :2], torch.full((2,), 62.5), tolerance=1e-3)


def test_targets_of_boxes():
    quality = torch.tensor([[0.1, 0.5, 0.7, 0.2, 0.0], [0.3, 0.4, 0.1, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    below, between = box.BELOW, box.BETWEEN
    assert box.match(quality, 0.6, 0.4).tolist() == [below, between, 0, below, below]
    # The second target's best is the second box, which overlaps the first one more; the third has none
    assert box.match(quality, 0.6, 0.4, rescue=True).tolist() == [below, 0, 0, below, below]
    assert box.match(quality[:0], 0.6, 0.4, rescue=True).tolist() == [below] * 5


def test_samples_of_boxes():
    labels = torch.tensor([0, 2, -1, 1, 0, 0, 3, 0, -1])
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        found = box.sample(labels, 4, 0.5, generator)
        assert found.tolist() == sorted(set(found.tolist()))
        assert (labels[found] > 0).sum() == 2
        assert (labels[found] == 0).sum() == 2
        assert box.sample(labels, 4, 0.5, generator.manual_seed(seed)).equal(found)
    assert (labels[box.sample(labels, 100, 0.1)] >= 0).sum() == 7


def test_errors_name_every_argument():
    model, (images, targets) = tiny(), pictures()
    images = [image.float() for image in images]
    wrong = [
        {**targets[0], "boxes": targets[0]["boxes"][:, [2, 1, 0, 3]], "labels": torch.tensor([1, 4])},
        {**targets[1], "masks": targets[1]["masks"][:, :5]},
    ]
    message = r"\[0\]: boxes must have positive .*\[0\]: labels must be in \[1, 4\).*"
    message += r"\[1\]: masks must be \[1, 48, 40\]"
    with pytest.raises(ValueError, match=message):
        model(images, wrong)
    with pytest.raises(ValueError, match=r"targets must be one for each of the 2 images, got 1; generators"):
        model(images, targets[:1], generators=[])
    with pytest.raises(ValueError, match=r"targets\[1\]: must have labels, masks, got boxes"):
        model(images, [targets[1], {"boxes": torch.zeros(0, 4)}])
    with pytest.raises(ValueError, match=r"images must be floating \[3, H, W\], got torch.uint8"):
        model.detect([torch.zeros(3, 8, 8, dtype=torch.uint8)])
    with pytest.raises(ValueError, match="images must be one or more"):
        model.detect([])
    message = r"classes must be at least 2.*anchor_sides one more.*head_norm must be one.*rpn_nms must be"
    with pytest.raises(ValueError, match=message):
        DetectorConfig(classes=1, anchor_sides=(8,), head_norm="some", rpn_nms=2.0)
