"""Text to token ids: CLIP's byte-pair encoding and BERT's WordPiece, both on the `tokenizers` package."""

from __future__ import annotations

import gzip
import html
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from vlmkernels._files import write_text
from vlmkernels.data._text import is_unicode

if TYPE_CHECKING:
    from typing_extensions import Self

CLIP_VOCABULARY = 49408
_BYTES = 256
_SPECIAL = ("<start_of_text>", "<end_of_text>")
_SPECIAL_PATTERN = re.compile("|".join(_SPECIAL))
# U+0345 is a mark whose case forms are letters: CLIP's case-insensitive pattern does not match it.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}\x{345}]+"
_CONFIG = "tokenizer_config.json"
_TOKENIZER = "tokenizer.json"


@lru_cache(maxsize=1)
def _byte_symbols() -> dict[int, str]:
    """A printable character for each byte, in the order of CLIP's vocabulary."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(_BYTES) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(_BYTES + i) for i, byte in enumerate(hidden)}


@lru_cache(maxsize=1)
def _merges() -> tuple[tuple[str, str], ...]:
    """CLIP's 48,894 merges, most frequent first (the file contains more; the first line is a header)."""
    path = resources.files("vlmkernels.data") / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
    count = CLIP_VOCABULARY - 2 * _BYTES - len(_SPECIAL)
    return tuple((left, right) for left, _, right in (line.partition(" ") for line in lines[1 : count + 1]))


def clean_text(text: str) -> str:
    """CLIP's text cleaning: ftfy (if installed), HTML unescaped twice, single spaces, lower case.

    Without the `ftfy` package broken encodings are not repaired and curly quotes, ligatures, full-width
    letters and control characters are unchanged; Unicode is normalised to NFC either way. The result for
    plain ASCII text is the same.
    """
    _checked(text)
    if find_spec("ftfy") is not None:
        import ftfy

        text = ftfy.fix_text(text)
    else:
        text = unicodedata.normalize("NFC", text)
    return " ".join(html.unescape(html.unescape(text)).split()).lower()


def _as_list(texts: str | Sequence[str]) -> list[str]:
    texts = [texts] if isinstance(texts, str) else list(texts)
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise ValueError(f"texts must be str or a sequence of str, got one with a {type(wrong).__name__}")
    return texts


def _checked(text: str) -> str:
    if not is_unicode(text):
        raise ValueError(f"text must be Unicode without lone surrogates, got {text!r}")
    return text


def _check_length(context_length: int) -> int:
    if context_length < 2:
        raise ValueError(f"context_length must be at least 2 (start and end), got {context_length}")
    return context_length


