"""The embedded emoji3 set: contents, splits, captions, loading in workers, and the script that builds it."""

import gzip
import importlib.util
import io
import json
import tarfile
from importlib import resources
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlmkernels.data import SPLITS, ClipTokenizer, Collate, image_transform, load_emoji3

ROOT = Path(__file__).resolve().parent.parent


def test_counts():
    assert {s: len(load_emoji3(s)) for s in SPLITS} == {
        "style-train": 3704,
        "style-test": 1852,
        "concept-train": 2964,
        "concept-test": 370,
    }
    assert load_emoji3().split == "style-train"
    assert load_emoji3("test").split == "style-test"


def test_splits_are_disjoint_and_complete():
    train, test = load_emoji3("concept-train"), load_emoji3("concept-test")
    assert not set(train.concept_ids) & set(test.concept_ids)
    assert set(train.concept_ids) | set(test.concept_ids) == set(range(1852))
    assert set(train.styles) == {"noto", "twemoji"} == set(load_emoji3("style-train").styles)
    assert set(test.styles) == {"fluent"} == set(load_emoji3("style-test").styles)
    # fixed for ever: results of different versions are comparable
    assert test.names[:3] == [
        "grinning face with big eyes",
        "grinning face with sweat",
        "rolling on the floor laughing",
    ]


def test_names_and_groups():
    emoji = load_emoji3("test")
    assert emoji.group_names == (
        "smileys-emotion",
        "people-body",
        "animals-nature",
        "food-drink",
        "travel-places",
        "activities",
        "objects",
        "symbols",
        "flags",
    )
    assert len(set(emoji.names)) == 1852
    assert [emoji.groups.count(g) for g in range(9)] == [166, 361, 157, 128, 218, 85, 261, 223, 253]
    at = emoji.names.index("cat")
    assert emoji.tags[at] == emoji.concepts[emoji.concept_ids[at]].tags
    assert "pet" in emoji.tags[at]
    assert emoji.hexcodes[at] == "1F408"
    assert emoji.group_names[emoji.groups[at]] == "animals-nature"


@pytest.mark.parametrize(("name", "hue"), [("red heart", 0), ("green circle", 1), ("blue square", 2)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_pictures_show_what_their_names_say(split, name, hue):
    emoji = load_emoji3(split)
    for index in (i for i, n in enumerate(emoji.names) if n == name):
        centre = emoji.pixels()[index, :, 16:32, 16:32].float().mean((1, 2))
        assert centre.argmax() == hue, (split, index)


def test_items_and_pixels_agree():
    for split in ("train", "concept-test"):
        emoji = load_emoji3(split)
        pixels = emoji.pixels()
        assert pixels.shape == (len(emoji), 3, 48, 48)
        assert pixels.dtype == torch.uint8
        for index in (0, 7, len(emoji) - 1):
            sample = emoji[index]
            unit = image_transform(48, (0, 0, 0), (1, 1, 1))(sample["image"])
            assert torch.equal((unit * 255).round().to(torch.uint8), pixels[index])
            assert sample["text"] == emoji.names[index]
            assert sample["label"] == emoji.groups[index]
            assert sample["concept"] == emoji.concept_ids[index]
            assert sample["key"] == f"{emoji.styles[index]}/{emoji.hexcodes[index]}"
        spread = pixels.float().std((1, 2, 3))
        faint = {name for name, value in zip(emoji.names, spread, strict=True) if value < 5}
        assert faint <= {"white large square"}  # white on white
    assert load_emoji3(image_size=32)[0]["image"].size == (32, 32)


def test_captions():
    plain = load_emoji3("test")
    tags = load_emoji3("test", caption="tags", max_tags=3)
    both = load_emoji3("test", caption="label_tags")
    counts = set()
    for i in range(0, len(plain), 25):
        chosen = tags[i]["text"].split(", ")
        counts.add(len(chosen))
        assert set(chosen) <= {*plain.tags[i], plain.names[i]}
        assert len(set(chosen)) == len(chosen)
        assert both[i]["text"].startswith(plain.names[i] + ", ")
    assert counts == {1, 2, 3}


def test_random_captions_follow_seed_and_epoch():
    def texts(seed, epoch):
        emoji = load_emoji3("test", caption="label_tags", seed=seed)
        emoji.set_epoch(epoch)
        return [emoji[i]["text"] for i in range(50)]

    assert texts(0, 0) == texts(0, 0)
    assert texts(0, 0) != texts(0, 1)
    assert texts(0, 0) != texts(1, 0)


def test_workers_and_batches():
    """Persistent workers see the epoch, and give what the main process gives."""
    transform = image_transform(24, train=True, crop_scale=(0.5, 1.0), jitter=0.2)
    emoji = load_emoji3("concept-test", caption="tags", transform=transform)
    tokenizer = ClipTokenizer(16, 1024)
    loader = DataLoader(emoji, 100, num_workers=2, persistent_workers=True, collate_fn=Collate(tokenizer))
    for epoch in range(2):
        emoji.set_epoch(epoch)
        batches = list(loader)
        assert batches[0]["images"].shape == (100, 3, 24, 24)
        assert batches[0]["labels"].dtype == batches[0]["concepts"].dtype == torch.int64
        images = torch.cat([batch["images"] for batch in batches])
        for index in (0, 150, 369):
            assert torch.equal(images[index], emoji[index]["image"])
        texts = [text for batch in batches for text in batch["texts"]]
        assert texts[5] == emoji[5]["text"]
        assert torch.equal(batches[1]["tokens"], tokenizer(texts[100:200]))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"split must be one of \('style-train'.*, got 'valid'"):
        load_emoji3("valid")
    with pytest.raises(ValueError, match=r"caption must be one of .*, got 'all'"):
        load_emoji3(caption="all")
    with pytest.raises(ValueError, match="max_tags must be at least 1, got 0"):
        load_emoji3(max_tags=0)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load_emoji3(image_size=0)
    with pytest.raises(IndexError, match="1852 is out of range"):
        load_emoji3("test")[1852]


def test_left_out_entries_are_listed():
    folder = resources.files("vlmkernels.data") / "emoji3"
    document = json.loads(gzip.decompress((folder / "concepts.json.gz").read_bytes()))
    assert len(document["concepts"]) + len(document["excluded"]) == 1949
    assert all(entry["reason"].startswith("no picture in ") for entry in document["excluded"])
    notice = (folder / "NOTICE").read_text(encoding="utf-8")
    assert all(
        text in notice for text in ("Apache License", "CC BY" if "CC BY" in notice else "Attribution 4.0")
    )


@pytest.fixture
def builder():
    path = ROOT / "tools" / "build_emoji3.py"
    if not path.exists():
        pytest.skip(f"{path} is not here (installed package)")
    spec = importlib.util.spec_from_file_location("build_emoji3", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_builder_joins_by_code_and_is_deterministic(builder, tmp_path):
    """Four small packages: codes with and without fe0f, a picture missing, a component, transparency."""

    def pack(name, files):
        with tarfile.open(tmp_path / builder.PACKAGES[name][2], "w:gz") as tar:
            for path, content in files.items():
                info = tarfile.TarInfo(path)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    def drawing(colour, size=(20, 10)):
        buffer = io.BytesIO()
        Image.new("RGBA", size, colour).save(buffer, "PNG")
        return buffer.getvalue()

    entries = [
        {"hexcode": "1F601", "label": "later", "order": 9, "group": 3, "subgroup": 0, "tags": ["b"]},
        {"hexcode": "2764-FE0F", "label": "heart", "order": 2, "group": 0, "subgroup": 0, "tags": ["love"]},
        {"hexcode": "1F3FB", "label": "skin", "order": 3, "group": 2, "subgroup": 0},
        {"hexcode": "1F999", "label": "only two styles", "order": 4, "group": 0, "subgroup": 0},
    ]
    groups = {"groups": {"0": "zero", "2": "component", "3": "three"}, "subgroups": {"0": "sub"}}
    pack(
        "emojibase",
        {
            "package/en/data.json": json.dumps(entries).encode(),
            "package/meta/groups.json": json.dumps(groups).encode(),
        },
    )
    codes = {"noto": "2764-fe0f", "twemoji": "2764-fe0f", "fluent": "2764"}
    for style, prefix in builder.PICTURES.items():
        files = {f"{prefix}{code}.png": drawing("red") for code in (codes[style], "1f601", "1f3fb")}
        if style != "fluent":
            files[f"{prefix}1f999.png"] = drawing("red")
        pack(style, files)

    files = builder.build(tmp_path)
    assert files == builder.build(tmp_path)
    document = json.loads(gzip.decompress(files["concepts.json.gz"]))
    assert [(c["label"], c["group"], c["subgroup"]) for c in document["concepts"]] == [
        ("heart", 0, "sub"),
        ("later", 1, "sub"),
    ]
    assert document["group_names"] == ["zero", "three"]
    assert {e["label"]: e["reason"] for e in document["excluded"]} == {
        "skin": "component of other emoji",
        "only two styles": "no picture in fluent",
    }
    tile = Image.open(io.BytesIO(files["fluent.webp"])).convert("RGB").crop((0, 0, 48, 48))
    assert min(tile.getpixel((24, 4))) > 240  # the border of a wide picture is white
    assert tile.getpixel((24, 24))[0] > 200
    assert tile.getpixel((24, 24))[1] < 60
