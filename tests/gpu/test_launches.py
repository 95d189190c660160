"""Launches are recorded and specialised as Triton's own launcher would."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from vlmkernels.triton import _pairwise as pairwise

from .launches import SM80, intercepting, recording
from .machine_code import TARGETS


@triton.jit
def _scaled(X, Y, EXTRA, n, stride, factor, flag, BLOCK: tl.constexpr, TWICE: tl.constexpr = False):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at * stride, mask=at < n, other=0.0)
    if EXTRA is not None:
        x += tl.load(EXTRA + at, mask=at < n, other=0.0)
    if flag:
        x = -x
    tl.store(Y + at, 2 * factor * x if TWICE else factor * x, mask=at < n)


def recorded(*, x=None, extra=None, n=48, stride=1, factor=2.5, flag=True, grid=(3,), **options):
    x = torch.empty(64) if x is None else x
    with recording() as launches:
        _scaled[grid](x, torch.empty(64), extra, n, stride, factor, flag, **({"BLOCK": 16} | options))
    (launch,) = launches
    return launch


def specialised(**kwargs) -> tuple[dict, dict, dict]:
    """Types, constants and divisibility by the names of the arguments."""
    launch = recorded(**kwargs)
    source, _ = launch.source(SM80)
    names = [p.name for p in launch.kernel.params]
    constants = {names[i]: x for (i,), x in source.constants.items()}
    divisible = {names[i]: bool(x) for (i,), x in source.attrs.items() if names[i] not in constants}
    return source.signature, constants, divisible


def test_types_constants_and_divisibility():
    types, constants, divisible = specialised()
    assert types == {
        "X": "*fp32", "Y": "*fp32", "EXTRA": "constexpr", "n": "i32", "stride": "constexpr", "factor": "fp32",
        "flag": "u1", "BLOCK": "constexpr", "TWICE": "constexpr",
    }  # fmt: skip
    assert constants == {"EXTRA": None, "stride": 1, "BLOCK": 16, "TWICE": False}
    assert divisible == {"X": True, "Y": True, "n": True}


@pytest.mark.parametrize(
    ("n", "kind", "divisible"), [(47, "i32", False), (1 << 31, "i64", True), (1, None, None)]
)
def test_an_integer_is_specialised_by_its_value(n, kind, divisible):
    types, constants, even = specialised(n=n)
    assert even.get("n") == divisible
    assert types["n"] == (kind or "constexpr")
    assert constants.get("n") == (1 if kind is None else None)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_pointer_is_specialised_by_its_address(device):
    x = torch.empty(64, device=device, dtype=torch.bfloat16)
    for offset, aligned in ((0, True), (8, True), (3, False)):
        types, _, divisible = specialised(x=x[offset:])
        assert (types["X"], divisible["X"]) == ("*bf16", aligned)


def test_code_is_what_a_launch_on_the_device_would_compile():
    """The specialisation shows in what is compiled: an aligned row is read 16 bytes at a time."""
    even, odd = recorded(n=64, BLOCK=1024), recorded(n=63, BLOCK=1024)
    assert "ld.global.v4" in even.compiled().asm["ptx"]
    assert "ld.global.v4" not in odd.compiled().asm["ptx"]
    assert "ld.global.v4" not in recorded(x=torch.empty(65)[1:], n=64, BLOCK=1024).compiled().asm["ptx"]


def test_names_grids_and_what_is_known_of_a_launch():
    x = torch.empty(64)
    launch = recorded(x=x, grid=lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]), 2), num_warps=8)
    assert launch.name == "test_launches._scaled"
    assert launch.grid == (3, 2, 1)
    assert launch.arguments["factor"] == 2.5
    assert launch.arguments["TWICE"] is False
    assert launch.tensors["X"] is x
    assert set(launch.tensors) == {"X", "Y"}
    assert launch.config == {"BLOCK": 16, "TWICE": False, "num_warps": 8}
    assert recorded(grid=(4,)).grid == (4, 1, 1)


def test_options_reach_the_compiler():
    launch = recorded(num_warps=8, num_stages=2, enable_fp_fusion=False)
    assert launch.compiled().metadata.num_warps == 8
    assert launch.source(SM80)[1]["enable_fp_fusion"] is False
    wrong = dataclasses.replace(launch, kwargs=launch.kwargs | {"no_such_option": 1})
    with pytest.raises(KeyError, match="no_such_option"):
        wrong.source(SM80)


def test_compiles_for_hip():
    kernel = recorded().compiled(TARGETS["gfx942"])
    assert "amdgcn" in kernel.asm
    assert kernel.metadata.warp_size == 64


def test_nothing_runs_and_what_was_there_comes_back():
    x = torch.full((1, 16), 3.0)
    with recording() as launches:
        *_, unit, _ = pairwise.norms(x, x, True, False)
        unit.fill_(7.0)
    assert [launch.name for launch in launches] == ["_pairwise._norms"]
    assert (unit == 7).all()
    with pytest.raises(ValueError, match="driver"), recording():
        raise ValueError("driver")
    with recording() as launches:
        pass
    assert launches == []


def test_launches_cannot_be_intercepted_twice():
    with recording(), pytest.raises(RuntimeError, match="already intercepted"), intercepting(print):
        pass
    assert recorded().name == "test_launches._scaled"
