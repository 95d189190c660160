"""Modules against open_flamingo's with the same parameters: a gated block, a decode step, the resampler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import peers
from benchmarks.cases.attention import HEADS, WIDTH, attention_flops
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name
from vlmkernels import intervals
from vlmkernels.models._visualgpt_layers import Regions, VisualBlock, VisualGPTConfig
from vlmkernels.nn import GatedCrossAttentionBlock, MediaCache, PerceiverResampler

INNER = HEADS * WIDTH
RUNS_WITH = ("interval_attention",)


def _theirs(name: str, **sizes: int) -> nn.Module:
    return getattr(peers.load("open_flamingo.src.helpers"), name)(**sizes)


def _without_values(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def _parameters(module: nn.Module, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """As they are after construction, with gates that are open."""
    values = {name: value.detach().clone() for name, value in module.named_parameters()}
    for name, value in values.items():
        if name.endswith("_gate"):
            value.fill_(0.5)
    return {name: value.to(device, dtype).requires_grad_() for name, value in values.items()}


def _image_tokens(batch: int, tokens: int, images: int, device: str) -> Tensor:  # [B, T] bool
    places = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    places[:, :: max(tokens // images, 1)][:, :images] = True
    return places


def _block_inputs(
    device: str, dtype: torch.dtype, batch: int, tokens: int, images: int, latents: int,
    *, width: int, visual: int, decoding: bool,
) -> dict[str, Tensor]:  # fmt: skip
    text = 1 if decoding else tokens
    return {
        "x": torch.randn(batch, text, width, device=device).to(dtype).requires_grad_(),
        "media": torch.randn(batch, images, latents, visual, device=device).to(dtype).requires_grad_(),
        "media_locations": _image_tokens(batch, tokens, images, device),
        **_parameters(GatedCrossAttentionBlock(width, visual), device, dtype),
    }


def _on_parameters(make: Callable[[], nn.Module], *positional: str, **options: bool) -> Callable[..., Tensor]:
    """The module as a function of its inputs and its parameters, by name."""
    module = _without_values(make)

    def call(**tensors: Tensor) -> Tensor:
        inputs = tuple(tensors.pop(name) for name in positional)
        return functional_call(module, tensors, inputs, options)

    return call


def _block_flops(rows: float, media: float, pairs: float, width: int, visual: int) -> float:
    """Forward, attention included: queries, output and feed-forward of 4 x the width; keys and values."""
    dense = rows * width * (2 * INNER + 8 * width) + media * visual * 2 * INNER
    return 2.0 * dense + attention_flops(pairs, backward=False)


def cross_attention(quick: bool, device: str) -> list[Case]:
    """Bound by dense products. Ours recomputes the branch of the attention in the backward."""
    sizes = cut(quick, batch=1, tokens=512, images=8, latents=64)
    width = visual = 128 if quick else 1024
    rows, media = sizes["tokens"], sizes["images"] * sizes["latents"]
    forward = _block_flops(rows, media, rows * sizes["latents"], width, visual)
    names = ("x", "media", "media_locations")
    theirs = partial(
        _on_parameters, partial(_theirs, "GatedCrossAttentionBlock", dim=width, dim_visual=visual), *names
    )
    block = _without_values(partial(GatedCrossAttentionBlock, width, visual))
    weights = sum(weight.numel() for weight in block.parameters())
    cases = []
    for dtype in (F32, BF16):
        for form in ("", " forward only", " recompute_ffn"):
            make = partial(GatedCrossAttentionBlock, width, visual, recompute_ffn=form == " recompute_ffn")
            backward = form != " forward only"
            again = rows * width * (INNER + (4 * width if form == " recompute_ffn" else 0))
            moved = 2 * rows * width + media * visual + weights
            cases.append(
                Case(
                    op="cross_attention",
                    name=f"gated block d=1024, T=512, 8 images x 64{form} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=partial(_block_inputs, width=width, visual=visual, decoding=False),
                    ours=_on_parameters(make, *names),
                    baselines=timed(
                        quick,
                        Baseline("open_flamingo's block", theirs),
                        Baseline("torch.compile of open_flamingo's block", theirs, True),
                    ),
                    flops=3 * forward + 2.0 * again if backward else forward,
                    min_flops=3 * forward if backward else forward,
                    bytes=moved * dtype.itemsize * (2 if backward else 1),
                    backward=backward,
                    memory=backward,
                    headline=form == "",
                    out_shape=("batch", "tokens", width),
                    runs_with=RUNS_WITH,
                )
            )
    return cases


def _cached(make: Callable[[], nn.Module]) -> Callable[..., Tensor]:
    """A step after the text before it: images projected once, at the first call."""
    block = _without_values(make)
    caches: list[MediaCache] = []

    def step(x: Tensor, media: Tensor, media_locations: Tensor, **parameters: Tensor) -> Tensor:
        if not caches:
            block.load_state_dict(parameters, assign=True)
            caches.append(MediaCache([block], media))
            caches[0].step(media_locations)
        caches[0].step()
        return functional_call(block, parameters, (x,), {"cache": caches[0]})

    return step


def media_cache(quick: bool, device: str) -> list[Case]:
    """One token through one block of OpenFlamingo-3B: bound by reading its weights once."""
    width, visual = (128, 128) if quick else (2048, 1024)
    theirs = partial(
        _on_parameters,
        partial(_theirs, "GatedCrossAttentionBlock", dim=width, dim_visual=visual),
        "x", "media", "media_locations",
        use_cached_media=True,
    )  # fmt: skip
    block = _without_values(partial(GatedCrossAttentionBlock, width, visual))
    read = sum(weight.numel() for name, weight in block.named_parameters() if "to_kv" not in name)
    cases = []
    for dtype in (F32, BF16):
        for batch, images in ((1, 1), (1, 2), (1, 4), (1, 8), (3, 8), (8, 8)):
            sizes = cut(quick, batch=batch, tokens=32 * images, images=images, latents=64)
            latents = sizes["latents"]
            flops = _block_flops(batch, 0, batch * latents, width, visual)
            cases.append(
                Case(
                    op="media_cache",
                    name=f"decode step, block d=2048, batch {batch}, images {images} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=partial(_block_inputs, width=width, visual=visual, decoding=True),
                    ours=_cached(partial(GatedCrossAttentionBlock, width, visual)),
                    baselines=timed(
                        quick,
                        Baseline("open_flamingo, use_cached_media", theirs),
                        *([Baseline("torch.compile of open_flamingo", theirs, True)] if images == 8 else []),
                    ),
                    flops=flops,
                    min_flops=flops,
                    bytes=(read + batch * latents * 2 * INNER) * dtype.itemsize,
                    backward=False,
                    headline=(batch, images) == (1, 8),
                    runs_with=RUNS_WITH,
                )
            )
    return cases


def _resampler_inputs(
    device: str, dtype: torch.dtype, images: int, tokens: int, *, width: int
) -> dict[str, Tensor]:
    return {
        "x": torch.randn(1, images, 1, tokens, width, device=device).to(dtype),
        **_parameters(PerceiverResampler(width, depth=1), device, dtype),
    }


def perceiver(quick: bool, device: str) -> list[Case]:
    """One layer on the tokens of a frozen vision encoder, bound by dense products."""
    sizes = cut(quick, images=8, tokens=256)
    width, latents = (128, 64) if quick else (1024, 64)
    images, tokens = sizes.values()
    ours = partial(PerceiverResampler, width, depth=1)
    theirs = partial(_on_parameters, partial(_theirs, "PerceiverResampler", dim=width, depth=1), "x")
    pairs = images * latents * (tokens + latents)
    dense = images * width * (latents * (2 * INNER + 8 * width) + (tokens + latents) * 2 * INNER)
    cases = []
    for dtype in (F32, BF16):
        for backward in (False, True):
            flops = (2.0 * dense + attention_flops(pairs, backward=False)) * (3 if backward else 1)
            cases.append(
                Case(
                    op="perceiver",
                    name="resampler layer d=1024, 8 images of 256 tokens"
                    f"{'' if backward else ' forward only'} {type_name(dtype)}",
                    dtype=dtype,
                    sizes=sizes,
                    make_inputs=partial(_resampler_inputs, width=width),
                    ours=_on_parameters(ours, "x"),
                    baselines=timed(
                        quick,
                        Baseline("open_flamingo's resampler", theirs),
                        Baseline("torch.compile of open_flamingo's resampler", theirs, True),
                    ),
                    flops=flops,
                    min_flops=flops,
                    bytes=images * (tokens + latents) * width * dtype.itemsize,
                    backward=backward,
                    memory=backward,
                    headline=backward,
                    out_shape=(1, "images", latents, width),
                    runs_with=("perceiver_attention",),
                )
            )
    return cases


def _decode_inputs(
    device: str, dtype: torch.dtype, batch: int, regions: int, *, config: VisualGPTConfig
) -> dict[str, Tensor]:
    shape = (batch, config.encoder_layers, regions, config.width)
    return {
        "x": torch.randn(batch, 1, config.width, device=device).to(dtype),
        "levels": torch.randn(shape, device=device).to(dtype),
        **_parameters(VisualBlock(config), device, dtype),
    }


def _visual_step(config: VisualGPTConfig, *, cached: bool) -> Callable[..., Tensor]:
    """A block of the decoder reads a first token, with the keys of the image made once or at every call."""
    block = _without_values(partial(VisualBlock, config)).eval()
    kept: list[tuple[Tensor, Tensor]] = []

    def step(x: Tensor, levels: Tensor, **parameters: Tensor) -> Tensor:
        regions = Regions(levels, None)
        if not kept:
            block.load_state_dict(parameters, assign=True)
            kept.append(block.keys_values(regions))
        memory = kept[0] if cached else block.keys_values(regions)
        return block(x, intervals.causal(1, device=x.device), memory, regions)

    return step


def visualgpt(quick: bool, device: str) -> list[Case]:
    """One token through one block of VisualGPT: weights, and the keys and values of images, are read."""
    config = VisualGPTConfig(width=64, heads=1) if quick else VisualGPTConfig()
    sizes = cut(quick, batch=50, regions=50)
    block = _without_values(partial(VisualBlock, config))
    read = sum(weight.numel() for name, weight in block.named_parameters() if "kv_proj" not in name)
    keys = 2 * sizes["batch"] * config.encoder_layers * sizes["regions"] * config.width
    cases = []
    for dtype in (F32, BF16):
        flops = 2.0 * sizes["batch"] * (read + config.width * 2 * config.encoder_layers) + 2.0 * keys
        case = Case(
            op="visualgpt",
            name=f"decode step, block d=768, batch 50, 3 levels of 50 regions {type_name(dtype)}",
            dtype=dtype,
            sizes=sizes,
            make_inputs=partial(_decode_inputs, config=config),
            ours=_visual_step(config, cached=True),
            baselines=timed(
                quick,
                Baseline("keys and values of every step", partial(_visual_step, config, cached=False)),
                Baseline("torch.compile of them", partial(_visual_step, config, cached=False), True),
            ),
            flops=flops,
            min_flops=flops,
            bytes=(read + keys) * dtype.itemsize,
            backward=False,
            headline=True,
            runs_with=("srau",),
        )
        cases.append(case)
    return cases


CASES = (cross_attention, media_cache, perceiver, visualgpt)
