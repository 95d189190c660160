"""Calls in forked children: one that dies names the call that it died of."""

import dataclasses
import faulthandler
import mmap
import os
import resource
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Iterator

import torch

BATCH = 200
PATIENCE = 60  # seconds without a finished call, after which a child is stuck
MEMORY = 4 * 2**30  # that a child may take beyond what it starts with: sizes out of range must be refused
_STATE = struct.Struct("qqq")  # the seed at work, results, refusals


class Wrong(Exception):
    """A call that ended in another way than it may."""


@dataclasses.dataclass
class Fault:
    first: int  # the seeds of the calls that show it
    last: int
    what: str


@dataclasses.dataclass
class Report:
    results: int = 0
    refusals: int = 0
    faults: list[Fault] = dataclasses.field(default_factory=list)

    @property
    def calls(self) -> int:
        return self.results + self.refusals + len(self.faults)


# One call from a seed: whether it gave a result (or refused its arguments); Wrong where it did neither.
Call = Callable[[int], bool]


def run(call: Call, batches: Iterator[range]) -> Report:
    """All calls, each batch in a child of its own; after a fault the rest of its batch follows in another."""
    report = Report()
    for seeds in batches:
        while seeds:
            last, message = _run(call, seeds, report)
            if message is None:
                break
            first = last if message.wrong else _first_of(call, seeds.start, last)
            report.faults.append(Fault(first, last, message.text))
            seeds = range(last + 1, seeds.stop)
    return report


@dataclasses.dataclass
class _End:
    text: str
    wrong: bool


def _run(call: Call, seeds: range, report: Report) -> tuple[int, _End | None]:
    """The last seed that the child came to, and how it ended if not as it should."""
    shared = mmap.mmap(-1, mmap.PAGESIZE + 2**16)
    _STATE.pack_into(shared, 0, seeds.start, 0, 0)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _work(call, seeds, shared)
    ended = _wait(child, shared)
    seed, results, refusals = _STATE.unpack_from(shared)
    report.results += results
    report.refusals += refusals
    text = bytes(shared[mmap.PAGESIZE :]).rstrip(b"\0").decode(errors="replace")
    shared.close()
    if text:
        return seed, _End(text, wrong=True)
    return seed, None if ended is None else _End(ended, wrong=False)


def _work(call: Call, seeds: range, shared: mmap.mmap) -> None:
    """In the child, which never returns."""
    torch.set_num_threads(1)  # the threads of the parent are not here
    faulthandler.disable()  # the parent tells
    _limit_memory()
    results = refusals = 0
    for seed in seeds:
        _STATE.pack_into(shared, 0, seed, results, refusals)
        try:
            if call(seed):
                results += 1
            else:
                refusals += 1
        except BaseException as error:
            text = str(error) if isinstance(error, Wrong) else traceback.format_exc()
            shared.seek(mmap.PAGESIZE)
            shared.write(text.encode(errors="replace")[: 2**16])
            os._exit(0)
    _STATE.pack_into(shared, 0, seeds.stop, results, refusals)
    os._exit(0)


def _limit_memory() -> None:
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _wait(child: int, shared: mmap.mmap) -> str | None:
    """What ended the child, None if it came to its end."""
    handle = os.pidfd_open(child)
    at = None
    while not select.select([handle], [], [], PATIENCE)[0]:
        if at == (at := _STATE.unpack_from(shared)):
            os.kill(child, signal.SIGKILL)
    os.close(handle)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return name if name != "SIGKILL" else "SIGKILL: stuck, or out of memory"
    code = os.waitstatus_to_exitcode(status)
    return None if code == 0 else f"exit status {code}"


def _first_of(call: Call, first: int, last: int) -> int:
    """The latest seed from which on the calls up to `last` still end their child."""

    def ends(start: int) -> bool:
        return _run(call, range(start, last + 1), Report())[1] is not None

    if ends(last):
        return last
    low, high = first, last  # calls from `low` on end it, from `high` on they do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if ends(middle) else (low, middle)
    return low
