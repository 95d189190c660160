"""The same model, ours and the peers', with equal weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import peers
from vlmkernels.models.align import ALIGN, AlignConfig
from vlmkernels.models.align import CONFIGS as ALIGN_CONFIGS
from vlmkernels.models.clip import CLIP, CONFIGS, ClipConfig

from .peer_models import open_clip_model, transformers_align, transformers_clip

OURS = "vlmkernels"
STEP = "training step"
BATCHES = {STEP: (1, 32, 128), "images": (1, 32, 128), "texts": (1, 32, 128)}
# Of EfficientNet-B7 at 289 pixels: a larger batch needs more memory than a small machine has
ALIGN_BATCHES = {STEP: (1, 8), "images": (1, 32), "texts": (1, 32, 128)}
ON_CAPTIONS = " on captions"
# COCO's captions under CLIP's tokenizer, start and end of text included: how many of a thousand have a length
CAPTION_LENGTHS = {
    9: 4, 10: 41, 11: 147, 12: 196, 13: 194, 14: 153, 15: 100, 16: 64, 17: 37, 18: 22, 19: 14, 20: 9, 21: 6,
    22: 4, 23: 2, 24: 2, 26: 2, 28: 2, 31: 1,
}  # fmt: skip


class Model(NamedTuple):
    """A model and what is done with it; embeddings are normalised."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]  # images [B, 3, R, R], tokens [B, L]
    images: Callable[[Tensor], Tensor] | None = None  # [B, 3, R, R] -> [B, E]
    texts: Callable[[Tensor], Tensor] | None = None  # [B, L] -> [B, E]
    padded: Callable[[Tensor], Tensor] = lambda tokens: tokens  # rows padded as the library's tokenizer does

    def compiled(self) -> Model:
        calls = (f and torch.compile(f, dynamic=False) for f in (self.loss, self.images, self.texts))
        return Model(self.module, *calls, self.padded)


@dataclass(frozen=True)
class System:
    name: str
    make: Callable[[], Model]  # imports the peer; what it raises becomes the reason in the table
    compiled: bool = False

    def model(self) -> Model:
        return self.make().compiled() if self.compiled else self.make()


class Family(NamedTuple):
    """Systems that compute the same, ours first, and what they read."""

    name: str
    systems: tuple[System, ...]
    inputs: Callable[[int], tuple[Tensor, Tensor]]  # images and tokens of a batch
    eager: str  # whose time is broken down next to ours
    batches: Mapping[str, tuple[int, ...]]  # of what is timed: a training step, images, texts


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _clip(config: ClipConfig) -> Model:
    torch.manual_seed(0)
    model = CLIP(config)
    return Model(
        model,
        model.loss,
        lambda images: model.encode_image(images, normalize=True),
        lambda tokens: model.encode_text(tokens, normalize=True),
    )


def _open_clip(config: ClipConfig) -> Model:
    model = open_clip_model(config)
    model.load_state_dict(_clip(config).module.state_dict())
    loss = peers.load("open_clip.loss").ClipLoss()
    return Model(
        model,
        lambda images, tokens: loss(**model(images, tokens)),
        lambda images: model.encode_image(images, normalize=True),
        lambda tokens: model.encode_text(tokens, normalize=True),
    )


def _transformers_clip(config: ClipConfig) -> Model:
    model = transformers_clip(config)
    ours = _clip(config).module
    assert isinstance(ours, CLIP)
    model.load_state_dict(ours.hf_state_dict())
    longest = lambda tokens: int((tokens == config.eot_id).int().argmax(1).max()) + 1  # noqa: E731
    return _transformers(model, longest)


def _transformers(
    model: Any,
    longest: Callable[[Tensor], int],
    mask: Callable[[Tensor], Tensor | None] = lambda tokens: None,
) -> Model:
    """Its processors pad to the longest text of a batch."""

    def loss(images: Tensor, tokens: Tensor) -> Tensor:
        inputs = {"input_ids": tokens, "pixel_values": images, "attention_mask": mask(tokens)}
        return model(**inputs, return_loss=True).loss

    return Model(
        model,
        loss,
        lambda images: _unit(model.get_image_features(pixel_values=images).pooler_output),
        lambda tokens: _unit(
            model.get_text_features(input_ids=tokens, attention_mask=mask(tokens)).pooler_output
        ),
        lambda tokens: tokens[:, : longest(tokens)],
    )


