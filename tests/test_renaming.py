"""Made-up words in rows of captions: which rows, which words, and that nothing else changes."""

import random
import re

import pytest

from benchmarks.shots import NAMES
from vlmkernels.data import CaptionCollate, CaptionTokenizer, load_scenes
from vlmkernels.data.renaming import Renaming, made_up_word, rename
from vlmkernels.data.scenes import OBJECTS

ROW = ["an owl above a fox", "a fox to the left of a key", "a crab above an owl", "a whale above a zebra"]
SYLLABLE = r"(?:[bcdfghjklmnprstvwz]|bl|br|dr|fl|gr|pl|sh|st|tr)[aeiou]"
MADE_UP = re.compile(rf"{SYLLABLE}{SYLLABLE}(?:[bdfgklmnprstxz]|{SYLLABLE})")


def test_names_of_the_shots_are_never_made_up_but_their_pieces_are():
    drawn = {made_up_word(random.Random(seed)) for seed in range(1500)}
    assert len(drawn) > 1450
    assert all(MADE_UP.fullmatch(word) for word in drawn)
    assert not any(MADE_UP.fullmatch(name) for name in NAMES)
    tokenizer = CaptionTokenizer(128, 1026)
    pieces = {piece for word in (*drawn, *OBJECTS) for piece in tokenizer.encode(word)}
    assert pieces.issuperset(piece for name in NAMES for piece in tokenizer.encode(name))


@pytest.mark.parametrize(
    ("text", "renamed"),
    [
        ("an elephant above a key", "a bolin above a key"),
        ("a key above an Elephant", "a key above a bolin"),
        ("two elephants", "two elephants"),
        ("elephant", "bolin"),
    ],
)
def test_a_word_with_its_article(text, renamed):
    assert rename(text, {"elephant": "bolin", "lephant": "dav"}) == renamed


def test_shared_words_of_a_row_are_renamed_throughout():
    shared = {"owl", "fox", "above"}  # the others are in one caption, or name nothing
    renamed_together, names = set(), set()
    for row in range(120):
        texts = Renaming(0.5, seed=0)([f"{row}-{i}" for i in range(4)], ROW)
        kept = frozenset(word for word in shared if any(re.search(rf"\b{word}\b", text) for text in texts))
        made = set(" ".join(texts).split()) - set(" ".join(ROW).split())
        assert all(MADE_UP.fullmatch(word) for word in made)
        assert len(made) == len(shared - kept)
        pairs = {
            (word, name)
            for text, original in zip(texts, ROW, strict=True)
            for name, word in zip(text.split(), original.split(), strict=True)
            if name in made
        }
        assert sorted(word for word, _ in pairs) == sorted(shared - kept)
        assert [rename(text, dict(pairs)) for text in ROW] == texts
        renamed_together.add(kept)
        names |= made
    assert len(renamed_together) == 8
    assert len(names) > 150


def test_rows_are_drawn_by_their_keys():
    keys = [[f"{row}-{i}" for i in range(4)] for row in range(400)]
    found = [Renaming(0.25, seed=3)(each, ROW) for each in keys]
    assert found == [Renaming(0.25, seed=3)(each, ROW) for each in keys]
    assert found != [Renaming(0.25, seed=4)(each, ROW) for each in keys]
    assert 60 < sum("owl" not in " ".join(texts) for texts in found) < 140
    assert [Renaming(0, seed=3)(each, ROW) for each in keys[:9]] == [ROW] * 9
    assert Renaming(1.0, seed=0)(["a", "b"], ["a fox", "a key"]) == ["a fox", "a key"]
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.5"):
        Renaming(1.5, seed=0)


def test_a_batch_has_the_renamed_rows():
    scenes = load_scenes("train", size=8)
    tokenizer = CaptionTokenizer(128, 1026)
    samples = [{**scenes[i], "image": None} for i in range(8)]
    batch = CaptionCollate(tokenizer, "text", 4, renaming=Renaming(1.0, seed=0))(samples)
    plain = CaptionCollate(tokenizer, "text", 4)(samples)
    assert plain["texts"] == scenes.names
    assert all(MADE_UP.search(" ".join(batch["texts"][row : row + 4])) for row in (0, 4))
    assert batch["tokens"].equal(tokenizer.interleaved([batch["texts"][:4], batch["texts"][4:]]))
