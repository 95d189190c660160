"""ClipTokenizer against open_clip's SimpleTokenizer, WordPieceTokenizer against transformers' BERT."""

import os
import pickle
import random
import sys
import unicodedata

import pytest
import torch

from benchmarks import peers
from vlmkernels.data import ClipTokenizer, WordPieceTokenizer, load_emoji3, load_tokenizer
from vlmkernels.data.tokenizer import clean_text

TEXTS = [
    "a photo of a cat",
    "",
    "   \t\n ",
    "Hello, World!! it's I'm we've they'd he'll you're don't '  'S '\u017f",
    "&amp;lt;b&amp;gt; &eacute; &#128512; &nbsp;x",
    "<start_of_text> hi <end_of_text>",
    "!!<start_of_text>",
    "a<start_of_text>b1<END_OF_TEXT>",
    "<start_of_text><end_of_text>x",
    "!<start_of_text><end_of_text>",
    "\u65e5\u672c\u8a9e \u30c6\u30b9\u30c8 \u4e2d\u6587",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea",
    "\xbd \xb2 \u2460 123 \uff14\uff15",
    "\ufb01ne o\ufb03ce \u201cquotes\u201d \u2014 dash\u2026",
    "x" * 300,
    "word " * 200,
    "!" * 100,
    "\t\n a \xa0 b\u2003c",
    "na\xefve cafe\u0301 \u0130stanbul \xdf \u1e9e",
    "\x00\x01\x1cctl \ufeffbom \u200b zero",
    "\xc3\xa9t\xc3\xa9",
    "'t't't a's-b a\u0345b",
    "\u0416\u0416 \u043f\u0440\u0438\u0432\u0435\u0442 \u05e2\u05d1\u05e8\u05d9\u05ea",
    "\u0627\u0644\u0639\u0631\u0628 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
]


@pytest.fixture(scope="module")
def simple():
    if peers.why_not("open_clip"):
        pytest.skip(peers.why_not("open_clip"))
    return peers.load("open_clip").tokenizer.SimpleTokenizer()


@pytest.fixture(scope="module")
def clip():
    return ClipTokenizer()


def random_texts(count):
    """Characters of many scripts that the Unicode tables of this Python know."""
    rng = random.Random(0)
    ranges = [(32, 127), (32, 0x250), (0x370, 0x2000), (0x2000, 0x3100), (0x1F300, 0x1FA00)]
    texts = []
    while len(texts) < count:
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))
        texts.append("".join(c for c in text if unicodedata.category(c) != "Cn"))
    return texts


@pytest.mark.parametrize("length", [77, 8, 3, 2])
def test_clip_equals_open_clip(clip, simple, length):
    assert torch.equal(clip(TEXTS, length), simple(TEXTS, length))


def test_clip_equals_open_clip_on_names_and_random_unicode(clip, simple):
    emoji = load_emoji3("test")
    texts = [*emoji.names, *(", ".join(tags) for tags in emoji.tags), *random_texts(1500)]
    wrong = [text for text in texts if clip.encode(text) != simple.encode(text)]
    assert wrong == []


@pytest.mark.slow
def test_clip_equals_open_clip_on_assigned_characters(clip, simple):
    """All below U+3400 and every seventh above, where whole planes behave alike."""
    codes = [c for c in range(sys.maxunicode + 1) if c < 0x3400 or c % 7 == 0]
    texts = [f"a{chr(c)}b1{chr(c)}!" for c in codes if unicodedata.category(chr(c)) not in ("Cn", "Co", "Cs")]
    assert [t for t in texts if clip.encode(t) != simple.encode(t)] == []


def test_clip_attributes(clip):
    assert (clip.sot_id, clip.eot_id, clip.pad_id, clip.vocab_size) == (49406, 49407, 0, 49408)
    assert clip.context_length == 77
    row = clip("a photo")[0]
    assert row.dtype == torch.int64
    assert row[:4].tolist() == [49406, 320, 1125, 49407]
    assert not row[4:].any()


def test_truncation_keeps_the_end_token(clip):
    long = clip("one two three four five six", context_length=5)[0]
    full = clip("one two three four five six")[0]
    assert long[:4].tolist() == full[:4].tolist()
    assert long[4] == clip.eot_id
    exact = clip("one two three", context_length=5)[0]
    assert exact.tolist() == [clip.sot_id, *clip.encode("one two three"), clip.eot_id]


@pytest.mark.parametrize("size", [514, 1024, 4096])
def test_reduced_vocabulary(clip, size):
    small = ClipTokenizer(context_length=32, vocabulary=size)
    assert (small.vocab_size, small.sot_id, small.eot_id) == (size, size - 2, size - 1)
    assert small.context_length == 32
    for text in TEXTS[:8] + load_emoji3("test").names[::50]:
        ids = small.encode(text)
        assert max(ids, default=0) < size
        assert small.decode(ids) == clip.decode(clip.encode(text))
        if all(i < size - 2 for i in clip.encode(text)):
            assert ids == clip.encode(text)  # frequent words keep the ids they have in CLIP
    assert small.encode("the") == clip.encode("the") or size == 514


