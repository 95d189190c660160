"""Made-up words in the captions of a row: what they name, only the row's other captions tell.

A row in which words stand for other ones throughout cannot be learned by heart; the row itself has to be
read. This is symbol tuning (Wei et al. 2023, arXiv:2305.08298) with words as the symbols, for captions.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from vlmkernels.data.samples import sample_rng

SHORTEST = 3  # letters of a word that is replaced
FUNCTION_WORDS = frozenset({"and", "are", "for", "from", "the", "with"})  # name nothing; others are shorter
_ONSETS = (*"bcdfghjklmnprstvwz", "bl", "br", "dr", "fl", "gr", "pl", "sh", "st", "tr")
_VOWELS, _CODAS = tuple("aeiou"), tuple("bdfgklmnprstxz")


def made_up_word(rng: random.Random) -> str:
    """Two syllables and a last consonant, "bolin" or "treshak", or three syllables, "kamiplo"."""
    parts = [rng.choice(letters) for letters in (_ONSETS, _VOWELS) * 2]
    parts += [rng.choice(_CODAS)] if rng.random() < 0.5 else [rng.choice(_ONSETS), rng.choice(_VOWELS)]
    return "".join(parts)


def rename(text: str, names: dict[str, str]) -> str:
    """The text with each word of ``names`` replaced by its name; an article before it fits.

    Names begin with a consonant, words are in lower case.
    """
    if not names:
        return text
    words = "|".join(map(re.escape, names))
    pattern = re.compile(rf"\b(?:(a)n )?({words})\b", re.IGNORECASE)

    def replaced(found: re.Match[str]) -> str:
        name = names[found[2].lower()]
        return f"{found[1]} {name}" if found[1] else name

    return pattern.sub(replaced, text)


class Renaming:
    """Replaces words that at least two captions of a row have, each with the probability ``fraction``.

    Called with the keys and texts of a row it returns its texts. The draws depend on ``seed`` and the keys
    alone. ValueError for a ``fraction`` that is not in [0, 1].
    """

    def __init__(self, fraction: float, seed: int) -> None:
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must be in [0, 1], got {fraction}")
        self.fraction, self.seed = fraction, seed

    def __call__(self, keys: Sequence[str], texts: Sequence[str]) -> list[str]:
        rng = sample_rng("renaming", self.seed, *keys)
        words = [set(re.findall(rf"[a-z]{{{SHORTEST},}}", text.lower())) for text in texts]
        shared = sorted(word for word in set().union(*words) if sum(word in each for each in words) > 1)
        names = {
            word: made_up_word(rng)
            for word in shared
            if word not in FUNCTION_WORDS and rng.random() < self.fraction
        }
        return [rename(text, names) for text in texts]
