"""A run that is killed at any moment, also while it saves, goes on and ends as if nothing had happened."""

import random
import signal
import sys
import time

import pytest
import torch

from tests.kills import die_before
from tests.train_tiny import TINY, assert_same_run, metrics, tiny_values, write_pairs
from tests.two_processes import FORKED
from vlmkernels._files import write_bytes
from vlmkernels.train import checkpoint, load_bundle

STEPS = ((checkpoint, "_exchange"), (checkpoint._Digesting, "write"))

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")


def child(kind, values, moment=None):
    from vlmkernels.train import TrainConfig, train

    torch.set_num_threads(1)
    if moment is not None:
        die_before(moment, values["out"], *STEPS)
    train(kind, TrainConfig(**values))


def start(*arguments):
    process = FORKED.Process(target=child, args=arguments)
    process.start()
    return process


def steps_written(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_somewhere(kind, values, run, rng):
    """Start a run and kill it after some steps or between two changes of files; whether it lived so long."""
    if rng.random() < 0.5:
        process = start(kind, values, rng.randrange(1, 120))
        process.join()
    else:
        process = start(kind, values)
        step = steps_written(run) + rng.randrange(1, 8)
        while steps_written(run) < step and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def boxes(table):
    """What a ViLD is trained with: pictures in as many batches as the table has, and a teacher."""
    from vlmkernels.train import TrainConfig, train

    teacher = train("clip", TrainConfig(**tiny_values(table, table.parent / "teacher", max_steps=1)))
    return {
        "data": "composites",
        "data_options": {"size": 6, "image_size": 64, "objects": 5},
        "augment": {},
        "batch_size": 2,
        "clip": str(teacher.final),
        "model_options": {**TINY["vild"], "variant": "text"},
    }


@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("clip", 4),
        ("simvlm", 2),
        ("vild", 1),
        pytest.param("clip", 20, marks=pytest.mark.slow),
        pytest.param("simvlm", 20, marks=pytest.mark.slow),
        pytest.param("visualgpt", 20, marks=pytest.mark.slow),
    ],
)
def test_killed_run_resumes_bit_for_bit(tmp_path, kind, kills):
    rng = random.Random(20)
    table = write_pairs(tmp_path)
    values = tiny_values(table, tmp_path / "whole", kind, epochs=20, save_every=4, ema_decay=0.9)  # 60 steps
    if kind == "vild":
        values |= boxes(table)
    whole = start(kind, values)
    whole.join()
    assert whole.exitcode == 0

    run = tmp_path / "killed"
    values = {**values, "out": str(run), "resume": "auto"}
    done = 0
    while done < kills:
        saved, ended = checkpoint.checkpoints(run), (run / "final").exists()
        done += kill_somewhere(kind, values, run, rng)
        found = checkpoint.checkpoints(run)
        assert found[-1:] >= saved[-1:]
        for folder in found:
            assert checkpoint.load(folder)["step"] == checkpoint.step_of(folder)
        if ended:
            load_bundle(run / "final")
    last = start(kind, values)
    last.join()
    assert last.exitcode == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, 61))
    assert_same_run(tmp_path / "whole", run)
    assert not list(run.rglob(".partial-*"))


def write_again(folder, moment):
    """Replace a checkpoint by the next one, a folder and a file by others, and die before a change."""
    die_before(moment, str(folder), *STEPS)
    checkpoint.save(folder, 2, {"step": 2}, keep=1)
    with checkpoint.atomic_folder(folder / "final") as final:
        for name in ("a", "b"):
            (final / name).write_text("new")
    write_bytes(folder / "file", b"new")


@pytest.mark.skipif(sys.platform != "linux", reason="two folders are exchanged in one step on Linux alone")
def test_a_kill_at_any_moment_leaves_the_old_or_the_new(tmp_path):
    seen = set()
    for moment in range(1, 1000):
        folder = tmp_path / str(moment)
        checkpoint.save(folder, 1, {"step": 1}, keep=1)
        with checkpoint.atomic_folder(folder / "final") as final:
            for name in ("a", "b"):
                (final / name).write_text("old")
        write_bytes(folder / "file", b"old")
        process = FORKED.Process(target=write_again, args=(folder, moment))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        found = checkpoint.checkpoints(folder)
        assert [checkpoint.load(path)["step"] for path in found] in ([1], [1, 2], [2])
        contents = {(folder / "final" / name).read_text() for name in ("a", "b")}
        assert len(contents) == 1
        seen.add((len(found), *contents, (folder / "file").read_text()))
        checkpoint.clean(folder)
        assert not list(folder.rglob(".partial-*"))
        if process.exitcode == 0:
            break
    assert moment > 20
    assert seen == {(1, "old", "old"), (2, "old", "old"), (1, "new", "old"), (1, "new", "new")}
