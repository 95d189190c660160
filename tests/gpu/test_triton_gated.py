"""gated_linear_residual on the CPU, under the sanitizer, against the reference in float64."""

import pytest
import torch

pytest.importorskip("triton")

from vlmkernels.reference.gated_linear_residual import gated_linear_residual_bwd, gated_linear_residual_fwd
from vlmkernels.triton import gated_linear_residual as linear

from .interpreter import interpreting
from .trials import DTYPES, check
from .trials_gated import Linear

pytestmark = pytest.mark.sampled(5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(1, 1, 1), (37, 130, 45), (70, 24, 96), (5, 3, 0)], ids=str)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gated_linear_residual(size, dtype, per_channel, masked):
    check(Linear(*size, dtype, per_channel=per_channel, masked=masked))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_residual_stream(dtype, per_channel):
    check(Linear(20, 40, 30, dtype, x_dtype=torch.float32, per_channel=per_channel, masked=True))


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (0, 2), ()], ids=str)
def test_frozen_inputs_cost_and_return_nothing(needed, per_channel):
    check(Linear(20, 30, 25, torch.float32, per_channel=per_channel, needs=[i in needed for i in range(3)]))


def test_a_closed_gate_keeps_x_and_has_a_gradient():
    trial = Linear(20, 30, 25, torch.bfloat16)
    trial.gate = torch.zeros(())
    assert torch.equal(check(trial)[0], trial.x)


def test_leading_dimensions_strides_and_broadcast_gradients():
    h, weight, gate = torch.randn(5, 3, 4, 16).transpose(0, 1), torch.randn(16, 24).T, torch.randn(24)
    x, dout = torch.randn(3, 5, 24, 4).mT, torch.randn(1, 1, 24).expand(3, 5, 4, 24)[..., :24]
    mask = (torch.rand(5, 3, 4) > 0.3).transpose(0, 1)
    with interpreting(sanitize=True):
        out = linear.gated_linear_residual(x, h, weight, gate, mask)
        grads = linear.gated_linear_residual_bwd(dout, h, weight, gate, mask, (True, True, True))
    expected = gated_linear_residual_bwd(dout, h, weight, gate, mask, (True, True, True))
    assert torch.allclose(out, gated_linear_residual_fwd(x, h, weight, gate, mask), atol=1e-5)
    for got, want in zip(grads, expected, strict=True):
        assert got.shape == want.shape
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [(0, 5, 4), (3, 0, 4)], ids=str)
def test_sizes_of_zero(size):
    trial = Linear(*size, torch.float32)
    h, weight, x = trial.h, trial.weight, trial.x
    with interpreting(sanitize=True):
        assert linear.gated_linear_residual(x, h, weight, torch.ones(1), None).shape == x.shape
        dh, dweight, dgate = linear.gated_linear_residual_bwd(
            x, h, weight, torch.ones(1), None, (True, True, True)
        )
    assert torch.equal(dh, torch.zeros(h.shape))
    assert torch.equal(dweight, torch.zeros(weight.shape))
    assert torch.equal(dgate, torch.zeros(1))


@pytest.mark.parametrize("wide", ["h", "x"])
def test_float64_runs_the_reference(wide):
    dtypes = (torch.float64, torch.float64) if wide == "h" else (torch.float32, torch.float64)
    trial = Linear(7, 6, 5, dtypes[0], x_dtype=dtypes[1])
    inputs = (trial.x, trial.h, trial.weight, trial.gate, None)
    out = linear.gated_linear_residual(*inputs)
    assert torch.equal(out, gated_linear_residual_fwd(*inputs))
    saved = (out, *inputs[1:], (True, True, True))
    for got, want in zip(
        linear.gated_linear_residual_bwd(*saved), gated_linear_residual_bwd(*saved), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("per_channel", [False, True])
def test_float32_products_are_of_the_size_of_the_weight(per_channel, monkeypatch):
    """Of the size of h only where the gate's gradient needs a product and the weight is frozen."""
    made, product = [], linear.tiles.product

    def record(a, b, into, **options):
        made.append(tuple(into.shape))
        product(a, b, into, **options)

    monkeypatch.setattr(linear.tiles, "product", record)
    for needs, expected in (
        ((True, True, True), [(6, 5)]),
        ((True, True, False), [(6, 5)]),
        ((False, False, True), [(6, 5)]),
        ((True, False, True), [(6, 5) if per_channel else (40, 5)]),
        ((True, False, False), []),
    ):
        made.clear()
        check(Linear(40, 6, 5, torch.bfloat16, per_channel=per_channel, needs=needs))
        assert made == expected, needs
