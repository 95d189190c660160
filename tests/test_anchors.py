"""Anchors in a folder: added and removed without a rebuild, read from the disk, whole after a kill."""

import itertools
import json
import signal
import threading

import pytest
import torch

from tests.kills import die_before
from tests.two_processes import FORKED
from vlmkernels.models.parts import anchors as module
from vlmkernels.models.parts.anchors import MANIFEST, AnchorFolder, AnchorTensors


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_ROWS", 8)


def pairs(first, count):
    """Features, names and captions that tell the number of an anchor."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)[:, None]
    names = [f"image {i}" for i in range(first, first + count)]
    return (
        numbers * torch.tensor([1.0, 2.0, 3.0]),
        -numbers * torch.ones(2),
        names,
        [f"text {n}" for n in names],
    )


def make(folder, count=0, **options):
    found = AnchorFolder.create(folder, image_width=3, text_width=2, **options)
    if count:
        found.add(*pairs(0, count))
    return found


def numbers(anchors):
    """Of each anchor in order; the features, names and captions of one must agree."""
    found = []
    for images, texts in anchors.blocks():
        assert torch.equal(images[:, :1] * torch.tensor([1.0, 2.0, 3.0]), images)
        assert torch.equal(texts, -images[:, :1].expand(-1, 2))
        found += images[:, 0].int().tolist()
    told = [anchors.describe(i) for i in range(len(anchors))]
    assert told == list(anchors.described())
    assert told == [(f"image {i}", f"text image {i}") for i in found]
    return found


def test_added_in_any_portions_they_are_the_same(tmp_path):
    """And there are few small shards: each is larger than all that follow it."""
    anchors, count = make(tmp_path), 0
    for part in (1, 1, 3, 20, 1, 1, 1, 7, 2):
        assert anchors.add(*pairs(count, part)) == part
        count += part
        assert numbers(anchors) == list(range(count))
        sizes = [len(images) for images, _ in anchors.blocks()]
        small = [size for size in sizes if size < 8]
        assert max(sizes) <= 8
        assert all(a > b for a, b in itertools.pairwise(small))
    assert numbers(AnchorFolder(tmp_path)) == list(range(count))


def test_removed_ones_are_gone_and_the_others_keep_their_order(tmp_path):
    anchors = make(tmp_path, 30)
    names = {path.name for path in tmp_path.iterdir()}
    assert (
        anchors.remove([("image 4", "text image 4"), ("image 25", "text image 25"), ("image 4", "other")])
        == 2
    )
    assert numbers(anchors) == [i for i in range(30) if i not in (4, 25)]
    assert len(names & {path.name for path in tmp_path.iterdir()}) == 2 + len(anchors.blocks()) - 2
    assert anchors.remove([(f"image {i}", f"text image {i}") for i in range(8, 16)]) == 8
    assert numbers(anchors) == [i for i in (*range(8), *range(16, 30)) if i not in (4, 25)]
    assert anchors.remove(list(anchors.described())) == 20
    assert numbers(anchors) == []
    assert anchors.add(*pairs(3, 2)) == 2
    assert numbers(anchors) == [3, 4]


def test_a_pair_is_there_once(tmp_path):
    anchors = make(tmp_path, 5)
    images, texts, names, captions = pairs(3, 4)
    twice = torch.cat([images, images]), torch.cat([texts, texts]), names * 2, captions * 2
    assert anchors.add(*twice) == 2
    assert numbers(anchors) == list(range(7))
    assert anchors.add(images[:1], texts[:1], names[:1], ["another caption"]) == 1
    assert len(anchors) == 8


def test_names_and_captions_of_any_kind(tmp_path):
    names, captions = ["", "日本/é.png", "name\udcff"], ["a\nb", "🐻 in the snow", ""]
    anchors = make(tmp_path)
    anchors.add(torch.ones(3, 3), torch.ones(3, 2), names, captions)
    assert list(AnchorFolder(tmp_path).described()) == list(zip(names, captions, strict=True))
    assert anchors.describe(2) == ("name\udcff", "")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_features_in_16_bits(tmp_path, dtype):
    anchors = make(tmp_path, 20, dtype=dtype)
    assert {x.dtype for block in anchors.blocks() for x in block} == {getattr(torch, dtype)}
    assert anchors.remove([("image 3", "text image 3")]) == 1
    assert numbers(AnchorFolder(tmp_path)) == [i for i in range(20) if i != 3]


def test_features_are_read_from_the_file_when_they_are_used(tmp_path, peak_memory, monkeypatch):
    count, width = 16384, 1024
    monkeypatch.setattr(module, "SHARD_ROWS", count)
    names = list(map(str, range(count)))
    anchors = AnchorFolder.create(tmp_path, image_width=width, text_width=2)
    anchors.add(torch.zeros(count, width), torch.zeros(count, 2), names, names)
    held = peak_memory(
        f"""
