"""Models recorded by torch.export and torch.jit.trace are right at sizes they were not recorded at."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from tests.every_model import CASES, EOT, build, numbers
from vlmkernels.inference import prepare_for_inference
from vlmkernels.nn import ClipLoss, InfoNCELoss, SigLipLoss

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.*torch.jit:DeprecationWarning"
)
every = pytest.mark.parametrize("name", CASES)

# Which dimension of which argument is the length of the text, or the number of visual tokens.
LENGTHS = {
    "clip": {1: 1}, "clip-resnet": {1: 1}, "align": {1: 1}, "simvlm": {1: 1}, "simvlm-prefix_lm": {1: 1},
    "virtex": {1: 1}, "visualgpt": {1: 1}, "flamingo": {1: 1, 3: 1}, "decoder": {0: 1},
    "resampler": {0: 3},
    "resampler-rms": {0: 3}, "resampler-squared_relu": {0: 3}, "block": {0: 1, 2: 1},
    "block-swiglu": {0: 1, 2: 1}, "block-all": {0: 1, 2: 1},
}  # fmt: skip
SIZES = [(3, 10), (2, 10), (5, 12), (4, 7)]


class OneTensor(nn.Module):
    """A case as a module of tensors alone."""

    def __init__(self, name):
        super().__init__()
        self.case = build(name)
        self.model = self.case.model
        self.none = [i for i, x in enumerate(self.case.batch()) if x is None]

    def batch(self, rows, length):
        return tuple(x for x in self.case.batch(rows, length) if x is not None)

    def forward(self, *tensors):
        arguments = list(tensors)
        for place in self.none:
            arguments.insert(place, None)
        return self.case.run(*arguments)


def assert_recorded(recorded, module):
    for rows, length in SIZES:
        batch = module.batch(rows, length)
        torch.testing.assert_close(recorded(*batch), module(*batch), rtol=1e-9, atol=1e-9)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@every
@torch.no_grad()
def test_export_with_any_batch_and_length(name, strict):
    if name.startswith("simvlm") and torch.__version__ < "2.13":
        pytest.skip("torch before 2.13 does not export a softmax of as many rows as a mask holds")
    if name.startswith("resampler") and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 takes the length of a merged dimension of size 1 for a minimum")
    if name == "vild":
        pytest.skip("its regions are sampled, as many as its images have")
    if name == "visualbert":
        pytest.skip(
            "its last layer packs the rows that a head reads, whose number is that of the batch it saw"
        )
    model, batch = build(name).model, build(name).batch(3, 10)
    case = build(name)
    rows, length = Dim("rows", min=2, max=64), Dim("length", min=4, max=12)
    shapes = [None if x is None else {0: rows} for x in batch]
    for argument, dim in LENGTHS[name].items():
        shapes[argument][dim] = length
    program = torch.export.export(model, batch, dynamic_shapes=tuple(shapes), strict=strict)
    recorded = program.module()
    for size in SIZES:
        batch = case.batch(*size)
        wanted = case.tensor(case.model(*batch))
        torch.testing.assert_close(case.tensor(recorded(*batch)), wanted, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_export_beside_a_model_on_packed_weights():
    """Its own weights are not packed, so that what packed ones need must not fix its sizes."""
    net = nn.Sequential(nn.Linear(64, 64)).eval()
    model, (images, tokens) = build("clip").model, build("clip").batch(3, 10)
    rows, length = Dim("rows", min=2, max=64), Dim("length", min=4, max=12)
    with prepare_for_inference(net):
        torch.export.export(model, (images, tokens), dynamic_shapes=({0: rows}, {0: rows, 1: length}))


@pytest.mark.sampled(2)
@every
@torch.no_grad()
def test_trace_holds_for_other_batches_and_lengths(name):
    if name == "vild":
        pytest.skip("its regions are sampled, as many as its images have")
    module = OneTensor(name).eval()
    recorded = torch.jit.trace(module, module.batch(3, 10), check_trace=False)
    assert_recorded(recorded, module)


@torch.no_grad()
def test_texts_without_an_end_are_found_in_recorded_code():
    module = TextTower(build("clip").model)
    good = build("clip").batch()[1]
    bad = good.masked_fill(good == EOT, 1)
    with pytest.raises(RuntimeError, match="index 10 is out of bounds"):
        torch.jit.trace(module, good, check_trace=False)(bad)
    with pytest.raises(RuntimeError, match="a row has no end-of-text id"):
        torch.export.export(module, (good,)).module()(bad)


class TextTower(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model.encode_text(tokens)


@pytest.mark.parametrize("padding", ["same", "fixed"])
@torch.no_grad()
def test_trace_holds_for_other_images(padding):
    tower = build("align").model.vision_model
    for module in tower.modules():
        if hasattr(module, "amounts"):
            module.mode = padding
    recorded = torch.jit.trace(tower, numbers(2, 3, 32, 32), check_trace=False)
    for height, width in ((32, 32), (33, 47), (40, 35)):
        images = numbers(3, 3, height, width)
        torch.testing.assert_close(recorded(images), tower(images))


class Loss(nn.Module):
    def __init__(self, loss, *arguments):
        super().__init__()
        self.loss, self.arguments = loss, arguments

    def forward(self, query, key):
        return self.loss(query, key, *self.arguments)


LOSSES = {
    "ClipLoss": Loss(ClipLoss(), 4.0),
    "SigLipLoss": Loss(SigLipLoss(), 4.0, -1.0),
    "InfoNCELoss": InfoNCELoss(init_scale=4.0),
    "InfoNCELoss, one way": InfoNCELoss(init_scale=4.0, symmetric=False, label_smoothing=0.1),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("recorder", ["export", "trace"])
def test_losses_of_any_batch(loss, recorder):
    example = torch.randn(4, 5), torch.randn(4, 5)
    if recorder == "export":
        rows = Dim("rows", min=2, max=1024)
        recorded = torch.export.export(loss, example, dynamic_shapes=({0: rows}, {0: rows})).module()
    else:
        recorded = torch.jit.trace(loss, example, check_trace=False)
    for rows in (4, 7, 600):
        pair = [torch.randn(rows, 5, requires_grad=True) for _ in range(2)]
        got, wanted = recorded(*pair), loss(*pair)
        torch.testing.assert_close(got, wanted)
        for a, b in zip(torch.autograd.grad(got, pair), torch.autograd.grad(wanted, pair), strict=True):
            torch.testing.assert_close(a, b)
