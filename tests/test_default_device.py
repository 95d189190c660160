"""`torch.set_default_device` changes where tensors are made, and nothing that the library computes."""

import numpy as np
import pytest
import torch
from PIL import Image

import vlmkernels
from tests.every_model import CASES, build
from vlmkernels.data import image_transform
from vlmkernels.train.batches import BatchPlan
from vlmkernels.use import evaluate


@pytest.mark.parametrize("name", CASES)
def test_models(name):
    case = build(name)
    batch = case.batch()
    wanted = case.run(*batch)
    weights = [weight for weight in case.model.parameters() if weight.requires_grad]
    wanted_grads = torch.autograd.grad(wanted.sum(), weights, allow_unused=True)
    with torch.device("meta"):
        got = case.run(*batch)
        grads = torch.autograd.grad(got.sum(), weights, allow_unused=True)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(grads, wanted_grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@torch.no_grad()
def test_generated_texts():
    simvlm, flamingo = build("simvlm"), build("flamingo")
    images, vision_x, lang_x = simvlm.batch()[0], *flamingo.batch()[:2]
    options = [{"max_new_tokens": 4}, {"max_new_tokens": 4, "num_beams": 2}]

    def texts():
        ours = [simvlm.model.generate(images, **given) for given in options]
        return ours + [flamingo.model.generate(vision_x, lang_x, **given) for given in options]

    wanted = texts()
    with torch.device("meta"):
        assert all(torch.equal(a, b) for a, b in zip(texts(), wanted, strict=True))


def test_losses():
    features, ids = torch.randn(8, 5, requires_grad=True), torch.arange(8) % 3

    def losses():
        calls = [
            vlmkernels.info_nce(features, features, 2.0, positives=(ids, ids), label_smoothing=0.1),
            vlmkernels.info_nce(features, features, 2.0, positives=ids, symmetric=False),
            vlmkernels.info_nce(features, features, 2.0, reduction="none").sum(),
            vlmkernels.contrastive_distillation(features, features, 2.0, features, features, 3.0),
            vlmkernels.sigmoid_loss(features, features, 2.0, -1.0, positives=(ids, ids)),
            vlmkernels.sigmoid_loss(features, features, 2.0, -1.0, reduction="sum"),
        ]
        return [(loss, *torch.autograd.grad(loss, features)) for loss in calls]

    wanted = losses()
    with torch.device("meta"):
        torch.testing.assert_close(losses(), wanted)


def test_data_and_metrics():
    image = Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3))
    features, labels = torch.eye(4), torch.tensor([0, 1, 2, 2])

    def results():
        torch.manual_seed(0)
        augmented = image_transform(32, train=True)(image)
        plain = image_transform(32)(image)
        order = list(BatchPlan(10, 4, seed=0).batches(0))
        return augmented, plain, order, evaluate.classification(features, labels, features)

    wanted = results()
    with torch.device("meta"):
        got = results()
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])
    assert got[2:] == wanted[2:]
