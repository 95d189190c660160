"""The attention kernels compile without a GPU for sm_80, sm_90 and gfx942 and spill inside no loop."""

import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

from vlmkernels.triton import _attention, _attention_bwd
from vlmkernels.triton import interval_attention as interval

from .compiling import sass, spills_in_loops, spills_on_amd

KERNELS = {
    "forward": (_attention._forward, _attention.FORWARD),
    "query": (_attention_bwd._query_grads, _attention_bwd.QUERY_GRADS),
    "key": (_attention_bwd._key_grads, _attention_bwd.KEY_GRADS),
}
# Arguments that a launch makes constants: rows of intervals are contiguous; what is absent is None
UNIT = {"stride_st": 1, "stride_et": 1}
VARIANTS = {
    "plain": {"TABLE": None, "K2": None, "V2": None} | UNIT,
    "bias": {"K2": None, "V2": None} | UNIT,
    "two sources": {"TABLE": None, "START": None, "stride_et": 0},
    "one gradient": {"TABLE": None, "DV": None} | UNIT,
}


def options_of(kernel: str, dtype, width: int, variant: str) -> dict:
    x = torch.empty(1, 1, 1, width, dtype=dtype, device="meta")
    return _attention.launch_options(KERNELS[kernel][1], x, x, 4096, 4096, variant == "bias")


def cases(variants):
    for dtype, widths in ((torch.bfloat16, (64, 80, 128, 256)), (torch.float32, (64, 128))):
        for width, kernel, variant in itertools.product(widths, KERNELS, variants):
            absent = variant == ("two sources" if kernel == "key" else "one gradient")
            if not absent and (width != 80 or variant == "plain"):
                quick = (dtype, width, variant) == (torch.bfloat16, 64, "plain")
                yield pytest.param(kernel, dtype, width, variant, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize(("kernel", "dtype", "width", "variant"), list(cases(VARIANTS)))
def test_on_nvidia(kernel, dtype, width, variant, arch, tmp_path):
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    options = options_of(kernel, dtype, width, variant)
    code = sass(KERNELS[kernel][0], name, options, VARIANTS[variant], arch, tmp_path)
    assert spills_in_loops(code) == 0
    assert "HMMA" in code or "HGMMA" in code
    if (name, width, variant) == ("bf16", 64, "plain"):
        assert "HGMMA" in code if arch == 90 else "HMMA" in code
        assert re.search(r"LDGSTS\.E\.BYPASS(\.\w+)*\.128", code)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "dtype", "width", "variant"), list(cases(["plain"])))
def test_on_amd(kernel, dtype, width, variant, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    options = options_of(kernel, dtype, width, variant)
    assert options["PRECISION"] == "ieee"
    assert spills_on_amd(KERNELS[kernel][0], name, options, VARIANTS[variant]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("dtype", "width"), [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 64)])
def test_gradient_of_the_bias(dtype, width, arch, tmp_path):
    x = torch.empty(1, 1, 1, width, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16, device="meta")
    assert (
        spills_in_loops(
            sass(interval._bias_grads, dtype, interval.bias_options(x, x, 24), UNIT, arch, tmp_path)
        )
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_small_kernels(arch, tmp_path):
    sums = {"BLOCK_M": 64, "BLOCK_V": 64, "EVEN_V": True, "num_warps": 4}
    assert spills_in_loops(sass(_attention_bwd._row_sums, "bf16", sums, {}, arch, tmp_path)) == 0
    ranges = {"BLOCK_N": 128, "ROWS": 1024, "num_warps": 4}
    assert spills_in_loops(sass(_attention_bwd._query_ranges, "bf16", ranges, UNIT, arch, tmp_path)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_sizes_of_one(kernel, tmp_path):
    """A launch makes an integer argument that is 1 a constant of the program."""
    fn = KERNELS[kernel][0]
    ones = {name: 1 for name in fn.arg_names if name.islower() and name != "scale"}
    x = torch.empty(1, 1, 1, 1, dtype=torch.float16, device="meta")
    options = _attention.launch_options(KERNELS[kernel][1], x, x, 1, 1, True)
    assert "EXIT" in sass(fn, "fp16", options, ones, 90, tmp_path)
