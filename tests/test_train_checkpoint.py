"""Files and folders that are whole or absent, and the state that a checkpoint brings back."""

import json
import random

import numpy
import pytest
import torch

from vlmkernels.train import checkpoint


def test_keeps_the_newest(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    found = checkpoint.checkpoints(tmp_path)
    assert [checkpoint.step_of(path) for path in found] == [10, 100]
    assert checkpoint.load(found[-1]) == {"step": 100}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step-00000010",
        "step-00000100",
    ]


def test_failed_write_leaves_what_was_there(tmp_path):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)

    def fail_half_way():
        with checkpoint.atomic_folder(tmp_path / "checkpoints" / "step-00000001") as folder:
            (folder / "state.pt").write_bytes(b"half")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fail_half_way()
    (found,) = checkpoint.checkpoints(tmp_path)
    assert checkpoint.load(found) == {"step": 1}
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_half_written_checkpoint_is_ignored_and_cleaned(tmp_path):
    checkpoint.save(tmp_path, 1, {"step": 1}, keep=1)
    partial = tmp_path / "checkpoints" / ".partial-step-00000002"
    partial.mkdir()
    (partial / "state.pt").write_bytes(b"half")
    (tmp_path / ".partial-config.yaml").write_text("half")
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [1]
    assert checkpoint.clean(tmp_path) == [".partial-config.yaml", ".partial-step-00000002"]
    assert not partial.exists()
    assert checkpoint.clean(tmp_path) == []


def test_replaces_a_folder(tmp_path):
    for content in ("first", "second"):
        with checkpoint.atomic_folder(tmp_path / "final") as folder:
            (folder / content).write_text(content)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
    assert [path.name for path in (tmp_path / "final").iterdir()] == ["second"]


def test_every_random_generator_continues(tmp_path):
    def draw():
        return (
            random.random(),
            random.gauss(0, 1),
            numpy.random.rand(),
            torch.rand(3).tolist(),
            numpy.random.randn(),
        )

    draw()
    checkpoint.save(tmp_path, 1, {"random": checkpoint.random_state()}, keep=1)
    expected = [draw() for _ in range(3)]
    checkpoint.set_random_state(checkpoint.load(checkpoint.checkpoints(tmp_path)[0])["random"])
    assert [draw() for _ in range(3)] == expected


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 3, 4)]
    path.write_text("".join(lines) + '{"step": 5, "lo')
    checkpoint.keep_metrics_until(path, 4)
    assert path.read_text() == "".join(lines)
    checkpoint.keep_metrics_until(path, 2)
    assert path.read_text() == "".join(lines[:2])
    checkpoint.keep_metrics_until(tmp_path / "absent.jsonl", 2)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="must be a folder named step-<number>"):
        checkpoint.step_of(tmp_path / "final")
    with pytest.raises(FileNotFoundError, match=r"contains no state\.pt"):
        checkpoint.load(tmp_path)
