"""The CUDA C++ kernels on the CPU, and the host runtime that runs them: what it must see, it sees."""

import os
import subprocess
import sys

import pytest
import torch

from . import cuda
from .trials_cuda import CASES, every_case

if cuda.why_not():
    pytest.skip(cuda.why_not(), allow_module_level=True)

GOOD = "4032\n"  # what tests/cpp/cuda/faults.cu prints where nothing is wrong
RACE, OVERFLOW, MISALIGNED = "ThreadSanitizer: data race", "heap-buffer-overflow", "misaligned address"
FAULTS = {  # what is said by the runtime in any build, or by one sanitizer
    "divergent barrier": dict.fromkeys(cuda.SANITIZERS, "divergent __syncthreads"),
    "barrier without ended threads": dict.fromkeys(cuda.SANITIZERS, "after some threads have ended"),
    "shuffle without some lanes": dict.fromkeys(cuda.SANITIZERS, "threads wait for others that do not come"),
    "shuffle of lanes outside its mask": dict.fromkeys(cuda.SANITIZERS, "under a mask that does not name it"),
    "shuffle from lanes outside its mask": dict.fromkeys(cuda.SANITIZERS, "that the mask does not name"),
    "shuffle at two places": dict.fromkeys(cuda.SANITIZERS, "meet at different places"),
    "no barrier": {"thread": RACE},
    "no barrier before the next write": {"thread": RACE},
    "blocks write to the same place": {"thread": RACE},
    "store beyond the end": {"address": OVERFLOW},
    "misaligned access": {"address": MISALIGNED},
}


def said(fault: str, mode: str, order: str = "forward") -> str:
    """What the kernel of that name in faults.cu prints or is stopped with."""
    try:
        return cuda.start(cuda.build(mode, [cuda.HOST / "faults.cu"]), fault, order=order)
    except cuda.Fault as error:
        return str(error)


@pytest.mark.parametrize("mode", cuda.SANITIZERS)
def test_no_fault_is_seen_where_there_is_none(mode):
    assert {said("none", mode, order) for order in cuda.ORDERS} == {GOOD}


@pytest.mark.parametrize(("fault", "mode"), [(fault, mode) for fault in FAULTS for mode in FAULTS[fault]])
def test_faults_are_seen(fault, mode):
    assert FAULTS[fault][mode] in said(fault, mode)


def test_faults_are_told_with_their_place():
    report = said("divergent barrier", "plain")
    lines = (cuda.HOST / "faults.cu").read_text().splitlines()
    places = [f"faults.cu:{i}" for i, line in enumerate(lines, 1) if line == "    __syncthreads();"]
    assert len(places) == 2
    assert all(f"32 threads, {first} the first of them, at" in report for first in (0, 32))
    assert all(place in report for place in places)


def test_an_order_of_the_threads_shows_a_missing_barrier():
    assert {said("no barrier", "plain", order) for order in cuda.ORDERS} != {GOOD}


def test_shared_memory_starts_as_nan():
    assert said("uninitialised shared memory", "plain") in ("nan\n", "-nan\n")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("order", cuda.ORDERS)
def test_kernels(name, order):
    trial = CASES[name]()
    requests = trial.requests()
    cuda.run(cuda.program("plain"), requests, order)
    trial.check(requests)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", ["address", "thread"])
def test_kernels_under_sanitizers(mode):
    """All cases in one process: to start one for the thread sanitizer takes over a second."""
    trials = [make() for make in CASES.values()]
    requests = [trial.requests() for trial in trials]
    cuda.run(cuda.program(mode), [x for pair in requests for x in pair])
    for trial, pair in zip(trials, requests, strict=True):
        trial.check(pair)


@pytest.mark.slow
@pytest.mark.parametrize("mode", cuda.SANITIZERS)
def test_kernels_of_all_types_and_sizes(mode):
    trials = every_case()
    requests = [trial.requests() for trial in trials]
    for order in cuda.ORDERS if mode == "plain" else ("forward",):
        cuda.run(cuda.program(mode), [x for pair in requests for x in pair], order)
        for trial, pair in zip(trials, requests, strict=True):
            trial.check(pair)


def test_the_order_of_the_threads_changes_no_bit():
    results = []
    for order in cuda.ORDERS:
        torch.manual_seed(0)
        requests = CASES["bfloat16, gate per channel"]().requests()
        cuda.run(cuda.program("plain"), requests, order)
        results.append([x.clone() for r in requests for x in (r.out, r.dgate) if x is not None])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_types_without_kernels_are_refused():
    request = CASES["one row"]().requests()[0]
    request.y = request.y.double()
    with pytest.raises(cuda.Fault, match="no kernel for these types"):
        cuda.run(cuda.program("plain"), [request])


@pytest.mark.slow
def test_the_op_on_the_bridge_of_cuda():
    """The tests of the op, with the bridge of CUDA tensors and its kernels in place of those for the CPU."""
    code = (
        "import sys, pytest, torch; torch.ops.load_library(sys.argv[1]); import vlmkernels\n"
        "assert vlmkernels._library.has_kernel('gated_residual_bwd', 'CPU')\n"
        "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *sys.argv[2:]]))"
    )
    only = ["tests/test_gated_residual.py", "-k", "not thread"]  # the host runtime has one
    environment = os.environ | {"VLMKERNELS_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, cuda.bridge(), *only], env=environment, cwd=cuda.ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
