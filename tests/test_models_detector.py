"""The detector against torchvision's: losses, every gradient, proposals, detections, names; and its parts."""

import re

import pytest
import torch

from tests.detector_tiny import needs_torchvision, ours_of, pictures, torchvision_detector, use_python
from tests.parity import close, peer
from vlmkernels.models.detector import CONFIGS, Detector

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
