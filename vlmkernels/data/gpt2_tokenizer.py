"""GPT-2's byte pairs, read from a folder of Hugging Face by the `tokenizers` package."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
END = "<|endoftext|>"


class Gpt2Tokenizer:
    """Text to GPT-2's ids and back (Radford et al. 2019).

    folder: has tokenizer.json, or vocab.json and merges.txt, then also added_tokens.json if there are such.
        Any byte-level BPE of that form is read.

    Attributes: end_id, the id of `<|endoftext|>`, and vocab_size. FileNotFoundError names what is missing,
    ValueError a damaged file, or a vocabulary without the end.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        whole, vocabulary, merges, added = (Path(folder) / name for name in FILES)
        if not whole.is_file() and not (vocabulary.is_file() and merges.is_file()):
            raise FileNotFoundError(f"{folder} must contain {FILES[0]}, or {FILES[1]} and {FILES[2]}")
        try:
            if whole.is_file():
                self._tokenizer = Tokenizer.from_str(whole.read_text(encoding="utf-8"))
                self._tokenizer.no_padding()
                self._tokenizer.no_truncation()
            else:
                self._tokenizer = _byte_level(vocabulary, merges, added)
        except Exception as error:  # the package raises Exception itself
            raise ValueError(f"{folder}: the files of its tokenizer cannot be read: {error}") from error
        end = self.id_of(END)
        if end is None:
            raise ValueError(f"{folder}: the vocabulary must have {END}, it is not GPT-2's")
        self.end_id: int = end
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def id_of(self, token: str) -> int | None:
        """The id of a token, None if the vocabulary does not have it."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of a text; special tokens in it are recognised, none is added."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens by their names."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


def _byte_level(vocabulary: Path, merges: Path, added: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    names: dict[str, int] = json.loads(added.read_text(encoding="utf-8")) if added.is_file() else {}
    special = [END, *sorted(names, key=lambda name: names[name])]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    wrong = [name for name, i in names.items() if tokenizer.token_to_id(name) != i]
    if wrong:
        raise ValueError(f"{added.name} gives {', '.join(wrong)} ids that do not follow the vocabulary")
    return tokenizer
