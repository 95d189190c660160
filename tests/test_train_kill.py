"""A run that is killed three times, once while it writes a checkpoint, ends as if nothing had happened."""

import multiprocessing
import os
import random
import signal
import time

import pytest

from tests.train_tiny import assert_same_run, metrics, tiny_values, write_pairs
from vlmkernels.train import checkpoint

CONTEXT = multiprocessing.get_context("forkserver")


def child(kind, values, die_in_save_after=None):
    """Train; with ``die_in_save_after`` a SIGKILL comes when the next checkpoint's file is half written."""
    import torch

    from vlmkernels.train import TrainConfig, train

    torch.set_num_threads(1)
    if die_in_save_after is not None:
        save, count = torch.save, iter(range(die_in_save_after))

        def save_half(state, path):
            save(state, path)
            if next(count, None) is None:
                with open(path, "r+b") as file:
                    file.truncate(path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        torch.save = save_half
    train(kind, TrainConfig(**values))


def start(*arguments):
    process = CONTEXT.Process(target=child, args=arguments)
    process.start()
    return process


def steps_written(run):
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
@pytest.mark.parametrize("kind", ["clip", "simvlm"])
def test_killed_run_resumes_bit_for_bit(tmp_path, kind):
    CONTEXT.set_forkserver_preload(["vlmkernels.train.loop"])
    rng = random.Random(20)
    table = write_pairs(tmp_path)
    values = tiny_values(table, tmp_path / "whole", kind, epochs=20, save_every=4)  # 60 steps
    whole = start(kind, values)
    whole.join()
    assert whole.exitcode == 0

    run = tmp_path / "killed"
    values = {**values, "out": str(run), "resume": "auto"}

    def kill_after(step):
        process = start(kind, values)
        while steps_written(run) < step and process.is_alive():
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        assert process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL

    kill_after(rng.randrange(2, 10))
    in_save = start(kind, values, rng.randrange(1, 3))
    in_save.join()
    assert in_save.exitcode == -signal.SIGKILL
    (half,) = (run / "checkpoints").glob(".partial-*")
    saved = [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)]
    assert int(half.name[-8:]) == saved[-1] + 4  # the half-written one is not among the checkpoints
    kill_after(rng.randrange(saved[-1] + 1, 40))
    assert not half.exists()
    assert not (run / "final").exists()
    assert steps_written(run) < 60
    last = start(kind, values)
    last.join()
    assert last.exitcode == 0
    assert [line["step"] for line in metrics(run)] == list(range(1, 61))
    assert_same_run(tmp_path / "whole", run)
    assert not list(run.rglob(".partial-*"))
