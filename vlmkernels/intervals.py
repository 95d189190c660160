"""The masks of vision-language models as intervals: query i sees the keys start_i <= j < end_i.

Every builder works on the device of its arguments without waiting for it and returns ``(start, end)``, int32,
``[T]`` or ``[B, T]``, non-decreasing along the queries. A tensor without dimensions counts as a number.
Lengths must be integers (ValueError); one beyond int32 is longer than any sequence. `runs` converts a
mask.
"""

import torch
from torch import Tensor

from vlmkernels._arguments import INTEGRAL

Intervals = tuple[Tensor, Tensor]
_MOST = 2**31 - 1


def causal(T: int, offset: int = 0, *, device: torch.device | str | None = None) -> Intervals:
    """Query i, at position ``offset + i``, sees all up to itself: ``[0, offset + i + 1)``, each [T]."""
    end = torch.arange(offset + 1, offset + T + 1, dtype=torch.int32, device=device)
    return torch.zeros_like(end), end


def full(T: int, keys: int | None = None, *, device: torch.device | str | None = None) -> Intervals:
    """Every query sees all of the ``keys`` (``T`` when not given): ``[0, keys)``, each [T]."""
    end = torch.full((T,), T if keys is None else keys, dtype=torch.int32, device=device)
    return torch.zeros_like(end), end


def prefix_lm(
    prefix_len: int | Tensor,  # [B]
    T: int,
    offset: int = 0,
    *,
    device: torch.device | str | None = None,
) -> Intervals:
    """Bidirectional over ``prefix_len`` keys, then causal: ``[0, max(prefix_len, offset + i + 1))``.

    The prefix language model of SimVLM (Wang et al. 2022, section 3.1). Each result is [T] for one length,
    [B, T] for a length per sample.
    """
    if isinstance(prefix_len, Tensor):
        prefix_len = _int32("prefix_lm", "prefix_len", prefix_len)
        if prefix_len.dim():
            start, end = causal(T, offset, device=prefix_len.device if device is None else device)
            end = torch.maximum(end, prefix_len.to(end)[:, None])
            return start.expand_as(end), end
    start, end = causal(T, offset, device=device)
    return start, end.clamp_min(prefix_len)


def padding(
    lengths: Tensor,  # [B]
    Tq: int,
) -> Intervals:
    """Every query sees the first ``lengths[b]`` keys: ``[0, length)``, each [B, Tq]."""
    end = _int32("padding", "lengths", lengths)[:, None]
    return torch.zeros_like(end).expand(-1, Tq), end.expand(-1, Tq)


def packed(
    cu_seqlens: Tensor,  # [documents + 1]
    T: int,
    *,
    causal: bool = True,
) -> Intervals:
    """Documents one after the other: from the document's start to i + 1, or to the document's end; each [T].

    ``cu_seqlens`` has the documents' bounds, 0 first, as for variable-length attention. Rows past the last
    document are empty.
    """
    bounds = _int32("packed", "cu_seqlens", cu_seqlens)
    if bounds.dim() != 1 or bounds.shape[0] == 0:
        raise ValueError(f"packed: cu_seqlens must be [documents + 1], got {tuple(bounds.shape)}")
    position = torch.arange(T, dtype=torch.int32, device=bounds.device)
    after = torch.searchsorted(bounds, position, right=True)  # the first bound past i
    inside = after < bounds.shape[0]
    start = bounds[(after - 1).clamp(0, bounds.shape[0] - 1)]
    end = position + 1 if causal else bounds[after.clamp_max(bounds.shape[0] - 1)]
    return start, torch.where(inside, end, start)


def media(
    text_time: Tensor,  # [B, T]
    tokens_per_media: int,
    num_media: int | Tensor,  # [B]
    *,
    attend: str = "immediate",
) -> Intervals:
    """Text at time t sees the tokens of image t, or of images 1 to t; each [B, T].

    ``text_time`` counts the images up to and including each position (`text_time`). With
    ``attend="immediate"``, the mask of Flamingo (Alayrac et al. 2022, section 3.1.3), text sees ``[(t-1) n,
    t n)``, nothing for t = 0 or t > num_media; with ``"all_previous"`` ``[0, min(t, num_media) n)``.

    Raises:
        ValueError: for another ``attend``.
    """
    if attend not in ("immediate", "all_previous"):
        raise ValueError(f"media: attend must be 'immediate' or 'all_previous', got {attend!r}")
    time = _int32("media", "text_time", text_time)
    most = num_media
    if isinstance(most, Tensor):
        most = _int32("media", "num_media", most)
        most = most.to(time)[:, None] if most.dim() else most
    end = time.clamp_max(most) * tokens_per_media
    if attend == "all_previous":
        return torch.zeros_like(end), end
    start = (time - 1).clamp_min(0).clamp_max(most) * tokens_per_media
    return start, end


def text_time(
    media_locations: Tensor,  # [B, T] bool
) -> Tensor:  # [B, T]
    """How many images have appeared up to and including each position, int32."""
    return media_locations.cumsum(-1, dtype=torch.int32)


def runs(
    mask: Tensor,  # [..., T] bool
) -> Intervals:  # [...] each
    """The interval of as many keys as a row has True, from its first one; exact if `are_runs`; each [...]."""
    start = mask.int().argmax(-1)  # bool has no argmax
    return start.to(torch.int32), (start + mask.sum(-1)).to(torch.int32)


def are_runs(
    mask: Tensor,  # [..., T] bool
    start: Tensor,  # [...]
    end: Tensor,  # [...]
) -> bool:
    """Whether each row of the mask sees its interval and nothing else; waits for the mask's device."""
    position = torch.arange(mask.shape[-1], device=mask.device)
    return torch.equal((position >= start[..., None]) & (position < end[..., None]), mask)


def _int32(builder: str, name: str, numbers: Tensor) -> Tensor:
    if numbers.dtype not in INTEGRAL:
        raise ValueError(f"{builder}: {name} must contain integers, got {numbers.dtype}")
    if numbers.dtype == torch.int64:
        numbers = numbers.clamp(-_MOST, _MOST)
    return numbers.to(torch.int32)
