"""linear, mlp and gated_mlp on the CPU, under the sanitizer, against their references."""

import math

import pytest
import torch

pytest.importorskip("triton")

from vlmkernels.reference import _dense as dense_reference
from vlmkernels.reference._dense import ACTIVATIONS
from vlmkernels.reference.linear import linear_bwd as reference_bwd
from vlmkernels.testing import assert_as_good
from vlmkernels.triton import _dense as dense
from vlmkernels.triton import linear

from .interpreter import interpreting
from .trials import check
from .trials_dense import OPS, Layer

pytestmark = pytest.mark.sampled(5)

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
SIZES = {"linear": (20, 45), "mlp": (20, 45, 6), "gated_mlp": (20, 45, 6)}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("zero", ["rows", 0, 1, 2])
@pytest.mark.parametrize("keep", [True, False])
def test_sizes_of_zero(op, zero, keep):
    sizes = [0 if i == zero else size for i, size in enumerate(SIZES[op])]
    check(Layer(op, 0 if zero == "rows" else 9, sizes, FP32, activation="relu", residual=FP32, keep=keep))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtypes", [(FP64, FP64), (FP64, None), (BF16, FP64)], ids=str)
def test_float64_runs_the_reference(op, dtypes):
    trial = Layer(op, 9, SIZES[op], dtypes[0], residual=dtypes[1])
    with interpreting(sanitize=True):
        got = trial.launch()
    assert torch.equal(got[0], trial.expected(None)[0])
    if dtypes[0] == FP64:
        trial.judge(got)


def test_leading_dimensions_strides_and_broadcast_gradients():
    x, weight, bias = torch.randn(5, 3, 20).transpose(0, 1), torch.randn(20, 12).T, torch.randn(1).expand(12)
    residual, dout = torch.randn(12, 5, 3).permute(2, 1, 0), torch.randn(12).expand(3, 5, 12)
    arguments = (x, weight, bias, residual, "gelu", True)
    with interpreting(sanitize=True):
        got = linear.linear(*arguments)
        grads = linear.linear_bwd(dout, x, weight, bias, got[1], "gelu", [True] * 3)
    want = OPS["linear"][2](*arguments)
    expected = reference_bwd(dout, x, weight, bias, want[1], "gelu", [True] * 3)
    for ours, theirs in zip((*got, *grads), (*want, *expected), strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_what_is_not_finite(activation):
    """NaN stays, and no gradient passes a closed relu."""
    y, dout = torch.tensor([[math.nan, -2.0, 3.0]]), torch.tensor([[1.0, math.inf, math.nan]])
    with interpreting(sanitize=True):
        out = dense.activated(y, activation)
        dy, *_ = dense.activated_bwd(dout, y, activation, None, dense.Needs(dy=True))
    want = dense_reference.activate(y, activation), dense_reference.activate_bwd(dout, y, activation)
    torch.testing.assert_close((out, dy), want, equal_nan=True)


def test_sums_of_many_equal_rows_do_not_drift(monkeypatch):
    """Errors of equal numbers add up in one direction in a long chain of float32."""
    monkeypatch.setattr(dense.gated, "PROGRAMS", 1)
    y, dout = torch.full((4097, 256), 0.7), torch.full((4097, 256), 0.1)
    with interpreting(sanitize=True):
        dy, _, _, sums, _ = dense.activated_bwd(dout, y, "silu", None, dense.Needs(dy=True, sums=True))
    assert_as_good(sums, dy.sum(0), dy.double().sum(0))


def test_an_unknown_activation_is_refused():
    y = torch.zeros(2, 3)
    for call in (dense.activated, lambda *x: dense.activated_bwd(y, *x, None, dense.Needs(dy=True))):
        with pytest.raises(ValueError, match=r"activation must be one of none, .*, got 'tanh'"):
            call(y, "tanh")
