"""Composites of emoji with exact boxes; files in COCO's format, written, read, damaged."""

import json
import random

import numpy
import pytest
import torch
from PIL import Image

from vlmkernels.data import BrokenImageError, load_pairs
from vlmkernels.data.coco import mask_of, runs_of, write_coco
from vlmkernels.data.composites import novel_names


@pytest.fixture(scope="module")
def composites():
    return load_pairs("composites:test", size=8, image_size=64)


def test_a_fifth_of_the_names_is_novel_and_the_classes_are_numbered_base_first(composites):
    assert len(composites.novel) == round(0.2 * 32)
    assert set(composites.novel) == novel_names()
    assert composites.names == (*composites.base, *composites.novel)
    train = load_pairs("composites", size=12, image_size=64)
    seen = [train.picture(i)[0].labels for i in range(12)]
    shown = [train[i]["image"].labels for i in range(12)]
    assert torch.cat(seen).max() > len(train.base)  # objects of novel classes are there, without boxes
    assert torch.cat(shown).max() <= len(train.base)
    assert sum(map(len, shown)) == int((torch.cat(seen) <= len(train.base)).sum())


def test_boxes_are_those_of_the_masks_and_masks_those_of_the_pixels(composites):
    for index in range(8):
        picture, names = composites.picture(index)
        again, _ = composites.picture(index)
        assert again.image.equal(picture.image)
        assert [composites.names[label - 1] for label in picture.labels] == names
        assert picture.masks.sum(0).max() == 1  # each pixel is one object's
        for box, mask in zip(picture.boxes.int().tolist(), picture.masks, strict=True):
            left, top, right, bottom = box
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum() > 30
            assert all(side.any() for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_a_transform_gets_the_picture_its_random_numbers_and_its_key():
    keys = []

    def jitter(picture, rng, key):
        keys.append(key)
        return picture.jittered(32, rng)

    data = load_pairs("composites", size=2, image_size=64, transform=jitter)
    first = data[0]["image"]
    assert first.image.shape == (3, 32, 32)
    assert data[0]["image"].image.equal(first.image)
    data.set_epoch(1)
    assert not data[0]["image"].image.equal(first.image)
    assert keys == ["composites/0/train/0"] * 3
    load_pairs("composites", size=2, image_size=64, transform=jitter, seed=1)[0]
    assert keys[-1] == "composites/1/train/0"  # of another picture
    with pytest.raises(ValueError, match=r"split must be .*; size must .*; image_size must .*; objects must"):
        load_pairs("composites:all", size=0, image_size=8, objects=3)


def test_a_file_in_cocos_format_comes_back(composites, tmp_path):
    pictures = [(f"{index}.png", composites.picture(index)[0]) for index in range(3)]
    path = write_coco(tmp_path, pictures, composites.names)
    data = load_pairs(str(path), base=composites.base)
    assert (data.base, data.novel, len(data)) == (composites.base, composites.novel, 3)
    for index, (file, picture) in enumerate(pictures):
        found = data[index]
        assert found["key"] == file
        assert found["image"].boxes.equal(picture.boxes)
        assert found["image"].labels.equal(picture.labels)
        assert found["image"].masks.equal(picture.masks)
        assert found["image"].image.equal(picture.image)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(BrokenImageError):
        data[1]
    assert list(data.skipped) == ["1.png"]


def test_masks_are_polygons_or_run_lengths():
    torch.manual_seed(0)
    for start in (0, 1):
        mask = torch.rand(5, 7) > 0.5
        mask[0, 0] = bool(start)
        assert mask_of(runs_of(mask), (5, 7)).equal(mask)
    coder = pytest.importorskip("pycocotools.mask")
    runs = runs_of(mask)
    assert numpy.array_equal(coder.decode(coder.frPyObjects(runs, 5, 7)), mask.numpy())
    square = mask_of([[1, 1, 4, 1, 4, 3, 1, 3]], (5, 7))
    assert square[1:4, 1:5].all()
    assert square.sum() == 12
    for wrong in ("text", {"counts": [3], "size": [5, 7]}, {"counts": "abc", "size": [5, 7]}):
        with pytest.raises(ValueError, match="must"):
            mask_of(wrong, (5, 7))


def test_errors_of_files_in_cocos_format(tmp_path):
    path = tmp_path / "a.json"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    images = [{"id": 1, "file_name": "a.png", "height": 4, "width": 4}]
    good = {"images": images, "annotations": [], "categories": [{"id": 3, "name": "fox"}]}
    path.write_text(json.dumps(good))
    assert load_pairs(str(path))[0]["image"].boxes.shape == (0, 4)
    with pytest.raises(ValueError, match=r"base must be names of .*, got owl"):
        load_pairs(str(path), base=["owl"])
    for document in ("[", "[]", '{"images": []}', json.dumps({**good, "annotations": [{"bbox": [1]}]})):
        path.write_text(document)
        with pytest.raises(ValueError, match="is not a file in COCO's format"):
            load_pairs(str(path))
    with pytest.raises(FileNotFoundError):
        load_pairs(str(tmp_path / "none.json"))


def test_a_random_generator_is_all_that_changes_a_picture():
    data = load_pairs("composites", size=1, image_size=64)
    views = [data.picture(0)[0].jittered(32, random.Random(seed)).image for seed in (1, 1, 2)]
    assert views[0].equal(views[1])
    assert not views[0].equal(views[2])
