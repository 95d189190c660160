"""How a number is measured: pairs of calls for time, a fresh process for memory, two limits for the machine.

`python -m benchmarks.measure CASE [--quick] [--threads N] [--device D]` is the fresh process: it prints, as
JSON, the peak extra memory of every implementation of one case.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MIN_SAMPLE = 0.01  # seconds: shorter calls are repeated within a sample
MAX_SAMPLE = 0.2  # seconds after which no call is repeated, regardless of its first timing
TILES = (
    (64, 256, 512),
    (128, 256, 512),
    (128, 256, 256),
)  # rows, columns, depth whose best rate is the limit
COPY_BYTES = 1 << 28
T = TypeVar("T")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    p20, median, p80 = np.percentile(np.asarray(values, dtype=np.float64), (20, 50, 80))
    return {"median": float(median), "p20": float(p20), "p80": float(p80)}


def step(
    fn: Callable[..., Tensor], tensors: Mapping[str, Tensor], dout: Tensor | None, backward: bool
) -> tuple:
    """One call of `fn`: its result, then the gradients of the tensors that require one."""
    if not backward:
        with torch.no_grad():
            return (fn(**tensors),)
    out = fn(**tensors)
    return (out, *torch.autograd.grad(out, [t for t in tensors.values() if t.requires_grad], dout))


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def seconds_per_call(
    fn: Callable[[], Any],
    repeats: int,
    sync: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds per call over up to `repeats` calls."""
    sync()
    start = clock()
    done = 0
    while done < repeats and clock() - start <= MAX_SAMPLE:
        fn()
        done += 1
    sync()
    return (clock() - start) / done


def pairs(
    ours: T,
    theirs: Mapping[str, T],
    *,
    seconds: float,
    rounds: tuple[int, int] = (5, 31),
    sync: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    sample: Callable[[T, int], float] | None = None,
) -> tuple[list[float], dict[str, list[tuple[float, float]]]]:
    """Seconds per call of ours, and for each of theirs its pairs (ours, theirs), one call after the other.

    Every round visits all of theirs; who goes first in a pair alternates from round to round. There are at
    least `rounds[0]` and at most `rounds[1]` rounds; from the least on none starts after `seconds`. The
    callables are warm. `sample(fn, repeats)`, where given, is what times one of them.
    """
    sample = sample or partial(seconds_per_call, sync=sync, clock=clock)

    def repeats_of(fn: T) -> int:
        return max(1, min(1000, round(MIN_SAMPLE / max(sample(fn, 1), 1e-7)))) if rounds[0] > 1 else 1

    our_repeats, their_repeats = repeats_of(ours), {name: repeats_of(fn) for name, fn in theirs.items()}
    times: list[float] = []
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in theirs}
    start = clock()
    for turn in range(rounds[1]):
        if turn >= rounds[0] and clock() - start > seconds:
            break
        if not theirs:
            times.append(sample(ours, our_repeats))
        for name, fn in theirs.items():
            order = [(ours, our_repeats), (fn, their_repeats[name])]
            first, second = (sample(*each) for each in (order if turn % 2 == 0 else order[::-1]))
            pair = (first, second) if turn % 2 == 0 else (second, first)
            taken[name].append(pair)
            times.append(pair[0])
    return times, taken


