import collections
import math
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

torch.set_num_threads(min(torch.get_num_threads(), 2))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background jobs of a shell
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # or the processes of tests would ignore it as well


@pytest.fixture(autouse=True)
def _seed_and_poison():
    """A fixed seed; uninitialised memory holds NaN (integers: their maximum): an unwritten output is seen."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def for_thread_counts():
    """The results of a function with 1, 2 and 3 threads."""
    threads = torch.get_num_threads()

    def results(fn) -> list:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(fn())
        return found

    yield results
    torch.set_num_threads(threads)


@pytest.fixture
def products():
    """Chooses who computes the products of linear layers during a test: "own" or "torch"."""
    from vlmkernels import _calibration

    yield lambda who: _calibration.apply(_calibration.all_products(who))
    _calibration.apply(_calibration.CHOICE)


@pytest.fixture
def busy_threads():
    """Counts the threads of this process that work while a function is repeated for half a second."""

    def count(fn) -> int:
        def ticks() -> dict[str, int]:
            stats = {
                path: path.read_text().rsplit(")", 1)[1].split()
                for path in Path("/proc/self/task").glob("*/stat")
            }
            return {path.parent.name: int(stat[11]) + int(stat[12]) for path, stat in stats.items()}

        if not Path("/proc/self/task").exists():
            pytest.skip("thread times are read from /proc")
        torch.set_num_threads(2)
        fn()
        before, start = ticks(), time.perf_counter()
        while time.perf_counter() - start < 0.5:
            fn()
        return sum(now > before.get(thread, 0) for thread, now in ticks().items())

    threads = torch.get_num_threads()
    yield count
    torch.set_num_threads(threads)


@pytest.fixture
def peak_memory():
    """Bytes that `run()`, defined by a script, holds at its peak beyond those before, in a fresh process.

    What is freed goes back to the system: what an allocator keeps depends on the order of the calls.
    """

    def measure(script: str) -> int:
        code = f"""
import torch, vlmkernels
torch.set_num_threads(1)
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
def held():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) * 1024
small = torch.randn(8, 64, requires_grad=True)
vlmkernels.info_nce(small, small, 1.0).backward()
vlmkernels.sigmoid_loss(small, small, 1.0, 0.0).backward()
{script}
before = held()
run()
print(peak() - before)
"""
        if not Path("/proc/self/status").exists():
            pytest.skip("peak memory is read from /proc")
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return int(done.stdout)

    return measure


def pytest_report_header(config):
    import vlmkernels

    facts = str(vlmkernels.info()).splitlines()
    photos = os.environ.get("VLMKERNELS_PHOTOS", "not set: tests on photographs are skipped")
    return [line for line in facts if line and not line.startswith(("torch", "python"))] + [
        f"photographs: {photos}"
    ]


@pytest.fixture(scope="module")
def one_thread():
    """Tiny models train fastest in one thread: `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="one in N of the cases of each test")
    parser.addoption("--kernels-alone", action="store_true", help="without the tests marked as `once`")


def _left_out(items, share):
    """Of the cases of a test one in `share` stays, of one that is marked `sampled(n)` one in n of them.

    At least one does; they are drawn by their names.
    """
    cases = collections.defaultdict(list)
    for item in items:
        if "slow" not in item.keywords:
            mark = item.get_closest_marker("sampled")
            cases[item.nodeid.partition("[")[0], share * (mark.args[0] if mark else 1)].append(item)
    for (_, n), drawn in cases.items():
        drawn.sort(key=lambda item: zlib.crc32(item.nodeid.encode()))
        yield from drawn[math.ceil(len(drawn) / n) :]


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"):
        return
    # Nothing is left out for good: `make test` has a part of each exhaustive run, `make test-all` the whole.
    skip = pytest.mark.skip(reason="slow: run by `make test-all` (pytest -m 'slow or not slow')")
    for item in [
        *(item for item in items if "slow" in item.keywords),
        *_left_out(items, config.getoption("one_in")),
    ]:
        item.add_marker(skip)
    if config.getoption("kernels_alone"):
        other = pytest.mark.skip(reason="once: on one instruction set here, on all by `make test-all`")
        for item in items:
            if "once" in item.keywords:
                item.add_marker(other)
