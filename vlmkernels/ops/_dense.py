"""Shared by the dense layers: checks of the arguments, gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _arguments as arguments
from vlmkernels.reference._dense import ACTIVATIONS


def check(
    op: str,
    x: Tensor,
    weights: Sequence[
        tuple[str, Tensor, int | None, int | None]
    ],  # name, weight, its rows and columns or None
    biases: Sequence[tuple[str, Tensor | None, int]],  # name, bias, its size
    activation: str,
    residual: Tensor | None,
    width: int,
) -> None:
    """Raises one ValueError that names every invalid argument; `width` is the last size of the result."""
    faults = []
    if x.dim() == 0:
        faults.append("x must be [..., K], got a scalar")
    for name, weight, rows, cols in weights:
        wanted = f"[{'*' if rows is None else rows}, {'*' if cols is None else cols}]"
        fits = weight.dim() == 2 and rows in (None, weight.shape[0]) and cols in (None, weight.shape[1])
        if not fits:
            faults.append(f"{name} must be {wanted}, got {tuple(weight.shape)}")
    faults += [
        f"{name} must be [{size}], got {tuple(bias.shape)}"
        for name, bias, size in biases
        if bias is not None and bias.shape != (size,)
    ]
    if activation not in ACTIVATIONS:
        faults.append(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    shape = (*x.shape[:-1], width)
    if residual is not None and residual.shape != shape:
        faults.append(f"residual must be {shape}, got {tuple(residual.shape)}")
    operands = {"x": x, **{name: weight for name, weight, _, _ in weights}}
    operands |= {name: bias for name, bias, _ in biases if bias is not None}
    everything = operands if residual is None else {**operands, "residual": residual}
    faults += arguments.dtype_faults(everything, operands)
    faults += arguments.device_faults(everything)
    if faults:
        raise ValueError(f"{op}: " + "; ".join(faults))


def size(t: Tensor, dim: int) -> int:
    """The size of a dimension, 0 if there is no such dimension; for messages about any tensor."""
    return t.shape[dim] if t.dim() > (dim if dim >= 0 else -dim - 1) else 0


def trained(*tensors: Tensor | None) -> bool:
    """Whether a backward may need the gradient of one of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def empty_grads(like: Tensor, shapes: Iterable[Sequence[int]], needs: Iterable[bool]) -> tuple[Tensor, ...]:
    """Memory for gradients of these shapes; one that is not needed has size 0."""
    return tuple(like.new_empty(shape if need else 0) for shape, need in zip(shapes, needs, strict=True))


def gradients(
    ctx: Any, needs: Mapping[str, bool], dout: Tensor, operands: Sequence[str], bwd: Callable
) -> dict[str, Tensor | None]:
    """The gradients of a layer with a residual, from its backward op."""
    wanted = [needs[name] for name in operands]
    grads = bwd(dout, *ctx.saved_tensors, ctx.activation, wanted) if any(wanted) else [None] * len(wanted)
    residual = dout.to(ctx.residual_dtype) if needs["residual"] else None
    return {**dict(zip(operands, grads, strict=True)), "residual": residual}