def tensor_bytes(tensors: Iterable[Any], known: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of `tensors` that are not in `known`."""
    seen = {t.untyped_storage().data_ptr() for t in known}
    total = 0
    for t in tensors:
        if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in seen:
            seen.add(t.untyped_storage().data_ptr())
            total += t.untyped_storage().nbytes()
    return total


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def peak_extra(fn: Callable[[], tuple], known: Sequence[Tensor], device: str = "cpu") -> int:
    """Bytes that one call of `fn` needs at its peak, above `known` (its inputs) and the tensors it returns.

    On the CPU it is the growth of the process's resident set with any allocator: the high-water mark of the
    system (VmHWM, reset through /proc/self/clear_refs) counts heap, mmap and thread stacks alike. Free
    pages that the allocator has kept are given back first, or they would hide what the call takes; run it
    in a process with a fixed MALLOC_MMAP_THRESHOLD_ (`memory_of` does). On other devices it is torch's
    allocator statistics.
    """
    gc.collect()
    if device != "cpu":
        module = torch.get_device_module(device)
        synchronize(device)
        module.empty_cache()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        results = fn()
        synchronize(device)
        return max(0, module.max_memory_allocated() - before - tensor_bytes(results, known))
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    results = fn()
    return max(0, _status("VmHWM") - before - tensor_bytes(results, known))


def memory_of(
    case_id: str, *, quick: bool, threads: int, device: str, timeout: float = 900
) -> dict[str, Any]:
    """Implementation -> peak extra bytes, or why there is no number; from a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.measure",
        case_id,
        "--threads",
        str(threads),
        "--device",
        device,
    ]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads)}
    try:
        done = subprocess.run(
            command + ["--quick"] * quick, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return {"": f"no answer within {timeout:.0f} s"}
    if done.returncode:
        return {"": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def _memory_in_this_process(case: Any, device: str) -> dict[str, Any]:
    """A small call first loads code and starts threads; a compiled function needs its own size for it."""
    tensors, dout = case.inputs(device)
    known = [t for t in (*tensors.values(), dout) if t is not None]
    found: dict[str, Any] = {}
    for name, compiled, make in case.implementations():
        try:
            fn = make()
            step(fn, *((tensors, dout) if compiled else case.inputs(device, small=True)), case.backward)
            found[name] = peak_extra(lambda fn=fn: step(fn, tensors, dout, case.backward), known, device)
        except Exception as error:  # any failure of a peer is the reason given in its row
            found[name] = reason(error)
    return found


def reason(error: BaseException) -> str:
    """An exception as one line of a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200].rstrip(": ")


def limits(device: str, dtypes: Iterable[torch.dtype], *, quick: bool = False) -> dict[str, dict[str, Any]]:
    """FLOP/s of tile products per dtype ("float32", ...) and bytes/s of a copy ("copy"), at their best."""
    found: dict[str, dict[str, Any]] = {}
    for dtype in dtypes:
        name = str(dtype).removeprefix("torch.")
        found[name] = _tile_products(name, quick) if device == "cpu" else {}
        # Without an instruction for 16-bit products kernels multiply in float32, and torch.mm takes a minute
        if not found[name] and device == "cpu" and dtype.itemsize == 2:
            wide = _tile_products("float32", quick)
            found[name] = wide and {**wide, "how": f"{wide['how']} in float32"}
        if not found[name]:
            found[name] = _matrix_products(dtype, device, quick)
    size = COPY_BYTES >> 4 if quick else COPY_BYTES
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(_seconds(lambda: target.copy_(source), device) for _ in range(3 if quick else 10))
    found["copy"] = {"rate": 2 * size / best, "how": f"torch copy of {size >> 20} MiB, bytes read + written"}
    return found


def _tile_products(dtype: str, quick: bool) -> dict[str, Any]:
    from vlmkernels import _native

    measure = getattr(_native.extension, "tile_product_rate", None)
    if measure is None:
        return {}
    rates = {
        tile: max(measure(dtype, *tile, 1 if quick else 4) for _ in range(1 if quick else 5))
        for tile in TILES
    }
    best = max(rates, key=lambda tile: rates[tile])
    if not rates[best]:
        return {}
    return {"rate": rates[best] * 1e9, "how": "tile products of {}x{}x{}".format(*best)}


def _matrix_products(dtype: torch.dtype, device: str, quick: bool) -> dict[str, Any]:
    """torch.mm where the extension's tile products are missing: a lower bound of the limit."""
    edge = 256 if quick else 2048 if device == "cpu" else 8192
    a, b = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    best = min(_seconds(lambda: a @ b, device) for _ in range(5))
    return {
        "rate": 2 * edge**3 / best,
        "how": f"torch.mm of {edge}x{edge}x{edge}, a stand-in for tile products",
    }


def _seconds(fn: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    fn()
    synchronize(device)
    return time.perf_counter() - start


def better(a: dict[str, dict[str, Any]], b: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of two measurements of the limits the higher ones."""
    both = {name: [each[name] for each in (a, b) if name in each] for name in a | b}
    return {name: max(found, key=lambda limit: limit["rate"]) for name, found in both.items()}


def main() -> None:
    from benchmarks import cases

    parser = argparse.ArgumentParser(
        description="Peak extra memory of every implementation of one case, as JSON."
    )
    parser.add_argument("case", help="op/name, as `python -m benchmarks.run --list` prints it")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    case = next(c for c in cases.all_cases(quick=args.quick, device=args.device) if c.id == args.case)
    print(json.dumps(_memory_in_this_process(case, args.device)))


if __name__ == "__main__":
    main()
