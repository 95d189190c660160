"""Shared by the references of the pairwise ops: features, positives, and their checks."""

import torch
from torch import Tensor
from torch.nn.functional import normalize as l2_normalize


def features(x: Tensor, normalize: bool, work: torch.dtype) -> Tensor:
    return l2_normalize(x.to(work), dim=-1) if normalize else x.to(work)


def feature_grad(grad: Tensor, x: Tensor, normalize: bool) -> Tensor:
    if normalize:
        norm = torch.linalg.vector_norm(x.to(grad.dtype), dim=-1, keepdim=True)
        unit = x.to(grad.dtype) / norm.clamp_min(1e-12)
        radial = unit * (unit * grad).sum(-1, keepdim=True)
        grad = torch.where(norm > 1e-12, grad - radial, grad) / norm.clamp_min(1e-12)
    return x.new_empty(x.shape).copy_(grad)


def check_features(op: str, query: Tensor, key: Tensor, whose: str = "") -> None:
    """The raw ops accept any tensors, so they check the features themselves."""
    if query.dim() != 2 or key.dim() != 2 or query.shape[1] != key.shape[1]:
        raise ValueError(
            f"{op}: {whose}query must be [N, D] and {whose}key [M, D], "
            f"got {whose}query {tuple(query.shape)} and {whose}key {tuple(key.shape)}"
        )


def check_pair(op: str, positives: Tensor | None, key_ids: Tensor | None) -> None:
    """The raw ops get query_ids and key_ids as separate arguments."""
    if positives is None and key_ids is not None:
        raise ValueError(f"{op}: key_ids require the ids of the queries in positives, got None")


def check_indices(op: str, positives: Tensor, m: int) -> None:
    """Indices of positives are -100 or in [0, M); a device assertion where reading them would synchronise."""
    valid = ((positives == -100) | ((positives >= 0) & (positives < m))).all()
    if positives.is_cuda:
        torch._assert_async(valid, f"{op}: positives must be in [0, M) or -100")
    elif not valid:
        low, high = int(positives.min()), int(positives.max())
        raise IndexError(f"{op}: positives must be in [0, M = {m}) or -100, got values from {low} to {high}")


def matches(
    op: str, positives: Tensor | None, key_ids: Tensor | None, n: int, m: int, device: torch.device
) -> Tensor:
    """Which pairs are positive, [N, M] bool."""
    check_pair(op, positives, key_ids)
    if positives is None:
        return torch.eye(n, m, dtype=torch.bool, device=device)
    if key_ids is None:
        check_indices(op, positives, m)
        key_ids = torch.arange(m, device=device)
    return positives[:, None] == key_ids
