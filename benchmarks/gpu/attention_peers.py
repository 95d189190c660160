"""Attention by other libraries, on the masks of the workloads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vlmkernels
from benchmarks import peers
from benchmarks.cases import attention as attention_cases
from benchmarks.cases.attention import IMAGES
from benchmarks.cases.case import Baseline
from vlmkernels import intervals

BACKENDS = {
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def merged(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Of a function of [B, T, H, D] tensors."""

    def call(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
        return attend(*(x.transpose(1, 2) for x in (query, key, value))).flatten(2)

    return call


def flash(mask: str) -> Callable[..., Tensor]:
    """What FlashAttention needs of each mask: segments and prefixes known on the host."""
    flash = peers.load("flash_attn")

    def by_image(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, sides = query.shape[0], (query.shape[1] // IMAGES, key.shape[1] // IMAGES)
        ends = [
            torch.arange(batch * IMAGES + 1, device=query.device, dtype=torch.int32) * side for side in sides
        ]
        out = flash.flash_attn_varlen_func(
            query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), *ends, *sides
        )
        return out.unflatten(0, (batch, -1))

    def by_prefix(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        p = key.shape[1] // 4
        prefix = flash.flash_attn_func(query[:, :p], key[:, :p], value[:, :p])
        return torch.cat([prefix, flash.flash_attn_func(query[:, p:], key, value, causal=True)], 1)

    forms = {
        "full": flash.flash_attn_func,
        "causal": partial(flash.flash_attn_func, causal=True),
        "Flamingo": by_image,
        "prefix-LM": by_prefix,
    }
    return merged(forms[mask])


def by_provider(mask: str, batch: int, queries: int, keys: int) -> Callable[..., Tensor]:
    """Our op with the intervals whole, which then chooses flash-attn or SDPA where it can."""

    @functools.cache
    def seen(device: torch.device) -> intervals.Intervals:
        if mask == "Flamingo":
            places = attention_cases.image_places(queries, device).expand(batch, -1)
            return intervals.media(intervals.text_time(places), keys // IMAGES, IMAGES)
        return {"full": intervals.full, "causal": intervals.causal}[mask](queries, device=device)

    def call(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
        out = vlmkernels.interval_attention(query, key, value, seen(query.device))
        return attention_cases.side_by_side(out)

    return call


def by_backend(name: str, make: Callable[[], Callable[..., Tensor]]) -> Iterator[Baseline]:
    """SDPA as it chooses, and by each of its fused kernels: cards differ in which one is fastest."""

    def held_to(backend: SDPBackend) -> Callable[..., Tensor]:
        attend = make()

        def call(**tensors: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attend(**tensors)

        return call

    yield Baseline(name, make)
    for backend, of in BACKENDS.items():
        yield Baseline(f"{name}, {backend}", partial(held_to, of))
