"""Texts ranked by the probability that each belongs to an image."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmkernels.data import Sample, read_image
from vlmkernels.data._text import printable
from vlmkernels.data.images import transformed
from vlmkernels.train import kinds

from .bundle import check_batch_size, inference, load_model


@dataclasses.dataclass(frozen=True)
class Matched:
    """The texts, the likeliest first, each with the probability that it belongs to the image."""

    texts: list[tuple[str, float]]

    def __str__(self) -> str:
        return "\n".join(f"{probability:.4f}  {printable(text)}" for text, probability in self.texts)


def match(
    model_folder: str | os.PathLike[str],
    image: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    regions: str | os.PathLike[str] | None = None,
    boxes: str | os.PathLike[str] | None = None,
    batch_size: int = 256,
    device: str = "auto",
) -> Matched:
    """Rank ``texts`` by how likely each is a text of ``image``, by the model in ``model_folder`` (RUN/final).

    ``regions`` or ``boxes``: files with those of the image (``vlmkernels.data.RegionFiles``), in which
    ``image``, as given, is the key; the image itself is not read for ``regions``. ValueError or
    FileNotFoundError name what is missing or invalid, BrokenImageError an image that cannot be read.
    """
    check_batch_size(batch_size)
    if isinstance(texts, str) or not texts or any(not text.strip() for text in texts):
        raise ValueError(f"texts must be a sequence of one or more texts that are not empty, got {texts!r}")
    model, tokenizer, transform = load_model(model_folder, device, fitting=kinds.matchers())
    kind = kinds.of_model(model)
    collate = kind.collate(regions, boxes)
    picture: Any = None if regions is not None else transformed(transform, read_image(Path(image)))
    sample = Sample(image=picture, text="", key=os.fspath(image), label=-1, concept=-1)
    odds: list[float] = []
    with inference(model) as place:
        batch = {k: v.to(place) if isinstance(v, torch.Tensor) else v for k, v in collate([sample]).items()}
        seen, mask = kind.pictures(model, batch)
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            shown = seen.expand(len(part), -1, -1), mask.expand(len(part), -1)
            odds += kind.match_odds(model, tokenizer, shown, part).tolist()
    order = sorted(range(len(texts)), key=lambda i: -odds[i])
    return Matched([(texts[i], torch.tensor(odds[i]).sigmoid().item()) for i in order])
