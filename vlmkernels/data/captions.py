"""Captions as batches: rows `<image>caption<|endofchunk|>` as Flamingo reads them, or start, caption, end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.data.renaming import Renaming
from vlmkernels.data.samples import Sample, stack_images
from vlmkernels.data.tokenizer import CaptionTokenizer


class CaptionCollate:
    """Collates samples for a captioning model into a dict of images, tokens, texts and keys.

    layout "prefix" (SimVLM): images [B, 3, H, W], tokens [B, L] start, caption, end, padding.
    layout "interleaved" (Flamingo): images [R, K, 1, 3, H, W] and tokens [R, T], R = ceil(B / K) rows of K =
    ``images_per_row`` samples each; a last row with fewer samples is padded with images of zeros, to which no
    token of the row refers. layout "text" (a language model): tokens as interleaved, no images.
    texts and keys are those of the B samples; ``renaming`` changes the texts of rows that are not prefixes. B
    may be 0; the images are then of ``image_size``, an int or (H, W), or an empty list without it.
    """

    LAYOUTS = ("prefix", "interleaved", "text")

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        layout: str,
        images_per_row: int = 1,
        image_size: int | tuple[int, int] | None = None,
        renaming: Renaming | None = None,
    ) -> None:
        if layout not in self.LAYOUTS:
            raise ValueError(f"layout must be one of {self.LAYOUTS}, got {layout!r}")
        if images_per_row < 1 or (layout == "prefix" and images_per_row > 1):
            raise ValueError(f"images_per_row must be at least 1, and 1 for a prefix, got {images_per_row}")
        self.tokenizer, self.layout, self.images_per_row = tokenizer, layout, images_per_row
        self.image_size, self.renaming = image_size, renaming

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        texts = [sample["text"] for sample in samples]
        batch: dict[str, Any] = {"texts": texts, "keys": [sample["key"] for sample in samples]}
        if self.layout == "prefix":
            tokens = self.tokenizer(texts)
            longest = int(self.tokenizer.lengths(tokens).max()) if texts else 2
            batch["tokens"] = tokens[:, :longest]
            batch["images"] = stack_images(samples, self.image_size)
            return batch
        count = self.images_per_row
        rows = [slice(i, i + count) for i in range(0, len(texts), count)]
        if self.renaming is not None:
            texts = batch["texts"] = [
                text for row in rows for text in self.renaming(batch["keys"][row], texts[row])
            ]
        batch["tokens"] = self.tokenizer.interleaved([texts[row] for row in rows])
        if self.layout == "interleaved":
            images = stack_images(samples, self.image_size)
            if isinstance(images, Tensor):
                images = torch.cat([images, images.new_zeros(-len(images) % count, *images.shape[1:])])
                images = images.unflatten(0, (-1, count)).unsqueeze(2)
            batch["images"] = images
        return batch
