"""Mask tensors read as intervals: on the CPU, in eager code."""

from __future__ import annotations

import weakref

import numpy
import torch
from torch import Tensor

from vlmkernels import intervals
from vlmkernels.intervals import Intervals

_ADDED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # to the logits
_LOWEST = {torch.bool: None} | {dtype: torch.finfo(dtype).min for dtype in _ADDED}
_READ: dict[int, tuple] = {}  # id of a mask -> (the query, including the mask's bytes; the result)


def intervals_of(
    mask: Tensor,
    shape: tuple[int, int, int, int],  # B, H, Tq, Tk
    *,
    true_is_seen: bool = True,
    owner: Tensor | None = None,
) -> Intervals | None:
    """The interval of keys that each query attends to; None if the mask is not made of intervals.

    The mask is broadcast to the shape as in torch. In a boolean mask True means attend, or masked out with
    ``true_is_seen=False``. Floating-point masks are added to the logits: 0 means attend, the smallest number
    of the dtype or -inf masked out, and any other value is a bias, not an interval. A query whose keys are
    all masked out gets an empty interval, unless the mask is finite there: the softmax is then uniform over
    all keys.

    The result is cached with the mask, or with `owner` if the mask is a temporary view, together with a copy
    of the mask's bytes, because changes by numpy or through ``mask.data`` cannot be detected otherwise.

    None in compiled code and on accelerators, where a mask cannot be read without synchronisation.
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.dtype not in _LOWEST:
        return None
    if not mask.is_cpu or mask.requires_grad or mask.is_nested or mask.layout != torch.strided:
        return None
    owner = mask if owner is None else owner
    if 0 in mask.stride():
        mask = mask[tuple(slice(1) if stride == 0 else slice(None) for stride in mask.stride())]
    values = (mask.float() if mask.dtype == torch.bfloat16 else mask).numpy()  # numpy has no bfloat16
    request = shape, true_is_seen, mask.dtype, mask.shape, values.tobytes()
    known = _READ.get(id(owner))
    if known is not None and known[0] == request:
        return known[1]
    with torch.inference_mode(False):  # the answer may be saved for a backward later
        answer = _read(values, shape, true_is_seen, _LOWEST[mask.dtype])
    if known is None:
        weakref.finalize(owner, _READ.pop, id(owner), None)
    _READ[id(owner)] = request, answer
    return answer


def _read(
    mask: numpy.ndarray,
    shape: tuple[int, int, int, int],
    true_is_seen: bool,
    lowest: float | None,  # the smallest number of the dtype, None for a boolean mask
) -> Intervals | None:
    if mask.ndim not in (2, 3, 4) or mask.size == 0:
        return None
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if any(n not in (1, wanted) for n, wanted in zip(mask.shape, shape, strict=True)):
        return None
    if mask.shape[1] > 1 and not (mask[:, 1:] == mask[:, :-1]).all():  # heads that attend to different keys
        return None
    *_, queries, keys = shape
    mask = mask[:, 0]  # [B or 1, Tq or 1, Tk or 1]
    if lowest is None:
        seen = mask if true_is_seen else ~mask
    else:
        seen, hidden = mask == 0, mask <= lowest
        uniform = ~seen.any(-1) & (mask > -numpy.inf).any(-1)
        if (seen == hidden).any() or uniform.any():
            return None
    whole = torch.from_numpy(numpy.broadcast_to(seen, (*seen.shape[:-1], keys)).copy())
    start, end = intervals.runs(whole)
    if not intervals.are_runs(whole, start, end):
        return None
    first, last = (x.expand(-1, queries) for x in (start, end))
    return Intervals(first, last) if len(mask) > 1 else Intervals(first[0], last[0])


def both(a: Intervals | None, b: Intervals | None) -> Intervals | None:
    """The intersection of two masks; None is a mask that masks out nothing."""
    if a is None or b is None:
        return a or b
    return Intervals(torch.maximum(a.start, b.start), torch.minimum(a.end, b.end))
