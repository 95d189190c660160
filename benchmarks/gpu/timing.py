"""Times of one workload, ours and its peers' in turn, each after the caches were flushed."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.gpu.predict import FORWARD, TRAINING
from benchmarks.gpu.workloads import TYPES, Workload
from benchmarks.run import disagreement

OURS = "vlmkernels"
FLUSHED = 1 << 28  # bytes written before each call, more than any cache holds


class Timer(Protocol):
    def __call__(self, fn: Callable[[], Any]) -> float:
        """Seconds of one call."""


def host_timer(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


class EventTimer:
    """Between two events on the stream; while the flush runs the host gets ahead with the launches."""

    def __init__(self, device: str):
        self.cache = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def __call__(self, fn: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.cache.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def rounds_of(
    calls: Mapping[str, Callable[[], Any]],
    timer: Timer,
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


def _call(fn: Callable[..., Tensor], tensors: Mapping[str, Tensor], dout: Tensor | None, direction: str):
    return measure.step(fn, tensors, dout, direction == TRAINING)


def measure_workload(
    workload: Workload, device: str, timer: Timer, *, seconds: float, quick: bool
) -> list[dict[str, Any]]:
    """An entry for each direction; a peer that is absent, fails or disagrees has `why_not`."""
    entries = []
    with workload.precision():
        tensors = workload.tensors(device)
        with torch.no_grad():
            expected = workload.ours(**tensors)
        dout = torch.randn_like(expected) if expected.dim() else None
        for direction in (FORWARD, TRAINING):
            if not quick:
                torch.compiler.reset()
            calls: dict[str, Callable[[], Any]] = {
                OURS: partial(_call, workload.ours, tensors, dout, direction)
            }
            calls[OURS]()
            why_not = {}
            for peer in workload.peers:
                if quick and peer.compiled:
                    why_not[peer.name] = "not compiled with --quick"
                    continue
                try:
                    call = partial(_call, peer.function(), tensors, dout, direction)
                    result = call()[0]
                    rounded = torch.bfloat16 if workload.type == "tf32" else TYPES[workload.type]
                    if wrong := disagreement(expected, result, rounded):
                        raise ArithmeticError(wrong)
                    call()
                    calls[peer.name] = call
                except Exception as error:  # whatever stops a peer becomes the reason in its row
                    why_not[peer.name] = measure.reason(error)
                    if not isinstance(error, ImportError):
                        gc.collect()  # what it allocated before it failed
            rounds = (3, 3) if quick else (10, 100)
            taken = rounds_of(calls, timer, seconds=seconds, rounds=rounds)
            ours = taken.pop(OURS)
            rows = [
                {
                    "name": name,
                    "seconds": measure.spread(theirs),
                    "ratio": measure.spread([b / a for a, b in zip(ours, theirs, strict=True)]),
                }
                for name, theirs in taken.items()
            ] + [{"name": name, "why_not": why} for name, why in why_not.items()]
            entries.append(
                {
                    "name": f"{workload.form}, {workload.type}, {direction}",
                    "op": workload.op,
                    "form": workload.form,
                    "type": workload.type,
                    "direction": direction,
                    "sizes": dict(workload.sizes),
                    "rounds": len(ours),
                    "seconds": measure.spread(ours),
                    "peers": rows,
                }
            )
    return entries


def compare(entry: dict[str, Any], predictions: dict[str, Any], card: str | None) -> None:
    """Add the prediction and the ratio of measured to predicted, or why there is none."""
    key = ("op", "form", "type", "direction", "sizes")
    found = next((x for x in predictions["entries"] if all(x[k] == entry[k] for k in key)), None)
    if card is None:
        entry["no_prediction"] = "the device is none of the cards"
    elif found is None or card not in found["cards"]:
        entry["no_prediction"] = "not among the stored predictions"
    else:
        entry["predicted_us"] = found["cards"][card]["us"]
        entry["of_predicted"] = entry["seconds"]["median"] * 1e6 / entry["predicted_us"]
