"""Weights that `prepare_for_inference` packed, and the linear layer that uses them."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmkernels._activations import ACTIVATIONS
from vlmkernels._modules import is_transformed
from vlmkernels.reference._dense import activate


@dataclass(frozen=True)
class Packed:
    weight: "weakref.ref[Tensor]"
    state: tuple[object, ...]  # of the weight
    packed: Tensor  # oneDNN's layout


PACKED: dict[int, Packed] = {}  # by the id of the weight
ROWS = 2048  # processed by an MLP at a time


def entry_of(weight: Tensor) -> Packed | None:
    entry = PACKED.get(id(weight))
    return entry if entry is not None and entry.weight() is weight else None


def why_not(weight: Tensor) -> str:
    """Why this weight cannot be packed; empty if it can."""
    if weight.device.type != "cpu":
        return f"on {weight.device}"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"{weight.dtype} is not packed"
    if weight.numel() == 0:
        return "empty"
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "this torch has no oneDNN"
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "this CPU has no bfloat16 products"
    if weight.is_inference():
        return "created in inference mode: its changes cannot be detected"
    return ""


def pack(weight: Tensor) -> None:
    with torch.no_grad():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
    PACKED[id(weight)] = Packed(weakref.ref(weight), _state(weight), packed)
    weakref.finalize(weight, PACKED.pop, id(weight), None)


def _state(weight: Tensor) -> tuple[object, ...]:
    """Changes whenever the weight changes, as far as this can be detected."""
    return weight._version, weight.data_ptr(), weight.shape, weight.dtype


def _is_recorded() -> bool:
    """Packed weights are not part of a graph, and looking them up must not specialize its sizes."""
    return torch.compiler.is_compiling() or is_transformed()


def packed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, residual: Tensor | None
) -> Tensor | None:
    """The layer on the packed weight, without a gradient; None if the layer has to run as usual.

    Raises:
        RuntimeError: the weight has changed since it was packed.
    """
    if _is_recorded():
        return None
    entry = entry_of(weight)
    if entry is None or torch.is_grad_enabled():
        return None
    if x.dtype != weight.dtype or x.numel() == 0 or x.device.type != "cpu":
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    if _state(weight) != entry.state:
        raise RuntimeError(
            "a weight has changed since prepare_for_inference packed it: "
            "call undo() and prepare the model again"
        )
    fused = ACTIVATIONS[activation].onednn if activation in ACTIVATIONS else None
    attribute, form = fused or ("none", "")
    rows = x.reshape(-1, x.shape[-1])
    bias = bias if bias is None else bias.contiguous()
    out = torch.ops.mkldnn._linear_pointwise(rows, entry.packed, bias, attribute, [], form)
    out = out.reshape(*x.shape[:-1], weight.shape[0])
    out = out if fused else activate(out, activation)
    return out if residual is None else out + residual


def by_rows(
    mlp: Callable[[Tensor, Tensor | None], Tensor | None], x: Tensor, residual: Tensor | None
) -> Tensor | None:
    """Calls `mlp` on ROWS rows of x and of the residual at a time, which bounds its hidden activations."""
    if _is_recorded():
        return None
    if x.shape[:-1].numel() <= ROWS:
        return mlp(x, residual)
    parts = x.reshape(-1, x.shape[-1]).split(ROWS)
    added = (None,) * len(parts) if residual is None else residual.reshape(-1, residual.shape[-1]).split(ROWS)
    out: list[Tensor] = []
    for rows, more in zip(parts, added, strict=True):
        piece = mlp(rows, more)
        if piece is None:
            return None
        out.append(piece)
    return torch.cat(out).unflatten(0, x.shape[:-1])
