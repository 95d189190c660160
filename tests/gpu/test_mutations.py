"""Every seeded fault is seen, as the page on testing says; a test that goes blind fails here."""

import collections
import dataclasses

import pytest

pytest.importorskip("triton")

from vlmkernels.triton import gated_residual, info_nce

from .cases import CASES
from .mutations import MUTANTS, RUNGS, mutated, patched, recorded, row, sources, verdict
from .test_cases import kernels
from .trials import sanitized

SPELLED_OTHERWISE = dataclasses.replace(
    MUTANTS[0],
    module="gated_residual",
    case="gated_residual, ragged, float32",
    old="x + t * y",
    new="t * y + x",
)


FIRST = {mutation.kernel: mutation.name for mutation in reversed(MUTANTS)}  # a fault of every kernel


@pytest.mark.parametrize(
    "mutation",
    [pytest.param(m, marks=[pytest.mark.slow] * (FIRST[m.kernel] != m.name), id=m.name) for m in MUTANTS],
)
def test_seen(mutation):
    assert verdict(mutation, RUNGS[mutation.rung]) is not None


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTANTS, ids=lambda mutation: mutation.name)
def test_each_rung_says_what_the_page_has(mutation):
    said = [verdict(mutation, executor) for executor in RUNGS.values()]
    assert row(mutation, *said) in recorded()


def test_the_table_is_that_of_the_mutations():
    assert [found[:2] for found in recorded()] == [row(mutation) for mutation in MUTANTS], (
        "run python -m tests.gpu.mutations --write"
    )


def test_three_faults_or_more_of_every_kernel():
    count = collections.Counter(mutation.kernel for mutation in MUTANTS)
    assert set(count) == set(kernels())
    assert min(count.values()) >= 3
    assert len({mutation.name for mutation in MUTANTS}) == len(MUTANTS)


def test_every_case_launches_the_kernel_of_its_fault():
    for mutation in MUTANTS:
        case = CASES[mutation.case]
        assert not case.slow
        assert mutation.kernel in {launch.name for launch in case.launched()}


def test_a_text_that_does_not_occur_is_an_error():
    text = sources()["info_nce"]
    gone = dataclasses.replace(MUTANTS[0], module="info_nce", old="no such text")
    with pytest.raises(ValueError, match="occurs 0 times, not 1"), mutated(gone):
        pass
    with pytest.raises(ValueError, match="occurs 2 times, not 1"):
        patched(gone, "no such text, no such text")
    assert patched(dataclasses.replace(gone, old="def _join("), text).count("def _join(") == 0


def test_a_change_that_is_no_fault_is_not_seen():
    assert verdict(SPELLED_OTHERWISE, sanitized) is None


def test_everything_is_restored():
    def state():
        return dict(vars(gated_residual)), dict(vars(info_nce))

    before = state()
    with mutated(SPELLED_OTHERWISE):
        assert gated_residual._forward is not before[0]["_forward"]
        assert "t * y + x" in gated_residual._forward.src
    assert state() == before
    with pytest.raises(KeyError), mutated(SPELLED_OTHERWISE):
        raise KeyError
    assert state() == before