def _pad(rows: list[list[int]], length: int, pad_id: int, last_id: int) -> Tensor:
    """Rows as int64 [B, length]; a row that is too long is truncated and ends with `last_id`."""
    result = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    for i, row in enumerate(rows):
        if len(row) > length:
            row = [*row[: length - 1], last_id]
        result[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return result


def _save(folder: str | os.PathLike[str], tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / _TOKENIZER, tokenizer.to_str())
    write_text(target / _CONFIG, json.dumps(config, indent=2) + "\n")


def _read_config(folder: str | os.PathLike[str], kind: str, sizes: Sequence[str]) -> dict[str, Any]:
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass a folder written by {kind}.save")
    config = _read_type(path)
    if config["type"] != kind:
        raise ValueError(f"type in {path} must be {kind!r}, got {config['type']!r}")
    wrong = {name: config.get(name) for name in sizes if not isinstance(config.get(name), int)}
    if wrong:
        raise ValueError(f"{', '.join(wrong)} in {path} must be integers, got {wrong}")
    return config


def _read_text(path: Path) -> str:
    """A file's text without its byte order mark; ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _read_type(path: Path) -> dict[str, Any]:
    """The values of a tokenizer_config.json, `type` among them. ValueError if it is something else."""
    try:
        config = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must contain the values of a tokenizer, got a {type(config).__name__}")
    return {"type": None, **config}


def _read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json; ValueError if the tokenizers package cannot read it."""
    text = _read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


class ClipTokenizer:
    """CLIP's tokenizer: ids equal `open_clip.SimpleTokenizer` (Radford et al. 2021, arXiv:2103.00020).

    context_length: columns of the result. Longer texts are truncated, with the end token in the last column.
    vocabulary: number of ids. None is CLIP's 49,408; a smaller number (514 or more) keeps the 512 byte
        symbols and the most frequent merges, with the ids they have in CLIP, and puts start and end of text
        at the two highest ids. Both can encode any text; a small vocabulary needs more tokens and a smaller
        embedding.

    Attributes: sot_id, eot_id, pad_id (0, as in CLIP, where it is also the id of "!"), vocab_size.
    See `clean_text` for the differences without the ftfy package. Letters that are newer than the Unicode
    version of the tokenizers package are split like punctuation.
    """

    def __init__(self, context_length: int = 77, vocabulary: int | None = None) -> None:
        size = CLIP_VOCABULARY if vocabulary is None else vocabulary
        smallest = 2 * _BYTES + len(_SPECIAL)
        if not smallest <= size <= CLIP_VOCABULARY:
            raise ValueError(f"vocabulary must be in [{smallest}, {CLIP_VOCABULARY}], got {vocabulary}")
        merges = list(_merges()[: size - smallest])
        symbols = [*_byte_symbols().values(), *(symbol + "</w>" for symbol in _byte_symbols().values())]
        symbols += ["".join(pair) for pair in merges]
        tokenizer = Tokenizer(
            models.BPE(
                vocab={symbol: i for i, symbol in enumerate(symbols)},
                merges=merges,
                end_of_word_suffix="</w>",
                continuing_subword_prefix="",
            )
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._setup(tokenizer, size, context_length)

    def _setup(self, tokenizer: Tokenizer, size: int, context_length: int) -> None:
        self._tokenizer = tokenizer
        self.context_length = _check_length(context_length)
        self.vocab_size = size
        self.sot_id, self.eot_id, self.pad_id = size - 2, size - 1, 0

    def encode(self, text: str) -> list[int]:
        """Ids of one text without start and end."""
        text = clean_text(text)
        if "<" not in text:
            return self._tokenizer.encode(text).ids
        ids: list[int] = []
        done = 0
        for match in _SPECIAL_PATTERN.finditer(text):
            before = text[match.start() - 1 : match.start()]
            starts_word = match.start() == done or before.isspace() or unicodedata.category(before)[0] in "LN"
            if starts_word:  # in a run of punctuation the name is ordinary text
                ids += self._tokenizer.encode(text[done : match.start()]).ids
                ids.append(self.sot_id if match.group() == _SPECIAL[0] else self.eot_id)
                done = match.end()
        return ids + self._tokenizer.encode(text[done:]).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of ids up to the first end of text, without the start and end tokens."""
        values = [int(i) for i in ids]
        if self.eot_id in values:
            values = values[: values.index(self.eot_id)]
        symbols = [self._tokenizer.id_to_token(i) or "" for i in values if i != self.sot_id]
        if "" in symbols:
            raise ValueError(f"ids must be below {self.vocab_size}, got {max(values)}")
        order = {symbol: byte for byte, symbol in _byte_symbols().items()}
        words = "".join(symbols).replace("</w>", " ")
        content = b"".join(b" " if c == " " else bytes([order[c]]) for c in words)
        return content.decode("utf-8", errors="replace").strip()

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """int64 [B, L]: start, tokens, end, then `pad_id`. Raises ValueError if a text is not a str."""
        length = self.context_length if context_length is None else _check_length(context_length)
        rows = [[self.sot_id, *self.encode(text), self.eot_id] for text in _as_list(texts)]
        return _pad(rows, length, self.pad_id, self.eot_id)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, each atomically; creates the folder."""
        config = {
            "type": type(self).__name__,
            "context_length": self.context_length,
            "vocab_size": self.eot_id + 1,
        }
        _save(folder, self._tokenizer, config)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote. FileNotFoundError, or ValueError for a folder of another tokenizer."""
        config = _read_config(folder, cls.__name__, ("vocab_size", "context_length"))
        tokenizer = cls.__new__(cls)
        inner = _read_tokenizer(Path(folder) / _TOKENIZER)
        tokenizer._setup(inner, config["vocab_size"], config["context_length"])
        return tokenizer

    def __repr__(self) -> str:
        return f"{type(self).__name__}(context_length={self.context_length}, vocabulary={self.vocab_size})"


class CaptionTokenizer(ClipTokenizer):
    """CLIP's byte pairs with two more ids, `<image>` and `<|endofchunk|>`, for models that write captions.

    vocabulary: number of ids, of which the last two are `image_id` and `endofchunk_id`; the others are those
        of ``ClipTokenizer(vocabulary=vocabulary - 2)``.

    Padding is `eot_id`, which no text contains: the names of special tokens inside a text are ordinary
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
        """Text of ids up to the first end (of text or of chunk); start of text and `<image>` are omitted."""
        values = [int(i) for i in ids]
        ends = (self.eot_id, self.endofchunk_id)
        stop = next((at for at, i in enumerate(values) if i in ends), len(values))
        return super().decode([i for i in values[:stop] if i != self.image_id])

    def interleaved(self, rows: Sequence[Sequence[str]]) -> Tensor:
        """int64 [B, T]: `<image>caption<|endofchunk|>` for each caption of a row, then `pad_id`.

        T is that of the longest row, 3 if there is no row. A caption longer than its share of
        `context_length` (the row's captions share it equally) is truncated and keeps its end. ValueError if
        a share is below 3 ids or a row is empty.
        """
        if not rows:
            return torch.empty(0, 3, dtype=torch.int64)
        most = max(len(row) for row in rows)
        if min(len(row) for row in rows) == 0:
            raise ValueError("rows must each have at least one caption")
        share = self.context_length // most
        if share < 3:
            raise ValueError(
                "context_length must have room for at least 3 ids per caption of a row, "
                f"got {self.context_length} for {most} captions"
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
        """int64 [B]: ids of each row up to and including its end of text, L if there is none."""
        ends = tokens == self.eot_id
        return torch.where(ends.any(dim=1), ends.int().argmax(dim=1) + 1, tokens.shape[1])


class WordPieceTokenizer:
    """BERT-uncased tokens: [CLS] text [SEP] [PAD]..., lower case, accents stripped (Devlin et al. 2018).

    Made by `train`, `from_file` or `load`. Attributes: cls_id, sep_id, pad_id, unk_id, mask_id, vocab_size,
    context_length (64, as in ALIGN, if nothing else is given).
    """

    SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

    def __init__(self, tokenizer: Tokenizer, context_length: int = 64) -> None:
        missing = [token for token in self.SPECIAL if tokenizer.token_to_id(token) is None]
        if missing:
            raise ValueError(f"tokenizer must be a BERT WordPiece vocabulary, but has no {missing}")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.context_length = _check_length(context_length)
        self.vocab_size = tokenizer.get_vocab_size()
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            int(tokenizer.token_to_id(token) or 0) for token in self.SPECIAL
        )

    @staticmethod
    def _empty(vocab: dict[str, int] | None = None) -> Tokenizer:
        model = (
            models.WordPiece(vocab=vocab, unk_token="[UNK]") if vocab else models.WordPiece(unk_token="[UNK]")
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
        tokenizer.decoder = decoders.WordPiece()  # type: ignore[assignment]
        return tokenizer

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 8192, context_length: int = 64
    ) -> WordPieceTokenizer:
        """Learn at most `vocab_size` pieces from `texts`. ValueError without texts or if it is too small."""
        texts = [_checked(text) for text in _as_list(list(texts))]
        if not any(text.strip() for text in texts):
            raise ValueError("texts has no text to learn from")
        if vocab_size <= len(cls.SPECIAL):
            raise ValueError(f"vocab_size must be greater than {len(cls.SPECIAL)}, got {vocab_size}")
        tokenizer = cls._empty()
        normalizer: Any = tokenizer.normalizer
        letters = sorted({letter for text in texts for letter in normalizer.normalize_str(text)} - {" "})
        # The trainer numbers the pieces ##x in the order of a hash map and breaks ties between equally
        # frequent pairs by number. Listing them first fixes both: the same texts give the same vocabulary.
        first = [*cls.SPECIAL, *(f"##{letter}" for letter in letters)]
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=first, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer = cls._empty(tokenizer.get_vocab())
        tokenizer.add_special_tokens(list(cls.SPECIAL))
        return cls(tokenizer, context_length)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], context_length: int = 64) -> WordPieceTokenizer:
        """Read a `tokenizer.json` of the tokenizers package, or a BERT `vocab.txt` (one piece a line)."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist; pass a tokenizer.json or a vocab.txt")
        if Path(path).suffix == ".txt":
            lines = _read_text(Path(path)).split("\n")
            pieces = lines[:-1] if lines[-1] == "" else lines
            tokenizer = cls._empty({piece: i for i, piece in enumerate(pieces)})
            tokenizer.add_special_tokens([token for token in cls.SPECIAL if token in pieces])
            return cls(tokenizer, context_length)
        return cls(_read_tokenizer(Path(path)), context_length)

    def encode(self, text: str) -> list[int]:
        """Ids of one text without [CLS] and [SEP]."""
        return self._tokenizer.encode(_checked(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """int64 [B, L]: [CLS], pieces, [SEP], then [PAD]. A longer text is truncated and keeps its [SEP]."""
        length = self.context_length if context_length is None else _check_length(context_length)
        rows = [[self.cls_id, *self.encode(text), self.sep_id] for text in _as_list(texts)]
        return _pad(rows, length, self.pad_id, self.sep_id)

    def attention_mask(self, tokens: Tensor) -> Tensor:  # [B, L]
        """int64 [B, L]: 1 where `tokens` is not padding."""
        return (tokens != self.pad_id).to(torch.int64)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, each atomically; creates the folder."""
        _save(folder, self._tokenizer, {"type": "WordPieceTokenizer", "context_length": self.context_length})

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> WordPieceTokenizer:
        """Read what `save` wrote. FileNotFoundError, or ValueError for a folder of another tokenizer."""
        config = _read_config(folder, "WordPieceTokenizer", ("context_length",))
        return cls(_read_tokenizer(Path(folder) / _TOKENIZER), config["context_length"])

    def __repr__(self) -> str:
        return f"WordPieceTokenizer(context_length={self.context_length}, vocabulary={self.vocab_size})"


def load_tokenizer(folder: str | os.PathLike[str]) -> ClipTokenizer | WordPieceTokenizer:
    """Read the tokenizer that was saved in `folder`, of any kind."""
    path = Path(folder) / _CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; pass a folder written by a tokenizer's save")
    known: tuple[Any, ...] = (ClipTokenizer, WordPieceTokenizer, CaptionTokenizer)
    kinds = {cls.__name__: cls for cls in known}
    kind = _read_type(path)["type"]
    if kind not in kinds:
        raise ValueError(f"type in {path} must be one of {sorted(kinds)}, got {kind!r}")
    return kinds[kind].load(folder)
