"""The masks of vision-language models as intervals: query i sees the keys start_i <= j < end_i.

Every builder works on the device of its arguments without waiting for it and returns `Intervals`, which are
``(start, end)``, int32, ``[T]`` or ``[B, T]``, non-decreasing along the queries, and how they were made. A
tensor without dimensions counts as a number. Lengths must be integers (ValueError); one beyond int32 is
longer than any sequence. `runs` converts a mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmkernels import _providers
from vlmkernels._arguments import INTEGRAL

_MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True, eq=False)
class Intervals:
    """``start, end = intervals``, and how they were made, by which attention on CUDA is chosen.

    Attributes:
        start, end: ``[T]`` or ``[B, T]``; not to be changed in place.
        made_by: the builder, "causal" for example; "bounds" if there was none.
        given: what the builder was given that determines the mask, by name.
        ends: of `packed` and `media`, the mask as attention within segments of all samples in one row: where
            those of the queries end and those of the keys, int32, 0 first. Only on CUDA, and only if a
            provider of attention that takes segments is installed.
    """

    start: Tensor
    end: Tensor
    made_by: str = "bounds"
    given: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ends: tuple[Tensor, Tensor] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.start, self.end))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return (self.start, self.end)[index]


Bounds = Intervals | tuple[Tensor, Tensor]  # also without a builder
torch.export.register_dataclass(Intervals, serialized_type_name="vlmkernels.intervals.Intervals")
torch.serialization.add_safe_globals([Intervals])  # the inputs that an exported program keeps as an example


def causal(T: int, offset: int = 0, *, device: torch.device | str | None = None) -> Intervals:
    """Query i, at position ``offset + i``, sees all up to itself: ``[0, offset + i + 1)``, each [T]."""
    end = torch.arange(offset + 1, offset + T + 1, dtype=torch.int32, device=device)
    return Intervals(torch.zeros_like(end), end, "causal", {"offset": offset})


def full(T: int, keys: int | None = None, *, device: torch.device | str | None = None) -> Intervals:
    """Every query sees all of the ``keys`` (``T`` when not given): ``[0, keys)``, each [T]."""
    keys = T if keys is None else keys
    end = torch.full((T,), keys, dtype=torch.int32, device=device)
    return Intervals(torch.zeros_like(end), end, "full", {"keys": keys})


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
    given = {"prefix_len": prefix_len, "offset": offset}
    if isinstance(prefix_len, Tensor):
        prefix_len = _int32("prefix_lm", "prefix_len", prefix_len)
        if prefix_len.dim():
            start, end = causal(T, offset, device=prefix_len.device if device is None else device)
            end = torch.maximum(end, prefix_len.to(end)[:, None])
            return Intervals(start.expand_as(end), end, "prefix_lm", given)
    start, end = causal(T, offset, device=device)
    return Intervals(start, end.clamp_min(prefix_len), "prefix_lm", given)


def padding(
    lengths: Tensor,  # [B]
    Tq: int,
) -> Intervals:
    """Every query sees the first ``lengths[b]`` keys: ``[0, length)``, each [B, Tq]."""
    end = _int32("padding", "lengths", lengths)[:, None]
    start = torch.zeros_like(end)
    return Intervals(start.expand(-1, Tq), end.expand(-1, Tq), "padding", {"lengths": lengths})


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
    given = {"cu_seqlens": cu_seqlens, "causal": causal}
    take_segments = _providers.take_segments(bounds, bounds.shape[0] + 4)
    ends = _document_ends(bounds, T) if take_segments else None
    return Intervals(start, torch.where(inside, end, start), "packed", given, ends)


def media(
    text_time: Tensor,  # [B, T]
    tokens_per_media: int,
    num_media: int | Tensor,  # [B]
    *,
    attend: str = "immediate",
) -> Intervals:
    """Text at time t sees the tokens of image t, or of images 1 to t; each [B, T].

    ``text_time`` counts the images up to and including each position (`text_time`), so that it does not
    decrease along a row. With
    ``attend="immediate"``, the mask of Flamingo (Alayrac et al. 2022, section 3.1.3), text sees ``[(t-1) n,
    t n)``, nothing for t = 0 or t > num_media; with ``"all_previous"`` ``[0, min(t, num_media) n)``.

    Raises:
        ValueError: for another ``attend``.
    """
    if attend not in ("immediate", "all_previous"):
        raise ValueError(f"media: attend must be 'immediate' or 'all_previous', got {attend!r}")
    given = {
        "text_time": text_time, "tokens_per_media": tokens_per_media, "num_media": num_media,
        "attend": attend,
    }  # fmt: skip
    time = _int32("media", "text_time", text_time)
    most = num_media
    if isinstance(most, Tensor):
        most = _int32("media", "num_media", most)
        most = most.to(time)[:, None] if most.dim() else most
    end = time.clamp_max(most) * tokens_per_media
    if attend == "all_previous":
        return Intervals(torch.zeros_like(end), end, "media", given)
    start = (time - 1).clamp_min(0).clamp_max(most) * tokens_per_media
    if isinstance(num_media, Tensor) or not _providers.take_segments(time, time.shape[0] * (num_media + 2)):
        return Intervals(start, end, "media", given)
    return Intervals(start, end, "media", given, _image_ends(time, tokens_per_media, num_media))


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
    end = start + mask.sum(-1)
    return Intervals(start.to(torch.int32), end.to(torch.int32), "runs", {})


def are_runs(
    mask: Tensor,  # [..., T] bool
    start: Tensor,  # [...]
    end: Tensor,  # [...]
) -> bool:
    """Whether each row of the mask sees its interval and nothing else; waits for the mask's device."""
    position = torch.arange(mask.shape[-1], device=mask.device)
    return torch.equal((position >= start[..., None]) & (position < end[..., None]), mask)


