"""Shared by the kinds whose texts are BERT's word pieces: where the tokenizer comes from."""

from __future__ import annotations

import dataclasses
from typing import Any

from vlmkernels.data import Emoji3, WordPieceTokenizer
from vlmkernels.train.config import TrainConfig, option

from ._kind import Kind, Options


@dataclasses.dataclass(frozen=True)
class WordPieceOptions(Options):
    tokenizer: str | None = option(
        None,
        "align, visualbert: tokenizer.json or vocab.txt of word pieces; learned from the data by default",
    )


class WordPieceKind(Kind):
    options = WordPieceOptions

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
