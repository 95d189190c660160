"""Linear layers and MLPs on the ops, with the parameter names of the torch modules they replace."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels._activations import QuickGELU as QuickGELU
from vlmkernels._activations import SquaredReLU as SquaredReLU
from vlmkernels._activations import activation_of
from vlmkernels._modules import are_plain, can_be_fused, must_be_called


class Linear(nn.Linear):
    """``x W^T + b``, plus `residual` in the same pass."""

    adds_residual: ClassVar = True

    def forward(
        self,
        x: Tensor,  # [..., K]
        residual: Tensor | None = None,  # [..., O]
    ) -> Tensor:  # [..., O]
        return vlmkernels.linear(x, self.weight, self.bias, residual=residual)


class MLP(nn.Sequential):
    """linear, activation, linear: ``act(x W1^T + b1) W2^T + b2``, plus `residual` in the same pass.

    Its three children may have any names. If one of them has to be called (it was replaced, by a LoRA layer
    for example, or has a forward hook), or there are more than three, they are called one after the other.
    `dropout` is that of the hidden layer, in training.
    """

    adds_residual: ClassVar = True
    dropout = 0.0

    def forward(  # type: ignore[override]
        self,
        x: Tensor,  # [..., K]
        residual: Tensor | None = None,  # [..., O]
    ) -> Tensor:  # [..., O]
        if len(self) == 3:
            first, activation, last = self
            if self.training and self.dropout:
                return add(residual, last, F.dropout(activation(first(x)), self.dropout))
            return mlp(x, first, activation, last, residual=residual)
        out = super().forward(x)
        return out if residual is None else residual + out


def mlp(
    x: Tensor,  # [..., K]
    first: nn.Module,
    activation: nn.Module,
    last: nn.Module,
    *,
    residual: Tensor | None = None,  # [..., O]
) -> Tensor:  # [..., O]
    """``last(activation(first(x))) + residual``, in one op if none of the three has to be called."""
    name = None if must_be_called(activation) else activation_of(activation)
    if name is None or not (can_be_fused(first, Linear, nn.Linear) and can_be_fused(last, Linear, nn.Linear)):
        return add(residual, last, activation(first(x)))
    first, last = cast(nn.Linear, first), cast(nn.Linear, last)
    weights = (first.weight, first.bias, last.weight, last.bias)
    return vlmkernels.mlp(x, *weights, activation=name, residual=residual)


def add(residual: Tensor | None, branch: nn.Module, *inputs: Any) -> Tensor:
    """``residual + branch(*inputs)``, fused into the branch if its own result cannot be observed.

    This applies to modules whose own class has `adds_residual`; a subclass may override forward.
    """
    if residual is None:
        return branch(*inputs)
    if "adds_residual" in type(branch).__dict__ and not must_be_called(branch):
        return branch(*inputs, residual=residual)
    return residual + branch(*inputs)


def take_rows(
    x: Tensor,  # [B, T, D]
    wanted: Tensor,  # [B, n] int64
) -> Tensor:  # [B, n, D]
    """The selected rows of each sample."""
    return x.gather(1, wanted[..., None].expand(-1, -1, x.shape[-1]))


def tied_logits(
    hidden: Tensor,  # [..., D]
    embedding: nn.Module,
) -> Tensor:  # [..., V]
    """``hidden E^T`` for the table E [V, D] of an embedding."""
    return vlmkernels.linear(hidden, table_for(hidden, embedding))


def table_for(hidden: Tensor, embedding: nn.Module) -> Tensor:  # [V, D]
    """The table of an embedding, on the device of what it is multiplied with."""
    table = cast(nn.Embedding, embedding).weight
    if table.device == hidden.device and are_plain(table):
        return table
    return embedding(torch.arange(table.shape[0], device=hidden.device))  # offloaded, sharded, quantized
