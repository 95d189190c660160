"""Time and memory of the fused loss against other libraries', forward and backward, fp32, interleaved.

`python -m benchmarks.demo_timing N,D ...` is the fresh process that measures memory and prints it as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import cases, measure, run

BASELINES = {
    "open_clip ClipLoss": "open_clip ClipLoss",
    "2 x F.linear_cross_entropy": "two F.linear_cross_entropy",
    "2 x F.linear_cross_entropy, chunked": "two F.linear_cross_entropy, chunked",
}
OURS = "vlmkernels.info_nce"


def loss_case(n: int, d: int) -> cases.Case:
    """The benchmark case of info_nce with N = M = n, D = d and the demo's baselines."""
    declared = (case for case in cases.all_cases() if case.op == "info_nce" and case.headline)
    case = next(case for case in declared if case.dtype == torch.float32)
    kept = tuple(baseline for baseline in case.baselines if baseline.name in BASELINES)
    return replace(case, name=f"N={n} D={d} fp32", sizes={"n": n, "m": n, "d": d}, baselines=kept)


def measure_losses(sizes: Sequence[tuple[int, int]], seconds: float, *, quick: bool) -> list[dict[str, Any]]:
    """For each (N, D) the rows: name, ms (median, p20, p80), ratio to ours, bytes, or why there is none."""
    memory = _memory(sizes)
    tables = []
    for n, d in sizes:
        found = dict(memory.get(f"{n},{d}", memory))
        options: dict[str, Any] = {"seconds": seconds, "quick": quick, "memory": partial(_known, found)}
        entry = run.measure_case(loss_case(n, d), device="cpu", **options)
        rows = [_row(row) for row in (entry["ours"], *entry["baselines"])]
        tables.append({"n": n, "d": d, "rows": rows})
    return tables


def _known(memory: dict[str, Any], case: cases.Case) -> dict[str, Any]:
    return memory


def _row(measured: dict[str, Any]) -> dict[str, Any]:
    ours = measured["name"] == cases.OURS
    row: dict[str, Any] = {"name": OURS if ours else BASELINES[measured["name"]], "ours": ours}
    row["why"] = measured.get("why_not")
    found = measured.get("extra_bytes", "not measured")
    row["bytes"], row["why_no_bytes"] = (None, found) if isinstance(found, str) else (found, None)
    if "seconds" in measured:
        row["ms"] = {key: 1e3 * value for key, value in measured["seconds"].items()}
    if "ratio" in measured:
        row["ratio"] = measured["ratio"]["median"]
    return row


def _memory(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """ "N,D" -> implementation -> bytes or a reason, from a fresh process; "" -> why there is nothing."""
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "benchmarks.demo_timing", *(f"{n},{d}" for n, d in sizes)]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": threads}
    try:
        done = subprocess.run(command, cwd=measure.ROOT, env=env, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return {"": "not measured: no answer within 300 s"}
    if done.returncode:
        return {
            "": "not measured: "
            + (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        }
    return json.loads(done.stdout.splitlines()[-1])


def _memory_here(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for n, d in sizes:
        case = loss_case(n, d)
        tensors, dout = case.inputs("cpu")
        known = [t for t in (*tensors.values(), dout) if t is not None]
        rows: dict[str, Any] = {}
        for name, _, make in case.implementations():
            try:
                function = make()
                measure.step(function, *case.inputs("cpu", small=True), case.backward)
                call = partial(measure.step, function, tensors, dout, case.backward)
                rows[name] = measure.peak_extra(call, known)
            except Exception as error:
                rows[name] = measure.reason(error)
        found[f"{n},{d}"] = rows
    return found


if __name__ == "__main__":
    wanted = [tuple(int(part) for part in argument.split(",")) for argument in sys.argv[1:]]
    print(json.dumps(_memory_here([(n, d) for n, d in wanted])))
