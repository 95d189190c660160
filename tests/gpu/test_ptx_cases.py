"""The compiled kernels in the simulator: results as good as the reference, no fault of memory or order."""

import pytest

pytest.importorskip("triton")

from .cases import CASES, SIMULATED
from .ptx import simulated
from .test_cases import SUMS, features, kernels
from .trials import DTYPES


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (name not in SIMULATED)) for name, case in CASES.items()],
    ids=list(CASES),
)
def test_as_good_as_the_reference(case):
    case.run(simulated)


def test_every_kernel_is_simulated_and_both_widths_are():
    cases = [CASES[name] for name in SIMULATED]
    assert not any(case.slow for case in cases)
    launches = [launch for case in cases for launch in case.launched()]
    assert {launch.name for launch in launches} == set(kernels())
    assert {features(launch) for launch in launches if launch.name not in SUMS} == set(DTYPES)
