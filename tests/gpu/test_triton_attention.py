"""interval_attention and perceiver_attention on the CPU, under the sanitizer, against the reference."""

import pytest
import torch

pytest.importorskip("triton")

from vlmkernels import intervals
from vlmkernels.reference.interval_attention import interval_attention_fwd
from vlmkernels.triton import _attention, _attention_bwd
from vlmkernels.triton import interval_attention as triton_interval
from vlmkernels.triton import perceiver_attention as triton_perceiver

from .interpreter import interpreting
from .trials import DTYPES, check, grid
from .trials_attention import Interval, Perceiver, any_intervals, heads_last, problem

pytestmark = pytest.mark.sampled(5)

SIZES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 2, 1, 37, 45, 20, 24),
    (1, 4, 2, 140, 70, 64, 64),
    (1, 2, 2, 17, 130, 80, 16),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_intervals_in_any_order(size, dtype):
    b, _, _, tq, tk = size[:5]
    check(Interval(*problem(*size, dtype), *any_intervals(b, tq, tk)))


MASKS = {
    "causal": lambda: intervals.causal(150),
    "causal, cached keys": lambda: intervals.causal(20, offset=130),
    "prefix": lambda: intervals.prefix_lm(torch.tensor([70, 0]), 150),
    "padding": lambda: intervals.padding(torch.tensor([150, 3], dtype=torch.int64), 140),
    "packed": lambda: intervals.packed(torch.tensor([0, 1, 40, 130]), 150),
    "whole documents": lambda: intervals.packed(torch.tensor([0, 66, 150]), 150, causal=False),
    "images": lambda: intervals.media(torch.arange(140)[None].repeat(2, 1) // 20, 50, 3),
    "images before": lambda: intervals.media(
        torch.arange(140)[None].repeat(2, 1) // 40, 50, torch.tensor([3, 1]), attend="all_previous"
    ),
    "nothing": lambda: (torch.full((20,), 5), torch.full((20,), 5)),
}  # fmt: skip


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_of_models(mask):
    start, end = mask()
    check(Interval(*problem(2, 2, 1, start.shape[-1], 150, 16, 16, torch.bfloat16), start, end))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bounds_outside_the_keys_are_clipped(dtype):
    far = torch.iinfo(dtype)
    start = torch.tensor([far.min, far.min, 10, far.max, 3, -7], dtype=dtype)
    end = torch.tensor([far.max, far.min, far.max, far.max, 1, 4], dtype=dtype)
    check(Interval(*problem(1, 1, 1, 6, 20, 16, 16, torch.float32), start, end))


@pytest.mark.parametrize(
    ("dtype", "sizes"), grid(DTYPES, [((2, 5), 10, 10), ((1, 40), 35, 50), ((3, 1), 5, 3)])
)
def test_relative_bias(dtype, sizes):
    grid, tq, tk = sizes
    bias = torch.randn(2, 2 * grid[0] - 1, 2 * grid[1] - 1)
    inputs = (*problem(2, 2, 1, tq, tk, 16, 16, dtype), *any_intervals(2, tq, tk))
    *_, dbias = check(Interval(*inputs, bias=bias, grid=grid))
    assert dbias.dtype == torch.float32


@pytest.mark.parametrize("programs", [1, 1 << 20])
def test_relative_bias_in_16_bits_with_few_and_many_programs(programs, monkeypatch):
    monkeypatch.setattr(triton_interval, "BIAS_PROGRAMS", programs)
    inputs = (*problem(3, 1, 1, 6, 6, 16, 16, torch.bfloat16), *intervals.causal(6))
    *_, dbias = check(Interval(*inputs, bias=torch.randn(1, 3, 5).bfloat16(), grid=(2, 3)))
    assert dbias.dtype == torch.bfloat16


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), ()], ids=str)
def test_frozen_inputs_cost_and_return_nothing(needed):
    needs = [i in needed for i in range(4)]
    bias = torch.randn(2, 3, 9)
    inputs = (*problem(2, 2, 2, 20, 30, 16, 24, torch.float32), *intervals.causal(20))
    check(Interval(*inputs, bias=bias, grid=(2, 5), dlse=False, needs=needs))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [500.0, 10.0, -0.3, 0.0], ids=str)
def test_extreme_and_negative_scales(dtype, scale):
    query, key, value = problem(1, 1, 1, 40, 66, 32, 32, dtype)
    check(Interval(query, key, value, *intervals.causal(40, offset=26), scale=scale))


def test_expanded_and_transposed_inputs():
    query = torch.randn(2, 2, 16, 20).mT
    key, value = torch.randn(1, 1, 33, 16).expand(2, 2, 33, 16), torch.randn(2, 2, 1, 16).expand(2, 2, 33, 16)
    check(Interval(query, key, value, *intervals.causal(20)))
    start, end = intervals.causal(20)
    inputs = (query, key, value, start, end)
    with interpreting(sanitize=True):
        out, lse = triton_interval.interval_attention(*inputs, 0.25, None, 0, 0)
        saved = (*inputs, out, lse, 0.25, None, 0, 0, [True, True, True, False])
        broadcast = triton_interval.interval_attention_bwd(torch.ones(()).expand(out.shape), None, *saved)
        plain = triton_interval.interval_attention_bwd(torch.ones(out.shape), None, *saved)
    assert all(torch.equal(a, b) for a, b in zip(broadcast, plain, strict=True))


