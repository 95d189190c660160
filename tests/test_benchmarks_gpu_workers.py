"""Tasks in processes of their own, and commands with a limit."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.gpu.workers import Deadline, Failure, attempt, outcomes, run_limited


def in_this_process(function, tasks, *, deadline, **_):
    """`outcomes` for tests that replace what a task does, or have no seconds for a process to start."""
    for task in tasks:
        if not deadline.left():
            return
        yield task, attempt(function, task)


def work(task, folder=None):
    """One of: a number to be doubled, or what goes wrong."""
    if folder is not None:
        (folder / str(os.getpid())).touch()
    if task == "raises":
        raise ValueError("not this one\nsecond line")
    if task == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "hangs":
        time.sleep(600)
    return 2 * task


def test_a_task_that_raises_dies_or_hangs_costs_itself_alone(tmp_path):
    tasks = [1, "raises", "dies", 2, "hangs", 3]
    function = partial(work, folder=tmp_path)
    found = dict(outcomes(function, tasks, workers=1, limit=10, deadline=Deadline()))
    assert [found[number] for number in (1, 2, 3)] == [2, 4, 6]
    assert found["raises"] == Failure("ValueError: not this one")
    assert found["dies"] == Failure(f"its process ended with status {-signal.SIGKILL}")
    assert found["hangs"] == Failure("no end within 10 s")
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert len(processes) == 3  # another after the one that died and the one that hung
    assert not any(os.path.exists(f"/proc/{process}") for process in processes)


@pytest.mark.slow
def test_tasks_run_beside_each_other_until_the_deadline(tmp_path):
    function = partial(work, folder=tmp_path)
    deadline, found = Deadline(minutes=10), {}
    for task, result in outcomes(function, ["hangs", 1, 2, "hangs"], workers=2, limit=500, deadline=deadline):
        found[task] = result
        if len(found) == 2:
            deadline.at = deadline.clock() + 0.5
    assert found == {1: 2, 2: 4}
    assert not any(os.path.exists(f"/proc/{path.name}") for path in tmp_path.iterdir())


class Lost:
    """A device of which a task leaves nothing."""

    lost = False

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def synchronize(_=None):
        if Lost.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


def lose(task):
    import torch

    torch.cuda = Lost
    Lost.lost = Lost.lost or task == "loses"
    Lost.synchronize()
    return os.getpid()


@pytest.mark.slow
def test_a_process_that_has_lost_its_device_gets_no_other_task():
    found = dict(outcomes(lose, [1, 2, "loses", 3], workers=1, limit=60, deadline=Deadline()))
    assert found[1] == found[2] != found[3]
    assert "illegal memory access" in found["loses"].why
    assert isinstance(found[3], int)


def test_a_command_past_its_limit_ends_with_its_children():
    script = "import subprocess, sys; sys.stdout.write('begun\\n'); sys.stdout.flush();"
    script += "child = subprocess.Popen(['sleep', '600']); print(child.pid, flush=True); child.wait()"
    status, output = run_limited([sys.executable, "-c", script], seconds=5)
    assert status is None
    begun, child = output.split()
    assert begun == "begun"
    until(lambda: not alive(child))


def alive(process: str) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


HELD = """
from benchmarks.gpu import workers
from tests import test_benchmarks_gpu_workers as here
if __name__ == "__main__":
    {}
"""
HOLDS = {
    "a task": "list(workers.outcomes(here.wait, [{!r}], workers=1, limit=600, deadline=workers.Deadline()))",
    "a command": "workers.run_limited(['sh', '-c', 'echo $$ > {}/pid; exec sleep 600'], 600)",
}


def wait(folder):
    (Path(folder) / "pid").write_text(f"{os.getpid()}\n")
    time.sleep(600)


@pytest.mark.parametrize("kind", HOLDS)
def test_nothing_outlives_a_run_that_is_killed(kind, tmp_path):
    script, told = tmp_path / "held.py", tmp_path / "pid"
    script.write_text(HELD.format(HOLDS[kind].format(str(tmp_path))))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.Popen([sys.executable, str(script)], env=environment)
    until(lambda: told.exists() and told.read_text().endswith("\n"))
    held = told.read_text().strip()
    assert alive(held)
    run.kill()
    run.wait()
    until(lambda: not alive(held))


def until(what, seconds=60):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_command_within_its_limit_gives_status_and_output():
    assert run_limited(["sh", "-c", "echo out; echo err >&2; exit 3"], seconds=float("inf")) == (
        3,
        "out\nerr\n",
    )
