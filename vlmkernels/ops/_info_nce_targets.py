"""The targets of InfoNCE: the positives, mean similarities with the targets, their part of the gradients.

All of it is O((N + M) D). Functions of (own, other) are for one direction of the loss: (queries, keys) for
the rows of the logits, (keys, queries) for their columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmkernels.ops import _pairwise as pairwise
from vlmkernels.ops import _pairwise_targets as targets
from vlmkernels.ops import _sums as sums
from vlmkernels.reference._pairwise import check_pair


@dataclass
class Positives:
    """The rows of the other side with an equal id, for each row."""

    label: Tensor  # [rows] in [0, N + M), one for each id
    others: Tensor  # [other rows] their labels
    count: Tensor  # [N + M] how many of the others have each label

    def number(self) -> Tensor:  # [rows]
        return self.count[self.label]

    def sum(self, values: Tensor) -> Tensor:  # [other rows, D] -> [rows, D]
        return sums.segment_sum(values, self.others, self.count)[self.label]


@dataclass
class Side:
    """The queries, or the keys, with their targets among the other side."""

    x: Tensor  # [rows, D]
    inv_norm: Tensor | None  # [rows]
    counted: Tensor | None = None  # [rows] bool, whether a row has a positive; all have one when None
    positives: Positives | None = None  # None: at most one

    def units(self) -> Tensor:  # [rows, D]
        """The features, divided by their norms, in the dtype of the sums."""
        x = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        return x if self.inv_norm is None else x * self.inv_norm[:, None]

    def weights(self, weight: Tensor | None) -> Tensor:  # [rows] -> [rows]
        """In the dtype of the sums; 0 for rows without a positive, which are not counted."""
        counted = self.x.new_ones(len(self.x), dtype=torch.promote_types(self.x.dtype, torch.float32))
        if self.counted is not None:
            counted = self.counted.to(counted.dtype)
        return counted if weight is None else counted * weight.to(counted.dtype)


def sides(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    normalize: bool,
    positives: Tensor | None,  # [N]
    key_ids: Tensor | None,  # [M]
    symmetric: bool,
) -> tuple[Side, Side, Tensor]:
    """The queries, the keys, and one positive key of each query [N], -1 if it has none."""
    check_pair("info_nce", positives, key_ids)
    query, key = pairwise.with_width(query), pairwise.with_width(key)
    queries, keys = (Side(x, pairwise.inverse_norms(x, normalize)) for x in (query, key))
    if positives is None:
        return queries, keys, torch.arange(len(query), device=query.device)
    everyone = torch.arange(len(key), device=key.device)
    if key_ids is None:
        positives = targets.checked_indices("info_nce", positives, len(key))
        if not symmetric:
            queries.counted = positives >= 0
            return queries, keys, positives
        key_ids = everyone
    query_label, key_label = targets.group_labels(positives, key_ids)
    zeros = torch.zeros(len(query) + len(key), dtype=torch.int64, device=query.device)
    query_count, key_count = (
        zeros.scatter_add(0, label, torch.ones_like(label)) for label in (query_label, key_label)
    )
    queries.positives = Positives(query_label, key_label, key_count)
    keys.positives = Positives(key_label, query_label, query_count)
    queries.counted, keys.counted = queries.positives.number() > 0, keys.positives.number() > 0
    first = zeros.scatter_reduce(0, key_label, everyone, "amin", include_self=False)
    return queries, keys, torch.where(queries.counted, first[query_label], -1)


def at(positive: Tensor, values: Tensor) -> Tensor:  # [N], [M] -> [N]
    """The value of each query's positive key; undefined for queries without one."""
    return values[positive.clamp_min(0)] if len(values) else values.new_zeros(len(positive))


def mean_positive(own: Side, other: Side) -> Tensor | None:  # [rows]
    """The mean similarity of each row with its positives; None if each has at most one."""
    if own.positives is None:
        return None
    dots = (own.x * own.positives.sum(other.units())).sum(-1)
    dots = dots if own.inv_norm is None else dots * own.inv_norm
    return dots / own.positives.number().clamp_min(1)


def mean_of_all(own: Side, other: Side) -> Tensor:  # [rows]
    """The mean similarity of each row with the whole other side."""
    total = other.units().sum(0)
    dots = own.x.to(total.dtype) @ total
    return (dots if own.inv_norm is None else dots * own.inv_norm) / max(len(other.x), 1)


def gradient(
    own: Side,
    other: Side,
    own_coef: Tensor | None,  # [own rows] dL/dl of the direction (own, other), None where it is not counted
    other_coef: Tensor | None,  # [other rows] of the direction (other, own)
    smoothing: float,
) -> Tensor | None:  # [own rows, D]
    """The part of D in `info_nce_grads` from targets beyond a single positive; None if there is none."""
    extra = None
    if smoothing:
        units = other.units()
        extra = units.new_zeros(own.x.shape)
        if own_coef is not None:
            extra.addmm_(own_coef[:, None], units.sum(0)[None], alpha=-smoothing / len(other.x))
        if other_coef is not None:  # not a product, whose order may depend on the number of threads
            extra -= smoothing / len(own.x) * (units * other_coef[:, None]).sum(0)
    if own.positives is not None and other.positives is not None:
        units = other.units()
        part = units.new_zeros(own.x.shape)
        if own_coef is not None:
            mean_coef = own_coef / own.positives.number().clamp_min(1)
            part += mean_coef[:, None] * own.positives.sum(units)
        if other_coef is not None:
            mean_coef = other_coef / other.positives.number().clamp_min(1)
            part += own.positives.sum(mean_coef[:, None] * units)
        extra = part.mul_(smoothing - 1) if extra is None else extra.add_(part, alpha=smoothing - 1)
    return extra
