"""A full disk, a folder that cannot be made: one line of error, and nothing that was saved is lost."""

import contextlib
import multiprocessing
import os
import shutil
import subprocess
import sys

import pytest
import torch
import yaml

from tests.train_tiny import assert_same_run, metrics, tiny_values, write_pairs
from vlmkernels.cli import main
from vlmkernels.models.parts.pretrained import save_tensors
from vlmkernels.train import TrainConfig, checkpoint, loop, record, train

resource = pytest.importorskip("resource", reason="sizes of files are limited on POSIX alone")
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    values = tiny_values(table, tmp_path_factory.mktemp("whole") / "run", save_every=2, ema_decay=0.9)
    return train("clip", TrainConfig(**values)).run, values


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if (
        sys.platform != "linux"
        or os.geteuid() != 0
        or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode
    ):
        pytest.skip("a disk cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill_disk(run):
    """Leave no block free."""
    with contextlib.suppress(OSError), (run.parent / "filler").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()


def limit_files(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def steps_size(run):
    return (run / "metrics.jsonl").stat().st_size


FILLED = {
    "a checkpoint": (checkpoint, "save", 3, lambda run: limit_files(30_000)),
    "the metrics": (record.Recorder, "record", 8, lambda run: limit_files(steps_size(run) + 9)),
    "the final model": (loop.Run, "_write_final", 1, lambda run: limit_files(9_000)),
    "the configuration": (checkpoint, "keep_metrics_until", 1, lambda run: limit_files(500)),
}


def child(run, config, owner, name, count, fill):
    """The command, for which files cannot grow from the count-th call of a function on."""
    torch.set_num_threads(1)
    original, left = getattr(owner, name), iter(range(count - 1))

    def filling(*arguments):
        if next(left, None) is None:
            fill(run)
        return original(*arguments)

    setattr(owner, name, filling)
    with config.with_name("told").open("w") as told, contextlib.redirect_stderr(told):
        main(["train", "clip", "--config", str(config), "--out", str(run), "--resume", "auto"])


def stop(run, values, owner, name, count, fill):
    """What the command said when the disk was full."""
    config = run.parent.parent / "config.yaml"
    config.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "out"}))
    process = FORK.Process(target=child, args=(run, config, owner, name, count, fill))
    process.start()
    process.join()
    assert process.exitcode == 1
    return config.with_name("told").read_text()


@pytest.mark.parametrize("filled", FILLED)
def test_a_file_that_cannot_grow_stops_the_run_with_one_line(whole, tmp_path, filled):
    run = tmp_path / "in" / "run"
    run.parent.mkdir()
    told = stop(run, whole[1], *FILLED[filled])
    last = told.splitlines()[-1]
    assert last.startswith("Error: ")
    assert "File too large" in last
    assert str(run) in last
    assert "Traceback" not in told
    saved = [checkpoint.load(folder)["step"] for folder in checkpoint.checkpoints(run)]
    assert saved == {"a checkpoint": [2, 4], "the metrics": [4, 6], "the final model": [10, 12]}.get(
        filled, []
    )
    assert not list(run.rglob(".partial-*"))
    assert not (run / "final").exists()
    train("clip", TrainConfig(**{**whole[1], "out": str(run), "resume": "auto"}))
    assert_same_run(whole[0], run)


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_full_disk_stops_the_run_with_one_line(whole, small_disk, tensorboard):
    run = small_disk / "run"
    told = stop(run, {**whole[1], "tensorboard": tensorboard}, checkpoint, "save", 3, fill_disk)
    assert told.splitlines()[-1].startswith("Error: [Errno 28] No space left on device: ")
    assert told.count("Error: ") == 1
    assert "Traceback" not in told
    assert "the last checkpoint is of step 4; continue: vlmkernels train clip" in told
    assert [checkpoint.load(folder)["step"] for folder in checkpoint.checkpoints(run)] == [2, 4]
    (small_disk / "filler").unlink()
    train("clip", TrainConfig(**{**whole[1], "out": str(run), "resume": "auto"}))
    assert_same_run(whole[0], run)


def test_a_finished_model_survives_a_disk_that_is_full_later(whole, tmp_path):
    run = tmp_path / "in" / "run"
    shutil.copytree(whole[0], run)
    stop(run, whole[1], *FILLED["the final model"])
    assert_same_run(whole[0], run)
    assert len(metrics(run)) == 12


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file", "Not a directory"),
        ("file/run", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("x/" * 2500, "File name too long"),
        ("/proc/run", "No such file or directory"),
    ],
    ids=["a file", "below a file", "a long name", "a long path", "nowhere"],
)
def test_an_out_that_cannot_be_made_is_one_line(table, tmp_path, capsys, monkeypatch, out, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    sizes = yaml.safe_dump(tiny_values(table, "")["model_options"], default_flow_style=True)
    with pytest.raises(SystemExit) as error:
        main(["train", "clip", "--data", str(table), f"--model-options={sizes}", "--out", out])
    assert error.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("Error: out: ")
    assert " cannot be a run folder: [Errno " in told
    assert message in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["--resume", "--config", "--init", "--data"])
def test_other_names_that_are_too_long_are_one_line(table, tmp_path, capsys, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    long = "x" * 300 + "/step-00000001" * (name == "--resume") + ".tsv" * (name == "--data")
    with pytest.raises(SystemExit) as error:
        main(["train", "clip", "--data", str(table), name, long])
    assert error.value.code in (1, 2)
    told = capsys.readouterr().err
    assert told.startswith("Error: ")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_weights_that_cannot_be_written_are_an_os_error(tmp_path):
    with pytest.raises(OSError, match=r"weights cannot be written: .*[Nn]o such file"):
        save_tensors({"a": torch.ones(2)}, tmp_path / "missing" / "weights", {})