def _document_ends(
    bounds: Tensor,  # [documents + 1]
    T: int,
) -> tuple[Tensor, Tensor]:  # [documents + 5] each
    """Of the documents, and of segments that have only queries or only keys for the tokens around them."""
    bounds = bounds.clamp(0, T)
    none, first, last, all_of_them = bounds.new_zeros(1), bounds[:1], bounds[-1:], bounds.new_full((1,), T)
    queries = torch.cat([none, first, bounds, all_of_them, all_of_them])
    return queries, torch.cat([none, none, bounds, last, all_of_them])


def _image_ends(
    time: Tensor,  # [B, T]
    tokens: int,
    images: int,
) -> tuple[Tensor, Tensor]:  # [B (images + 2) + 1] each
    """Of each sample the text before its images, the images with their text, and text of images it lacks."""
    batch, length = time.shape
    torch._assert_async((time[:, 1:] >= time[:, :-1]).all(), "media: text_time decreases along a row")
    image = torch.arange(images + 2, dtype=torch.int32, device=time.device)
    sample = torch.arange(batch, dtype=torch.int32, device=time.device)[:, None]
    queries = torch.searchsorted(time.contiguous(), image.repeat(batch, 1), out_int32=True)
    queries = (queries * (image > 0) + sample * length).flatten()  # those of negative times are before, too
    keys = ((image - 1).clamp_min(0) * tokens + sample * (images * tokens)).flatten()
    totals = (batch * length, batch * images * tokens)
    queries, keys = (
        torch.cat([x, x.new_full((1,), total)]) for x, total in zip((queries, keys), totals, strict=True)
    )
    return queries, keys


def _int32(builder: str, name: str, numbers: Tensor) -> Tensor:
    if numbers.dtype not in INTEGRAL:
        raise ValueError(f"{builder}: {name} must contain integers, got {numbers.dtype}")
    if numbers.dtype == torch.int64:
        numbers = numbers.clamp(-_MOST, _MOST)
    return numbers.to(torch.int32)
