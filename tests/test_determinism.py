"""Bits of the library's own kernels do not depend on the number of threads, as docs/determinism.md says."""

import re

import pytest
import torch

import vlmkernels
from tests import determinism, instruction_sets

CHOSEN = vlmkernels.info()["cpu"]["instruction set"]
OPS = sorted(op for op in vlmkernels.info()["ops"] if not op.endswith("_bwd"))

pytestmark = pytest.mark.skipif(not CHOSEN, reason="the reference kernels do not promise it")


def differing(found: determinism.Found) -> dict[str, dict[str, int]]:
    assert sorted(found) == OPS
    return {op: {name: n[0] for name, n in dtypes.items() if n[0]} for op, dtypes in found.items()}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", determinism.DTYPES)
def test_bits_do_not_depend_on_the_number_of_threads(products, dtype):
    products("own")
    assert differing(determinism.compare([dtype], most=determinism.QUICK)) == {op: {} for op in OPS}


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_size_with_every_instruction_set(isa):
    if isa != CHOSEN and isa not in instruction_sets.others():
        pytest.skip("this machine does not run it")
    assert differing(determinism.started(VLMKERNELS_CPU_ISA=isa)) == {op: {} for op in OPS}


def test_the_table_is_that_of_the_ops_and_of_the_comparisons_made():
    """Every op has its row, with all that is compared, and 0 where the bits are promised."""
    written = (
        determinism.PAGE.read_text().partition(determinism.MARKS[0])[2].partition(determinism.MARKS[1])[0]
    )
    sets = written.split("; ")[1].split(", ")
    rows = {
        m[1]: [c.strip() for c in m[2].split("|")[:-1]]
        for m in re.finditer(r"\| \[(\w+)\].*?\|(.*)", written)
    }
    assert sorted(rows) == OPS
    made = [op for op, *_ in determinism.cases(torch.float32)]
    for op, (*own, by_torch, reference) in rows.items():
        each = made.count(op) * (len(determinism.THREADS) - 1)
        assert own == [f"0 of {each * len(sets)}"] * len(determinism.DTYPES)
        assert by_torch.endswith(f"of {2 * each}") if op in determinism.DENSE else by_torch == ""
        assert reference.endswith(f"of {each * len(determinism.DTYPES)}")
