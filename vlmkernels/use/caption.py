"""Captions of images by a trained Flamingo or SimVLM (and, without images, by a language model)."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.data import CaptionTokenizer
from vlmkernels.data._text import printable
from vlmkernels.data.samples import stacked
from vlmkernels.train import kinds

from .bundle import check_batch_size, inference, load_model
from .images import find_images, read_files

MAX_NEW_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Images with their captions, in order; ``skipped`` gives the reason for each that cannot be read."""

    captions: list[tuple[Path, str]]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(printable(f"{path}: {text}") for path, text in self.captions)


def write_captions(
    model: nn.Module,
    tokenizer: CaptionTokenizer,
    images: Tensor | int,  # [B, 3, H, W]
    *,
    prompt: str = "",
    max_new_tokens: int | None = None,
    **decoding: Any,
) -> list[str]:
    """A caption for each image; for a language model, which has no images, ``images`` is their number.

    The caption starts with ``prompt``. ``max_new_tokens`` of None is 48, or less if the model's context is
    shorter. ``decoding``: num_beams, do_sample, temperature, top_k, top_p,
    length_penalty, generator, as in ``vlmkernels.models.generation.generate``. The model is used in
    evaluation mode. ValueError for invalid options.
    """
    kind = kinds.of_model(model)
    if isinstance(images, int):
        if kind.sees_images:
            raise ValueError(f"images must be [B, 3, H, W], got {images}")
        count = images
    else:
        count = len(images)
    start = [kind.first_token(tokenizer), *tokenizer.encode(prompt)]
    room = tokenizer.context_length - len(start)
    if room < 1:
        raise ValueError(
            f"prompt must have at most {tokenizer.context_length - 2} tokens, got {len(start) - 1}"
        )
    if max_new_tokens is None:
        max_new_tokens = min(MAX_NEW_TOKENS, room)
    with inference(model) as device:
        prompts = torch.tensor([start], device=device).expand(count, -1)
        visible = images if isinstance(images, int) else images.to(device)
        decoding = {"max_new_tokens": max_new_tokens, **decoding}
        tokens = kind.generate(model, tokenizer, visible, prompts, **decoding)
    return [tokenizer.decode(start[1:] + row) for row in tokens.tolist()]


def caption(
    model_folder: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    *,
    batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
    **options: Any,
) -> Captioned:
    """Captions of image files, and of the images below folders, by the model in ``model_folder`` (RUN/final).

    ``options`` are those of :func:`write_captions`; with ``do_sample`` the draws depend on ``seed``. An image
    that cannot be read is skipped and listed in the result. FileNotFoundError or ValueError name what is
    missing or invalid.
    """
    check_batch_size(batch_size)
    if isinstance(inputs, (str, os.PathLike)):
        raise ValueError(f"inputs must be a sequence of paths, got one {type(inputs).__name__}")
    files = find_images(inputs)
    model, tokenizer, transform = load_model(model_folder, device, fitting=kinds.captioners())
    if options.get("do_sample"):
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        options = {**options, "generator": generator}
    skipped: dict[str, str] = {}
    done: list[tuple[Path, str]] = []
    pictures = read_files(transform, files, skipped)
    while batch := list(itertools.islice(pictures, batch_size)):
        images = stacked([image for _, image in batch])
        texts = write_captions(model, tokenizer, images, **options)
        done += zip((file for file, _ in batch), texts, strict=True)
    return Captioned(done, skipped)
