"""The losses on a matrix of logits that is too small for streaming kernels to pay for their calls.

Scale and bias enter as columns, and sums over all pairs are sums over rows first: torch splits a sum of
everything by the number of threads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Logits up to which torch's own operators are as fast as the kernels on a CPU, by the precision of the
# features. bf16 features are multiplied in float32, so that logits are never rounded: the advantage ends
# earlier.
LIMITS = {torch.float32: 2**15, torch.bfloat16: 2**14}


def serves(query: Tensor, key: Tensor) -> bool:
    """Whether the problem is small, on a CPU, and not traced: a traced size must not decide the path."""
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
    logits = _column(scale, query) * _similarities(query, key, normalize)  # [N, M]
    target = torch.arange(len(query), device=logits.device)
    loss = F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    if symmetric:
        loss = (loss + F.cross_entropy(logits.T, target, label_smoothing=label_smoothing)) * 0.5
    return loss


def sigmoid_loss(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor, normalize: bool) -> Tensor:
    """Key i is the positive of query i; the sum over all pairs, divided by N."""
    logits = _column(scale, query) * _similarities(query, key, normalize) + _column(bias, query)
    signs = torch.eye(*logits.shape, dtype=logits.dtype, device=logits.device).mul_(2).sub_(1)  # [N, M]
    return -F.logsigmoid(signs * logits).sum(1).sum() / len(query)


def _column(scalar: Tensor, query: Tensor) -> Tensor:  # [N, 1]
    return scalar.float().reshape(1, 1).expand(len(query), 1)


def _similarities(query: Tensor, key: Tensor, normalize: bool) -> Tensor:
    q, k = query.float(), key.float()
    return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T if normalize else q @ k.T
