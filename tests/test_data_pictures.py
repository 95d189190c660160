"""Boxes, proposals, masks and pixels move together; files of proposals."""

import random

import pytest
import torch

from vlmkernels.data.pictures import Picture
from vlmkernels.data.proposals import Proposals, write_proposals

HEIGHT, WIDTH = 60, 80
CORNERS = [[8.0, 10.0, 30.0, 28.0], [40.0, 34.0, 72.0, 56.0], [50.0, 2.0, 58.0, 12.0]]


def picture():
    """Three boxes of one bright channel each; the proposals are the same boxes in another order."""
    image, masks = torch.zeros(3, HEIGHT, WIDTH), torch.zeros(3, HEIGHT, WIDTH, dtype=torch.bool)
    for number, corners in enumerate(CORNERS):
        left, top, right, bottom = map(int, corners)
        image[number, top:bottom, left:right] = 1
        masks[number, top:bottom, left:right] = True
    boxes = torch.tensor(CORNERS)
    order = torch.tensor([2, 0, 1])
    return Picture(image, boxes, torch.tensor([1, 2, 3]), masks, boxes[order], torch.eye(3)[order])


def extent(seen):
    """The box of the pixels that are seen."""
    rows, columns = seen.any(1).nonzero()[:, 0], seen.any(0).nonzero()[:, 0]
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def check(moved, tolerance):
    for box, label, mask in zip(moved.boxes, moved.labels, moved.masks, strict=True):
        assert (extent(mask) - box).abs().max() <= tolerance
        assert (extent(moved.image[label - 1] > 0.5) - box).abs().max() <= tolerance
        row = moved.embeddings.argmax(1).tolist().index(int(label) - 1)
        assert moved.proposals[row].equal(box)
    assert len(moved.proposals) == len(moved.boxes)


def test_a_flip_moves_everything_once():
    moved = picture().flipped()
    check(moved, 0)
    assert moved.boxes[0].tolist() == [WIDTH - 30, 10, WIDTH - 8, 28]
    assert moved.flipped().boxes.equal(picture().boxes)


def test_a_window_cuts_boxes_and_drops_those_outside():
    moved = picture().window(20, 20, 40)
    check(moved, 0)
    assert moved.labels.tolist() == [1, 2]
    assert moved.boxes.tolist() == [[0, 0, 10, 8], [20, 14, 40, 36]]
    assert moved.image.shape == (3, 40, 40)
    padded = picture().window(0, 0, 100)
    check(padded, 0)
    assert padded.image.shape == (3, 100, 100)
    assert not padded.image[:, HEIGHT:].any()


def test_large_scale_jitter_keeps_them_together():
    flips, counts = 0, set()
    for seed in range(40):
        moved = picture().jittered(64, random.Random(seed), scales=(0.5, 2.0))
        check(moved, 2)
        assert moved.image.shape == (3, 64, 64)
        counts.add(len(moved.boxes))
        flips += len(moved.boxes) == 3 and bool(moved.boxes[0, 0] > moved.boxes[1, 0])
        again = picture().jittered(64, random.Random(seed), scales=(0.5, 2.0))
        assert again.image.equal(moved.image)
    assert flips > 3
    assert {2, 3} <= counts


def test_a_target_without_objects_and_without_proposals():
    empty = Picture(
        torch.rand(3, 20, 30), torch.zeros(0, 4), torch.zeros(0).long(), torch.zeros(0, 20, 30).bool()
    )
    moved = empty.jittered(16, random.Random(0))
    assert {name: list(value.shape) for name, value in moved.target().items()} == {
        "boxes": [0, 4], "labels": [0], "masks": [0, 16, 16],
    }  # fmt: skip


def test_errors_of_a_picture_name_what_is_wrong():
    one = picture()
    with pytest.raises(ValueError, match=r"labels must be .*; masks must be .*; proposals and embeddings"):
        Picture(one.image, one.boxes, one.labels[:2], one.masks[:, 1:], one.proposals)


def test_proposals_come_back_from_their_file(tmp_path):
    path = tmp_path / "proposals.safetensors"
    images = {
        "a/1": (torch.tensor(CORNERS), torch.randn(3, 5)),
        "none": (torch.zeros(0, 4), torch.zeros(0, 5)),
        "ü": (torch.tensor(CORNERS[:1]), torch.randn(1, 5)),
    }
    write_proposals(path, images, teacher="clip#1")
    found = Proposals(path)
    assert (found.teacher, found.width, list(found)) == ("clip#1", 5, list(images))
    for key, (boxes, embeddings) in images.items():
        assert found[key][0].equal(boxes)
        assert found[key][1].equal(embeddings.half().float())
    with pytest.raises(KeyError):
        found["other"]


def test_errors_of_files_of_proposals(tmp_path):
    path = tmp_path / "proposals.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        Proposals(path)
    with pytest.raises(ValueError, match="images must be one or more"):
        write_proposals(path, {}, teacher="")
    with pytest.raises(ValueError, match=r"b must have boxes \[P, 4\] and embeddings \[P, 5\]"):
        write_proposals(
            path,
            {"a": (torch.zeros(1, 4), torch.zeros(1, 5)), "b": (torch.zeros(1, 4), torch.zeros(2, 5))},
            teacher="",
        )
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match="is not a file of proposals"):
        Proposals(path)
