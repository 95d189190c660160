"""ALIGN (Jia et al. 2021): an EfficientNet against a BERT, by the softmax loss with label smoothing."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmkernels.data import Emoji3, WordPieceTokenizer
from vlmkernels.models import align
from vlmkernels.train.config import TrainConfig, option

from ._contrastive import ContrastiveKind
from ._kind import Options


@dataclasses.dataclass(frozen=True)
class AlignOptions(Options):
    tokenizer: str | None = option(
        None,
        "align: tokenizer.json or vocab.txt of word pieces; learned from the data's texts by default",
    )


class Align(ContrastiveKind):
    name = "align"
    model = align.ALIGN
    configs = align.CONFIGS
    options = AlignOptions
    label_smoothing = 0.1

    def new_tokenizer(self, config: TrainConfig, source: Any) -> WordPieceTokenizer:
        """Word pieces, read from a file or learned from the captions of the data: of emoji3 names and tags.

        ValueError for tars, from which they cannot be learned.
        """
        sizes, file = self.sizes(config), self.own_options(config).tokenizer
        if file is not None:
            return WordPieceTokenizer.from_file(file, sizes.context_length)
        if config.streams:
            raise ValueError(
                "tokenizer must be given for tars, from which word pieces cannot be learned, "
                f"got data {config.data}"
            )
        texts = list(source.names)
        if isinstance(source, Emoji3):
            texts = [text for concept in source.concepts for text in (concept.label, *concept.tags)]
        return WordPieceTokenizer.train(texts, sizes.vocab_size, sizes.context_length)

    def image_side(self, config: Any) -> None:
        return None
