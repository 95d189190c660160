"""What the tests of the dense layers share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.reference._dense import ACTIVATIONS as ACTIVATIONS
from vlmkernels.testing import assert_as_good, result_and_gradients

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def plain_activation(y: Tensor, activation: str) -> Tensor:
    """The activation as torch's autograd differentiates it."""
    return {
        "none": lambda: y,
        "gelu": lambda: F.gelu(y),
        "gelu_tanh": lambda: F.gelu(y, approximate="tanh"),
        "quick_gelu": lambda: y * torch.sigmoid(1.702 * y),
        "silu": lambda: F.silu(y),
        "relu": lambda: F.relu(y),
        "squared_relu": lambda: F.relu(y) ** 2,
    }[activation]()


def assert_layer_as_good(
    op: Callable, reference: Callable, inputs: Sequence[Tensor], *, inner: int = 2, **options: Any
) -> None:
    """`assert_as_good` for the result and every gradient.

    How far plain PyTorch is off in a small result is chance: the largest error counts over several orders of
    the features of x, which the first `inner` inputs have.
    """
    got = result_and_gradients(op, inputs, **options)
    double = inputs[0].dtype == torch.float64
    exact = result_and_gradients(reference, copies(inputs, torch.float64), **options)
    wide = copies(inputs, torch.float64 if double else torch.float32)
    lows = [result_and_gradients(reference, wide, **options)]
    for _ in range(0 if double else 4):
        order = torch.randperm(wide[0].shape[-1])
        back = torch.argsort(order)
        shuffled = [t.detach()[..., order].requires_grad_() for t in wide[:inner]]
        out, *grads = result_and_gradients(reference, [*shuffled, *wide[inner:]], **options)
        lows.append([out, *(g[..., back] if g is not None else g for g in grads[:inner]), *grads[inner:]])
    names = ["result", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, ours, truth, *theirs in zip(names, got, exact, *lows, strict=True):
        assert_as_good(ours, [low.to(ours.dtype) for low in theirs], truth, name=name)


def copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.detach().to(dtype).requires_grad_() for t in tensors]
