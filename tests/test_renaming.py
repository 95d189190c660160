"""Made-up words in rows of captions: which rows, which words, and that nothing else changes."""

import random
import re

import pytest

from benchmarks.shots import NAMES
from vlmkernels.data import CaptionCollate, CaptionTokenizer, load_scenes
from vlmkernels.data.renaming import Renaming, made_up_word, rename

ROW = ["an owl above a fox", "a fox to the left of a key", "a crab above an owl", "a whale above a zebra"]
MADE_UP = re.compile(r"[bdfgklmnprstvz][aeiou][bdfgklmnprstvz][aeiou][bdfgklmnprstvz]")


def test_names_of_the_shots_are_never_made_up():
    drawn = {made_up_word(random.Random(seed)) for seed in range(200)}
    assert len(drawn) > 190
    assert all(MADE_UP.fullmatch(word) for word in drawn)
    assert not any(MADE_UP.fullmatch(name) for name in NAMES)


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
    assert rename(text, "elephant", "bolin") == renamed


def test_one_shared_word_of_a_row_is_renamed_throughout():
    shared = {"owl", "fox", "above"}  # the others are in one caption, or shorter
    names, words = set(), set()
    for row in range(60):
        texts = Renaming(1.0, seed=0)([f"{row}-{i}" for i in range(4)], ROW)
        (name,) = {word for text in texts for word in MADE_UP.findall(text)}
        (word,) = [word for word in shared if texts == [rename(text, word, name) for text in ROW]]
        assert not any(re.search(rf"\b{word}\b", text) for text in texts)
        names.add(name)
        words.add(word)
    assert len(names) > 50
    assert words == shared


def test_rows_are_drawn_by_their_keys():
    keys = [[f"{row}-{i}" for i in range(4)] for row in range(400)]
    found = [Renaming(0.25, seed=3)(each, ROW) for each in keys]
    assert found == [Renaming(0.25, seed=3)(each, ROW) for each in keys]
    assert found != [Renaming(0.25, seed=4)(each, ROW) for each in keys]
    assert 70 < sum(texts != ROW for texts in found) < 130
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
