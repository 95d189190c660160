"""Every seeded fault of the CUDA C++ kernels is seen, as the page on testing says."""

import collections
import dataclasses

import pytest

pytest.importorskip("triton")

from . import cuda
from .cuda_mutants import CRASH, MUTANTS, RUNGS, SECTION, mutated, verdict
from .mutations import UNSEEN, recorded, row
from .trials_cuda import CASES

if cuda.why_not():
    pytest.skip(cuda.why_not(), allow_module_level=True)


def cheapest(seen: tuple[str, ...]) -> str:
    """The first rung that has seen a fault: the kernels are compiled for it alone.

    A spoilt heap ends a program only where the C library notices.
    """
    return next(rung for rung, said in zip(RUNGS, seen, strict=True) if said not in (UNSEEN, CRASH))


ROWS = recorded(SECTION)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[mutation.name for mutation in MUTANTS])
def test_seen(i):
    assert verdict(MUTANTS[i], RUNGS[cheapest(ROWS[i][2:])]) is not None


@pytest.mark.slow
@pytest.mark.parametrize("i", range(len(MUTANTS)), ids=[mutation.name for mutation in MUTANTS])
@pytest.mark.parametrize("rung", RUNGS)
def test_seen_as_the_table_says(i, rung):
    if rung == "PTX simulator" and cuda.find_nvcc() is None:
        pytest.skip("no nvcc on this machine")
    said = verdict(MUTANTS[i], RUNGS[rung])
    assert (said is None) == (ROWS[i][2 + list(RUNGS).index(rung)] == UNSEEN), said


def test_the_table_is_that_of_the_mutations():
    assert [found[:2] for found in ROWS] == [row(mutation) for mutation in MUTANTS], (
        "run python -m tests.gpu.cuda_mutants --write"
    )
    assert all(set(found[2:]) != {UNSEEN} for found in ROWS)


def test_three_faults_or_more_of_every_kernel():
    count = collections.Counter(mutation.kernel for mutation in MUTANTS)
    assert set(count) == {f"gated_residual.{name}" for name in ("forward", "backward", "finish")}
    assert min(count.values()) >= 3
    assert len({mutation.name for mutation in MUTANTS}) == len(MUTANTS)


def test_a_text_that_does_not_occur_is_an_error():
    gone = dataclasses.replace(MUTANTS[0], old="no such text")
    with pytest.raises(ValueError, match="occurs 0 times, not 1"), mutated(gone):
        pass


def test_a_change_that_is_no_fault_is_not_seen():
    same = dataclasses.replace(MUTANTS[0], old="sum[v] += t[v] * branch[v]", new="sum[v] += branch[v] * t[v]")
    assert same.case in CASES
    assert verdict(same, RUNGS["threads in order"]) is None