def test_decode(clip):
    for text in ["a photo of a cat .", "stra\xdfe \u65e5\u672c \U0001f600", "1 2 3"]:
        assert clip.decode(clip(text)[0]) == clean_text(text)
    with pytest.raises(ValueError, match="ids must be below 49408, got 49999"):
        clip.decode([49999])


@pytest.mark.parametrize("vocabulary", [None, 600])
def test_clip_save_and_load(tmp_path, clip, vocabulary):
    tokenizer = ClipTokenizer(20, vocabulary)
    tokenizer.save(tmp_path / "new" / "folder")
    for again in (load_tokenizer(tmp_path / "new" / "folder"), pickle.loads(pickle.dumps(tokenizer))):
        assert repr(again) == repr(tokenizer)
        assert torch.equal(again(TEXTS), tokenizer(TEXTS))
        assert again.eot_id == tokenizer.eot_id
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    ClipTokenizer(20, 600).save(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ClipTokenizer(30, 700).save(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]
    assert ClipTokenizer.load(tmp_path).vocab_size == 600


def test_without_ftfy(clip, monkeypatch):
    with_ftfy = clip(TEXTS[0])
    monkeypatch.setattr("vlmkernels.data.tokenizer.find_spec", lambda name: None)
    assert torch.equal(clip(TEXTS[0]), with_ftfy)
    assert clean_text("Caf\u0065\u0301 &amp;lt;  X") == "caf\xe9 < x"
    assert clean_text("\u201cq\u201d") == "\u201cq\u201d"


def test_clip_bad_input(clip, tmp_path):
    with pytest.raises(ValueError, match=r"vocabulary must be in \[514, 49408\], got 513"):
        ClipTokenizer(vocabulary=513)
    with pytest.raises(ValueError, match=r"context_length must be at least 2 .*, got 1"):
        ClipTokenizer(context_length=1)
    with pytest.raises(ValueError, match=r"context_length must be at least 2 .*, got 0"):
        clip("a", context_length=0)
    with pytest.raises(ValueError, match="a sequence of str, got one with a int"):
        clip(["a", 3])
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"type": "Other"}')
    with pytest.raises(ValueError, match=r"must be one of .*, got 'Other'"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="must be 'ClipTokenizer', got 'Other'"):
        ClipTokenizer.load(tmp_path)


@pytest.fixture(scope="module")
def words():
    emoji = load_emoji3("test")
    return WordPieceTokenizer.train([*emoji.names, *(" ".join(t) for t in emoji.tags)], vocab_size=1000)


def test_wordpiece_layout(words):
    assert (words.pad_id, words.unk_id, words.cls_id, words.sep_id, words.mask_id) == (0, 1, 2, 3, 4)
    assert words.vocab_size <= 1000
    tokens = words(["grinning face", "", "face " * 100])
    assert tokens.shape == (3, 64)
    assert tokens[:, 0].eq(words.cls_id).all()
    assert tokens[1, :3].tolist() == [words.cls_id, words.sep_id, 0]
    assert tokens[2, -1] == words.sep_id
    assert torch.equal(words.attention_mask(tokens).sum(1), (tokens != 0).sum(1))
    assert words.decode(tokens[0]) == "grinning face"
    assert words("Gr\xeenning FACE").equal(tokens[:1])


def test_wordpiece_training_is_deterministic(words):
    emoji = load_emoji3("test")
    texts = [*emoji.names, *(" ".join(t) for t in emoji.tags)]
    again = WordPieceTokenizer.train(iter(texts), vocab_size=1000)
    assert torch.equal(again(TEXTS), words(TEXTS))


def test_wordpiece_equals_bert(words, tmp_path):
    if peers.why_not("transformers"):
        pytest.skip(peers.why_not("transformers"))
    inner = words._tokenizer
    pieces = sorted(inner.get_vocab(), key=inner.token_to_id)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    bert = peers.load("transformers:BertTokenizerFast").from_pretrained(tmp_path)
    theirs = bert(TEXTS, padding="max_length", truncation=True, max_length=64, return_tensors="pt")
    ours = WordPieceTokenizer.from_file(tmp_path / "vocab.txt")
    for tokenizer in (words, ours):
        tokens = tokenizer(TEXTS)
        assert torch.equal(tokens, theirs["input_ids"])
        assert torch.equal(tokenizer.attention_mask(tokens), theirs["attention_mask"])


def test_wordpiece_save_and_load(words, tmp_path):
    words.save(tmp_path)
    for again in (
        load_tokenizer(tmp_path),
        WordPieceTokenizer.from_file(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(words)),
    ):
        assert torch.equal(again(TEXTS), words(TEXTS))
        assert again.vocab_size == words.vocab_size


def test_wordpiece_bad_input(tmp_path, clip):
    with pytest.raises(ValueError, match="no text to learn from"):
        WordPieceTokenizer.train(["", " "])
    with pytest.raises(ValueError, match="vocab_size must be greater than 5, got 5"):
        WordPieceTokenizer.train(["a"], vocab_size=5)
    with pytest.raises(FileNotFoundError, match=r"absent\.json"):
        WordPieceTokenizer.from_file(tmp_path / "absent.json")
    clip.save(tmp_path)
    with pytest.raises(ValueError, match=r"a BERT WordPiece vocabulary, but has no \['\[PAD\]'"):
        WordPieceTokenizer.from_file(tmp_path / "tokenizer.json")
