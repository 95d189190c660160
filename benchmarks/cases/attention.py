"""Attention of 8 heads of width 64 as a module calls it: views of projections in, merged heads out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import vlmkernels
from benchmarks import peers
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name
from vlmkernels import intervals, reference
from vlmkernels.reference.interval_attention import visible

HEADS, WIDTH, IMAGES = 8, 64, 8
BLOCK = 64  # queries and keys of our smallest tile


class Given(nn.Module):
    """Stands in for a projection whose result is given."""

    result: Any = None

    def forward(self, _: Tensor) -> Any:
        return self.result


def side_by_side(heads: Tensor) -> Tensor:  # [B, H, T, D] -> [B, T, H D]
    return heads.transpose(1, 2).flatten(2)


def _projection(device: str, dtype: torch.dtype, *shape: int) -> Tensor:  # [B, T, ...]
    return torch.randn(shape, device=device).to(dtype)


# interval_attention


def image_places(queries: int, device: str) -> Tensor:  # [1, Tq] bool
    """An image before every eighth of the text."""
    places = torch.zeros(1, queries, dtype=torch.bool, device=device)
    places[:, : IMAGES * (queries // IMAGES) : max(queries // IMAGES, 1)] = True
    return places


def bounds(mask: str, queries: int, keys: int, device: str = "cpu") -> tuple[Tensor, Tensor]:  # [Tq]
    if mask == "Flamingo":
        time = intervals.text_time(image_places(queries, device))
        start, end = intervals.media(time, keys // IMAGES, IMAGES)
        return start[0], end[0]
    if mask == "last image":
        end = torch.full((queries,), keys, dtype=torch.int32, device=device)
        return end - keys // IMAGES, end
    prefix = {"causal": 0, "prefix-LM": keys // 4, "full": keys}[mask]
    return intervals.prefix_lm(prefix, queries, device=device)


def visible_pairs(start: Tensor, end: Tensor, *, block: int = 1) -> int:
    """Pairs of query and key inside the intervals; with `block`, as its square tiles cover them."""
    if block == 1:
        return int((end - start).clamp_min(0).sum())
    pairs = 0
    for low, high in zip(start.split(block), end.split(block), strict=True):
        if (low < high).any():
            first, last = int(low[low < high].min()), int(high[low < high].max())
            pairs += len(low) * (-(-last // block) - first // block) * block
    return pairs


def attention_flops(pairs: float, *, backward: bool) -> float:
    """Two products forward; backward the recomputed logits and one product for each of dp, dv, dq, dk."""
    return HEADS * pairs * 2.0 * WIDTH * (7 if backward else 2)


def _inputs(device: str, dtype: torch.dtype, queries: int, keys: int, *, mask: str) -> dict[str, Tensor]:
    tensors = {
        name: _projection(device, dtype, 1, tokens, HEADS, WIDTH).transpose(1, 2).requires_grad_()
        for name, tokens in (("query", queries), ("key", keys), ("value", keys))
    }
    tensors["start"], tensors["end"] = bounds(mask, queries, keys, device)
    if mask not in ("causal", "full"):
        tensors["mask"] = visible(tensors["start"], tensors["end"], keys)
    if mask == "Flamingo":
        tensors["places"] = image_places(queries, device)
    return tensors


def _ours(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, **_: Tensor) -> Tensor:
    return side_by_side(vlmkernels.interval_attention(query, key, value, start, end))


def _reference() -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, start: Tensor, end: Tensor, **_: Tensor) -> Tensor:
        return side_by_side(reference.interval_attention(query, key, value, start, end))

    return attend


def _sdpa(**options: bool) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **_: Tensor) -> Tensor:
        return side_by_side(scaled_dot_product_attention(query, key, value, attn_mask=mask, **options))

    return attend


def _image_by_image() -> Callable[..., Tensor]:
    """The speed that positions of images known on the host allow."""

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
        pieces = zip(*(x.chunk(IMAGES, 2) for x in (query, key, value)), strict=True)
        return side_by_side(torch.cat([scaled_dot_product_attention(*piece) for piece in pieces], 2))

    return attend


def _prefix_and_rest() -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Tensor) -> Tensor:
        p = key.shape[2] // 4
        prefix = scaled_dot_product_attention(query[:, :, :p], key[:, :, :p], value[:, :, :p])
        rest = scaled_dot_product_attention(query[:, :, p:], key, value, attn_mask=mask[p:])
        return side_by_side(torch.cat([prefix, rest], 2))

    return attend


def _open_flamingo() -> Callable[..., Tensor]:
    """MaskedCrossAttention without its norm and its projections."""
    make = peers.load("open_flamingo.src.helpers").MaskedCrossAttention
    core = make(dim=HEADS * WIDTH, dim_visual=HEADS * WIDTH, dim_head=WIDTH, heads=HEADS)
    core.norm = core.to_q = core.to_out = nn.Identity()
    core.to_kv = Given()

    def attend(query: Tensor, key: Tensor, value: Tensor, places: Tensor, **_: Tensor) -> Tensor:
        pair = side_by_side(key), side_by_side(value)
        core.to_kv.result = SimpleNamespace(chunk=lambda *_, **__: pair)
        return core(side_by_side(query), pair[1].unflatten(1, (IMAGES, -1)), places)

    return attend


def _flex(mask: str, queries: int, keys: int, device: str) -> Callable[..., Tensor]:
    flex = peers.load("torch.nn.attention.flex_attention")
    start, end = bounds(mask, queries, keys, device)
    block_mask = flex.create_block_mask(
        lambda b, h, q, k: (k >= start[q]) & (k < end[q]), None, None, queries, keys, device=device
    )

    def attend(query: Tensor, key: Tensor, value: Tensor, **_: Tensor) -> Tensor:
        return side_by_side(flex.flex_attention(query, key, value, block_mask=block_mask))

    return attend


def interval_attention(quick: bool, device: str) -> list[Case]:
    """Two products forward and five backward over the tiles that the intervals touch."""
    masked = Baseline("SDPA with the mask", _sdpa)
    flamingo = (
        masked,
        Baseline("open_flamingo's eager core", _open_flamingo),
        Baseline("SDPA image by image, places known to the host", _image_by_image),
    )
    prefix = (masked, Baseline("SDPA for the prefix, SDPA with the mask for the rest", _prefix_and_rest))
    causal = (Baseline("SDPA is_causal", partial(_sdpa, is_causal=True)),)
    full = (Baseline("SDPA", _sdpa),)
    plain = (Baseline("reference", _reference), Baseline("torch.compile of the reference", _reference, True))
    forms = [
        ("Flamingo, 8 images x 64, T=2048", "Flamingo", 2048, 512, flamingo),
        ("Flamingo, 8 images x 64, T=512", "Flamingo", 512, 512, flamingo),
        ("Flamingo, 8 images x 64, T=256", "Flamingo", 256, 512, flamingo),
        ("prefix-LM, T=2048 P=512", "prefix-LM", 2048, 2048, prefix),
        ("prefix-LM, T=1024 P=256", "prefix-LM", 1024, 1024, prefix),
        ("causal, T=2048", "causal", 2048, 2048, causal),
        ("full, T=2048", "full", 2048, 2048, full),
        ("full, T=577", "full", 577, 577, full),
        ("decoding, the last of 8 images x 64", "last image", 1, 512, (masked,)),
        ("decoding, 2048 keys", "full", 1, 2048, full),
    ]
    cases = []
    for dtype in (F32, BF16):
        for form, mask, queries, keys, peers_of_form in forms:
            sizes = cut(quick, queries=queries, keys=keys)
            start, end = bounds(mask, **sizes)
            flex = Baseline("FlexAttention, compiled", partial(_flex, mask, **sizes, device=device), True)
            shown = form in ("Flamingo, 8 images x 64, T=2048", "prefix-LM, T=2048 P=512")
            for backward in (False,) if queries == 1 else (False, True):
                compared = [*peers_of_form, *(plain if shown else ())]
                if shown or not backward:  # one row says why it has no backward
                    compared.append(flex)
                rows = len(start) + int(end.max() - start.min())  # keys that some query sees
                moved = rows * 2 * HEADS * WIDTH * dtype.itemsize
                cases.append(
                    Case(
                        op="interval_attention",
                        name=f"{form}{'' if backward else ' forward only'} {type_name(dtype)}",
                        dtype=dtype,
                        sizes=sizes,
                        make_inputs=partial(_inputs, mask=mask),
                        ours=_ours,
                        baselines=timed(quick, *compared),
                        flops=attention_flops(visible_pairs(start, end, block=BLOCK), backward=backward),
                        min_flops=attention_flops(visible_pairs(start, end), backward=backward),
                        bytes=moved * (2 if backward else 1),
                        backward=backward,
                        memory=shown and backward,
                        headline=shown,
                        out_shape=(1, "queries", HEADS * WIDTH),
                    )
                )
    return cases


# perceiver_attention


def _latent_inputs(
    device: str, dtype: torch.dtype, batch: int, media: int, latents: int, *, ragged: bool
) -> dict[str, Tensor]:
    query = _projection(device, dtype, batch, latents, HEADS, WIDTH).transpose(1, 2).requires_grad_()
    tensors = {"query": query}  # keys and values of one source come from one projection
    for name, tokens in (("media", media), ("latents", latents)):
        tensors[name] = _projection(device, dtype, batch, tokens, 2, HEADS, WIDTH).requires_grad_()
    if ragged:
        lengths = torch.linspace(0, media, batch, device=device).long()
        everywhere = torch.full_like(lengths, media + latents)[:, None]
        seen = visible(torch.zeros_like(everywhere), lengths[:, None], media + latents)  # [B, 1, 1, S + L]
        seen[..., media:] = True
        tensors |= {"media_lengths": lengths, "mask": seen}
    return tensors


def _keys_values(source: Tensor) -> tuple[Tensor, Tensor]:  # [B, T, 2, H, D] -> each [B, H, T, D]
    key, value = source.unbind(2)
    return key.transpose(1, 2), value.transpose(1, 2)


def _latents_attend(
    op: Callable[..., Tensor],
    query: Tensor,
    media: Tensor,
    latents: Tensor,
    media_lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    sources = (*_keys_values(media), *_keys_values(latents))
    return side_by_side(op(query, *sources, media_lengths=media_lengths))


def _concatenated() -> Callable[..., Tensor]:
    def attend(
        query: Tensor, media: Tensor, latents: Tensor, mask: Tensor | None = None, **_: Tensor
    ) -> Tensor:
        key, value = _keys_values(torch.cat([media, latents], 1))
        return side_by_side(scaled_dot_product_attention(query, key, value, attn_mask=mask))

    return attend


def _open_flamingo_latents() -> Callable[..., Tensor]:
    """PerceiverAttention without its norms and its projections; it concatenates media and latents."""
    make = peers.load("open_flamingo.src.helpers").PerceiverAttention
    core = make(dim=HEADS * WIDTH, dim_head=WIDTH, heads=HEADS)
    core.norm_media = core.norm_latents = core.to_kv = core.to_out = nn.Identity()
    core.to_q = Given()

    def attend(query: Tensor, media: Tensor, latents: Tensor) -> Tensor:
        core.to_q.result = side_by_side(query)[:, None]
        return core(media.flatten(2)[:, None], latents.flatten(2)[:, None])[:, 0]

    return attend


def perceiver_attention(quick: bool, device: str) -> list[Case]:
    """Two products forward and five backward over all pairs of a latent with media tokens and latents."""
    joined = Baseline("SDPA on the concatenation", _concatenated)
    core = Baseline("open_flamingo's eager core", _open_flamingo_latents)

    def plain() -> Callable[..., Tensor]:
        return partial(_latents_attend, reference.perceiver_attention)

    compiled = Baseline("torch.compile of the reference", plain, True)
    forms = [
        (
            "8 images of 256 tokens, 64 latents",
            256,
            False,
            (joined, core, Baseline("reference", plain), compiled),
        ),
        ("8 images of 2048 tokens, 64 latents", 2048, False, (joined, core)),
        ("8 images of 0 to 256 tokens, 64 latents", 256, True, (joined,)),
    ]
    cases = []
    for dtype in (F32, BF16):
        for form, tokens, ragged, baselines in forms:
            sizes = cut(quick, batch=8, media=tokens, latents=64)
            batch, media, latents = sizes.values()
            seen = batch * (media / 2 if ragged else media) + batch * latents
            pairs = seen * latents
            shown = tokens == 256 and not ragged
            for backward in (False, True):
                moved = (2 * seen + 2 * batch * latents) * HEADS * WIDTH * dtype.itemsize
                flops = attention_flops(pairs, backward=backward)
                cases.append(
                    Case(
                        op="perceiver_attention",
                        name=f"{form}{'' if backward else ' forward only'} {type_name(dtype)}",
                        dtype=dtype,
                        sizes=sizes,
                        make_inputs=partial(_latent_inputs, ragged=ragged),
                        ours=partial(_latents_attend, vlmkernels.perceiver_attention),
                        baselines=timed(quick, *baselines),
                        flops=flops,
                        min_flops=flops,
                        bytes=moved * (2 if backward else 1),
                        backward=backward,
                        memory=shown and backward,
                        headline=shown and backward,
                        out_shape=("batch", "latents", HEADS * WIDTH),
                    )
                )
    return cases


CASES = (interval_attention, perceiver_attention)
