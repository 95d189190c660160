"""`vlmkernels asif`: build, add, remove, search, classify, explain, on pictures of plain colours."""

import os

import pytest
import torch
from PIL import Image

from vlmkernels.cli import main
from vlmkernels.models import AnchorFolder
from vlmkernels.use import asif as use
from vlmkernels.use.encoders import Encoder

COLOURS = {
    "red": (220, 20, 20), "green": (20, 200, 30), "blue": (30, 30, 210), "yellow": (230, 220, 40),
    "black": (10, 10, 10), "white": (245, 245, 245), "pink": (250, 150, 180), "brown": (120, 70, 20),
}  # fmt: skip


def pixels(image):
    return torch.tensor(image.resize((1, 1)).getpixel((0, 0))[:3]) / 255 - 0.5


def letters(texts):
    """The colours that a text names: a width of its own, and nothing of an image."""
    rows = torch.tensor([[float(name in text) for name in COLOURS] for text in texts])
    return rows + 0.01


@pytest.fixture(autouse=True)
def _encoders(monkeypatch, tmp_path):
    """Tiny ones under the names of the packaged networks, and a cache of their own."""
    image = Encoder("efficientnet-lite0", pixels, torch.stack, 4)
    text = Encoder("all-minilm-l6-v2", str, letters, 4)
    monkeypatch.setattr(use, "image_encoder", lambda source, device: image)
    monkeypatch.setattr(use, "text_encoder", lambda source, device: text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return image


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "seen", 12, COLOURS)


def write(folder, shift, colours):
    """Pictures of plain colours and their captions, in another shade than with another shift."""
    folder.mkdir()
    rows = ["filepath\ttitle"]
    for name in colours:
        shade = tuple(min(255, part + shift) for part in COLOURS[name])
        Image.new("RGB", (20, 12), shade).save(folder / f"{name}.png")
        rows.append(f"{name}.png\ta {name} wall")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return folder / "pairs.tsv"


def run(capsys, *arguments):
    main(["asif", *map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def fail(capsys, *arguments):
    with pytest.raises(SystemExit) as error:
        main(["asif", *map(str, arguments)])
    return error.value.code, capsys.readouterr().err


def test_search_finds_the_colour(table, tmp_path, capsys):
    anchors = tmp_path / "anchors"
    assert run(capsys, "build", anchors, table) == [f"8 added, 8 anchors: {anchors}"]
    write(tmp_path / "unseen", 0, COLOURS)
    through = ("--anchors", anchors, "--k", 3)
    for name in COLOURS:
        lines = run(capsys, "search", *through, "-n", 2, f"something {name}", tmp_path / "unseen")
        assert len(lines) == 2
        score, path = lines[0].split("  ")
        assert path == str(tmp_path / "unseen" / f"{name}.png")
        assert float(score) > 0.5


def test_search_keeps_features(table, tmp_path, capsys, monkeypatch):
    anchors = tmp_path / "anchors"
    run(capsys, "build", anchors, table)
    first = run(capsys, "search", "--anchors", anchors, "red", tmp_path / "seen")
    asif = use.open_asif(anchors)
    assert use.search(asif, "red", tmp_path / "seen").cached == 8
    assert use.search(asif, "red", tmp_path / "seen", cache=False).cached == 0
    assert run(capsys, "search", "--anchors", anchors, "red", tmp_path / "seen") == first
    (tmp_path / "seen" / "broken.png").write_bytes(b"no picture")
    found = use.search(asif, "red", tmp_path / "seen")
    assert list(found.skipped) == [str(tmp_path / "seen" / "broken.png")]
    assert found.searched == 8


def test_classes_and_shares(table, tmp_path, capsys):
    anchors = tmp_path / "anchors"
    run(capsys, "build", anchors, table)
    picture = tmp_path / "seen" / "blue.png"
    classes = ("--class", "red", "--class", "blue", "--class", "white")
    (line,) = run(capsys, "classify", "--anchors", anchors, picture, *classes, "--top", 2)
    path, first, second = line.split("\t")
    assert (path, first.split()[0]) == (str(picture), "blue")
    assert float(first.split()[1]) > float(second.split()[1])
    title, best, *_ = run(capsys, "explain", "--anchors", anchors, picture, "deep blue")
    assert float(title.removeprefix("score ").partition(",")[0]) > 0.9
    assert best.split("  ")[-2:] == [str(tmp_path / "seen" / "blue.png"), "a blue wall"]
    alone = run(capsys, "explain", "--anchors", anchors, picture, "-n", 2)
    assert alone[0].startswith("score 1.0000")
    assert len(alone) == 3


def test_anchors_come_and_go(table, tmp_path, capsys, monkeypatch):
    anchors = tmp_path / "anchors"
    run(capsys, "build", anchors, table)
    more = write(tmp_path / "more", 5, ["red", "blue"])
    calls = []
    monkeypatch.setattr(
        Encoder, "batches", lambda self, items, own=Encoder.batches: own(self, counted(items, calls))
    )
    assert run(capsys, "add", anchors, table, more) == [f"2 added, 10 anchors: {anchors}"]
    assert len(calls) == 4
    names = [name for name, _ in AnchorFolder(anchors).described()]
    assert names[-1] == str(tmp_path / "more" / "blue.png")
    assert run(capsys, "remove", anchors, names[-1], f"{tmp_path}/seen/b*") == [
        f"4 removed, 6 anchors: {anchors}"
    ]
    kept = [os.path.basename(name) for name, _ in AnchorFolder(anchors).described()]
    assert kept == ["red.png", "green.png", "yellow.png", "white.png", "pink.png", "red.png"]
    code, err = fail(capsys, "remove", anchors, "nowhere", names[0])
    assert code == 2
    assert "names must be of anchors, got nowhere" in err
    assert len(AnchorFolder(anchors)) == 6


def counted(items, calls):
    for item in items:
        calls.append(item)
        yield item


def test_without_anchors_those_of_emoji3(tmp_path, capsys, monkeypatch, table):
    splits = ("emoji3:concept-test",)
    monkeypatch.setattr(use, "EMBEDDED", splits)
    asif = use.open_asif()
    assert len(asif.anchors) == 370
    (name, caption), *_ = asif.anchors.described()
    assert name.startswith("fluent/")
    assert caption
    asif.anchors.remove([(name, caption)])
    monkeypatch.setattr(
        Encoder, "batches", lambda self, items, own=Encoder.batches: own(self, counted(items, calls))
    )
    calls = []
    assert len(run(capsys, "search", "red", tmp_path / "seen", "-n", 3)) == 3
    assert len(AnchorFolder(asif.anchors.folder)) == 370  # completed, as after an interruption
    calls.clear()
    use.open_asif()
    assert calls == []


def test_wrong_use_is_one_error(table, tmp_path, capsys, monkeypatch):
    anchors = tmp_path / "anchors"
    code, err = fail(capsys, "search", "--anchors", anchors, "red", tmp_path)
    assert (code, "anchors.json does not exist" in err) == (2, True)
    run(capsys, "build", anchors, table)
    code, err = fail(capsys, "build", anchors, table)
    assert (code, "folder must have no anchors yet" in err) == (2, True)
    code, err = fail(capsys, "search", "--anchors", anchors, " ", tmp_path)
    assert (code, "text must not be empty" in err) == (2, True)
    code, err = fail(capsys, "search", "--anchors", anchors, "--k", 0, "red", tmp_path)
    assert (code, "k must be at least 1, got 0" in err) == (2, True)
    code, err = fail(capsys, "search", "--anchors", anchors, "--search", "hnsw", "red", tmp_path)
    assert (code, "search must be one of exact, faiss, got 'hnsw'" in err) == (2, True)
    code, err = fail(capsys, "add", anchors, "nothing.csv")
    assert code == 2
    (tmp_path / "note.txt").write_text("x")
    code, err = fail(capsys, "classify", "--anchors", anchors, tmp_path / "note.txt", "--class", "red")
    assert (code, "none of 1 images can be read" in err) == (2, True)
    other = Encoder("another", pixels, torch.stack, 4)
    monkeypatch.setattr(use, "image_encoder", lambda source, device: other)
    code, err = fail(capsys, "search", "--anchors", anchors, "red", tmp_path / "seen")
    assert code == 2
    assert "image_encoder must be efficientnet-lite0, which made the anchors" in err
    assert "got another" in err


def test_a_missing_package_is_told(tmp_path, capsys, monkeypatch):
    def missing(source, device):
        raise ModuleNotFoundError("x is not installed: pip install 'vlmkernels[asif]'", name="x")

    monkeypatch.setattr(use, "image_encoder", missing)
    code, err = fail(capsys, "build", tmp_path / "anchors")
    assert code == 1
    assert err == "Error: x is not installed: pip install 'vlmkernels[asif]'\n"


def test_help_names_the_commands(capsys):
    out = " ".join(run(capsys, "--help"))
    assert all(name in out for name in ("build", "add", "remove", "search", "classify", "explain"))
