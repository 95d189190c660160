"""ALIGN (Jia et al. 2021): an EfficientNet against a BERT, by the softmax loss with label smoothing."""

from __future__ import annotations

from typing import Any

from vlmkernels.models import align

from ._contrastive import ContrastiveKind
from ._word_pieces import WordPieceKind


class Align(WordPieceKind, ContrastiveKind):
    name = "align"
    model = align.ALIGN
    configs = align.CONFIGS
    label_smoothing = 0.1

    def image_side(self, config: Any) -> None:
        return None
