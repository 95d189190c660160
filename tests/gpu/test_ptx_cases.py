"""The compiled kernels in the simulator: results as good as the reference, no fault of memory or order."""

import pytest
import torch

pytest.importorskip("triton")

from .cases import CASES
from .ptx import simulated
from .test_cases import SUMS, features, kernels

# Default cases whose kernels others run in a type of the same width; compiling them is most of the work.
ALIKE = {
    "info_nce, by id, bfloat16",
    "info_nce, by index, bfloat16",
    "info_nce, by id, chunks, float16",
    "info_nce, few rows, float16",
    "info_nce, few rows by id, bfloat16",
    "info_nce, few far rows, bfloat16",
    "info_nce, far rows, bfloat16",
    "info_nce, far rows, normalised, bfloat16",
    "sigmoid_loss, ragged, by ids, float16",
    "sigmoid_loss, chunks, bfloat16",
    "sigmoid_loss, far rows, bfloat16",
    "sigmoid_loss, far rows, normalised, bfloat16",
    "scale_grads, four, float16",
    "contrastive_distillation, ragged, bfloat16",
    "contrastive_distillation, far rows, bfloat16",
    "linear_cross_entropy, ragged, float16",
    "linear_cross_entropy, far rows, bfloat16",
    "linear_distillation, ragged, float16",
    "linear_distillation, offline, float16",
    "linear_distillation, far rows, bfloat16",
    "gated_linear_residual, ragged, float16",
    "gated_linear_residual, wide, bfloat16",
    "gated_linear_residual, far rows, bfloat16",
    "interval_attention, any interval, float16",
    "interval_attention, causal, bfloat16",
    "interval_attention, far heads, bfloat16",
    "interval_attention, heads of 24, aligned, bfloat16",
    "interval_attention, heads of 24, aligned, float32",
    "interval_attention, ranges of rows, bfloat16",
    "perceiver_attention, lengths, float16",
}
QUICK = {name: case for name, case in CASES.items() if not case.slow and name not in ALIKE}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.slow] * (name not in QUICK)) for name, case in CASES.items()],
    ids=list(CASES),
)
def test_as_good_as_the_reference(case):
    case.run(simulated)


def test_the_quick_cases_run_every_kernel_in_types_of_both_widths():
    launches = [launch for case in QUICK.values() for launch in case.launched()]
    assert {launch.name for launch in launches} == set(kernels())
    widths = {(launch.name, features(launch).itemsize) for launch in launches if launch.name not in SUMS}
    assert widths == {(name, size) for name in set(kernels()) - SUMS for size in (2, 4)}
    assert not any(CASES[name].slow for name in ALIKE)
    assert torch.float16 in {features(launch) for launch in launches if launch.name not in SUMS}
