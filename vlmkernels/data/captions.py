"""Captions as token rows: `<image>caption<|endofchunk|>` for Flamingo, start caption end for SimVLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from vlmkernels.data.samples import Sample, stack_images
from vlmkernels.data.tokenizer import ClipTokenizer, _as_list, _pad, clean_text


class CaptionTokenizer(ClipTokenizer):
    """CLIP's byte pairs with two more ids, `<image>` and `<|endofchunk|>`, for models that write captions.

    vocabulary: number of ids, of which the last two are `image_id` and `endofchunk_id`; the others are those
        of ``ClipTokenizer(vocabulary=vocabulary - 2)``.

    Padding is `eot_id`, which no text holds: here the names of special tokens inside a text are ordinary
    characters. Decoded text is in lower case.
    """

    image_id: int
    endofchunk_id: int

    def __init__(self, context_length: int = 77, vocabulary: int = 4098) -> None:
        super().__init__(context_length, vocabulary - 2)

    def _setup(self, tokenizer: Tokenizer, size: int, context_length: int) -> None:
        super()._setup(tokenizer, size, context_length)
        self.image_id, self.endofchunk_id = size, size + 1
        self.pad_id = self.eot_id
        self.vocab_size = size + 2

    def encode(self, text: str) -> list[int]:
        """Ids of one text without any special token."""
        return self._tokenizer.encode(clean_text(text)).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of ids up to the first end (of text or of chunk); start of text and `<image>` are left out."""
        values = [int(i) for i in ids]
        ends = (self.eot_id, self.endofchunk_id)
        stop = next((at for at, i in enumerate(values) if i in ends), len(values))
        return super().decode([i for i in values[:stop] if i != self.image_id])

    def interleaved(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """int64 [B, T]: `<image>caption<|endofchunk|>` for each caption of a row, then `pad_id`.

        T is that of the longest row, 3 where there is no row. A caption longer than its share of
        `context_length` (the row's captions share it equally) is cut and keeps its end. ValueError where a
        share is below 3 ids or a row is empty.
        """
        if not rows:
            return torch.empty(0, 3, dtype=torch.int64)
        most = max(len(row) for row in rows)
        if min(len(row) for row in rows) == 0:
            raise ValueError("rows: each needs at least one caption")
        share = self.context_length // most
        if share < 3:
            raise ValueError(
                f"rows: {most} captions in context_length {self.context_length} leave {share} ids for each, "
                "expected at least 3"
            )
        ids = [
            [
                i
                for text in _as_list(list(row))
                for i in (self.image_id, *self.encode(text)[: share - 2], self.endofchunk_id)
            ]
            for row in rows
        ]
        return _pad(ids, max(map(len, ids)), self.pad_id, self.endofchunk_id)

    def lengths(self, tokens: Tensor) -> Tensor:  # [B, L]
        """int64 [B]: ids of each row up to and including its end of text, L where there is none."""
        ends = tokens == self.eot_id
        return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, tokens.shape[1])


class CaptionCollate:
    """Collates samples for a captioning model into a dict of images, tokens, texts and keys.

    layout "prefix" (SimVLM): images [B, 3, H, W], tokens [B, L] start, caption, end, padding.
    layout "interleaved" (Flamingo): images [R, K, 1, 3, H, W] and tokens [R, T], R = ceil(B / K) rows of K =
    ``images_per_row`` samples each; a last row with fewer samples is padded with images of zeros, to which no
    token of the row refers. layout "text" (a language model): tokens as interleaved, no images.
    texts and keys are those of the B samples. B may be 0; the images are then of ``image_size``, an int or
    (H, W), or an empty list without it.
    """

    LAYOUTS = ("prefix", "interleaved", "text")

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        layout: str,
        images_per_row: int = 1,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        if layout not in self.LAYOUTS:
            raise ValueError(f"layout is {layout!r}, expected one of {self.LAYOUTS}")
        if images_per_row < 1 or (layout == "prefix" and images_per_row > 1):
            raise ValueError(f"images_per_row is {images_per_row}, expected at least 1, and 1 for a prefix")
        self.tokenizer, self.layout, self.images_per_row = tokenizer, layout, images_per_row
        self.image_size = image_size

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
        batch["tokens"] = self.tokenizer.interleaved(
            [texts[i : i + count] for i in range(0, len(texts), count)]
        )
        if self.layout == "interleaved":
            images = stack_images(samples, self.image_size)
            if isinstance(images, Tensor):
                images = torch.cat([images, images.new_zeros(-len(images) % count, *images.shape[1:])])
                images = images.unflatten(0, (-1, count)).unsqueeze(2)
            batch["images"] = images
        return batch
