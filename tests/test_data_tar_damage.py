"""Damaged webdataset tars: no sample vanishes unnamed, nothing is run or written."""

import gzip
import io
import os
import tarfile

import pytest
from torch.utils.data import DataLoader

from tests.damage import GOOD, encoded, member, tar
from vlmkernels.data import Collate, TarPairs, load_pairs, tar_pairs


def test_shards_that_count_their_keys_from_zero(tmp_path):
    for i in range(3):
        tar(tmp_path / f"{i}.tar", [("0.png", b"broken"), ("0.txt", b"x"), *GOOD])
    pairs = load_pairs(str(tmp_path / "{0..2}.tar"))
    for _ in range(2):
        assert [s["key"] for s in pairs] == ["good"] * 3
    assert list(pairs.skipped) == ["0", f"0 in {tmp_path}/1.tar", f"0 in {tmp_path}/2.tar"]
    assert f"in {tmp_path}/0.tar" in pairs.skipped["0"]


@pytest.mark.parametrize("seed", range(6))
def test_shuffled_shards_are_dealt_anew_where_one_is_damaged(tmp_path, seed):
    """A rank that is dealt the damaged one twice in a row gives up, once is no reason to."""
    tar(tmp_path / "0.tar", GOOD)
    (tmp_path / "1.tar").write_bytes(b"garbage" * 200)
    for rank in range(2):
        shards = str(tmp_path / "{0..1}.tar")
        pairs = TarPairs(shards, rank=rank, world_size=2, samples_per_rank=3, shuffle=2, seed=seed)
        passes = "".join("gb"[pairs._shards_of(0, 1, 0, k)[0].endswith("1.tar")] for k in range(9))
        assert len(list(pairs)) == min(passes.partition("bb")[0].count("g"), 3)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (member("../../evil.png", encoded()), "leads out of the folder"),
        (member("a/../../evil.png", encoded()), "leads out of the folder"),
        (member("..\\evil.png", encoded()), "leads out of the folder"),
        (member("evil.png", kind=tarfile.SYMTYPE, link="/etc/passwd"), "a symbolic link, not a file"),
        (member("evil.png", kind=tarfile.LNKTYPE, link="good.png"), "a hard link, not a file"),
        (member("evil.png", kind=tarfile.CHRTYPE), "a device, not a file"),
        (member("evil.png", kind=tarfile.BLKTYPE), "a device, not a file"),
        (member("evil.png", kind=tarfile.FIFOTYPE), "a named pipe, not a file"),
        (member("evil", encoded()), "the name has no extension"),
        (member("\udce9vil.png", encoded()), "the name is not UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0].name.encode("unicode_escape").decode(),
)
def test_members_that_are_no_plain_files(tmp_path, entry, reason, monkeypatch):
    folder = tmp_path / "empty" / "deep"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    pairs = tar(tmp_path / "t.tar", [entry, *GOOD])
    assert [s["key"] for s in pairs] == ["good"]
    assert reason in pairs.skipped[entry[0].name]
    assert list((tmp_path / "empty").rglob("*")) == [folder]


def test_names_of_a_shard_that_are_passed_over(tmp_path):
    """Folders, hidden files and webdataset's own metadata belong to no sample."""
    names = ["._good.png", "./._good.png", ".DS_Store", "a/.git/x.txt", "__info__", "__meta__/x.txt"]
    folder = member("a", kind=tarfile.DIRTYPE)
    plain = [("./here.png", encoded()), ("./here.txt", b"here")]
    pairs = tar(tmp_path / "t.tar", [folder, *((name, b"x") for name in names), *GOOD, *plain])
    assert [s["key"] for s in pairs] == ["good", "./here"]
    assert pairs.skipped == {}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.json", b"[" * 100_000 + b"]" * 100_000, "text cannot be decoded"),
        ("x.json", b'{"caption": ' * 50_000, "text cannot be decoded"),
        ("x.json", b'{"caption": "half \\ud83d"}', "without lone surrogates"),
        ("x.json", b'{"caption": "half \xed\xa0\xbd"}', "without lone surrogates"),
        ("x.json", b'{"caption": ' + b"9" * 5000 + b"}", "text cannot be decoded"),
        ("x.json", b'{"caption": ["a"]}', "must be a string"),
        ("x.txt", b"\xff\xfe", "text cannot be decoded"),
    ],
)
def test_texts_of_a_shard_that_are_none(tmp_path, name, content, reason):
    pairs = tar(tmp_path / "t.tar", [("x.png", encoded()), (name, content), *GOOD])
    assert [s["key"] for s in pairs] == ["good"]
    assert reason in pairs.skipped["x"]


def test_a_second_file_of_one_name_is_named_alone(tmp_path):
    entries = [("a.png", encoded()), ("a.txt", b"first"), ("a.txt", b"second"), *GOOD]
    pairs = tar(tmp_path / "t.tar", entries)
    assert [s["text"] for s in pairs] == ["first", "fine"]
    assert pairs.skipped == {"a.txt": f"in {tmp_path}/t.tar: a second file of this name"}


