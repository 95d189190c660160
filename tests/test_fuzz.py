"""Random calls with damaged arguments end in a result or an error, and what looks for others sees them."""

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from vlmkernels import ops

from .fuzz import children, memory, public, raw

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="children, page protection and /proc of Linux"
)


def test_every_op_has_arguments():
    """A new op draws its own in tests/fuzz/raw.py, a public one in tests/fuzz/public.py as well."""
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("vlmkernels::")}
    assert {f"vlmkernels::{name}" for name in raw.ARGUMENTS} == registered
    assert set(public.ARGUMENTS) == set(ops.__all__)


def fuzz(*options: str) -> str:
    """In a process without threads, whose children can be forked."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", *options]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


@pytest.mark.parametrize(("kind", "count"), [("raw", 100), ("public", 100)])
@pytest.mark.once
def test_calls_end_in_a_result_or_an_error(kind, count):
    assert f"{count} calls: " in fuzz(kind, "--count", str(count))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["raw", "public"])
def test_calls_for_minutes(kind):
    fuzz(kind, "--minutes", "5", "--seed", str(int(time.time()) * 1000))


@pytest.mark.once
def test_a_call_can_be_repeated():
    assert raw.told(3).startswith("torch.ops.vlmkernels.")
    assert fuzz("raw", "--seed", "3", "--count", "1").startswith(raw.told(3))


DONE = []  # in a child: the calls before


def call(seed: int) -> bool:
    """Ends as its seed says."""
    DONE.append(seed)
    if seed == 5 or (seed == 14 and 11 in DONE):
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == 7:
        raise children.Wrong("no error that may be")
    if seed == 8:
        raise KeyError("of the fuzzer itself")
    if seed == 9:
        os._exit(3)
    return seed % 2 == 0


@pytest.mark.once
def test_faults_are_seen_with_the_calls_that_show_them():
    report = children.run(call, iter([range(10), range(10, 20)]))
    assert [(fault.first, fault.last) for fault in report.faults] == [
        (5, 5),
        (7, 7),
        (8, 8),
        (9, 9),
        (11, 14),
    ]
    texts = [
        "SIGSEGV",
        "no error that may be",
        "KeyError: 'of the fuzzer itself'",
        "exit status 3",
        "SIGSEGV",
    ]
    for fault, text in zip(report.faults, texts, strict=True):
        assert text in fault.what
    assert (report.results, report.refusals, report.calls) == (8, 7, 20)


def test_a_call_without_end_is_seen(monkeypatch):
    monkeypatch.setattr(children, "PATIENCE", 0.2)
    report = children.run(lambda seed: seed == 0 or time.sleep(60), iter([range(2)]))
    assert [(fault.first, fault.what) for fault in report.faults] == [(1, "SIGKILL: stuck, or out of memory")]


@pytest.mark.parametrize(("at_end", "beside"), [(True, 40), (False, -1)])
def test_reading_beside_a_guarded_tensor_ends_the_process(at_end, beside):
    def read(seed: int) -> bool:
        t = memory.Guarded().copy(torch.arange(10.0)[::2], at_end=at_end)
        assert t.tolist() == [0, 2, 4, 6, 8]
        place = (
            beside if seed else (35 if at_end else 0)
        )  # its last number ends 4 bytes before that of the storage
        return ctypes.string_at(t.data_ptr() + place, 1) is not None

    report = children.run(read, iter([range(2)]))
    assert [(fault.first, fault.what) for fault in report.faults] == [(1, "SIGSEGV")]


def test_guarded_tensors_cannot_be_written():
    report = children.run(
        lambda seed: memory.Guarded().copy(torch.ones(3), at_end=True).fill_(2) is not None, iter([range(1)])
    )
    assert [fault.what for fault in report.faults] == ["SIGSEGV"]
