"""The losses on a matrix of logits that is too small for streaming kernels to pay for their calls."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits up to which torch's own operators are as fast as the kernels on a CPU, by the precision of the features.
# For bf16 the products here run in float32, so that logits are never rounded, and lose their advantage earlier.
LIMITS = {torch.float32: 2**15, torch.bfloat16: 2**14}


def serves(query: Tensor, key: Tensor) -> bool:
    """Whether the problem is small, on a CPU, and not being traced: a traced size must not decide the path."""
    if query.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return 0 < query.shape[0] * key.shape[0] <= LIMITS.get(query.dtype, 0)


def info_nce(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    scale: Tensor,
    symmetric: bool,
    label_smoothing: float,
    normalize: bool,
) -> Tensor:
    """Key i is the positive of query i; the mean over rows, and over columns when symmetric."""
    logits = scale.float().reshape(()) * _similarities(query, key, normalize)  # [N, M]
    target = torch.arange(len(query))
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    if symmetric:
        loss = (loss + F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)) * 0.5
    return loss


def sigmoid_loss(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, normalize: bool) -> Tensor:
    """Key i is the positive of query i; the sum over all pairs, divided by N."""
    logits = _similarities(query, key, normalize) * scale.float().reshape(()) + bias.float().reshape(())
    signs = torch.eye(*logits.shape).mul_(2).sub_(1)  # [N, M]
    return -F.logsigmoid(signs * logits).sum() / len(query)


def _similarities(query: Tensor, key: Tensor, normalize: bool) -> Tensor:
    q, k = query.float(), key.float()
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T if normalize else q @ k.T
