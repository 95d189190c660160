"""Language models on text and on images and text: GPT-2 beside transformers', Flamingo and SimVLM alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlmkernels.models import clip, decoder, flamingo, simvlm
from vlmkernels.models.decoder import CausalLM, DecoderConfig
from vlmkernels.models.flamingo import Flamingo, FlamingoConfig
from vlmkernels.models.simvlm import SimVLM, SimVLMConfig

from .peer_models import transformers_gpt2
from .systems import OURS, STEP, Family, Model, System, patched, text_lengths

GPT2 = DecoderConfig(
    vocab_size=50257, width=768, layers=12, heads=12, context_length=1024, activation="gelu_tanh"
)
CAPTION = 32  # tokens of a padded caption
PREFIX = 4  # tokens of a caption that SimVLM is given
IGNORE = -100


def _gpt2(config: DecoderConfig) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(config)


def _ours(config: DecoderConfig) -> Model:
    model = _gpt2(config)
    return Model(model, lambda images, tokens: model.loss(tokens))


def _transformers(config: DecoderConfig) -> Model:
    model = transformers_gpt2(config)
    model.load_state_dict(_gpt2(config).hf_state_dict())
    return Model(model, lambda images, tokens: model(tokens, labels=tokens, use_cache=False).loss)


def gpt2(config: DecoderConfig, length: int, name: str) -> Family:
    """Texts without padding; there are no images."""

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        return torch.empty(0), torch.randint(0, config.vocab_size, (batch, length))

    systems = (
        System(OURS, lambda: _ours(config)),
        System("transformers", lambda: _transformers(config)),
        System("transformers, compiled", lambda: _transformers(config), compiled=True),
        System("transformers, patched", lambda: patched(_transformers(config))),
    )
    return Family(name, systems, inputs, "transformers", {STEP: (1, 8)})


def _alone(name: str, make: Callable[[], Model], inputs: Callable[[int], tuple[Tensor, Tensor]]) -> Family:
    return Family(name, (System(OURS, make),), inputs, OURS, {STEP: (1, 8)})


def on_captions(config: FlamingoConfig, name: str) -> Family:
    """Flamingo on pairs of an image and its caption; the image's token and the padding are not predicted."""
    vision, language = config.vision, config.language
    assert vision is not None
    assert language is not None

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        tokens = torch.randint(0, config.endofchunk_token_id, (batch, CAPTION))
        tokens[:, 0] = config.media_token_id
        padding = torch.arange(CAPTION) >= text_lengths(batch, CAPTION, captions=True)
        images = torch.randn(batch, 1, 1, 3, vision.image_size, vision.image_size)
        return images, tokens.masked_fill(padding, config.endofchunk_token_id)

    def make() -> Model:
        torch.manual_seed(0)
        model = Flamingo(config)

        def loss(images: Tensor, tokens: Tensor) -> Tensor:
            ended = (tokens == config.endofchunk_token_id).cumsum(1)
            hidden = (tokens == config.media_token_id) | (ended > 1)
            out: dict[str, Any] = model(
                images, tokens, (ended < 2).long(), tokens.masked_fill(hidden, IGNORE)
            )
            return out["loss"]

        return Model(model, loss)

    return _alone(name, make, inputs)


def with_prefixes(config: SimVLMConfig, name: str) -> Family:
    """SimVLM on images and captions, whose first tokens are given."""

    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        tokens = torch.randint(3, config.vocab_size - 2, (batch, CAPTION))  # special ids are first or last
        tokens[:, 0] = config.bos_id
        end = text_lengths(batch, CAPTION, captions=True) - 1
        tokens = tokens.masked_fill(torch.arange(CAPTION) > end, config.pad_id).scatter(1, end, config.eos_id)
        return torch.randn(batch, 3, config.image_size, config.image_size), tokens

    def make() -> Model:
        torch.manual_seed(0)
        model = SimVLM(config)
        return Model(model, lambda images, tokens: model(images, tokens, PREFIX)["loss"])

    return _alone(name, make, inputs)


def families(quick: bool) -> Iterator[Family]:
    """GPT-2 small; a Flamingo of it and CLIP's ViT-B/32; SimVLM base; or tiny ones."""
    if quick:
        yield gpt2(decoder.CONFIGS["emoji-tiny"], 32, "GPT-2 tiny")
        yield on_captions(flamingo.CONFIGS["emoji-tiny"], "Flamingo tiny on captions")
        yield with_prefixes(simvlm.CONFIGS["emoji-tiny"], "SimVLM tiny on captions")
        return
    yield gpt2(GPT2, 256, "GPT-2 small, 256 tokens")
    ids = {"media_token_id": GPT2.vocab_size, "endofchunk_token_id": GPT2.vocab_size + 1}
    language = replace(GPT2, vocab_size=GPT2.vocab_size + 2)
    vision = clip.CONFIGS["ViT-B-32"]
    config = FlamingoConfig(**ids, vision=vision, language=language, cross_attn_every_n_layers=4)
    yield on_captions(config, "Flamingo of GPT-2 small and ViT-B/32 on captions")
    yield with_prefixes(simvlm.CONFIGS["simvlm-base"], "SimVLM base on captions")