@pytest.mark.parametrize("absent", ["b", "h", "tq", "tk", "dh", "dv"])
def test_sizes_of_zero(absent):
    size = {"b": 1, "h": 2, "hkv": 1, "tq": 5, "tk": 6, "dh": 16, "dv": 16} | {absent: 0}
    size["hkv"] = min(size["h"], 1)
    query, key, value = problem(*size.values(), torch.float32)
    check(Interval(query, key, value, *any_intervals(size["b"], size["tq"], size["tk"] + 1), scale=1.0))


def test_float64_and_very_wide_heads_run_the_reference():
    for dtype, width in ((torch.float64, 16), (torch.float32, 129), (torch.bfloat16, 257)):
        query, key, value = problem(1, 1, 1, 3, 4, width, 8, dtype)
        inputs = (query, key, value, *intervals.causal(3), 0.1, None, 0, 0)
        assert torch.equal(triton_interval.interval_attention(*inputs)[0], interval_attention_fwd(*inputs)[0])


def test_blocks_no_query_sees_are_not_read():
    query, key, value = problem(1, 1, 1, 40, 640, 16, 16, torch.float32)
    start, end = torch.full((40,), 300), torch.full((40,), 310)
    key[:, :, :200], value[:, :, :200], key[:, :, 500:], value[:, :, 500:] = [float("nan")] * 4
    with interpreting(sanitize=True):
        out, lse = triton_interval.interval_attention(query, key, value, start, end, 0.25, None, 0, 0)
        grads = triton_interval.interval_attention_bwd(
            out, None, query, key, value, start, end, out, lse, 0.25, None, 0, 0, [True, True, True, False]
        )
    for x in (out, lse, *grads[:3]):
        assert x.isfinite().all()
    assert (grads[1][:, :, :200] == 0).all()


def test_nan_is_not_hidden():
    query, key, value = problem(1, 1, 1, 20, 20, 16, 16, torch.float32)
    query[:, :, 3] = float("nan")
    with interpreting(sanitize=True):
        out, lse = triton_interval.interval_attention(
            query, key, value, *intervals.causal(20), 0.25, None, 0, 0
        )
    assert out[:, :, 3].isnan().all()
    assert lse[:, :, 3].isnan().all()
    assert out[:, :, 4:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "s", "latents", "lengths"),
    [(8, 70, 8, None), (33, 50, 33, (50, 17, 0, 60)), (5, 0, 5, None), (20, 40, 0, (40, 0, 3, -2))],
    ids=str,
)
def test_perceiver(n, s, latents, lengths, dtype):
    check(Perceiver(n, s, latents, lengths, dtype))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (4,), (2, 4), ()], ids=str)
def test_perceiver_gives_the_gradients_that_are_needed(needed):
    inputs = [heads_last(1, 2, t, 16, torch.float32) for t in (8, 30, 30, 8, 8)]
    dout = torch.randn(1, 2, 8, 16)
    with interpreting(sanitize=True):
        out, lse = triton_perceiver.perceiver_attention(*inputs, None, 0.25)
        saved = (dout, *inputs, None, out, lse, 0.25)
        whole = triton_perceiver.perceiver_attention_bwd(*saved, [True] * 5)
        part = triton_perceiver.perceiver_attention_bwd(*saved, [i in needed for i in range(5)])
    for i, (every, one) in enumerate(zip(whole, part, strict=True)):
        assert torch.equal(one, every) if i in needed else one.numel() == 0


def test_tiles_follow_type_width_and_size():
    def chosen(dtype, width, rows, tables=_attention.FORWARD):
        x = torch.empty(1, 1, 1, width, dtype=dtype)
        options = _attention.launch_options(tables, x, x, rows, 1000, False)
        return (
            options["BLOCK_M"],
            options["BLOCK_N"],
            options["BLOCK_D"],
            options["PRECISION"],
            options["EVEN_D"],
        )

    half, wide, single = (_attention.FORWARD[key][:2] for key in ((True, 64), (True, 128), (False, 128)))
    assert chosen(torch.bfloat16, 64, 4096) == (*half, 64, "ieee", True)
    assert chosen(torch.float16, 64, 1) == (16, half[1], 64, "ieee", True)
    assert chosen(torch.bfloat16, 80, 4096) == (*wide, 128, "ieee", False)
    assert chosen(torch.float32, 128, 4096) == (*single, 128, "tf32x3", True)
    for tables in (_attention.FORWARD, _attention_bwd.QUERY_GRADS, _attention_bwd.KEY_GRADS):
        assert chosen(torch.float16, 256, 64, tables)[2] == 256
