"""The compiled kernels in the simulator: results as good as the reference, no fault of memory or order."""

import pytest

pytest.importorskip("triton")

from .cases import CASES
from .ptx import simulated
from .test_cases import kernels


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * c.slow) for c in CASES.values()],
                         ids=list(CASES))  # fmt: skip
def test_as_good_as_the_reference(case):
    case.run(simulated)


def test_the_default_cases_run_every_kernel():
    launched = {launch.name for case in CASES.values() if not case.slow for launch in case.launched()}
    assert launched == set(kernels())
