"""A simulator of PTX: what the compilers made for sm_80, executed on the CPU.

`case.run(simulated)` compiles every launch of a case as Triton would, runs all blocks of its grid on the
tensors, and finds accesses outside the views of the arguments, misaligned ones, reads of memory that nothing
wrote, races between warps and between blocks, reads of what cp.async still brings, and barriers and
collectives that not all threads reach. `run()` takes PTX of any origin.
"""

import contextlib
import functools
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from ..launches import SM80, Launch, intercepting
from ..sanitizer import Sanitizer
from .counters import Counters
from .machine import Machine
from .memory import Fault, Global, Moment
from .parse import Program, Unsupported, parse

__all__ = ["Counters", "Fault", "Program", "Unsupported", "bound", "counted", "parse", "run", "simulated"]
Report = Callable[[Launch, Counters], None]
_PACK = {"i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}
_parsed = functools.lru_cache(maxsize=64)(parse)


def run(
    program: Program,
    grid: tuple[int, int, int],
    threads: int,
    parameters: Sequence[bytes],
    tensors: Mapping[str, torch.Tensor],
    *,
    shared_bytes: int = 0,
    fresh: Mapping[int, np.ndarray] | None = None,
    counters: Counters | None = None,
) -> None:
    """Run a kernel on CPU tensors, whose addresses are among its `parameters`.

    `fresh`: for storages made by torch.empty, by address, which bytes were written; updated here.
    """
    moment = Moment()
    memory = Global(tensors, fresh or {}, moment)
    machine = Machine(program, threads, grid, parameters, memory, moment, shared_bytes, counters)
    machine.run()
    for storage in memory.storages:
        storage.publish()


def bound(launch: Launch, program: Program) -> list[bytes]:
    """The parameters of a Triton kernel: its arguments but the constants, and two pointers to scratch."""
    source, _ = launch.source(SM80)
    values = []
    for name, kind in source.signature.items():
        if kind == "constexpr":
            continue
        value = launch.arguments[name]
        if kind.startswith("*"):
            values.append(struct.pack("<Q", value.data_ptr() if isinstance(value, torch.Tensor) else value))
        else:
            values.append(struct.pack(_PACK[kind], value))
    if len(program.parameters) != len(values) + 2:
        raise Unsupported(f"{len(program.parameters)} parameters of {launch.name}, {len(values)} arguments")
    return [*values, bytes(8), bytes(8)]


@contextlib.contextmanager
def simulated(report: Report | None = None) -> Iterator[None]:
    """Launches of Triton kernels run in the simulator; `report` takes each launch and its counts."""
    memory = Sanitizer()  # knows what torch.empty made and what was written since

    def handle(launch: Launch) -> None:
        binary = launch.compiled()
        program = _parsed(binary.asm["ptx"])
        counters = Counters() if report else None
        fresh = {at: written for at, (_, written) in memory.fresh.items()}
        with torch.utils._python_dispatch._disable_current_modes():
            run(
                program,
                launch.grid,
                32 * binary.metadata.num_warps,
                bound(launch, program),
                launch.tensors,
                shared_bytes=binary.metadata.shared,
                fresh=fresh,
                counters=counters,
            )
        if report is not None:
            report(launch, counters)

    with intercepting(handle), memory:
        yield


def counted(reports: list[tuple[Launch, Counters]]) -> Callable[[], contextlib.AbstractContextManager]:
    """`simulated` as an executor that adds each launch and its counts to `reports`."""
    return lambda: simulated(lambda launch, counters: reports.append((launch, counters)))
