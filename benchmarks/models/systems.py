"""The same model, ours and the peers', with equal weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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


class Model(NamedTuple):
    """A model and what is done with it; embeddings are normalised."""

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]  # images [B, 3, R, R], tokens [B, L]
    images: Callable[[Tensor], Tensor]  # [B, 3, R, R] -> [B, E]
    texts: Callable[[Tensor], Tensor]  # [B, L] -> [B, E]

    def compiled(self) -> Model:
        return Model(self.module, *(torch.compile(f, dynamic=False) for f in self[1:]))


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
    eager: str  # whose time is taken apart beside ours


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
    return _transformers(model)


def _transformers(model: Any, mask: Callable[[Tensor], Tensor | None] = lambda tokens: None) -> Model:
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
    )


def _patched(model: Model) -> Model:
    from vlmkernels.integrations import patch

    patch(model.module)
    return model


def clip(config: ClipConfig, name: str) -> Family:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        images = torch.randn(batch, 3, config.image_size, config.image_size)
        tokens = torch.randint(1, config.eot_id, (batch, config.context_length))
        tokens[:, -1] = config.eot_id
        return images, tokens

    def make(build: Callable[[ClipConfig], Model]) -> Callable[[], Model]:
        return lambda: build(config)

    systems = (
        System(OURS, make(_clip)),
        System("open_clip", make(_open_clip)),
        System("open_clip, compiled", make(_open_clip), compiled=True),
        System("transformers", make(_transformers_clip)),
        System("transformers, compiled", make(_transformers_clip), compiled=True),
        System("transformers, patched", lambda: _patched(_transformers_clip(config))),
    )
    return Family(name, systems, inputs, "open_clip")


def align(config: AlignConfig, side: int, name: str) -> Family:
    def inputs(batch: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        tokens = torch.randint(1, config.vocab_size, (batch, config.context_length))
        return torch.randn(batch, 3, side, side), tokens

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
        return _transformers(model, lambda tokens: (tokens != 0).long())

    systems = (
        System(OURS, ours),
        System("transformers", theirs),
        System("transformers, compiled", theirs, compiled=True),
        System("transformers, patched", lambda: _patched(theirs())),
    )
    return Family(name, systems, inputs, "transformers")


def families(quick: bool) -> Iterator[Family]:
    """Those of the published sizes, or tiny ones."""
    yield clip(CONFIGS["emoji-tiny" if quick else "ViT-B-32"], "CLIP tiny" if quick else "CLIP ViT-B/32")
    base = replace(ALIGN_CONFIGS["align-base"], text_dropout=0.0, drop_rate=0.0)
    if quick:
        image = {"image_width": 0.25, "image_depth": 0.25, "embed_dim": 80}
        text = {"text_width": 64, "text_layers": 1, "text_heads": 2, "text_mlp_width": 64, "vocab_size": 99}
        yield align(replace(base, **image, **text), 32, "ALIGN tiny")
    else:
        yield align(base, 289, "ALIGN base")


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """float32, or bfloat16 under autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield
