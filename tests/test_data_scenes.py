"""Scenes of emoji3: what a seed fixes, which combinations are unseen, and the score of a caption."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vlmkernels.data import (
    SCENE_SPLITS,
    image_transform,
    load_emoji3,
    load_pairs,
    parse_caption,
    slot_accuracy,
)
from vlmkernels.data.scenes import OBJECTS, RELATIONS, Scene, held_out_pairs, load_scenes
from vlmkernels.train import kinds


def pixels(image):
    return np.asarray(image).astype(int)


def test_a_seed_fixes_every_scene():
    first, again, other = (load_scenes("train", size=20, seed=seed) for seed in (3, 3, 4))
    for i in range(20):
        assert first.scene(i) == again.scene(i)
        assert (pixels(first[i]["image"]) == pixels(again[i]["image"])).all()
        assert first[i]["text"] == again[i]["text"] == first.names[i] == first.scene(i).caption
    assert first.names != other.names
    assert load_scenes("train", size=5, seed=3).names == first.names[:5]
    before = first[7]["image"]
    first.set_epoch(5)  # the epoch draws augmentation, not scenes
    assert (pixels(first[7]["image"]) == pixels(before)).all()


def test_these_scenes_are_those_of_every_machine():
    assert load_scenes("train").names[:2] == [
        "a rocket above a bicycle to the left of a balloon",
        "a strawberry above a balloon to the left of a butterfly",
    ]
    assert load_scenes("test").names[:2] == [
        "a whale above a carrot to the left of a strawberry",
        "a fox above a pineapple",
    ]


def test_workers_and_augmentation_do_not_change_what_is_drawn():
    transform = image_transform(24, train=True, flip=0.5, jitter=0.3)
    scenes = load_scenes("train", size=12, transform=transform, seed=1)
    loaded = [list(DataLoader(scenes, batch_size=None, num_workers=workers)) for workers in (0, 2)]
    for a, b in zip(*loaded, strict=True):
        assert a["text"] == b["text"]
        assert a["image"].equal(b["image"])
    scenes.set_epoch(1)
    assert not all(a["image"].equal(scenes[i]["image"]) for i, a in enumerate(loaded[0]))


def test_without_images():
    with_images, without = (load_scenes("test", size=4, seed=2, images=images) for images in (True, False))
    assert [{**with_images[i], "image": None} for i in range(4)] == [without[i] for i in range(4)]
    with pytest.raises(ValueError, match="clip needs images, which Scenes"):
        kinds.find("clip").check_images(without)
    kinds.find("lm").check_images(without)


@pytest.mark.parametrize("objects", [12, 24, 32])
def test_combinations_of_the_test_splits_are_unseen(objects):
    held_out = held_out_pairs(objects)
    assert len(held_out) == round(0.2 * objects * (objects - 1) / 2)
    train = load_scenes("train", size=2000, objects=objects)
    seen = {frozenset(p) for i in range(2000) for p in itertools.combinations(train.scene(i).objects, 2)}
    assert not seen & held_out
    assert {name for pair in seen for name in pair} == set(OBJECTS[:objects])
    for split in ("test", "style-test"):
        scenes = [load_scenes(split, objects=objects).scene(i) for i in range(500)]
        for scene in scenes:
            assert all(frozenset(pair) in held_out for pair in itertools.pairwise(scene.objects))
        assert {style for scene in scenes for style in scene.styles} == (
            {"noto", "twemoji"} if split == "test" else {"fluent"}
        )
        assert {len(scene.objects) for scene in scenes} == {2, 3}


@pytest.mark.parametrize(("grid", "image_size"), [(2, 48), (3, 60), (2, 33)])
def test_the_picture_shows_the_caption(grid, image_size):
    """Cells follow the relations, objects differ, and each picture lies in its cell on white."""
    scenes = load_scenes("train", size=60, grid=grid, image_size=image_size)
    cell = image_size // grid
    used = set()
    for i in range(60):
        scene = scenes.scene(i)
        used |= set(scene.cells)
        assert len(set(scene.objects)) == len(scene.objects) == len(scene.relations) + 1
        for (a, b), relation in zip(itertools.pairwise(scene.cells), scene.relations, strict=True):
            if relation == "to the left of":
                assert a[0] == b[0]
                assert a[1] < b[1]
            else:
                assert a[1] == b[1]
                assert a[0] < b[0]
        image = pixels(scenes[i]["image"])
        assert image.shape == (image_size, image_size, 3)
        for row, column in itertools.product(range(grid), repeat=2):
            part = image[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            assert (part.min() < 200) == ((row, column) in scene.cells)
    assert used == set(itertools.product(range(grid), repeat=2))


def test_the_pictures_are_those_of_emoji3():
    """Where a picture fills its cell it is the emoji of that name and style, made smaller."""
    emoji = load_emoji3("style-train")
    rows = {(name, style): i for i, (name, style) in enumerate(zip(emoji.names, emoji.styles, strict=True))}
    scenes = load_scenes("train", size=200, image_size=96)
    found = 0
    for i in range(200):
        scene, image = scenes.scene(i), scenes[i]["image"]
        for name, style, (row, column) in zip(scene.objects, scene.styles, scene.cells, strict=True):
            tile = image.crop((column * 48, row * 48, column * 48 + 48, row * 48 + 48))
            found += (pixels(tile) == pixels(emoji[rows[name, style]]["image"])).all()
    assert found > 10  # a side of 48 is one of 13


def test_captions_read_back():
    for split in SCENE_SPLITS:
        scenes = load_scenes(split, size=100)
        for i, caption in enumerate(scenes.names):
            assert parse_caption(caption) == (scenes.scene(i).objects, scenes.scene(i).relations)
    scene = Scene(("owl", "key"), (RELATIONS[0],), ((0, 0), (0, 1)), ("noto", "noto"))
    assert scene.caption == "an owl to the left of a key"
    assert parse_caption("  The Owl  to the left of\tkey. ") == (("owl", "key"), ("to the left of",))
    assert parse_caption("nothing") == (("nothing",), ())


@pytest.mark.parametrize(
    ("caption", "slots", "objects", "relations", "scenes"),
    [
        ("a fox to the left of an owl above a key", 1, 1, 1, 1),
        ("fox to the left of owl above key.", 1, 1, 1, 1),
        ("a fox to the left of a key above an owl", 3 / 5, 1 / 3, 1, 0),
        ("a fox above an owl above a key", 4 / 5, 1, 1 / 2, 0),
        ("a fox to the left of an owl", 3 / 5, 2 / 3, 1 / 2, 0),  # missing
        (
            "a fox to the left of an owl above a key above a dog",
            5 / 7,
            3 / 4,
            2 / 3,
            0,
        ),  # too much
        ("a foxy to the left of an owl above a key", 4 / 5, 2 / 3, 1, 0),
        ("", 0, 0, 0, 0),
    ],
)
def test_slot_accuracy(caption, slots, objects, relations, scenes):
    result = slot_accuracy([caption], ["a fox to the left of an owl above a key"])
    expected = {"slots": slots, "objects": objects, "relations": relations, "scenes": scenes}
    assert result == pytest.approx(expected)


def test_slot_accuracy_of_several_counts_slots():
    references = ["a fox above an owl", "a fox to the left of an owl above a key"]
    result = slot_accuracy(["a fox above an owl", "a frog"], references)
    assert result == pytest.approx({"slots": 3 / 8, "objects": 2 / 5, "relations": 1 / 3, "scenes": 1 / 2})
    for wrong in ([], ["a fox"]):
        with pytest.raises(ValueError, match=r"must pair up, got \d and 2"):
            slot_accuracy(wrong, references)


def test_load_pairs_opens_scenes():
    scenes = load_pairs("scenes:test", transform=image_transform(48), seed=0, size=3)
    assert scenes.split == "test"
    assert load_pairs("scenes").split == "train"
    sample = scenes[-1]
    assert sample["key"] == "scenes/test/2"
    assert sample["image"].shape == (3, 48, 48)
    assert sample["image"].dtype == torch.float32
    assert isinstance(load_pairs("scenes", size=1)[0]["image"], Image.Image)
    with pytest.raises(IndexError, match="index 3 is out of range for 3"):
        scenes[3]


def test_bad_arguments_are_one_error():
    with pytest.raises(ValueError) as error:
        load_scenes("val", size=0, grid=4, objects=5)
    for part in (
        "split must be one of ('train', 'test', 'style-test'), got 'val'",
        "size must be at least 1, got 0",
        "grid must be 2 or 3, got 4",
        "objects must be in [12, 32], got 5",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="image_size must be at least 8 for a grid of 2, got 7"):
        load_scenes(image_size=7)
    with pytest.raises(ValueError, match=r"options of load_scenes must be .*, got \['caption'\]"):
        load_pairs("scenes", caption="label")
