"""EfficientNet: the compound rule, TensorFlow's padding, global pooling, stochastic depth."""

import math

import pytest
import torch

from vlmkernels.models.efficientnet import COEFFICIENTS, EfficientNet, StridedPad
from vlmkernels.models.parts.stochastic_depth import drop_branch

CLASSIFIERS = {  # parameters of the published classifiers of 1000 classes
    **{"b0": 5_288_548, "b1": 7_794_184, "b2": 9_109_994, "b3": 12_233_232},
    **{"b4": 19_341_616, "b5": 30_389_784, "b6": 43_040_704, "b7": 66_347_960},
}


@pytest.mark.parametrize(("name", "classifier"), CLASSIFIERS.items())
def test_parameter_counts_are_the_published_ones_less_the_head(name, classifier):
    width, depth, _ = COEFFICIENTS[name]
    with torch.device("meta"):
        model = EfficientNet(width, depth)
    head = 4 * model.feature_dim  # 1x1 convolution and its BatchNorm, then a linear layer
    head_parameters = model.feature_dim * head + 2 * head + 1000 * head + 1000
    assert sum(p.numel() for p in model.parameters()) == classifier - head_parameters


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("size", [1, 2, 9, 10, 75, 289])
def test_padding_rules(kernel, size):
    """ "same": ceil(size / 2) windows whose centres are spread evenly; "fixed": floor(size / 2)."""
    before, after = StridedPad(kernel, "same").amounts(size)
    assert 0 <= after - before <= 1
    assert (size + before + after - kernel) // 2 + 1 == math.ceil(size / 2)
    assert (size + before + after - kernel) % 2 == 0
    before, after = StridedPad(kernel, "fixed").amounts(size)
    assert (before, after) == (kernel // 2 - 1, kernel // 2)
    assert (size + before + after - kernel) // 2 + 1 == size // 2


@pytest.mark.parametrize(("padding", "side"), [("same", 10), ("fixed", 9)])
def test_map_and_pooling_at_the_papers_resolution(padding, side):
    model = EfficientNet(0.25, 0.1, padding=padding).eval()
    images = torch.randn(1, 3, 289, 289)
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (1, 80, side, side)
        torch.testing.assert_close(model(images), features.flatten(2).mean(2))


def test_pooling_is_global_at_any_size():
    """A pool of fixed width (as wide as the feature, 80 here) would leave a 2 x 1 map at this height."""
    model = EfficientNet(0.25, 0.1, strides=(1,) * 7).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 180, 8)).shape == (1, 80)


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    x = torch.rand(4000, 2, 3, 3) + 0.5
    y = drop_branch(x, 0.25, training=True)
    kept = (y != 0).flatten(1)
    assert torch.equal(kept.all(1), kept.any(1))
    torch.testing.assert_close(y[kept.all(1)], x[kept.all(1)] / 0.75)
    assert abs(kept.all(1).float().mean() - 0.75) < 0.03
    assert drop_branch(x, 0.25, training=False) is x


def test_stochastic_depth_rates_rise_with_depth():
    blocks = EfficientNet(0.25, 1.0, drop_rate=0.2).encoder["blocks"]
    assert [block.drop_rate for block in blocks] == [0.2 * i / len(blocks) for i in range(len(blocks))]
    assert [block.residual for block in blocks].count(False) == 7


def test_stochastic_depth_acts_in_training_only():
    for rate, random in ((0.0, False), (0.9, True)):
        model = EfficientNet(0.25, 1.0, drop_rate=rate).train()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        images = torch.randn(4, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(model(images), model(images)) != random
            model.eval()
            assert torch.equal(model(images), model(images))


def test_initial_weights():
    """Variance 2 / fan_out, fan_out counted within the group; no bias."""
    model = EfficientNet(1.0, 0.1)
    block = model.encoder["blocks"][4]
    for conv, fan_out in (
        (model.embeddings["convolution"], 9 * 32),
        (block.depthwise_conv["depthwise_conv"], 25),
        (block.projection["project_conv"], 112),
    ):
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    assert not block.squeeze_excite["reduce"].bias.any()
