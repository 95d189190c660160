"""Mask tensors read as intervals: on the CPU, in eager code, once per tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Intervals = tuple[Tensor, Tensor]  # start and end, each [Tq] or [B, Tq]

_READ = WeakIdKeyDictionary()  # mask -> (its version when it was read, what was asked, the answer)


def intervals_of(
    mask: Tensor,  # [Tq, Tk], [B, Tk], [B, Tq, Tk] or [B, 1 or H, 1 or Tq, Tk]
    queries: int,
    keys: int,
    *,
    true_is_seen: bool = True,
    owner: Tensor | None = None,
) -> Intervals | None:
    """What each query sees, where that is one run of keys and nothing else; None where it is not.

    Boolean masks say what is seen, or with ``true_is_seen=False`` what is hidden; floating-point masks are
    added to the logits: 0 is seen, the smallest number of the dtype or -inf is hidden, anything else is a
    bias and no interval. A query that sees nothing gets an empty interval, unless the mask is finite there:
    all keys are then equally far away, and the softmax is uniform. `owner` is the tensor that the answer is
    remembered by, where the mask is made from it for the question alone.

    In compiled code, under tracing and on accelerators nothing can be read without waiting: None.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(mask) is not Tensor:
        return None
    if mask.device.type != "cpu" or mask.requires_grad or mask.is_nested or mask.is_sparse:
        return None
    owner = mask if owner is None else owner
    asked = (queries, keys, true_is_seen, tuple(mask.shape))
    version = None if owner.is_inference() else owner._version
    known = _READ.get(owner)
    if known is not None and version is not None and known[:2] == (version, asked):
        return known[2]
    answer = _read(mask, queries, keys, true_is_seen)
    if version is not None:
        _READ[owner] = version, asked, answer
    return answer


def _read(mask: Tensor, queries: int, keys: int, true_is_seen: bool) -> Intervals | None:
    mask = _without_heads(mask)
    if mask.dim() not in (2, 3) or mask.shape[-1] != keys or mask.shape[-2] not in (1, queries) or keys == 0:
        return None
    if mask.dtype == torch.bool:
        seen = mask if true_is_seen else ~mask
    elif mask.is_floating_point():
        seen = mask == 0
        hidden = mask <= torch.finfo(mask.dtype).min
        finite = hidden & (mask > -torch.inf)
        if not torch.equal(seen, ~hidden) or (~seen.any(-1) & finite.any(-1)).any():
            return None
    else:
        return None
    start = seen.to(torch.uint8).argmax(-1)
    end = start + seen.sum(-1)
    j = torch.arange(keys)
    if not torch.equal(seen, (j >= start[..., None]) & (j < end[..., None])):
        return None
    shape = (*mask.shape[:-2], queries)
    return start.to(torch.int32).expand(shape), end.to(torch.int32).expand(shape)


def _without_heads(mask: Tensor) -> Tensor:
    """[B, Tq, Tk] of a mask of four dimensions whose heads see the same; others as they are."""
    if mask.dim() != 4 or mask.shape[1] == 0:
        return mask
    if mask.stride(1) != 0 and not torch.equal(mask[:, 1:], mask[:, :-1]):
        return mask
    return mask[0, 0] if mask.shape[0] == 1 else mask[:, 0]


def both(a: Intervals | None, b: Intervals | None) -> Intervals | None:
    """What two masks let through together; None is a mask that hides nothing."""
    if a is None or b is None:
        return a or b
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])
