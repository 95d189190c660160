"""Long sums of equal numbers, whose rounding errors go one way: they must not grow with the sum's length."""

import pytest
import torch
from torch import Tensor

import vlmkernels
from vlmkernels import reference
from vlmkernels.testing import assert_as_good, result_and_gradients

VALUES = [0.1, 1 / 3, 0.7, 0.013, 1.1, 2.7]


def equal(*shape: int, value: float, grad: bool = True) -> Tensor:
    return torch.full(shape, value, requires_grad=grad)


def assert_sums_as_good(op, exact, inputs: list[Tensor], which: tuple[int, ...], **options) -> None:
    """The result (0) and the gradients by inputs (1, ...) in `which`, for equal incoming gradients."""

    def results(fn, dtype):
        same = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
        return result_and_gradients(lambda *tensors: 0.1 * fn(*tensors, **options).sum(), same)

    got, low, truth = (
        results(fn, t) for fn, t in ((op, torch.float32), (exact, torch.float32), (exact, torch.float64))
    )
    for i in which:
        assert_as_good(got[i], low[i], truth[i], name=f"{i} of {[x.flatten()[0].item() for x in inputs]}")


@pytest.mark.parametrize("shape", [(1000, 64), (5000, 128), (300, 768)], ids=str)
@pytest.mark.parametrize("channels", [False, True], ids=["one gate", "gates"])
def test_gate_of_gated_residual(shape, channels):
    for value in VALUES:
        gate = equal(shape[1] if channels else 1, value=0.3)
        inputs = [equal(*shape, value=value), equal(*shape, value=value), gate]
        assert_sums_as_good(vlmkernels.gated_residual, reference.gated_residual, inputs, (3,))


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("rows", [300, 3000])
def test_bias_of_linear(rows, activation):
    for value in VALUES:
        inputs = [equal(rows, 8, value=value), equal(600, 8, value=0.01), equal(600, value=value)]
        assert_sums_as_good(vlmkernels.linear, reference.linear, inputs, (3,), activation=activation)


@pytest.mark.parametrize("rows", [300, 3000])
def test_biases_of_mlp(rows):
    for value in VALUES:
        w1, w2 = equal(600, 8, value=0.01), equal(8, 600, value=0.01)
        inputs = [equal(rows, 8, value=value), w1, equal(600, value=value), w2, equal(8, value=value)]
        assert_sums_as_good(vlmkernels.mlp, reference.mlp, inputs, (3, 5), activation="gelu")


@pytest.mark.parametrize("rows", [300, 3000])
def test_biases_of_gated_mlp(rows):
    def with_biases(op):
        def call(x, w_gate, w_up, w_down, b_gate, b_up, b_down):
            return op(x, w_gate, w_up, w_down, b_gate=b_gate, b_up=b_up, b_down=b_down)

        return call

    for value in VALUES:
        weights = [equal(600, 8, value=0.01), equal(600, 8, value=0.02), equal(8, 600, value=0.01)]
        biases = [equal(size, value=value) for size in (600, 600, 8)]
        inputs = [equal(rows, 8, value=value), *weights, *biases]
        ops = (with_biases(vlmkernels.gated_mlp), with_biases(reference.gated_mlp))
        assert_sums_as_good(*ops, inputs, (5, 6, 7))


def attention(result: int, tq: int, tk: int, **options):
    """Of every query over every key: the result (0) or the log-sum-exp (1)."""
    bounds = torch.zeros(tq).long(), torch.full((tq,), tk)

    def of(op):
        def call(query, key, value, bias=None):
            return op(query, key, value, *bounds, relative_bias=bias, return_lse=True, **options)[result]

        return call

    return of(vlmkernels.interval_attention), of(reference.interval_attention)


@pytest.mark.parametrize("tq", [1, 2, 3, 70])
def test_softmax_of_attention(tq):
    """One key is apart, so that the exponentials of the others are equal and not 1."""
    for value in VALUES:
        key = equal(1, 1, 4000, 8, value=0.0, grad=False)
        key[:, :, 0] = value
        inputs = [equal(1, 1, tq, 8, value=1.0), key, equal(1, 1, 4000, 24, value=value, grad=False)]
        assert_sums_as_good(*attention(1, tq, 4000), inputs, (0,))
        if tq <= 2:  # with more queries the result is a product of matrices
            assert_sums_as_good(*attention(0, tq, 4000), inputs, (0,))


@pytest.mark.parametrize(("batch", "side"), [(1, 23), (64, 7), (300, 3)])
def test_bias_of_attention(batch, side):
    tokens = side * side
    inputs = [equal(batch, 1, tokens, 8, value=0.0, grad=False) for _ in range(3)]
    inputs.append(equal(1, 2 * side - 1, 2 * side - 1, value=0.0))
    assert_sums_as_good(*attention(1, tokens, tokens, grid=(side, side)), inputs, (4,))


def two_directions(n: int, m: int, dim: int) -> list[Tensor]:
    """Queries that are all alike, and keys of two kinds."""
    query, key = torch.nn.functional.normalize(torch.randn(3, dim), dim=-1).split([1, 2])
    features = query.expand(n, dim), key.repeat_interleave((m + 1) // 2, 0)[:m]
    return [x.clone().requires_grad_() for x in features]


@pytest.mark.parametrize("shape", [(300, 300, 16), (1000, 1000, 16), (520, 2500, 16)], ids=str)
def test_sums_of_the_contrastive_losses(shape):
    n, m, _ = shape
    features = two_directions(*shape)
    for value in VALUES:
        scale, bias = (torch.tensor(x, requires_grad=True) for x in (10 * value, -3.0))
        losses = vlmkernels.info_nce, reference.info_nce
        assert_sums_as_good(*losses, [*features, scale], (0,), symmetric=n == m)
        losses = vlmkernels.sigmoid_loss, reference.sigmoid_loss
        assert_sums_as_good(*losses, [*features, scale, bias], (0, 3, 4))
