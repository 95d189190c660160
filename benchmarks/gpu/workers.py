"""Tasks in processes of their own: one that dies, hangs or loses its device costs only its own task."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import connection
from typing import Any, NamedTuple, TypeVar

from benchmarks.measure import ROOT, reason

T = TypeVar("T")
START = 60.0  # seconds that a process may take to begin its first task
PARENT_DEATH = 1  # PR_SET_PDEATHSIG of Linux


class Failure(NamedTuple):
    """In place of the result of a task."""

    why: str


class Deadline:
    """When all work has to be over; never, without `minutes`."""

    def __init__(self, minutes: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.at = clock() + 60 * minutes if minutes is not None else float("inf")

    def left(self) -> float:
        """Seconds, not below 0."""
        return max(0.0, self.at - self.clock())


def attempt(function: Callable[[T], Any], task: T) -> Any:
    try:
        return function(task)
    except Exception as error:  # an error of a kernel or a compiler is the result of its task
        return Failure(reason(error))


def _usable() -> bool:
    """Whether the device of this process still works: after some faults every call to it fails."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return True
    return not isinstance(attempt(torch.cuda.synchronize, None), Failure)


def _end_with_parent() -> None:
    """Not even a killed run leaves a task on the device, where it would slow the next run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(pipe: connection.Connection, function: Callable[[T], Any]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    usable = True
    while usable:
        try:
            task = pipe.recv()
        except EOFError:  # nothing is left to do, or the parent has ended
            return
        result = attempt(function, task)
        usable = _usable()
        pipe.send((result, usable))


class _Worker:
    def __init__(self, function: Callable[[T], Any]):
        context = multiprocessing.get_context("spawn")  # a process that has used CUDA cannot fork
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()

    def result(self) -> tuple[Any, bool]:
        """That of its task, and whether it can have another."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return Failure(f"its process ended with status {self.end()}"), False

    def end(self) -> int | None:
        self.pipe.close()
        self.process.kill()
        self.process.join()
        return self.process.exitcode


def late_after(seconds: float) -> Failure:
    return Failure(f"no end within {seconds:.0f} s")


def outcomes(
    function: Callable[[T], Any],
    tasks: Iterable[T],
    *,
    workers: int,
    limit: float,
    deadline: Deadline,
) -> Iterator[tuple[T, Any]]:
    """Each task with its result or its `Failure`, as they end, until the deadline.

    A task that takes longer than `limit` seconds fails, and its process is ended.
    """
    waiting = list(tasks)[::-1]
    idle: list[_Worker] = []
    busy: dict[connection.Connection, tuple[_Worker, T, float]] = {}
    try:
        while (waiting or busy) and deadline.left():
            while waiting and len(busy) < workers:
                worker, start = (idle.pop(), 0.0) if idle else (_Worker(function), START)
                task = waiting.pop()
                worker.pipe.send(task)
                busy[worker.pipe] = worker, task, deadline.clock() + start + limit
            first = min(end for _, _, end in busy.values())
            ready = connection.wait(list(busy), min(deadline.left(), max(0.0, first - deadline.clock())))
            late = [pipe for pipe, (_, _, end) in busy.items() if end <= deadline.clock()]
            for pipe in [pipe for pipe in busy if pipe in ready or pipe in late]:
                worker, task, _ = busy.pop(pipe)
                result, usable = worker.result() if pipe in ready else (late_after(limit), False)
                if usable:
                    idle.append(worker)
                else:
                    worker.end()
                yield task, result
    finally:
        for worker in [*idle, *(worker for worker, _, _ in busy.values())]:
            worker.end()


def run_limited(
    command: Sequence[str], seconds: float, env: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit status, None past the limit, and the output of a command that ends with all its children.

    It ends with this process too.
    """
    die = partial(ctypes.CDLL(None).prctl, PARENT_DEATH, int(signal.SIGKILL))
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=die,
        )  # fmt: skip
        try:
            status: int | None = process.wait(min(seconds, threading.TIMEOUT_MAX))
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return status, output.read().decode(errors="replace")
