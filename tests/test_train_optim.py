"""Which parameters decay, the schedule, and the average of the weights."""

import itertools

import pytest
import torch
from torch import nn

from vlmkernels.models.align import ALIGN
from vlmkernels.models.align import CONFIGS as ALIGN_CONFIGS
from vlmkernels.models.clip import CLIP, ClipConfig
from vlmkernels.train import TrainConfig
from vlmkernels.train.optim import build_average, build_optimizer, learning_rate, parameter_groups


def tiny_clip() -> CLIP:
    sizes = {"embed_dim": 8, "image_size": 16, "vision_layers": 1, "vision_width": 8, "patch_size": 8}
    text = {"context_length": 8, "vocab_size": 20, "eot_id": 19, "text_width": 8, "text_layers": 1}
    return CLIP(ClipConfig(**sizes, **text, vision_heads=2, text_heads=2))


@pytest.mark.parametrize(
    "build", [tiny_clip, lambda: ALIGN(ALIGN_CONFIGS["emoji-tiny"])], ids=["clip", "align"]
)
def test_gains_biases_and_scales_do_not_decay(build):
    model = build()
    decayed, free = (group["params"] for group in parameter_groups(model, 0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms = {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d))
        for name, _ in module.named_parameters(recurse=False)
    }
    without = {names[id(parameter)] for parameter in free}
    assert norms <= without
    assert {name for name in names.values() if name.endswith("bias")} <= without
    assert without & {"logit_scale", "temperature"}
    assert all(
        names[id(parameter)].endswith(("weight", "proj", "projection", "embedding")) for parameter in decayed
    )
    assert len(decayed) + len(free) == len(names)


def test_frozen_parameters_are_left_out():
    model = tiny_clip()
    model.visual.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())


def test_schedule():
    config = TrainConfig(lr=2.0, min_lr=0.5, warmup_steps=4)
    rates = [learning_rate(step, 14, config) for step in range(15)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[9] == pytest.approx(1.25)
    assert rates[14] == pytest.approx(0.5)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
    assert learning_rate(0, 10, TrainConfig(lr=2.0, warmup_steps=0)) == 2.0


def test_average_follows_the_definition():
    model = nn.Linear(3, 2)
    average = build_average(model, 0.9)
    expected = None
    for _ in range(4):
        with torch.no_grad():
            model.weight += torch.randn_like(model.weight)
        average.update_parameters(model)
        now = model.weight.detach().clone()
        expected = now if expected is None else 0.9 * expected + 0.1 * now
    torch.testing.assert_close(average.module.weight, expected)
    assert build_average(model, 0.0) is None


def test_optimizers():
    model = tiny_clip()
    adamw = build_optimizer(model, TrainConfig(beta1=0.8, weight_decay=0.3))
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.3, 0.0]
    assert adamw.param_groups[0]["betas"] == (0.8, 0.98)
    assert isinstance(build_optimizer(model, TrainConfig(optimizer="sgd")), torch.optim.SGD)