def patched(model: Model) -> Model:
    from vlmkernels.integrations import patch

    patch(model.module)
    return model


def text_lengths(batch: int, longest: int, captions: bool) -> Tensor:  # [B, 1]
    """Of texts as long as can be, or of captions."""
    if not captions:
        return torch.full((batch, 1), longest)
    lengths = torch.tensor(list(CAPTION_LENGTHS))
    drawn = torch.tensor(list(CAPTION_LENGTHS.values()), dtype=torch.float32)
    return lengths[drawn.multinomial(batch, replacement=True)][:, None].clamp_max(longest)


def _batches(batches: Mapping[str, tuple[int, ...]], captions: bool) -> Mapping[str, tuple[int, ...]]:
    """Without images for captions: they are the same."""
    return {what: sizes for what, sizes in batches.items() if not (captions and what == "images")}


def clip(config: ClipConfig, name: str, captions: bool = False) -> Family:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        images = torch.randn(batch, 3, config.image_size, config.image_size)
        tokens = torch.randint(1, config.eot_id, (batch, config.context_length))
        last = text_lengths(batch, config.context_length, captions) - 1
        tokens = tokens.masked_fill(torch.arange(config.context_length) > last, config.pad_id)
        return images, tokens.scatter(1, last, config.eot_id)

    def make(build: Callable[[ClipConfig], Model]) -> Callable[[], Model]:
        return lambda: build(config)

    systems = (
        System(OURS, make(_clip)),
        System("open_clip", make(_open_clip)),
        System("open_clip, compiled", make(_open_clip), compiled=True),
        System("open_clip, patched", lambda: patched(_open_clip(config))),
        System("transformers", make(_transformers_clip)),
        System("transformers, compiled", make(_transformers_clip), compiled=True),
        System("transformers, patched", lambda: patched(_transformers_clip(config))),
    )
    return Family(name, systems, inputs, "open_clip", _batches(BATCHES, captions))


def align(config: AlignConfig, side: int, name: str, captions: bool = False) -> Family:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        tokens = torch.randint(1, config.vocab_size, (batch, config.context_length))
        lengths = text_lengths(batch, config.context_length, captions)
        return torch.randn(batch, 3, side, side), tokens * (torch.arange(config.context_length) < lengths)

    def ours() -> Model:
        torch.manual_seed(0)
        model = ALIGN(config)
        return Model(
            model,
            lambda images, tokens: model.loss(images, tokens, label_smoothing=0.1),  # as the peer
            lambda images: model.encode_image(images, normalize=True),
            lambda tokens: model.encode_text(tokens, normalize=True),
        )

    def theirs() -> Model:
        model = transformers_align(config)
        own = ours().module
        assert isinstance(own, ALIGN)
        model.load_state_dict(own.state_dict())
        mask = lambda tokens: (tokens != 0).long()  # noqa: E731
        return _transformers(model, lambda tokens: int(mask(tokens).sum(1).max()), mask)

    systems = (
        System(OURS, ours),
        System("transformers", theirs),
        System("transformers, compiled", theirs, compiled=True),
        System("transformers, patched", lambda: patched(theirs())),
    )
    return Family(name, systems, inputs, "transformers", _batches(ALIGN_BATCHES, captions))


def contrastive(quick: bool) -> Iterator[Family]:
    """CLIP and ALIGN, of published sizes or tiny; with texts as long as can be, and with captions."""
    name, config = ("CLIP tiny", "emoji-tiny") if quick else ("CLIP ViT-B/32", "ViT-B-32")
    yield clip(CONFIGS[config], name)
    yield clip(CONFIGS[config], f"{name}{ON_CAPTIONS}", captions=True)
    base = replace(ALIGN_CONFIGS["align-base"], text_dropout=0.0, drop_rate=0.0)
    name, side = ("ALIGN tiny", 32) if quick else ("ALIGN base", 289)
    if quick:
        image = {"image_width": 0.25, "image_depth": 0.25, "embed_dim": 80}
        text = {"text_width": 64, "text_layers": 1, "text_heads": 2, "text_mlp_width": 64, "vocab_size": 99}
        base = replace(base, **image, **text)
    yield align(base, side, name)
    yield align(base, side, f"{name}{ON_CAPTIONS}", captions=True)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """float32, or bfloat16 under autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield
