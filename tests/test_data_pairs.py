"""load_pairs: CSV tables and webdataset tars, damaged input, sharding, workers."""

import io
import json
import tarfile

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlmkernels.data import (
    BrokenImageError,
    Collate,
    Emoji3,
    TarPairs,
    image_transform,
    load_emoji3,
    load_pairs,
)


def encoded(colour, kind="PNG", size=(20, 16)):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


def colour_of(i):
    return (10 * i % 256, 255 - 10 * i % 256, 7 * i % 256)


@pytest.fixture
def table(tmp_path):
    """Ten pictures with captions, open_clip's format; a.tsv beside the pictures."""
    for i in range(10):
        (tmp_path / f"p{i}.png").write_bytes(encoded(colour_of(i)))
    rows = [f"p{i}.png\tpicture number {i}" for i in range(10)]
    (tmp_path / "a.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n", encoding="utf-8")
    return tmp_path / "a.tsv"


def write_tar(path, entries):
    with tarfile.open(path, "w") as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path):
    """Six shards of four samples, with jpg, png and webp, txt and json."""
    for s in range(6):
        entries = []
        for i in range(4):
            kind, suffix = [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("JPEG", "jpeg")][i]
            key = f"{s}{i}"
            entries.append((f"{key}.{suffix}", encoded(colour_of(int(key)), kind)))
            if i % 2:
                entries.append(
                    (f"{key}.json", json.dumps({"caption": f"caption {key}", "width": 20}).encode())
                )
            else:
                entries.append((f"{key}.txt", f"caption {key}\n".encode()))
        write_tar(tmp_path / f"s{s}.tar", entries)
    return str(tmp_path / "s{0..5}.tar")


ALL_KEYS = [f"{s}{i}" for s in range(6) for i in range(4)]


def test_csv_items(table):
    pairs = load_pairs(str(table))
    assert len(pairs) == 10
    sample = pairs[3]
    assert sample["text"] == "picture number 3"
    assert sample["key"] == "p3.png"
    assert sample["image"].mode == "RGB"
    assert sample["image"].getpixel((0, 0)) == colour_of(3)
    assert (sample["label"], sample["concept"]) == (-1, -1)
    assert pairs[-1]["key"] == "p9.png"
    assert pairs.skipped == {}
    with pytest.raises(IndexError, match="10 is out of range"):
        pairs[10]


@pytest.mark.parametrize("separator", [",", "\t", ";"])
def test_csv_separators_and_quotes(tmp_path, separator):
    (tmp_path / "x.png").write_bytes(encoded("red"))
    header = separator.join(["url", "caption", "image"])
    row = separator.join(["none", f'"a ""quoted"" one{separator} with separator"', "x.png"])
    path = tmp_path / "t.csv"
    path.write_text(f"\ufeff{header}\n{row}\n\n", encoding="utf-8")
    pairs = load_pairs(
        str(path),
        image_column="image",
        text_column="caption",
        separator=separator if separator == ";" else None,
    )
    assert [pairs[0]["text"]] == [f'a "quoted" one{separator} with separator'] == pairs.names


def test_csv_root(table, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "p0.png").write_bytes(encoded((1, 2, 3)))
    assert load_pairs(str(table), root=tmp_path / "other")[0]["image"].getpixel((0, 0)) == (1, 2, 3)


def test_csv_missing_column_names_those_found(table):
    with pytest.raises(ValueError, match=r"no column 'picture'.*\['filepath', 'title'\]"):
        load_pairs(str(table), image_column="picture")
    with pytest.raises(ValueError, match=r"no column 'filepath' and 'title'.*\['filepath\\ttitle'\]"):
        load_pairs(str(table), separator=",")
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        load_pairs("absent.csv")


@pytest.mark.parametrize("workers", [0, 2])
def test_csv_damaged_images_and_rows_are_skipped_and_named(table, workers):
    folder = table.parent
    (folder / "p2.png").write_bytes(b"not an image")
    (folder / "p5.png").write_bytes(encoded(colour_of(5))[:60])
    (folder / "p7.png").unlink()
    with table.open("a", encoding="utf-8") as file:
        file.write("p1.png\t \n\tno path\nonly one field\n")
    pairs = load_pairs(str(table), transform=image_transform(8))
    assert len(pairs) == 10
    loader = DataLoader(pairs, batch_size=4, num_workers=workers, collate_fn=Collate())
    for _ in range(2):  # a second epoch counts nothing twice
        keys = [key for batch in loader for key in batch["keys"]]
        assert keys == [f"p{i}.png" for i in (0, 1, 3, 4, 6, 8, 9)]
    assert set(pairs.skipped) == {"p2.png", "p5.png", "p7.png", "line 12", "line 13", "line 14"}
    assert "no caption" in pairs.skipped["line 12"]
    assert "no image path" in pairs.skipped["line 13"]
    assert "FileNotFoundError" in pairs.skipped["p7.png"]
    assert "6 skipped" in repr(pairs)
    with pytest.raises(BrokenImageError, match=r"p2\.png cannot be read"):
        pairs[2]


def test_csv_without_usable_rows(tmp_path):
    (tmp_path / "e.csv").write_text("filepath,title\n")
    with pytest.raises(ValueError, match="no row with an image path"):
        load_pairs(str(tmp_path / "e.csv"))


def test_tar_samples(shards):
    samples = list(load_pairs(shards))
    assert [s["key"] for s in samples] == ALL_KEYS
    for sample in samples:
        assert sample["text"] == f"caption {sample['key']}"
        assert sample["image"].size == (20, 16)
        near = zip(sample["image"].getpixel((3, 3)), colour_of(int(sample["key"])), strict=True)
        assert max(abs(a - b) for a, b in near) < 12  # JPEG and WebP are lossy


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 2), (3, 4), (6, 2)])
def test_tar_every_sample_reaches_exactly_one_worker(shards, world_size, workers):
    seen = []
    for rank in range(world_size):
        pairs = TarPairs(shards, rank=rank, world_size=world_size, shuffle=5)
        loader = DataLoader(pairs, batch_size=3, num_workers=workers, collate_fn=Collate())
        seen += [key for batch in loader for key in batch["keys"]]
    assert sorted(seen) == ALL_KEYS


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_fixed_epoch_length(shards, workers):
    for rank in range(2):
        pairs = TarPairs(shards, rank=rank, world_size=2, samples_per_rank=31)
        loader = DataLoader(pairs, batch_size=1, num_workers=workers, collate_fn=Collate())
        keys = [batch["keys"][0] for batch in loader]
        assert len(keys) == 31
        assert set(keys) == set(
            ALL_KEYS[4 * rank :: 8] + [f"{s}{i}" for s in range(rank, 6, 2) for i in range(4)]
        )


def test_tar_shuffle_is_seeded_and_follows_the_epoch(shards):
    def order(seed, epoch):
        pairs = TarPairs(shards, shuffle=50, seed=seed)
        pairs.set_epoch(epoch)
        return [s["key"] for s in pairs]

    first = order(0, 0)
    assert first == order(0, 0)
    assert sorted(first) == ALL_KEYS != first
    assert first != order(0, 1)
    assert first != order(1, 0)


def test_tar_damage_is_skipped_and_named(tmp_path, shards):
    write_tar(
        tmp_path / "d0.tar",
        [
            ("bad.jpg", b"\xff\xd8 no jpeg"),
            ("bad.txt", b"x"),
            ("blank.png", encoded("red")),
            ("blank.txt", b"  "),
            ("json.png", encoded("red")),
            ("json.json", b"{"),
            ("key.png", encoded("red")),
            ("key.json", b'{"alt": "x"}'),
            ("lonely.png", encoded("red")),
            ("noimage.txt", b"x"),
            ("okay.png", encoded("red")),
            ("okay.txt", "fünf".encode()),
            ("utf.png", encoded("red")),
            ("utf.txt", b"\xff\xfe\xfa"),
        ],
    )
    (tmp_path / "d1.tar").write_bytes(b"garbage" * 500)
    pairs = load_pairs(str(tmp_path / "d{0..1}.tar") + "::" + str(tmp_path / "s1.tar"))
    assert [s["key"] for s in pairs] == ["okay", "10", "11", "12", "13"]
    skipped = pairs.skipped
    assert {"bad", "blank", "json", "key", "lonely", "noimage", "utf", str(tmp_path / "d1.tar")} == set(
        skipped
    )
    assert "['alt']" in skipped["key"]
    assert "no text, fields ['png']" in skipped["lonely"]


@pytest.mark.parametrize("cut", ["in a header", "in the data", "between files"])
def test_tar_cut_off(tmp_path, shards, cut):
    with tarfile.open(tmp_path / "s0.tar") as tar:
        third = tar.getmembers()[4]  # after two samples of two files
    size = {
        "in a header": third.offset + 100,
        "in the data": third.offset_data + 3,
        "between files": third.offset,
    }
    (tmp_path / "cut.tar").write_bytes((tmp_path / "s0.tar").read_bytes()[: size[cut]])
    pairs = load_pairs(str(tmp_path / "cut.tar") + "::" + str(tmp_path / "s1.tar"))
    assert [s["key"] for s in pairs] == ["00", "01", "10", "11", "12", "13"]
    assert list(pairs.skipped) == [str(tmp_path / "cut.tar")]


def test_tar_text_key(tmp_path):
    meta = json.dumps({"caption": "short", "long": "a longer text"}).encode()
    write_tar(tmp_path / "t.tar", [("a.png", encoded("red")), ("a.json", meta), ("a.txt", b"plain")])
    assert next(iter(load_pairs(str(tmp_path / "t.tar"))))["text"] == "plain"
    assert next(iter(load_pairs(str(tmp_path / "t.tar"), text_key="long")))["text"] == "a longer text"


@pytest.mark.parametrize("length", [None, 5])
def test_tar_without_any_pair_names_the_fields(tmp_path, length):
    write_tar(tmp_path / "t.tar", [("a.gif", b"GIF"), ("a.cls", b"3")])
    with pytest.raises(ValueError, match=r"fields found: \['cls', 'gif'\]"):
        list(load_pairs(str(tmp_path / "t.tar"), samples_per_rank=length))


def test_tar_bad_arguments(shards):
    with pytest.raises(ValueError, match="at least one shard per rank, got 6 shards for 7 ranks"):
        TarPairs(shards, rank=0, world_size=7)
    with pytest.raises(ValueError, match=r"rank must be in \[0, world_size = 2\), got 2"):
        TarPairs(shards, rank=2, world_size=2)
    with pytest.raises(ValueError, match="shuffle must be a buffer size of at least 0, got -1"):
        TarPairs(shards, shuffle=-1)
    with pytest.raises(ValueError, match="samples_per_rank must be at least 1, got 0"):
        TarPairs(shards, samples_per_rank=0)
    with pytest.raises(FileNotFoundError, match="1 of 1 shards"):
        TarPairs("absent.tar")


def test_tar_rank_from_the_environment(shards, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert [s["key"] for s in load_pairs(shards)] == ["10", "11", "12", "13"]


def test_load_pairs_specs(table):
    assert isinstance(load_pairs("emoji3"), Emoji3)
    assert len(load_pairs("emoji3:concept-test", caption="tags")) == len(load_emoji3("concept-test"))
    with pytest.raises(ValueError, match="spec must be emoji3"):
        load_pairs("data.parquet")
    with pytest.raises(ValueError, match=r"options of CsvPairs must be .*separator.*, got \['shuffle'\]"):
        load_pairs(str(table), shuffle=4)


def test_augmentation_does_not_depend_on_workers(table):
    transform = image_transform(8, train=True, crop_scale=(0.2, 1.0), flip=0.5, jitter=0.3)
    pairs = load_pairs(str(table), transform=transform, seed=3)
    runs = []
    for epoch, workers in [(0, 0), (0, 2), (1, 0)]:
        pairs.set_epoch(epoch)
        loader = DataLoader(pairs, batch_size=5, num_workers=workers, collate_fn=Collate())
        runs.append(torch.cat([batch["images"] for batch in loader]))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
