"""Texts ranked by the probability that each belongs to an image."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from vlmkernels.data._text import printable
from vlmkernels.train import kinds

from .bundle import check_batch_size, inference, load_model
from .images import read_files


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
    batch_size: int = 256,
    device: str = "auto",
) -> Matched:
    """Rank ``texts`` by how likely each is a text of ``image``, by the model in ``model_folder`` (RUN/final).

    ``image`` is a file of an image or of the features of its regions (``vlmkernels.data.read_regions``).
    ValueError or FileNotFoundError name what is missing, cannot be read or is invalid.
    """
    check_batch_size(batch_size)
    if isinstance(texts, str) or not texts or any(not text.strip() for text in texts):
        raise ValueError(f"texts must be a sequence of one or more texts that are not empty, got {texts!r}")
    model, tokenizer, transform = load_model(model_folder, device, fitting=kinds.matchers())
    skipped: dict[str, str] = {}
    found = list(read_files(transform, [Path(image)], skipped))
    if not found:
        raise ValueError(f"image: {image} cannot be read: {skipped[str(image)]}")
    kind = kinds.of_model(model)
    odds: list[float] = []
    with inference(model) as place:
        regions, mask = kind.pictures(model, found[0][1][None].to(place))
        for start in range(0, len(texts), batch_size):
            part = texts[start : start + batch_size]
            shown = regions.expand(len(part), -1, -1), mask.expand(len(part), -1)
            odds += kind.match_odds(model, tokenizer, shown, part).tolist()
    probabilities = torch.tensor(odds).sigmoid().tolist()
    order = sorted(range(len(texts)), key=lambda i: -odds[i])
    return Matched([(texts[i], probabilities[i]) for i in order])
