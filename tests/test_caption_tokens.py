"""Captions as token rows: the tokenizer of captioning models and its batches."""

import pytest
import torch

from vlmkernels.data import CaptionCollate, CaptionTokenizer, ClipTokenizer, Sample, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return CaptionTokenizer(context_length=24, vocabulary=1002)


def sample(text, value=0.0):
    return Sample(image=torch.full((3, 4, 4), value), text=text, key=text[:3], label=-1, concept=-1)


def test_ids_are_those_of_clip_and_two_more(tokenizer):
    clip = ClipTokenizer(context_length=24, vocabulary=1000)
    text = "A strawberry to the left of an owl"
    assert tokenizer.encode(text) == clip.encode(text)
    assert (tokenizer.sot_id, tokenizer.eot_id) == (clip.sot_id, clip.eot_id) == (998, 999)
    assert (tokenizer.image_id, tokenizer.endofchunk_id) == (1000, 1001)
    assert tokenizer.vocab_size == 1002
    own, theirs = tokenizer([text])[0], clip([text])[0]
    length = int(tokenizer.lengths(own[None]))
    assert own[:length].equal(theirs[:length])
    assert (own[length:] == tokenizer.pad_id).all()
    assert int(own[length - 1]) == tokenizer.eot_id


@pytest.mark.parametrize(
    "text", ["a fox!", "an owl, <end_of_text> and <start_of_text>", "naïve <image> 日本"]
)
def test_texts_come_back(tokenizer, text):
    """Also those that spell a special token, which is then no special token."""
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.sot_id
    for end in (tokenizer.eot_id, tokenizer.endofchunk_id):
        decoded = tokenizer.decode([tokenizer.sot_id, tokenizer.image_id, *ids, end, 5, 6])
        assert decoded.replace(" ", "") == text.replace(" ", "")


def test_interleaved_rows(tokenizer):
    rows = tokenizer.interleaved([["a fox", "an owl above a key"], ["a frog", "a"]])
    chunks = [
        [tokenizer.image_id, *tokenizer.encode(text), tokenizer.endofchunk_id]
        for text in ("a fox", "an owl above a key", "a frog", "a")
    ]
    assert rows[0].tolist() == chunks[0] + chunks[1]
    second = chunks[2] + chunks[3]
    assert rows[1].tolist() == second + [tokenizer.pad_id] * (rows.shape[1] - len(second))


def test_a_long_caption_is_cut_and_ends(tokenizer):
    text = "an owl above a key " * 10
    (row,) = tokenizer.interleaved([[text]]).tolist()
    assert row == [tokenizer.image_id, *tokenizer.encode(text)[:22], tokenizer.endofchunk_id]
    (row,) = tokenizer.interleaved([[text, "a fox"]]).tolist()
    assert row[:12] == [tokenizer.image_id, *tokenizer.encode(text)[:10], tokenizer.endofchunk_id]
    assert row[12:] == tokenizer.interleaved([["a fox"]])[0].tolist()
    assert tokenizer([text]).shape == (1, 24)
    assert tokenizer.lengths(tokenizer([text, "a"])).tolist() == [24, 3]
    with pytest.raises(ValueError, match="at least 3 ids per caption of a row, got 24 for 9 captions"):
        tokenizer.interleaved([["a"] * 9])
    with pytest.raises(ValueError, match="rows must each have at least one caption"):
        tokenizer.interleaved([["a"], []])


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert isinstance(loaded, CaptionTokenizer)
    texts = ["a fox", "an <image>", ""]
    assert loaded(texts).equal(tokenizer(texts))
    assert loaded.interleaved([texts]).equal(tokenizer.interleaved([texts]))
    assert vars(loaded).keys() == vars(tokenizer).keys()
    with pytest.raises(ValueError, match="must be 'ClipTokenizer', got 'CaptionTokenizer'"):
        ClipTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"vocabulary must be in \[514, 49408\], got 513"):
        CaptionTokenizer(vocabulary=515)


def test_prefix_batches(tokenizer):
    batch = CaptionCollate(tokenizer, "prefix")([sample("a fox", 1.0), sample("an owl above a key", 2.0)])
    assert batch["texts"] == ["a fox", "an owl above a key"]
    assert batch["keys"] == ["a f", "an "]
    assert batch["images"].shape == (2, 3, 4, 4)
    longest = len(tokenizer.encode("an owl above a key")) + 2
    assert batch["tokens"].equal(tokenizer(batch["texts"])[:, :longest])
    assert int(batch["tokens"][1, -1]) == tokenizer.eot_id


def test_interleaved_batches(tokenizer):
    samples = [sample(text, float(i + 1)) for i, text in enumerate(["a", "b", "c", "d", "e"])]
    batch = CaptionCollate(tokenizer, "interleaved", images_per_row=2)(samples)
    assert batch["images"].shape == (3, 2, 1, 3, 4, 4)
    assert batch["images"][:, :, 0, 0, 0, 0].tolist() == [[1, 2], [3, 4], [5, 0]]
    assert batch["tokens"].equal(tokenizer.interleaved([["a", "b"], ["c", "d"], ["e"]]))
    assert (batch["tokens"] == tokenizer.image_id).sum(dim=1).tolist() == [2, 2, 1]
    single = CaptionCollate(tokenizer, "interleaved")(samples[:1])
    assert single["images"].shape == (1, 1, 1, 3, 4, 4)
    text = CaptionCollate(tokenizer, "text")(samples)
    assert "images" not in text
    assert text["tokens"].equal(tokenizer.interleaved([[s["text"]] for s in samples]))


def test_bad_use(tokenizer):
    with pytest.raises(ValueError, match=r"layout must be one of .*, got 'rows'"):
        CaptionCollate(tokenizer, "rows")
    for layout, count in (("interleaved", 0), ("prefix", 2)):
        with pytest.raises(ValueError, match=f"images_per_row must be at least 1.*, got {count}"):
            CaptionCollate(tokenizer, layout, count)
