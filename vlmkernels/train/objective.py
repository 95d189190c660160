"""The contrastive losses on the features of all processes together, and sums over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmkernels import distributed
from vlmkernels.ops import info_nce, sigmoid_loss


def process_count() -> int:
    """Number of processes that train together."""
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if together else 1


@torch.no_grad()
def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of every process's value, the same on all; ``value`` is unchanged."""
    total = value.clone()
    if process_count() > 1:
        torch.distributed.all_reduce(total)
    return total


def joint_list(values: list[Any]) -> list[Any]:
    """The values of all processes, in the order of the joint batch, the same on all."""
    if process_count() == 1:
        return values
    parts: list[Any] = [None] * process_count()
    torch.distributed.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def joint_features(output: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Image and text features [N, E] of the joint batch, N pairs over all processes.

    The gradient of a gathered feature is summed over the processes: every process computes the same loss, so
    after DDP's average each parameter has the gradient of one process on the joint batch.
    """
    images, texts = output["image_features"], output["text_features"]
    if process_count() == 1:
        return images, texts
    sizes = distributed.shard_sizes(len(images), images.device)
    return (
        distributed.all_gather_with_grad(images, sizes=sizes),
        distributed.all_gather_with_grad(texts, sizes=sizes),
    )


def contrastive_loss(
    images: Tensor,  # [N, E] normalised
    texts: Tensor,  # [N, E] normalised
    scale: Tensor,
    bias: Tensor | None,
    *,
    label_smoothing: float = 0.0,
) -> Tensor:
    """A scalar: SigLIP's sigmoid loss for a model with a bias, else the symmetric InfoNCE of CLIP and ALIGN.

    ALIGN's paper sums the two directions of the InfoNCE, here they are averaged as in CLIP.
    """
    if bias is not None:
        return sigmoid_loss(images, texts, scale, bias)
    return info_nce(images, texts, scale, label_smoothing=label_smoothing)


@torch.no_grad()
def retrieval_at_1(
    images: Tensor,  # [N, E]
    texts: Tensor,  # [N, E]
    limit: int = 1024,
) -> Tensor:
    """Fraction of the first ``limit`` images whose own text, or an equal one, is the nearest in the batch."""
    similarity = images[:limit].float() @ texts.float().T  # [min(N, limit), N]
    return (similarity.diagonal() >= similarity.amax(dim=1)).float().mean()
