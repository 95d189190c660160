"""What all public ops share: which dtypes and layouts they take, and errors that name op and argument."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import vlmkernels
from vlmkernels import ops

from .fuzz import public, raw
from .fuzz.damage import DTYPES

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def arguments(op: str) -> dict:
    """Valid ones, among them no empty tensor."""
    for seed in range(1000):
        values = public.ARGUMENTS[op](public.Draw(seed))
        if all(value.numel() for value in values.values() if isinstance(value, torch.Tensor)):
            return values
    raise AssertionError(op)


def floats(values: dict) -> list[str]:
    return [
        name
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "weight"
    ]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in FLOATS])
@pytest.mark.parametrize("op", ops.__all__)
@pytest.mark.once
def test_other_dtypes_are_refused(op, dtype):
    values = arguments(op)
    for name in floats(values):
        other = (
            torch.zeros((), dtype=torch.uint8).view(dtype)
            if dtype.itemsize == 1
            else torch.zeros((), dtype=dtype)
        )
        wanted = rf"{op}: .*{name}.* must be .*float32, float64, bfloat16 or float16.*got .*{dtype}"
        with pytest.raises(ValueError, match=wanted):
            getattr(vlmkernels, op)(**{**values, name: other.expand(values[name].shape)})


def test_float8_features_do_not_reach_a_kernel():
    x = torch.randn(256, 64).to(torch.float8_e4m3fn)
    message = r"x and weight must be float32, float64, bfloat16 or float16, got x torch.float8_e4m3fn"
    with pytest.raises(ValueError, match=message):
        vlmkernels.linear(x, x)


@pytest.mark.parametrize("op", [op for op in ops.__all__ if op not in ops.WITHOUT_GRADIENTS])
def test_recomputed_in_the_backward(op):
    """Gradient checkpointing, which gives a backward what was saved once."""
    values = arguments(op)
    leaves = [values[name].requires_grad_() for name in floats(values)]
    call = partial(getattr(vlmkernels, op), **values)
    results = call(), checkpoint(call, use_reentrant=False)
    first = (x[0] if isinstance(x, tuple) else x for x in results)
    grads = (torch.autograd.grad(x.sum(), leaves, allow_unused=True) for x in first)
    for got, wanted in zip(*grads, strict=True):
        assert got is wanted or torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("op", ops.__all__)
def test_layouts_are_refused(op):
    values = arguments(op)
    for name in floats(values):
        others = [
            values[name].float().to_sparse(),
            torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
        ]
        for other in others:
            with pytest.raises((TypeError, ValueError), match=rf"^{op}: .*{name}"):
                getattr(vlmkernels, op)(**{**values, name: other})


@pytest.mark.parametrize("value", [object(), "x", b"x", [], {}, (None, None), range(3)])
@pytest.mark.parametrize("op", ops.__all__)
@pytest.mark.once
def test_arguments_of_another_kind_are_named(op, value):
    values = arguments(op)
    for name, valid in values.items():
        if isinstance(valid, bool):  # what is given is true or false
            continue
        with pytest.raises((TypeError, ValueError), match=rf"(?s)^{op}: .*{name}"):
            getattr(vlmkernels, op)(**{**values, name: value})


def test_all_arguments_of_another_kind_are_in_one_error():
    message = "linear: x must be dense Tensor, got list of float; weight must be dense Tensor, got NoneType"
    with pytest.raises(TypeError, match=message):
        vlmkernels.linear([1.0], None, activation=3)
    with pytest.raises(
        TypeError, match=r"positives must be dense Tensor or \(dense Tensor, dense Tensor\) or None"
    ):
        vlmkernels.info_nce(torch.ones(2, 3), torch.ones(2, 3), 1.0, positives=(None, torch.arange(2)))


@pytest.mark.parametrize("op", ["linear", "mlp", "gated_mlp"])
def test_raw_ops_know_their_activations_on_every_kernel(op):
    for raw_op in (op, f"{op}_bwd"):
        values = raw.ARGUMENTS[raw_op](raw.Draw(1))
        values = ["GELU" if isinstance(value, str) else value for value in values]
        with pytest.raises(ValueError, match=r"activation must be one of none, gelu, .*, got 'GELU'"):
            getattr(torch.ops.vlmkernels, raw_op)(*values)


def test_errors_of_other_causes_stay_as_they_are():
    with pytest.raises(TypeError, match=r"linear\(\) missing 1 required positional argument: 'weight'"):
        vlmkernels.linear(torch.ones(2, 3))


@pytest.mark.parametrize("scale", [torch.tensor(0.5), torch.nn.Parameter(torch.tensor(0.5)), "0.5"])
def test_attention_takes_no_tensor_as_scale(scale):
    x, bounds = torch.ones(1, 1, 2, 4), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(TypeError, match=r"interval_attention: scale must be float or None, got"):
        vlmkernels.interval_attention(x, x, x, bounds, bounds + 2, scale=scale)
    with pytest.raises(TypeError, match=r"perceiver_attention: scale must be float or None, got"):
        vlmkernels.perceiver_attention(x, x, x, x, x, scale=scale)


def test_weights_of_info_nce_are_numbers():
    x = torch.randn(4, 3)
    for dtype in (torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=rf"weight must be float32, .*, or integers, got {dtype}"):
            vlmkernels.info_nce(x, x, 1.0, weight=torch.ones(4).to(dtype))
    assert vlmkernels.info_nce(x, x, 1.0, weight=torch.tensor([True, False, True, True])).isfinite()


def test_contrastive_ops_take_no_tensor_as_label_smoothing():
    x = torch.randn(4, 5)
    with pytest.raises(TypeError, match="info_nce: label_smoothing must be float, got Tensor"):
        vlmkernels.info_nce(x, x, 1.0, label_smoothing=torch.tensor(0.1))


def test_complex_numbers_are_no_scales():
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"info_nce: scale must be float or dense Tensor, got complex"):
        vlmkernels.info_nce(x, x, complex(1))
    with pytest.raises(TypeError, match=r"sigmoid_loss: bias must be float or dense Tensor, got complex"):
        vlmkernels.sigmoid_loss(x, x, 1.0, complex(1))


def test_numbers_out_of_the_range_of_the_sums():
    x = torch.randn(4, 3)
    for scale in (1e300, 10**400):
        with pytest.raises(ValueError, match=r"info_nce: scale must be in the range of torch.float32, got"):
            vlmkernels.info_nce(x, x, scale)
    with pytest.raises(ValueError, match=r"sigmoid_loss: bias must be in the range"):
        vlmkernels.sigmoid_loss(x, x, 1.0, -1e300)
    with pytest.raises(ValueError, match=r"store_bytes must be in \[0, 2\*\*63\)"):
        vlmkernels.info_nce(x, x, 1.0, store_bytes=2**63)


@pytest.mark.parametrize("features", [4, 700])
def test_a_scale_tensor_out_of_that_range_is_infinite(features):
    """As for the reference: the loss is not a number, and nothing is raised."""
    x, scale = torch.randn(features, 3), torch.tensor(1e300, dtype=torch.float64)
    assert vlmkernels.info_nce(x, x, scale).isnan()
    assert not vlmkernels.sigmoid_loss(x, x, scale, 0.0).isfinite()
    vlmkernels.sigmoid_loss(x, x, 1.0, scale)


def test_the_gradient_of_a_half_precision_scale_may_overflow():
    x = 300 * torch.ones(2, 8)
    scale = torch.tensor(1.0, dtype=torch.float16, requires_grad=True)
    vlmkernels.sigmoid_loss(x, x, scale, 0.0).backward()
    assert scale.grad == torch.inf


def test_negative_views_are_what_they_stand_for():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    torch.testing.assert_close(
        vlmkernels.linear(torch._neg_view(x), w), vlmkernels.linear(-x, w), atol=0, rtol=0
    )
