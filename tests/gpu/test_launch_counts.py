"""How many kernels a training step of an op launches: the host takes microseconds for each."""

import pytest
import torch

pytest.importorskip("triton")

import vlmkernels
from benchmarks.gpu import trace
from vlmkernels import interval_attention, intervals, perceiver_attention, reference
from vlmkernels.reference._dense import ACTIVATIONS

from .workloads import BF16, heads, meta

TOKENS = 1024


def launched(call, tensors, *rest) -> list[str]:
    """The kernels of a forward and of the backward to those tensors that require a gradient, torch's too."""
    step = trace.Pass()
    with trace.recording(step, "sm_90"):
        out = call(*tensors, *rest)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in tensors if x.requires_grad]
        torch.autograd.grad(out, wanted, [x.detach() for x in out])
    return [found.name for found in step.steps]


def attended(tokens=TOKENS, grad=True):
    return heads(8, tokens, 16, 72, BF16).requires_grad_(grad)


BOUNDS = {
    "causal": intervals.causal(TOKENS, device="meta"),
    "any": tuple(meta(8, TOKENS, dtype=torch.int32) for _ in range(2)),
    "padding": intervals.padding(meta(8, dtype=torch.int32), TOKENS),
}


@pytest.mark.parametrize("mask", BOUNDS)
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=str)
def test_interval_attention_takes_four_at_most(mask, frozen):
    tensors = [attended(grad=i not in frozen) for i in range(3)]
    names = launched(lambda *x: interval_attention(*x, return_lse=True), tensors, *BOUNDS[mask])
    ranges = mask != "padding"  # which queries see a block of keys, where they differ
    assert len(names) == (2 if frozen == (1, 2) else 3 + ranges), names


@pytest.mark.parametrize("lengths", [True, False])
def test_perceiver_attention_takes_four(lengths):
    tensors = [attended(tokens) for tokens in (64, TOKENS, TOKENS, 64, 64)]
    media = meta(8, dtype=torch.int32) if lengths else None
    names = launched(lambda *x: perceiver_attention(*x, media_lengths=media), tensors)
    assert len(names) == 4, names


def layer(op: str, bias: bool, residual: bool, grad: bool) -> tuple[list, dict]:
    """Arguments and options of a dense layer."""
    shapes = {"linear": [(64, 48)], "mlp": [(64, 48), (48, 64)], "gated_mlp": [(64, 48), (64, 48), (48, 64)]}
    x, *weights = (meta(*shape, dtype=BF16).requires_grad_(grad) for shape in ((32, 48), *shapes[op]))
    biases = [meta(len(weight), dtype=BF16).requires_grad_(grad) if bias else None for weight in weights]
    options = {"residual": meta(32, len(weights[-1]), dtype=BF16).requires_grad_(grad)} if residual else {}
    if op == "gated_mlp":
        names = ("b_gate", "b_up", "b_down")
        return [x, *weights], options | dict(zip(names, biases, strict=True))
    return [x, *(t for pair in zip(weights, biases, strict=True) for t in pair)], options


def steps(op, arguments, options) -> list[str]:
    """Of the forward and, where there are gradients, of the backward."""
    flat = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    step = trace.Pass()
    with trace.recording(step, "sm_90"):
        out = op(*arguments, **options)
        if flat:
            torch.autograd.grad(out, flat, out.detach())
    return [found.name for found in step.steps]


PRODUCTS = {"linear": 3, "mlp": 6, "gated_mlp": 9}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", PRODUCTS)
def test_a_dense_layer_takes_no_more_than_torch(op, activation, bias, residual):
    """Beside its products one pass each way; the sums of its biases' gradients; the residual."""
    arguments, options = layer(op, bias, residual, grad=True)
    options |= {"activation": activation}
    ours, theirs = (steps(getattr(of, op), arguments, options) for of in (vlmkernels, reference))
    passes = 0 if activation == "none" and op != "gated_mlp" else 2
    added = residual and not (op == "linear" and passes)
    biases = {"linear": 1, "mlp": 2, "gated_mlp": 3}[op] if bias else 0
    assert len(ours) == PRODUCTS[op] + passes + added + biases, ours
    assert len(ours) <= len(theirs), (ours, theirs)


@pytest.mark.parametrize("op", PRODUCTS)
def test_a_dense_layer_without_a_backward_leaves_activations_to_cublas(op):
    count = {"linear": 1, "mlp": 2, "gated_mlp": 4}[op]
    for activation in ("relu", "gelu_tanh"):
        arguments, options = layer(op, True, False, grad=False)
        names = steps(getattr(vlmkernels, op), arguments, options | {"activation": activation})
        assert len(names) == count, names
    for activation in ("gelu", "silu"):
        names = steps(getattr(vlmkernels, op), arguments, options | {"activation": activation})
        assert len(names) == count + (op != "gated_mlp"), names


@pytest.mark.parametrize("elements", [1, 48])
def test_gated_residual_takes_three(elements):
    tensors = [meta(32, 48, dtype=BF16).requires_grad_() for _ in range(2)]
    gate = meta(elements, dtype=BF16).requires_grad_()
    names = launched(vlmkernels.gated_residual, [*tensors, gate])
    assert len(names) == 3, names


@pytest.mark.parametrize("elements", [1, 48])
@pytest.mark.parametrize("frozen", [False, True])
def test_gated_linear_residual_takes_five(elements, frozen):
    """With the weight's gradient nothing of the size of h is written in float32."""
    x, h, weight = (meta(*shape, dtype=BF16).requires_grad_() for shape in ((32, 48), (32, 64), (48, 64)))
    gate = meta(elements, dtype=BF16).requires_grad_()
    names = launched(vlmkernels.gated_linear_residual, [x, h, weight.requires_grad_(not frozen), gate])
    assert len(names) == (4 if frozen and elements == 1 else 5), names