def test_a_member_that_would_fill_the_memory(tmp_path, monkeypatch):
    """256 MiB of zeros are 300 kB when compressed; other fields of a sample are not read at all."""
    monkeypatch.setattr(tar_pairs, "LARGEST_MEMBER", 10_000)
    entries = [
        ("a.png", bytes(20_000)),
        ("a.txt", b"a"),
        ("b.png", encoded()),
        ("b.npy", bytes(20_000)),
        ("b.txt", b"b"),
    ]
    pairs = tar(tmp_path / "t.tar.gz", entries, "w:gz")
    assert [s["key"] for s in pairs] == ["b"]
    assert "20000 bytes, more than 10000" in pairs.skipped["a.png"]
    assert "no image" in pairs.skipped["a"]


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "not gzip"])
def test_a_damaged_compressed_shard_is_named(tmp_path, damage):
    entries = [
        (f"{i}.{kind}", content)
        for i in range(40)
        for kind, content in (("png", os.urandom(900)), ("txt", b"x"))
    ]
    list(tar(tmp_path / "good.tar", GOOD))
    with tarfile.open(tmp_path / "bad.tar.gz", "w:gz") as shard:
        for name, content in entries:
            shard.addfile(member(name, content)[0], io.BytesIO(content))
    content = (tmp_path / "bad.tar.gz").read_bytes()
    content = {
        "cut": content[: len(content) // 2],
        "garbage": os.urandom(5000),
        "empty": b"",
        "not gzip": gzip.compress(b"no tar" * 500),
    }[damage]
    (tmp_path / "bad.tar.gz").write_bytes(content)
    pairs = load_pairs(f"{tmp_path / 'bad.tar.gz'}::{tmp_path / 'good.tar'}")
    assert [s["key"] for s in pairs] == ["good"]
    assert pairs.skipped[str(tmp_path / "bad.tar.gz")].startswith("rest of the shard")


@pytest.mark.parametrize("length", [None, 6])
def test_a_damaged_shard_does_not_end_the_run_of_its_worker(tmp_path, length):
    """With two workers one has nothing to read: the other goes on."""
    list(tar(tmp_path / "0.tar", GOOD))
    (tmp_path / "1.tar").write_bytes(b"garbage" * 200)
    pairs = load_pairs(str(tmp_path / "{0..1}.tar"), samples_per_rank=length)
    loader = DataLoader(pairs, batch_size=2, num_workers=2, collate_fn=Collate())
    keys = [key for batch in loader for key in batch["keys"]]
    assert keys == ["good"] * (1 if length is None else 3)
    assert str(tmp_path / "1.tar") in pairs.skipped
    rank = TarPairs(str(tmp_path / "{0..1}.tar"), rank=1, world_size=2, samples_per_rank=length)
    assert list(rank) == []


@pytest.mark.parametrize(
    "spec",
    [
        "pipe:touch {}; cat x.tar",
        "PIPE:touch {}; cat x.tar",
        " pipe:touch {}; cat x.tar",
        "pi\tpe:touch {}; cat x.tar",
        "x.tar::pipe:touch {}; cat x.tar",
        "{{x.tar,pipe:touch {}}}",
        "http://localhost:1/x.tar",
        "https://localhost:1/x.tar",
        "ftps://localhost:1/x.tar",
        "sftp://localhost:1/x.tar",
        "scp://localhost/x.tar",
        "gs://bucket/x.tar",
        "s3://bucket/x.tar",
        "ais://bucket/x.tar",
        "htgs://bucket/x.tar",
        "hf://datasets/a/b/x.tar",
        "whatever:x.tar",
    ],
)
def test_no_url_runs_a_program_unasked(tmp_path, spec, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(tar(tmp_path / "x.tar", GOOD))
    for name in ("curl", "gsutil", "ais"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(ValueError, match=r"urls: to read .* a program would be run .*--allow-pipe"):
        list(load_pairs(spec.format(tmp_path / "started")))
    assert not (tmp_path / "started").exists()


def test_pipes_that_are_allowed(tmp_path):
    list(tar(tmp_path / "x.tar", GOOD))
    pairs = load_pairs(f"pipe:cat {tmp_path / 'x.tar'}", allow_pipe=True)
    assert [s["key"] for s in pairs] == ["good"]
    with (tmp_path / "long.tar").open("wb") as file:  # blocks behind the end mark are no fault
        file.write((tmp_path / "x.tar").read_bytes() + bytes(2**22))
    for length in (1, None):  # reading ends early, and with the tar
        pairs = load_pairs(f"pipe:cat {tmp_path / 'long.tar'}", allow_pipe=True, samples_per_rank=length)
        assert [s["key"] for s in pairs] == ["good"]
        assert pairs.skipped == {}
    failed = load_pairs(f"pipe:cat {tmp_path / 'x.tar'}; exit 3::{tmp_path / 'x.tar'}", allow_pipe=True)
    assert [s["key"] for s in failed][-1:] == ["good"]  # and first, where it was read before the exit
    assert "exit 3" in next(iter(failed.skipped.values()))


def test_file_urls_and_names_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    list(tar(tmp_path / "a:b.tar", GOOD))
    for spec in (
        f"file://{tmp_path}/a:b.tar",
        f"file:{tmp_path}/a:b.tar",
        "a:b.tar",
        str(tmp_path / "a:b.tar"),
    ):
        assert [s["key"] for s in load_pairs(spec)] == ["good"]
    (tmp_path / "cut.tar").write_bytes((tmp_path / "a:b.tar").read_bytes()[:2048])
    cut = load_pairs(f"file:{tmp_path}/cut.tar")
    assert [s["key"] for s in cut] == ["good"]
    assert "end mark" in cut.skipped[f"file:{tmp_path}/cut.tar"]
    with pytest.raises(FileNotFoundError, match="1 of 1 shards"):
        load_pairs(f"file:{tmp_path}/absent.tar")