from vlmkernels.models.parts.anchors import AnchorFolder
def run():
    anchors = AnchorFolder({str(tmp_path)!r})
    assert anchors.blocks()[0][0][5:8].sum() == 0
    assert anchors.describe(7) == ("7", "7")
"""
    )
    assert held < 4 * count * width / 4


def test_who_reads_keeps_what_was_opened(tmp_path):
    reader = make(tmp_path, 10)
    writer = AnchorFolder(tmp_path)
    writer.add(*pairs(10, 30))
    writer.remove([("image 0", "text image 0")])
    assert numbers(reader) == list(range(10))
    reader.reload()
    assert numbers(reader) == numbers(writer) == list(range(1, 40))
    assert reader.add(*pairs(38, 4)) == 2


def test_one_changes_it_at_a_time(tmp_path):
    make(tmp_path)
    threads = [
        threading.Thread(target=lambda i=i: AnchorFolder(tmp_path).add(*pairs(5 * i, 5))) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers(AnchorFolder(tmp_path))) == list(range(30))


def change(folder, action, moment):
    module.SHARD_ROWS = 8
    torch.set_num_threads(1)
    die_before(moment, str(folder))
    anchors = AnchorFolder(folder)
    if action == "add":
        anchors.add(*pairs(20, 13))
    else:
        anchors.remove([(f"image {i}", f"text image {i}") for i in (1, 9, *range(16, 20))])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize(
    ("action", "after"),
    [("add", list(range(33))), ("remove", [i for i in range(16) if i not in (1, 9)])],
)
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path, action, after):
    before, seen = list(range(20)), set()
    for moment in range(1, 1000):
        folder = tmp_path / str(moment)
        make(folder, 20)
        process = FORKED.Process(target=change, args=(folder, action, moment))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        found = AnchorFolder(folder)
        assert numbers(found) in (before, after)
        seen.add(numbers(found) == after)
        assert found.add(*pairs(100, 1)) == 1
        assert numbers(found)[-1] == 100
        files = {shard["file"] for shard in json.loads((folder / MANIFEST).read_text())["shards"]}
        assert {path.name for path in folder.iterdir()} == {*files, MANIFEST, ".lock"}
        if process.exitcode == 0:
            break
    assert moment > 10
    assert seen == {False, True}
    assert numbers(found)[:-1] == after


def test_errors_name_every_argument(tmp_path):
    with pytest.raises(
        ValueError, match=r"image_width must be at least 1, got 0; dtype must be one of .*'int8'"
    ):
        AnchorFolder.create(tmp_path, image_width=0, text_width=2, dtype="int8")
    with pytest.raises(FileNotFoundError, match=r"anchors.json does not exist; pass a folder"):
        AnchorFolder(tmp_path)
    make(tmp_path)
    anchors = make(tmp_path, 5)
    with pytest.raises(ValueError, match="folder must have no anchors yet"):
        make(tmp_path)
    with pytest.raises(ValueError, match=r"images must be \[n, 3\], .* got \[1, 4\]; texts must be \[n, 2\]"):
        anchors.add(torch.ones(1, 4), torch.ones(1, 3), ["a"], ["b"])
    with pytest.raises(ValueError, match=r"must be as many, got \[2, 1, 1, 1\]"):
        anchors.add(torch.ones(2, 3), torch.ones(1, 2), ["a"], ["b"])
    with pytest.raises(ValueError, match="must be finite"):
        anchors.add(torch.tensor([[1.0, torch.nan, 0.0]]), torch.ones(1, 2), ["a"], ["b"])
    with pytest.raises(
        ValueError, match=r"images must be floating \[n, D\], got torch.int64 of shape \(1, 3\)"
    ):
        AnchorTensors(torch.ones(1, 3, dtype=torch.int64), torch.ones(1, 2))
    with pytest.raises(IndexError, match="index 5 is out of range for 5 anchors"):
        anchors.describe(5)
    assert numbers(anchors) == list(range(5))


def edited(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGES = [
    (lambda shard, manifest: shard.unlink(), "no such file, but anchors.json names it"),
    (lambda shard, manifest: shard.write_bytes(shard.read_bytes()[:-8]), "is not a shard of anchors"),
    (lambda shard, manifest: shard.write_bytes(b""), "is not a shard of anchors"),
    (lambda shard, manifest: manifest.write_text("{"), "not JSON"),
    (lambda shard, manifest: manifest.write_text('{"format": 2}'), "format must be 1, got 2"),
    (lambda shard, manifest: edited(manifest, '"text_width": 2', '"text_width": 4'), "texts must be float32"),
    (lambda shard, manifest: edited(manifest, '"file": "', '"file": "../'), "must be files of the folder"),
    (lambda shard, manifest: edited(manifest, '"count": 5', '"count": "5"'), "count must be an integer"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_told(tmp_path, damage, message):
    make(tmp_path, 5)
    (shard,) = tmp_path.glob("*.safetensors")
    damage(shard, tmp_path / MANIFEST)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        AnchorFolder(tmp_path)
