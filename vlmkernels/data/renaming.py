"""Made-up words in the captions of a row: what they name, only the row's other captions tell.

A row in which a word stands for another one throughout cannot be learned by heart; the row itself has to be
read. This is symbol tuning (Wei et al. 2023, arXiv:2305.08298) with words as the symbols, for captions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from vlmkernels.data.samples import sample_rng

SHORTEST = 3  # letters of a word that is replaced: shorter ones are function words
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


def made_up_word(rng: random.Random) -> str:
    """Two syllables, consonant and vowel, and a last consonant: "bolin", "tavok"."""
    return "".join(rng.choice(letters) for letters in (_CONSONANTS, _VOWELS) * 2) + rng.choice(_CONSONANTS)


def rename(text: str, word: str, name: str) -> str:
    """The text with ``name``, which begins with a consonant, for the word; an article before it fits."""
    pattern = re.compile(rf"\b(?:(a)n )?{re.escape(word)}\b", re.IGNORECASE)
    return pattern.sub(lambda found: f"{found[1]} {name}" if found[1] else name, text)


class Renaming:
    """Replaces a word in a fraction of the rows: one that at least two captions of the row have.

    Called with the keys and texts of a row it returns its texts. The draws depend on ``seed`` and the keys
    alone. ValueError for a ``fraction`` that is not in [0, 1].
    """

    def __init__(self, fraction: float, seed: int) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], got {fraction}")
        self.fraction, self.seed = fraction, seed

    def __call__(self, keys: Sequence[str], texts: Sequence[str]) -> list[str]:
        rng = sample_rng("renaming", self.seed, *keys)
        if rng.random() >= self.fraction:
            return list(texts)
        words = [set(re.findall(rf"[a-z]{{{SHORTEST},}}", text.lower())) for text in texts]
        shared = sorted(word for word in set().union(*words) if sum(word in each for each in words) > 1)
        if not shared:
            return list(texts)
        word, name = rng.choice(shared), made_up_word(rng)
        return [rename(text, word, name) for text in texts]
