"""CIDEr-D of single captions, with document frequencies that are given once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from .caption_scores import plain_tokens

LONGEST = 4  # n-grams
SIGMA = 6.0  # of the penalty for another length

Vector = list[dict[tuple[str, ...], float]]  # by length of the n-gram


class CiderD:
    """CIDEr-D (Vedantam et al. 2015) by the n-grams of a corpus, as the COCO evaluation computes it.

    ``corpus`` has the references of each image, which count as one document. A score is 10 times the mean
    over n = 1 .. 4, and over the references, of the cosine of the tf-idf vectors, the caption's clipped to
    the reference's, times exp(-(difference of lengths)^2 / 72). Words are those of ``plain_tokens``. This is
    the reward of self-critical training (Rennie et al. 2017), where the document frequencies must not depend
    on the batch. ValueError for an empty corpus.
    """

    def __init__(self, corpus: Iterable[str | Sequence[str]]) -> None:
        self.documents: Counter[tuple[str, ...]] = Counter()
        count = 0
        for texts in corpus:
            count += 1
            self.documents.update({n for text in _as_list(texts) for n in ngrams(text)})
        if not count:
            raise ValueError("CiderD: corpus must have the references of an image, got none")
        self.log_count = math.log(count)

    def __call__(self, caption: str, references: str | Sequence[str]) -> float:
        """The score of a caption against the references of its image. ValueError without a reference."""
        texts = _as_list(references)
        if not texts:
            raise ValueError("CiderD: references must have a text, got none")
        found = self._vector(caption)
        total = sum(self._similarity(found, self._vector(text)) for text in texts)
        return 10.0 * total / len(texts)

    def _vector(self, text: str) -> tuple[Vector, list[float], int]:
        """tf-idf by length of the n-gram, its norms, and how many pairs of words there are."""
        vector: Vector = [{} for _ in range(LONGEST)]
        pairs = 0
        for ngram, count in ngrams(text).items():
            rarity = self.log_count - math.log(max(self.documents[ngram], 1))
            vector[len(ngram) - 1][ngram] = count * rarity
            pairs += count if len(ngram) == 2 else 0
        return vector, [math.sqrt(sum(x * x for x in each.values())) for each in vector], pairs

    def _similarity(
        self, caption: tuple[Vector, list[float], int], reference: tuple[Vector, list[float], int]
    ) -> float:
        total = 0.0
        for found, norm, wanted, other in zip(*caption[:2], *reference[:2], strict=True):
            if norm and other:
                shared = sum(min(x, wanted.get(n, 0.0)) * wanted.get(n, 0.0) for n, x in found.items())
                total += shared / (norm * other)
        return total / LONGEST * math.exp(-((caption[2] - reference[2]) ** 2) / (2 * SIGMA**2))


def ngrams(text: str) -> Counter[tuple[str, ...]]:
    """How often each run of 1 to 4 words occurs."""
    words = plain_tokens(text).split()
    return Counter(tuple(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1))


def _as_list(texts: str | Sequence[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
