"""Times of one workload, ours and its peers' in turn, each after the caches were flushed.

Two times are taken of every call: as PyTorch makes it, and of only its kernels, without the host between
them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.gpu.cards import Card
from benchmarks.gpu.predict import estimate
from benchmarks.gpu.workload import TRAINING, TYPES, Workload
from benchmarks.gpu.workloads import workloads
from benchmarks.run import disagreement

OURS = "vlmkernels"
FLUSHED = 1 << 28  # bytes written before each call, more than the size of any cache
KERNEL_SECONDS = 0.5  # of rounds for the kernels of one implementation


class Timer(Protocol):
    def __call__(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""

    def kernels(self, call: Callable[[], Any]) -> dict[str, Any]:
        """`seconds` of its kernels alone and `how` they were told apart, or `why_not`."""


class HostTimer:
    def __call__(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def kernels(self, call: Callable[[], Any]) -> dict[str, Any]:
        return {"why_not": "no GPU"}


class EventTimer:
    """Between two events on the stream; while the flush runs the host gets ahead with the launches."""

    def __init__(self, device: str):
        self.cache = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def kernels(self, call: Callable[[], Any]) -> dict[str, Any]:
        """One launch of a graph where the call can be captured, else the sum over the profiler's kernels."""
        try:
            replay, results = captured(call)
        except Exception as error:  # any reason why the call cannot be captured
            taken = [self._profiled(call) for _ in range(5)]
            return {"seconds": measure.spread(taken), "how": "profiler", "no_graph": measure.reason(error)}
        [taken] = rounds_of({"": replay}, self, seconds=KERNEL_SECONDS, rounds=(5, 30)).values()
        del results  # what the graph writes to
        return {"seconds": measure.spread(taken), "how": "CUDA graph"}

    def _profiled(self, call: Callable[[], Any]) -> float:
        self.cache.zero_()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            call()
            torch.cuda.synchronize()
        return sum(on_device(seen.events())) / 1e6


def on_device(events: Iterable[Any]) -> list[float]:
    """Microseconds of kernels, copies and fills; named ranges, which contain them, are skipped."""
    cuda = torch.autograd.DeviceType.CUDA
    return [e.time_range.elapsed_us() for e in events if e.device_type == cuda and not e.is_user_annotation]


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What replays the call as one CUDA graph, and the results that it writes to."""
    graph, here, side = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(here)
    with torch.cuda.stream(side):
        for _ in range(2):  # libraries set themselves up for a stream
            call()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a graph has memory of its own
        graph.capture_begin()
        try:
            results = call()
        except BaseException:
            with contextlib.suppress(RuntimeError):  # that the capture failed, which is known
                graph.capture_end()
            raise
        graph.capture_end()
    here.wait_stream(side)
    return graph.replay, results


def rounds_of(
    calls: Mapping[str, Callable[[], Any]],
    timer: Callable[[Callable[[], Any]], float],
    *,
    seconds: float,
    rounds: tuple[int, int],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Every round times all calls once, and each time another one begins."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    names, start = list(calls), clock()
    for turn in range(rounds[1]):
        if turn >= rounds[0] and clock() - start > seconds:
            break
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            taken[name].append(timer(calls[name]))
    return taken


class Settings(NamedTuple):
    device: str
    quick: bool
    compiled: bool  # whether peers are compiled
    seconds: float  # of rounds
    peers: bool = True

    def ours_alone(self) -> Settings:
        return self._replace(compiled=False, peers=False)


@functools.cache
def timer_for(device: str) -> Timer:
    return HostTimer() if device == "cpu" else EventTimer(device)


def measure_named(task: tuple[str, str], settings: Settings) -> dict[str, Any]:
    """The times of the workload of this name in a direction."""
    name, direction = task
    declared = workloads(quick=settings.quick, device=settings.device)
    return measure_row(next(w for w in declared if w.name == name), direction, settings)


def measure_row(
    workload: Workload, direction: str, settings: Settings, timer: Timer | None = None
) -> dict[str, Any]:
    """Ours and the peers; one that is absent, fails or disagrees has `why_not`."""
    timer = timer or timer_for(settings.device)
    with workload.precision():
        tensors = workload.tensors(settings.device)
        with torch.no_grad():
            expected = workload.ours(**tensors)
        dout = torch.randn_like(expected) if expected.dim() else None
        if settings.compiled:
            torch.compiler.reset()

        def call_of(fn: Callable[..., Tensor]) -> Callable[[], Any]:
            return partial(measure.step, fn, tensors, dout, direction == TRAINING)

        calls = {OURS: call_of(workload.ours)}
        calls[OURS]()
        why_not = {}
        for peer in workload.peers if settings.peers else ():
            if peer.compiled and not settings.compiled:
                why_not[peer.name] = "not compiled in this run"
                continue
            try:
                call = call_of(peer.function())
                result = call()[0]
                rounded = torch.bfloat16 if workload.type == "tf32" else TYPES[workload.type]
                if wrong := disagreement(expected, result, rounded):
                    raise ArithmeticError(wrong)
                call()
                calls[peer.name] = call
            except Exception as error:  # any failure of a peer is the reason given in its row
                why_not[peer.name] = measure.reason(error)
                if not isinstance(error, ImportError):
                    free(settings.device)
        rounds = (3, 3) if settings.quick else (10, 100)
        taken = rounds_of(calls, timer, seconds=settings.seconds, rounds=rounds)
        kernels = {name: _kernels(timer, call) for name, call in calls.items()}
    free(settings.device)
    ours = taken.pop(OURS)
    rows = [
        {
            "name": name,
            "seconds": measure.spread(theirs),
            "ratio": measure.spread([b / a for a, b in zip(ours, theirs, strict=True)]),
            "kernels": kernels[name],
        }
        for name, theirs in taken.items()
    ] + [{"name": name, "why_not": why} for name, why in why_not.items()]
    return {
        "rounds": len(ours),
        "seconds": measure.spread(ours),
        "kernels": kernels[OURS],
        "peers": rows,
    }


def _kernels(timer: Timer, call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return timer.kernels(call)
    except Exception as error:  # the time of the call itself is known and stays
        return {"why_not": measure.reason(error)}


def compare(row: dict[str, Any], predictions: dict[str, Any], card: Card | None) -> None:
    """Add the prediction at the card's rates and what is measured over it, or why there is none."""
    key = ("op", "form", "type", "direction", "sizes")
    found = next((x for x in predictions["entries"] if all(x[k] == row[k] for k in key)), None)
    if card is None:
        row["no_prediction"] = "the device is none of the cards"
    elif found is None or card.name not in found["cards"]:
        row["no_prediction"] = "not among the stored predictions"
    else:
        row["predicted_us"] = estimate(found["cards"][card.name], card)["us"]
        row["predicted_at"] = "measured ceilings" if card.ceilings else "published rates"
        measured = row["kernels"].get("seconds", row["seconds"])
        row["of_predicted"] = measured["median"] * 1e6 / row["predicted_us"]


def free(device: str) -> None:
    """Frees the memory of a call that failed or is over."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
