"""gated_linear_residual on the CPU, under the sanitizer, against the reference in float64."""

import pytest
import torch

pytest.importorskip("triton")

from vlmkernels.reference.gated_linear_residual import gated_linear_residual_bwd, gated_linear_residual_fwd
from vlmkernels.testing import assert_as_good
from vlmkernels.triton import _contrastive as tiles
from vlmkernels.triton import gated_linear_residual as linear

from .interpreter import interpreting

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("dh", "dweight", "dgate")


def problem(n, d, k, dtype, *, x_dtype=None, per_channel=False, masked=False):
    """(h, weight, x, gate, row_mask), h in rows further apart than they are wide, NaN where masked."""
    mask = torch.rand(n) > 0.4 if masked else None
    h = torch.full((n, k + 7), float("nan"), dtype=dtype)[:, 3:-4].copy_(torch.randn(n, k))
    if masked:
        h[~mask] = float("nan")
    weight = torch.randn(d, k).to(dtype) / max(k, 1) ** 0.5
    x = torch.randn(n, d).to(x_dtype or dtype)
    return h, weight, x, torch.randn(1, 1, d if per_channel else 1), mask


def widened(tensors, work):
    return [x.to(work) if x is not None and x.is_floating_point() else x for x in tensors]


def check(inputs, needs=(True, True, True)):
    h, weight, x, gate, mask = inputs
    dtype = torch.promote_types(x.dtype, h.dtype)
    dout = torch.randn(x.shape).to(dtype)
    if mask is not None:
        dout[~mask] = float("nan")
    with interpreting(sanitize=True):
        out = linear.gated_linear_residual(*inputs)
        grads = linear.gated_linear_residual_bwd(dout, h, weight, gate, mask, *needs)
    wide = [widened(inputs, work) for work in (torch.float32, torch.float64)]
    low, exact = (gated_linear_residual_fwd(*tensors) for tensors in wide)
    assert_as_good(out, low.to(dtype), exact, name="out")
    if mask is not None:
        assert torch.equal(out[~mask], x[~mask].to(dtype))
    saved = [[tensors[0], tensors[1], *tensors[3:]] for tensors in wide]
    # dout enters products in the dtype of h
    low = gated_linear_residual_bwd(dout.to(h.dtype).float(), *saved[0], *needs)
    exact = gated_linear_residual_bwd(dout.double(), *saved[1], *needs)
    for name, got, like, lower, true, need in zip(
        NAMES, grads, (h, weight, gate), low, exact, needs, strict=True
    ):
        if not need:
            assert got.numel() == 0
        elif dtype == torch.float32 and h.dtype == torch.float32:
            assert_as_good(got, lower.to(like.dtype), true, name=name)
        else:
            assert got.dtype == like.dtype
            assert (got.double() - true).norm() <= 4e-3 * true.norm() + 1e-30, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (37, 130, 45), (70, 24, 96), (5, 3, 0)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gated_linear_residual(size, dtype, per_channel, masked):
    check(problem(*size, dtype, per_channel=per_channel, masked=masked))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_residual_stream(dtype, per_channel):
    check(problem(20, 40, 30, dtype, x_dtype=torch.float32, per_channel=per_channel, masked=True))


@pytest.mark.parametrize("large", [False, True])
def test_every_tile(large, monkeypatch):
    monkeypatch.setattr(tiles, "LARGE", 0 if large else 1 << 60)
    check(problem(150, 100, 70, torch.bfloat16))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), ()], ids=str)
def test_frozen_inputs_cost_and_return_nothing(needed, per_channel):
    inputs = problem(20, 30, 25, torch.float32, per_channel=per_channel)
    check(inputs, [i in needed for i in range(3)])


def test_a_closed_gate_keeps_x_and_has_a_gradient():
    h, weight, x, _, _ = problem(20, 30, 25, torch.bfloat16)
    gate = torch.zeros(())
    with interpreting(sanitize=True):
        assert torch.equal(linear.gated_linear_residual(h, weight, x, gate, None), x)
    check((h, weight, x, gate, None))


def test_leading_dimensions_strides_and_broadcast_gradients():
    h, weight, gate = torch.randn(5, 3, 4, 16).transpose(0, 1), torch.randn(16, 24).T, torch.randn(24)
    x, dout = torch.randn(3, 5, 24, 4).mT, torch.randn(1, 1, 24).expand(3, 5, 4, 24)[..., :24]
    mask = (torch.rand(5, 3, 4) > 0.3).transpose(0, 1)
    with interpreting(sanitize=True):
        out = linear.gated_linear_residual(h, weight, x, gate, mask)
        grads = linear.gated_linear_residual_bwd(dout, h, weight, gate, mask, True, True, True)
    expected = gated_linear_residual_bwd(dout, h, weight, gate, mask, True, True, True)
    assert torch.allclose(out, gated_linear_residual_fwd(h, weight, x, gate, mask), atol=1e-5)
    for got, want in zip(grads, expected, strict=True):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(0, 5, 4), (3, 0, 4)], ids=str)
def test_sizes_of_zero(size):
    h, weight, x, _, _ = problem(*size, torch.float32)
    with interpreting(sanitize=True):
        assert linear.gated_linear_residual(h, weight, x, torch.ones(1), None).shape == x.shape
        dh, dweight, dgate = linear.gated_linear_residual_bwd(
            x, h, weight, torch.ones(1), None, True, True, True
        )
    assert torch.equal(dh, torch.zeros(h.shape))
    assert torch.equal(dweight, torch.zeros(weight.shape))
    assert torch.equal(dgate, torch.zeros(1))


@pytest.mark.parametrize("wide", ["h", "x"])
def test_float64_runs_the_reference(wide):
    dtypes = (torch.float64, torch.float64) if wide == "h" else (torch.float32, torch.float64)
    inputs = problem(7, 6, 5, dtypes[0], x_dtype=dtypes[1])
    out = linear.gated_linear_residual(*inputs)
    assert torch.equal(out, gated_linear_residual_fwd(*inputs))
    saved = (out, inputs[0], inputs[1], inputs[3], None, True, True, True)
    for got, want in zip(
        linear.gated_linear_residual_bwd(*saved), gated_linear_residual_bwd(*saved), strict=True
    ):
        assert torch.equal(got, want)
