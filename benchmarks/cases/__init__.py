"""One function per op: the inputs, lower bounds of the costs, and the baselines.

Ours and every baseline are called with the same tensors by keyword. Baselines are imported through
`benchmarks.peers`, or are one line around an imported function; torch.compile gets static shapes.
"""

from benchmarks.cases import attention, dense, detection, modules, pairwise, residual, retrieval, rows
from benchmarks.cases.case import OURS, QUICK_SIZE, Baseline, Case

__all__ = ["OURS", "QUICK_SIZE", "Baseline", "Case", "all_cases"]


def all_cases(*, quick: bool = False, device: str = "cpu") -> list[Case]:
    """Every declared case; `quick` keeps the names, cuts the sizes and omits torch.compile."""
    families = (residual, dense, pairwise, attention, rows, retrieval, detection, modules)
    cases = [case for family in families for cases_of in family.CASES for case in cases_of(quick, device)]
    ids = [case.id for case in cases]
    assert len(set(ids)) == len(ids), "two cases of one name"
    return cases
