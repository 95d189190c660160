"""Gradients that a forward computes along with its loss, from the same look at the inputs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from vlmkernels import _arguments as arguments
from vlmkernels._library import TRITON, define_part, kernel
from vlmkernels._modules import is_traced, is_transformed


def forms_ahead(x: Tensor) -> bool:
    """Whether a forward with a single result already computes the gradients.

    Not in float16: without the factor of a scaled loss the gradients would leave its range.
    """
    return torch.is_grad_enabled() and arguments.product_dtype(x) != torch.float16


def scaled(
    formed: Sequence[Tensor], dloss: Tensor, inputs: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None] | None:
    """The gradients that a forward computed, times the incoming one; None unless all that are needed exist.

    Under create_graph they have to come from the backward op, which is then in the graph and raises.
    Where the incoming one is 1 and the graph is not retained, they are handed over without a copy.
    """
    needed = [(grad, x) for grad, x, need in zip(formed, inputs, needs, strict=True) if need]
    if (
        torch.is_grad_enabled()
        or dloss.dim()
        or any(x is None or grad.shape != x.shape for grad, x in needed)
    ):
        return None
    if not torch._C._autograd._get_current_graph_task_keep_graph() and _is_one(dloss):
        return [grad if need else None for grad, need in zip(formed, needs, strict=True)]
    if TRITON and dloss.is_cuda and _is_eager(dloss) and dloss.dtype == torch.float32:
        products = iter(_scale(dloss, *(grad for grad, _ in needed), *[None] * (MOST - len(needed))))
    else:
        products = iter(_each_times(dloss, *(grad for grad, _ in needed)))
    return [next(products) if need else None for need in needs]


def _is_one(x: Tensor) -> bool:
    """Whether a scalar is 1, if that is known without waiting for a device or fixing a graph to it."""
    known = x.device.type == "cpu" and not _get_current_dispatch_mode()
    return known and _is_eager(x) and x.item() == 1


def _is_eager(x: Tensor) -> bool:
    return type(x) is Tensor and not is_traced() and not is_transformed()


def _each_times(dloss: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    return tuple(dloss.new_empty(0) if x is None else (x * dloss).to(x.dtype) for x in grads)


def _scale_on_cpu(
    dloss: Tensor, a: Tensor | None = None, b: Tensor | None = None, c: Tensor | None = None,
    d: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The dispatcher leaves out what has its default at the end: there are four results all the same."""
    return _each_times(dloss, a, b, c, d)


_scale = define_part(
    "scale_grads(Tensor dloss, Tensor? a=None, Tensor? b=None, Tensor? c=None, Tensor? d=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    flops=lambda *_, **__: 0,
)
kernel("scale_grads", "CPU", _scale_on_cpu, "PyTorch")
if TRITON:
    from vlmkernels.triton._ahead import MOST, scale_grads

    kernel("scale_grads", "CUDA", scale_grads, "Triton")
