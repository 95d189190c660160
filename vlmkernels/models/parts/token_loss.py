"""The loss of language models: the mean negative log-likelihood of the next tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmkernels

IGNORE = -100


def label_faults(labels: Tensor | None, tokens: Tensor, name: str) -> list[str]:
    """What is wrong with the labels of `tokens`, an argument called `name`."""
    if labels is None or (labels.shape == tokens.shape and labels.dtype == torch.int64):
        return []
    wanted = f"int64 {list(tokens.shape)} like {name}"
    return [f"labels must be {wanted}, got {labels.dtype} {list(labels.shape)}"]


def next_token_loss(
    hidden: Tensor,  # [B, T, D], the input of the head
    weight: Tensor,  # [V, D] of the head
    labels: Tensor,  # [B, T] int64
    bias: Tensor | None = None,  # [V]
) -> Tensor:
    """Mean over t of -log softmax(hidden_t weight^T + bias)[labels_(t+1)], labels of -100 excluded.

    0 if all are. In float32 (float64 for float64 hidden states).
    """
    successors = F.pad(labels, (0, 1), value=IGNORE)[:, 1:]
    return vlmkernels.linear_cross_entropy(hidden, weight, successors, bias=bias, ignore_index=IGNORE)


def loss_of_logits(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T] int64
) -> Tensor:
    """`next_token_loss` where the logits are there."""
    labels = labels[:, 1:].flatten()
    flat = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp_min(1)
