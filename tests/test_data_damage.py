"""Damaged tables, tars and names: no sample vanishes unnamed, none is borrowed, nothing is run or written."""

import codecs
import logging
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Subset, random_split

from tests.damage import encoded, tar
from vlmkernels.data import (
    CaptionCollate,
    CaptionTokenizer,
    ClipTokenizer,
    Collate,
    SkipLog,
    WordPieceTokenizer,
    image_transform,
    load_pairs,
    load_tokenizer,
)
from vlmkernels.data._text import printable
from vlmkernels.use.evaluate import ClassFolders
from vlmkernels.use.images import find_images


def rows(path, text, **options):
    """The pairs of a table with this text, and what was left out."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    pairs = load_pairs(str(path), **options)
    return pairs._rows, pairs.skipped


def table_of(folder, count, broken=()):
    """A table of pictures of which some are no images."""
    for i in range(count):
        (folder / f"p{i}.png").write_bytes(b"no image" if i in broken else encoded())
    table = folder / "t.tsv"
    table.write_text("filepath\ttitle\n" + "".join(f"p{i}.png\tpicture {i}\n" for i in range(count)))
    return str(table)


@pytest.mark.parametrize(("ending", "separator"), [("tsv", "\t"), ("csv", ",")])
@pytest.mark.parametrize("begin", ['"a quote', '"', 'a "quoted" word"', '"said" he', '""'])
def test_a_quote_that_is_not_closed_costs_no_other_row(tmp_path, ending, separator, begin):
    lines = [f"{i}.png{separator}picture {i}\n" for i in range(10_000)]
    lines[2] = f"2.png{separator}{begin}\n"
    found, skipped = rows(tmp_path / f"t.{ending}", f"filepath{separator}title\n" + "".join(lines))
    expected = [(f"{i}.png", f"picture {i}") for i in range(10_000)]
    expected[2] = ("2.png", begin)
    if begin == '""':  # an empty caption
        del expected[2]
    assert found == expected
    assert list(skipped) == (["line 4"] if begin == '""' else [])


def test_two_quotes_far_apart_are_no_field(tmp_path):
    """The second one ends a line, so that csv alone reads ten rows as one caption."""
    lines = [f"{i}.png\tpicture {i}\n" for i in range(20)]
    lines[3], lines[12] = '3.png\t"open\n', '12.png\t5"\n'
    found, skipped = rows(tmp_path / "t.tsv", "filepath\ttitle\n" + "".join(lines))
    assert [image for image, _ in found] == [f"{i}.png" for i in range(20)]
    assert dict(found)["3.png"] == '"open'
    assert dict(found)["12.png"] == '5"'
    assert skipped == {}


def test_fields_over_several_lines(tmp_path):
    text = (
        "title,filepath,width\n"
        '"two\nlines, and a comma",a.png,3\n'
        '"an ""inner"" quote\r\n\r\nfar below",b.png,4\r\n'
        "plain,c.png,5\n"
        '"open, and a comma,d.png,6\n'
        '"open",e.png,"7\n'
        "last,f.png,8"
    )
    found, skipped = rows(tmp_path / "t.csv", text)
    assert found == [
        ("a.png", "two\nlines, and a comma"),
        ("b.png", 'an "inner" quote\r\n\r\nfar below'),
        ("c.png", "plain"),
        ("e.png", '"open"'),
        ("f.png", "last"),
    ]
    assert list(skipped) == ["line 8"]
    assert skipped["line 8"].startswith("a quote is not closed")


def test_a_caption_is_not_cut_at_a_comma(tmp_path):
    text = "filepath,title\na.png,a dog, running\nb.png,a dog,,\nc.png\n"
    found, skipped = rows(tmp_path / "t.csv", text)
    assert found == [("b.png", "a dog")]
    assert list(skipped) == ["line 2", "line 4"]
    assert skipped["line 2"].startswith("3 columns, the header has 2")


def test_rows_that_are_not_utf8_are_named(tmp_path):
    text = b"filepath\ttitle\tnote\na.png\tfine\t\xff\nb.png\tcaf\xe9\t\nc\xe9.png\tx\t\n"
    found, skipped = rows(tmp_path / "t.tsv", text)
    assert found == [("a.png", "fine")]
    assert [reason.split(":")[0] for reason in skipped.values()] == ["not UTF-8"] * 2
    with pytest.raises(ValueError, match=r"no column 'filepath' and 'title'.*must be UTF-8"):
        rows(tmp_path / "t.tsv", text.decode("latin-1").encode("utf-16"))


def test_a_header_that_csv_cannot_read_is_a_value_error(tmp_path):
    """A file without line ends whose first quote never closes, for example."""
    with pytest.raises(ValueError, match=r"t\.csv has no header: field larger than field limit"):
        rows(tmp_path / "t.csv", '"' + "a" * 200_000)


def test_byte_order_marks(tmp_path):
    found, _ = rows(tmp_path / "t.csv", codecs.BOM_UTF8 + b"filepath,title\na.png,b\n")
    assert found == [("a.png", "b")]
    marked = [
        ("a.png", encoded()),
        ("a.txt", codecs.BOM_UTF8 + b"a text"),
        ("b.png", encoded()),
        ("b.json", codecs.BOM_UTF8 + b'{"caption": "a caption"}'),
    ]
    assert [s["text"] for s in tar(tmp_path / "t.tar", marked)] == ["a text", "a caption"]
    pieces = [*WordPieceTokenizer.SPECIAL, "red", "##s"]
    (tmp_path / "vocab.txt").write_bytes(codecs.BOM_UTF8 + "\r\n".join(pieces).encode())
    vocabulary = WordPieceTokenizer.from_file(tmp_path / "vocab.txt")
    assert vocabulary.encode("reds") == [5, 6]
    for tokenizer in (vocabulary, ClipTokenizer(16, 600), CaptionTokenizer(16, 602)):
        tokenizer.save(tmp_path)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).write_bytes(codecs.BOM_UTF8 + (tmp_path / name).read_bytes())
        assert load_tokenizer(tmp_path)(["reds"]).equal(tokenizer(["reds"]))
    (tmp_path / "tokenizer.json").write_bytes(codecs.BOM_UTF8 + vocabulary._tokenizer.to_str().encode())
    assert WordPieceTokenizer.from_file(tmp_path / "tokenizer.json").encode("reds") == [5, 6]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer_config.json", b"{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"\xff", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", b"[1]", "must contain the values of a tokenizer, got a list"),
        ("tokenizer_config.json", b"{}", "must be one of .*, got None"),
        ("tokenizer_config.json", b'{"type": "ClipTokenizer"}', "must be integers, got .*'vocab_size': None"),
        ("tokenizer.json", b"{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", b"", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", b"\xff", "tokenizer.json is not UTF-8"),
    ],
)
def test_a_broken_tokenizer_is_named(tmp_path, file, content, message):
    ClipTokenizer(16, 600).save(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("make", [lambda: ClipTokenizer(16, 600), lambda: WordPieceTokenizer.train(["a"])])
def test_half_a_character_is_named(make):
    with pytest.raises(ValueError, match=r"text must be Unicode without lone surrogates, got 'a \\ud83d'"):
        make()(["fine", "a \ud83d"])


def test_paths_that_no_system_takes(tmp_path):
    names = ["a.png", "x" * 300 + ".png", "/".join(["y" * 200] * 30) + ".png", "z\0.png", "fifo.png", "sub"]
    (tmp_path / "a.png").write_bytes(encoded())
    (tmp_path / "sub").mkdir()
    os.mkfifo(tmp_path / "fifo.png")
    table = tmp_path / "t.tsv"
    table.write_text("filepath\ttitle\n" + "".join(f"{name}\ttext\n" for name in names))
    pairs = load_pairs(str(table))
    batches = list(DataLoader(pairs, batch_size=2, collate_fn=Collate()))
    assert [batch["keys"] for batch in batches] == [["a.png"], [], []]
    assert list(pairs.skipped) == names[1:]
    assert "File name too long" in pairs.skipped[names[1]]
    assert "File name too long" in pairs.skipped[names[2]]


def failing(image):
    if image.getpixel((0, 0))[0] > 200:
        raise RuntimeError("too red")
    return torch.zeros(3, 2, 2)


def test_a_transform_that_fails_skips_its_sample(tmp_path):
    table = table_of(tmp_path, 3)
    (tmp_path / "p1.png").write_bytes(encoded("blue"))
    pairs = load_pairs(table, transform=failing)
    assert [s["key"] for s in pairs.__getitems__([0, 1, 2])] == ["p1.png"]
    assert pairs.skipped["p0.png"] == "transform: RuntimeError: too red"
    entries = [("a.png", encoded()), ("a.txt", b"a"), ("b.png", encoded("blue")), ("b.txt", b"b")]
    shards = tar(tmp_path / "t.tar", entries, transform=failing)
    assert [s["key"] for s in shards] == ["b"]
    assert shards.skipped == {"a": f"in {tmp_path}/t.tar: transform: RuntimeError: too red"}


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_borrowed_from_the_other_split(tmp_path, workers):
    pairs = load_pairs(table_of(tmp_path, 12, broken=(1, 4, 5)), transform=image_transform(4))
    one, two = random_split(pairs, [6, 6], torch.Generator().manual_seed(0))
    for part in (one, two, Subset(pairs, [4, 5]), Subset(pairs, [3, 4])):
        loader = DataLoader(part, batch_size=2, num_workers=workers, collate_fn=Collate(image_size=4))
        batches = list(loader)
        keys = [key for batch in batches for key in batch["keys"]]
        assert keys == [f"p{i}.png" for i in part.indices if i not in (1, 4, 5)]
        assert len(batches) == -(-len(part) // 2)
    empty = next(iter(DataLoader(Subset(pairs, [4, 5]), batch_size=2, collate_fn=Collate(image_size=4))))
    assert empty["images"].shape == (0, 3, 4, 4)


def test_batches_of_nothing():
    batch = Collate(ClipTokenizer(8, 600), image_size=(4, 6))([])
    assert (batch["texts"], batch["keys"]) == ([], [])
    assert batch["images"].shape == (0, 3, 4, 6)
    assert batch["tokens"].shape == (0, 8)
    assert (len(batch["labels"]), batch["labels"].dtype) == (0, torch.int64)
    assert Collate()([])["images"] == []
    tokenizer = CaptionTokenizer(16, 602)
    shapes = {"prefix": (0, 3, 4, 4), "interleaved": (0, 2, 1, 3, 4, 4)}
    for layout, count in (("prefix", 1), ("interleaved", 2), ("text", 2)):
        batch = CaptionCollate(tokenizer, layout, count, image_size=4)([])
        assert batch["tokens"].ndim == 2
        assert len(batch["tokens"]) == 0
        assert layout == "text" or batch["images"].shape == shapes[layout]
        assert layout == "text" or CaptionCollate(tokenizer, layout, count)([])["images"] == []


def test_a_skipped_image_is_logged_once_for_all_workers_and_epochs(tmp_path):
    pairs = load_pairs(table_of(tmp_path, 6, broken=(2, 3)))
    handler = logging.FileHandler(tmp_path / "log")  # which the workers inherit
    logging.getLogger("vlmkernels").addHandler(handler)
    try:
        for workers in (2, 0, 2):
            list(DataLoader(pairs, batch_size=2, num_workers=workers, collate_fn=Collate()))
    finally:
        logging.getLogger("vlmkernels").removeHandler(handler)
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in lines) == ["skipped p2.png", "skipped p3.png"]
    assert set(pairs.skipped) == {"p2.png", "p3.png"}


def test_skip_logs_keep_any_key(tmp_path, caplog):
    log = SkipLog()
    keys = ["a\tb", "two  blanks", "line\nbreak", "\x1b[31mred", "\udce9", "x" * 5000]
    for key in keys:
        log.add(key, f"because\n {key[:10]}")
    assert list(log.items()) == keys
    assert list(log._known) == keys
    assert "\x1b" not in repr(log) + caplog.text
    assert r"\udce9" in caplog.text


def test_a_full_disk_does_not_stop_the_skip_log(monkeypatch):
    log = SkipLog()

    def full(path, mode, **options):
        if "a" in mode:
            raise OSError(28, "No space left on device")
        return ordinary(path, mode, **options)

    ordinary = open
    monkeypatch.setattr("builtins.open", full)
    log.add("a", "b")
    monkeypatch.undo()
    assert log.items() == {"a": "b"}
    with open(log._path, "ab") as file:  # what a write leaves that the disk cut off, and one that goes on
        file.write(b'["half')
        assert log.items() == {"a": "b"}
        file.write(b'\n["c", "d"]\n')
    assert log.items() == {"a": "b", "c": "d"}


def test_printable():
    assert printable("plain ünï 漢字 👩‍🚀") == "plain ünï 漢字 👩‍🚀"
    assert printable("a\x1b[31m\n\r\t\x7f\x9b") == r"a\x1b[31m\n\r\t\x7f\x9b"
    assert printable("\u202egnp.exe\u2028\udcff") == r"\u202egnp.exe\u2028\udcff"
    assert printable(Path("a")) == "a"


def test_hidden_folders_are_no_classes_and_no_images(tmp_path):
    for name in ("cat", "dog", ".git", ".ipynb_checkpoints", "dog/.ipynb_checkpoints", "dog/deep"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "a.png").write_bytes(encoded())
    (tmp_path / "cat" / "._a.png").write_bytes(b"mac")
    folders = ClassFolders(tmp_path)
    assert folders.class_names == ["cat", "dog"]
    names = [str(file.relative_to(tmp_path)) for file, _ in folders.files]
    assert names == ["cat/a.png", "dog/a.png", "dog/deep/a.png"]
    hidden = tmp_path / ".git"
    assert find_images([hidden]) == [hidden / "a.png"]
    assert find_images([tmp_path / "cat" / "._a.png"]) == [tmp_path / "cat" / "._a.png"]


def test_what_is_not_a_file_is_found_to_be_named(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.jpg").write_bytes(encoded())
    scandir = os.scandir

    def locked(path):  # as root every folder can be listed
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert [file.name for file in find_images([tmp_path])] == ["a.jpg", "fifo.png", "gone.png", "locked"]
    assert find_images([tmp_path / "fifo.png"]) == [tmp_path / "fifo.png"]
