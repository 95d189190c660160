"""Scales that the optimizer put at their bounds."""

import math

import pytest
import torch

from vlmkernels.models.align import ALIGN
from vlmkernels.models.align import CONFIGS as ALIGN_CONFIGS
from vlmkernels.models.clip import CLIP
from vlmkernels.models.clip import CONFIGS as CLIP_CONFIGS
from vlmkernels.nn import InfoNCELoss
from vlmkernels.nn._bounds import within


class ClampWithoutGradientAtBounds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, low, high):
        ctx.inside = (x > low) & (x < high)
        return torch.minimum(torch.maximum(x, x.new_tensor(low)), x.new_tensor(high))

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.inside, None, None


@pytest.fixture
def clamp_without_gradient_at_bounds(monkeypatch):
    """torch.clamp as it is from release 2.15 on, in whatever release runs the test."""

    def clamp(x, min=-math.inf, max=math.inf):
        low, high = (-math.inf if min is None else min), (math.inf if max is None else max)
        return ClampWithoutGradientAtBounds.apply(x, low, high)

    for owner in (torch, torch.Tensor):
        monkeypatch.setattr(owner, "clamp", clamp)
        monkeypatch.setattr(owner, "clamp_min", lambda x, min: clamp(x, min=min))
        monkeypatch.setattr(owner, "clamp_max", lambda x, max: clamp(x, max=max))


def clip():
    model = CLIP(CLIP_CONFIGS["emoji-tiny"])
    return model, model.logit_scale, model.clamp_logit_scale_


def align():
    model = ALIGN(ALIGN_CONFIGS["emoji-tiny"])
    return model, model.temperature, model.clamp_logit_scale_


def info_nce_loss():
    module = InfoNCELoss()
    return module, module.log_scale, module.clamp_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("make", "beyond"), [(clip, 9.0), (align, -1.0), (info_nce_loss, 9.0)])
def test_a_scale_at_its_bound_can_come_back(clamp_without_gradient_at_bounds, make, beyond, dtype):
    module, parameter, clamp_ = make()
    module.to(dtype)
    with torch.no_grad():
        parameter.fill_(beyond)
    clamp_()
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    assert module.scale().item() == pytest.approx(100.0, rel=2e-2)
    for _ in range(3):  # each step wants a smaller scale
        optimizer.zero_grad()
        module.scale().backward()
        optimizer.step()
        clamp_()
    assert module.scale() < 90


@pytest.mark.parametrize("x", [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, math.inf, math.nan])
def test_within(x):
    bounded = torch.tensor(x, requires_grad=True)
    y = within(bounded, -1.0, 1.0)
    y.backward()
    torch.testing.assert_close(y.detach(), torch.tensor(x).clamp(-1.0, 1.0), equal_nan=True)
    assert bounded.grad == (0 if abs(x) > 1 else 1)
    assert within(torch.tensor(x), low=0.0).item() == pytest.approx(max(x, 0.0), nan_ok=True)
