"""Mask tensors read as intervals: on the CPU, in eager code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

Intervals = tuple[Tensor, Tensor]  # start and end, each [Tq] or [B, Tq]

_READ = WeakIdKeyDictionary()  # mask -> (what was asked, the bytes of the mask included; the answer)


def intervals_of(
    mask: Tensor,
    shape: tuple[int, int, int, int],  # B, H, Tq, Tk
    *,
    true_is_seen: bool = True,
    owner: Tensor | None = None,
) -> Intervals | None:
    """What each query sees, where that is one run of keys and nothing else; None where it is not.

    The mask is broadcast to the shape as torch does, from the right. Boolean masks say what is seen, or with
    ``true_is_seen=False`` what is hidden; floating-point masks are added to the logits: 0 is seen, the
    smallest number of the dtype or -inf is hidden, anything else is a bias and no interval. A query that sees
    nothing gets an empty interval, unless the mask is finite there: all keys are then equally far away, and
    the softmax is uniform.

    The answer is remembered with the mask, or with `owner` where the mask is a view made for the question,
    beside a copy of its bytes: memory that numpy or ``mask.data`` writes to shows no other sign of a change.

    In compiled code and on accelerators nothing can be read without waiting: None.
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.device.type != "cpu":
        return None
    if mask.requires_grad or mask.is_nested or mask.layout != torch.strided:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        return None
    owner = mask if owner is None else owner
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    bits = mask.view(torch.int16) if mask.dtype == torch.bfloat16 else mask  # which numpy does not have
    asked = shape, true_is_seen, mask.dtype, mask.shape, bits.numpy().tobytes()
    known = _READ.get(owner)
    if known is not None and known[0] == asked:
        return known[1]
    with torch.inference_mode(False):  # the answer may be saved for a backward later
        answer = _read(mask, shape, true_is_seen)
    _READ[owner] = asked, answer
    return answer


def _read(mask: Tensor, shape: tuple[int, int, int, int], true_is_seen: bool) -> Intervals | None:
    if mask.dim() not in (2, 3, 4) or mask.numel() == 0:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    if any(n not in (1, wanted) for n, wanted in zip(mask.shape, shape, strict=True)):
        return None
    if not torch.equal(mask[:, 1:], mask[:, :-1]):  # heads that see different keys
        return None
    *_, queries, keys = shape
    mask = mask[:, 0].expand(-1, -1, keys)  # [B or 1, Tq or 1, Tk]
    if mask.dtype == torch.bool:
        seen = mask if true_is_seen else ~mask
    else:
        seen = mask == 0
        hidden = mask <= torch.finfo(mask.dtype).min
        finite = hidden & (mask > -torch.inf)
        if not torch.equal(seen, ~hidden) or (~seen.any(-1) & finite.any(-1)).any():
            return None
    start = seen.to(torch.uint8).argmax(-1)
    end = start + seen.sum(-1)
    j = torch.arange(keys, device=mask.device)
    if not torch.equal(seen, (j >= start[..., None]) & (j < end[..., None])):
        return None
    start, end = (x.to(torch.int32).expand(-1, queries) for x in (start, end))
    return (start, end) if len(mask) > 1 else (start[0], end[0])


def both(a: Intervals | None, b: Intervals | None) -> Intervals | None:
    """What two masks let through together; None is a mask that hides nothing."""
    if a is None or b is None:
        return a or b
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])
