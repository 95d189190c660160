import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.attention import DTYPES, assert_attention_as_good, implementations
from vlmkernels import intervals, reference
from vlmkernels.testing import result_and_gradients

OPS = implementations(vlmkernels.interval_attention)
NATIVE = vlmkernels.info()["ops"]["interval_attention"]["CPU"] != "reference"


def inputs(b, h, hkv, tq, tk, dh, dv, dtype=torch.float32):
    shapes = [(b, h, tq, dh), (b, hkv, tk, dh), (b, hkv, tk, dv)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def random_intervals(b, tq, tk, dtype=torch.int32):
    """Not monotone, some empty, some beyond the keys."""
    return tuple(torch.randint(-3, tk + 4, (b, tq), dtype=dtype) for _ in range(2))


def everything(tq, tk):
    return torch.zeros(tq, dtype=torch.int64), torch.full((tq,), tk)


def attention(bounds, **options):
    return lambda op: lambda *tensors: op(*tensors, *bounds, **options)


SHAPES = {
    "square": (2, 2, 2, 130, 130, 64, 64),
    "grouped": (1, 6, 2, 37, 300, 20, 37),
    "long keys": (1, 1, 1, 9, 1100, 16, 8),
    "few queries": (2, 4, 2, 2, 90, 36, 20),  # keys are read as they are
    "one": (1, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "causal", "all"])
def test_forward_and_gradients(op, dtype, shape, kind):
    b, _, _, tq, tk, *_ = SHAPES[shape]
    bounds = {
        "random": random_intervals(b, tq, tk),
        "causal": intervals.causal(tq, max(tk - tq, 0)),
        "all": everything(tq, tk),
    }[kind]
    tensors = inputs(*SHAPES[shape], dtype)
    assert_attention_as_good(attention(bounds), OPS[op], tensors)


WHOLE = {
    "full": lambda device: intervals.full(130, device=device),
    "causal": lambda device: intervals.causal(130, device=device),
    "packed": lambda device: intervals.packed(torch.tensor([0, 1, 70, 70, 128], device=device), 130),
    "images": lambda device: intervals.media(
        intervals.text_time((torch.arange(130, device=device) % 40 == 3)[None]), 26, 5
    ),
    "padding": lambda device: intervals.padding(torch.tensor([77], device=device), 130),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)], ids=str)
@pytest.mark.parametrize("mask", WHOLE)
def test_intervals_whole(op, dtype, heads, mask):
    """On a GPU other libraries compute some of them."""

    def on(attention):
        whole = WHOLE[mask]("cuda" if op == "cuda" and attention is OPS[op] else "cpu")
        bounds = (whole,) if attention is OPS[op] else tuple(whole)
        return lambda *tensors: attention(*tensors, *bounds)

    assert_attention_as_good(on, OPS[op], inputs(1, *heads, 130, 130, 64, 64, dtype))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 3.0])
def test_scale(scale):
    bounds = random_intervals(2, 40, 70)
    tensors = inputs(2, 2, 2, 40, 70, 16, 16)
    assert_attention_as_good(attention(bounds, scale=scale), vlmkernels.interval_attention, tensors)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tq", [2, 70])
def test_log_sum_exp_and_its_gradient(op, tq):
    bounds = random_intervals(2, tq, 150)
    bounds[1][0, 1] = 0  # an empty row
    tensors = inputs(2, 2, 1, tq, 150, 16, 16)

    def both(op):
        def joined(*t):
            out, lse = op(*t, *bounds, return_lse=True)
            return torch.cat([out.flatten(), lse.where(lse > -torch.inf, 0).flatten()])

        return joined

    assert_attention_as_good(both, OPS[op], tensors)

    def only(op):
        def lse(*t):
            lse = op(*t, *bounds, return_lse=True)[1]
            return lse.where(lse > -torch.inf, 0) + 0 * t[2].sum()

        return lse

    assert_attention_as_good(only, vlmkernels.interval_attention, tensors)
    _, lse = vlmkernels.interval_attention(*tensors, *bounds, return_lse=True)
    start, end = bounds
    empty = end.clamp(0, 150) <= start.clamp(0, 150)
    assert empty.any()
    assert torch.equal((lse == -torch.inf).all(1), empty)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", [(5, 7), (1, 1), (12, 13)], ids=str)
@pytest.mark.parametrize("tq", [3, 100])
def test_relative_bias(op, dtype, grid, tq):
    """The grid may be smaller than the queries and keys, or larger."""
    bounds = intervals.prefix_lm(torch.tensor([30, 80]), tq)
    bias = torch.randn(4, 2 * grid[0] - 1, 2 * grid[1] - 1).to(dtype).requires_grad_()
    tensors = [*inputs(2, 4, 2, tq, 100, 16, 16, dtype), bias]

    def with_bias(op):
        return lambda q, k, v, rb: op(q, k, v, *bounds, relative_bias=rb, grid=grid)

    assert_attention_as_good(with_bias, OPS[op], tensors)


def test_relative_bias_means_what_it_says():
    rows, cols, heads = 3, 4, 2
    query, key, value = inputs(1, heads, heads, 14, 14, 8, 8)
    table = torch.randn(heads, 2 * rows - 1, 2 * cols - 1)
    dense = torch.zeros(heads, 14, 14)
    for i in range(rows * cols):
        for j in range(rows * cols):
            dense[:, i, j] = table[:, i // cols - j // cols + rows - 1, i % cols - j % cols + cols - 1]
    got = vlmkernels.interval_attention(
        query, key, value, *everything(14, 14), relative_bias=table, grid=(rows, cols)
    )
    torch.testing.assert_close(got, F.scaled_dot_product_attention(query, key, value, attn_mask=dense))


def test_equals_scaled_dot_product_attention():
    query, key, value = inputs(2, 4, 4, 90, 90, 32, 32)
    causal = vlmkernels.interval_attention(query, key, value, *intervals.causal(90))
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(query, key, value, is_causal=True))
    full = vlmkernels.interval_attention(query, key[:, :2], value[:, :2], *everything(90, 90))
    wanted = F.scaled_dot_product_attention(query, key[:, :2], value[:, :2], enable_gqa=True)
    torch.testing.assert_close(full, wanted)


def test_gradcheck():
    bounds = random_intervals(2, 6, 9)
    tensors = inputs(2, 4, 2, 6, 9, 5, 3, torch.float64)
    bias = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)

    def both(*t):
        out, lse = vlmkernels.interval_attention(
            *t[:3], *bounds, relative_bias=t[3], grid=(2, 3), return_lse=True
        )
        return out, lse.where(lse > -torch.inf, 0)

    assert torch.autograd.gradcheck(both, (*tensors, bias))


def test_second_derivative_is_refused():
    tensors = inputs(1, 1, 1, 5, 5, 4, 4)
    out = vlmkernels.interval_attention(*tensors, *intervals.causal(5))
    (dq,) = torch.autograd.grad(out.sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="interval_attention has no second derivative"):
        dq.sum().backward()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("tq", [3, 9])
@pytest.mark.once
def test_registration(permuted, tq):
    query, key, value = (t.detach() for t in inputs(2, 4, 2, tq, 8, 6, 5))
    if permuted:
        query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value))
    bounds = random_intervals(2, tq, 8)
    bias = torch.randn(4, 3, 5)
    op, bwd = torch.ops.vlmkernels.interval_attention, torch.ops.vlmkernels.interval_attention_bwd
    leaves = [t.requires_grad_() for t in (query, key, value, bias)]
    unknown, ends = (None, None, None), torch.tensor([0, tq], dtype=torch.int32)
    torch.library.opcheck(op.default, (*leaves[:3], *bounds, 0.4, leaves[3], 2, 3, *unknown))
    torch.library.opcheck(op.default, (*leaves[:3], *bounds, 0.4, None, 0, 0, True, ends, ends))
    tensors = [t.detach() for t in leaves]
    out, lse = op(*tensors[:3], *bounds, 0.4, tensors[3], 2, 3, *unknown)
    saved = (*tensors[:3], *bounds, out, lse, 0.4, tensors[3], 2, 3, *unknown)
    dlse = torch.randn_like(lse)
    torch.library.opcheck(bwd.default, (torch.randn_like(out), dlse, *saved, [True] * 4))
    torch.library.opcheck(bwd.default, (torch.randn_like(out), None, *saved, [False, True, False, True]))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(query, key, value, lengths):
        return vlmkernels.interval_attention(
            query, key, value, *intervals.padding(lengths, query.shape[2]), return_lse=True
        )[0]

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tq, tk in ((10, 30), (70, 40)):
        tensors = inputs(2, 4, 2, tq, tk, 16, 16)
        lengths = torch.tensor([7, tk])
        for got, want in zip(
            result_and_gradients(lambda *t, f=compiled, n=lengths: f(*t, n), tensors),
            result_and_gradients(lambda *t, n=lengths: step(*t, n), tensors),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


def test_autocast_casts_the_operands():
    tensors = inputs(1, 2, 2, 20, 20, 16, 16)
    bounds = intervals.causal(20)
    bias = torch.randn(2, 3, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = vlmkernels.interval_attention(*tensors, *bounds, relative_bias=bias, grid=(2, 2))
        mixed = vlmkernels.interval_attention(tensors[0].bfloat16(), *tensors[1:], *bounds)
    assert out.dtype == mixed.dtype == torch.bfloat16
    half = [t.bfloat16() for t in tensors]
    torch.testing.assert_close(
        out, vlmkernels.interval_attention(*half, *bounds, relative_bias=bias, grid=(2, 2))
    )
    out.sum().backward()
    assert tensors[0].grad.dtype == bias.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        double = [t.detach().double() for t in tensors]
        assert vlmkernels.interval_attention(*double, *bounds).dtype == torch.float64


@pytest.mark.parametrize("tq", [2, 80])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_empty_rows_are_exactly_zero_and_get_no_gradient(tq, bias):
    query, key, value = inputs(1, 2, 2, tq, 50, 16, 16)
    start, end = torch.zeros(tq, dtype=torch.int32), torch.full((tq,), 50, dtype=torch.int32)
    empty = torch.arange(tq) % 2 == 1
    start[empty], end[empty] = 30, 10
    options = {"relative_bias": torch.randn(2, 5, 5), "grid": (3, 3)} if bias else {}
    out, lse = vlmkernels.interval_attention(query, key, value, start, end, return_lse=True, **options)
    assert (out[:, :, empty] == 0).all()
    assert (lse[:, :, empty] == -torch.inf).all()
    dq, dk, dv = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert (dq[:, :, empty] == 0).all()
    kept = (
        vlmkernels.interval_attention(query[:, :, ~empty], key, value, start[~empty], end[~empty])
        if not bias
        else None
    )
    if kept is not None:
        wanted = torch.autograd.grad(kept.square().sum(), (key, value))
        torch.testing.assert_close((dk, dv), wanted)
    nothing = vlmkernels.interval_attention(query, key, value, end, end, **options)
    assert (nothing == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(nothing.sum(), (query, key, value)))


@pytest.mark.parametrize("tq", [2, 200])
def test_keys_outside_every_interval_are_not_touched(tq):
    """Whatever memory holds there (NaN), blocks of keys that nobody sees have no influence."""
    query, key, value = inputs(1, 1, 1, tq, 1000, 8, 8)
    start, end = torch.full((tq,), 256), torch.full((tq,), 512)
    got = result_and_gradients(attention((start, end))(vlmkernels.interval_attention), (query, key, value))
    with torch.no_grad():
        for t in (key, value):
            t[:, :, :256], t[:, :, 512:] = torch.nan, torch.nan
    if NATIVE:
        again = result_and_gradients(
            attention((start, end))(vlmkernels.interval_attention), (query, key, value)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    assert (got[2][:, :, :256] == 0).all()
    assert (got[3][:, :, 512:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_intervals_of_either_type_shared_or_per_sample_and_expanded(dtype):
    tensors = inputs(3, 2, 2, 20, 30, 8, 8)
    start, end = (x[0] for x in random_intervals(1, 20, 30, dtype))
    once = vlmkernels.interval_attention(*tensors, start, end)
    per_sample = vlmkernels.interval_attention(*tensors, start.expand(3, -1), end.expand(3, -1))
    assert torch.equal(once, per_sample)


@pytest.mark.parametrize(
    "shape",
    [
        (0, 2, 2, 5, 5, 4, 4), (2, 0, 0, 5, 5, 4, 4), (2, 2, 2, 0, 5, 4, 4), (2, 2, 2, 5, 0, 4, 4),
        (2, 2, 2, 5, 5, 0, 4), (2, 2, 1, 5, 5, 4, 0), (1, 1, 1, 0, 0, 0, 0), (2, 4, 2, 2, 0, 4, 4),
    ],
    ids=str,
)  # fmt: skip
def test_sizes_of_zero(shape):
    b, h, _, tq, tk, dh, dv = shape
    tensors = inputs(*shape)
    out, *grads = result_and_gradients(attention(everything(tq, tk))(vlmkernels.interval_attention), tensors)
    assert out.shape == (b, h, tq, dv)
    assert [g.shape for g in grads] == [t.shape for t in tensors]
    if dh == 0 and tk and out.numel():
        torch.testing.assert_close(out, tensors[2].mean(2, keepdim=True).expand_as(out))
    assert (grads[0] == 0).all() or dh


@pytest.mark.parametrize("layout", ["heads inside", "transposed widths", "expanded", "sliced"])
def test_any_strides(layout):
    b, h, t, d = 2, 3, 70, 16
    if layout == "heads inside":
        tensors = [torch.randn(b, t, h, d).transpose(1, 2) for _ in range(3)]
    elif layout == "transposed widths":
        tensors = [torch.randn(b, h, d, t).mT for _ in range(3)]
    elif layout == "expanded":
        tensors = [torch.randn(1, 1, t, d).expand(b, h, t, d) for _ in range(3)]
    else:
        tensors = [torch.randn(b, h, 2 * t, 3 * d)[:, :, ::2, d : 2 * d] for _ in range(3)]
    bounds = random_intervals(b, t, t)
    tensors = [x.requires_grad_() for x in tensors]
    dense = [x.detach().contiguous().requires_grad_() for x in tensors]
    out = vlmkernels.interval_attention(*tensors, *bounds)
    wanted = vlmkernels.interval_attention(*dense, *bounds)
    assert torch.equal(out, wanted)
    incoming = torch.randn(b, h, d, t).mT
    for got, want in zip(
        torch.autograd.grad(out, tensors, incoming), torch.autograd.grad(wanted, dense, incoming), strict=True
    ):
        assert torch.equal(got, want)


def test_merging_the_heads_copies_nothing():
    out = vlmkernels.interval_attention(*inputs(2, 3, 3, 10, 10, 8, 8), *intervals.causal(10))
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("frozen", range(7))
def test_frozen_inputs(frozen):
    tensors = inputs(1, 2, 1, 70, 90, 8, 8)
    for i, t in enumerate(tensors):
        t.requires_grad_(not frozen >> i & 1)
    assert_attention_as_good(attention(random_intervals(1, 70, 90)), vlmkernels.interval_attention, tensors)


@pytest.mark.parametrize("tq", [3, 70])
@pytest.mark.parametrize("size", [30.0, 1e4, 1e18])
def test_extreme_logits(tq, size):
    """Far above what exp holds, of either sign: the largest key wins; no NaN, finite gradients."""
    query, key, value = inputs(1, 1, 1, tq, 130, 4, 4)
    with torch.no_grad():
        key.mul_(size)
    bounds = random_intervals(1, tq, 130)
    got = result_and_gradients(attention(bounds)(vlmkernels.interval_attention), (query, key, value))
    exact = result_and_gradients(
        attention(bounds)(reference.interval_attention),
        [t.detach().double().requires_grad_() for t in (query, key, value)],
    )
    assert all(torch.isfinite(t).all() for t in got)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("tq", [1, 2, 3, 70])
def test_a_key_that_is_seen_alone_has_probability_one(tq, biased, dtype):
    """Exactly, also in the backward, which forms its logit again: the forward's log-sum-exp is that logit."""
    for width in (20, 64, 512):
        query, key, value = inputs(2, 4, 2, tq, 300, width, 8, dtype)
        with torch.no_grad():
            key.mul_(8)
        only = torch.randperm(300)[:tq]
        options = {"relative_bias": torch.randn(4, 17, 17), "grid": (9, 9)} if biased else {}
        out = vlmkernels.interval_attention(query, key, value, only, only + 1, **options)
        (dvalue,) = torch.autograd.grad(out, value, torch.ones_like(out))
        assert torch.equal(out, value[:, :, only].repeat_interleave(2, 1))
        assert (dvalue[:, :, only] == 2).all(), f"width {width}"  # two heads share each key
        assert dvalue.sum() == 2 * 2 * 2 * tq * 8


def test_all_logits_very_low():
    query, key, value = inputs(1, 1, 1, 40, 60, 4, 4)
    with torch.no_grad():
        query.copy_(query.abs() * 100)
        key.copy_(-key.abs() * 100)
    assert_attention_as_good(
        attention(everything(40, 60)), vlmkernels.interval_attention, [query, key, value]
    )


def test_nan_is_seen():
    query, key, value = inputs(1, 1, 1, 40, 60, 4, 4)
    with torch.no_grad():
        query[0, 0, 7] = torch.nan
    out = vlmkernels.interval_attention(query, key, value, *everything(40, 60))
    assert out[0, 0, 7].isnan().all()
    assert torch.isfinite(out[0, 0, [6, 8]]).all()


@pytest.mark.skipif(not NATIVE, reason="torch splits a product by the number of threads")
@pytest.mark.parametrize("shape", [(1, 1, 1, 300, 900, 16, 16), (2, 4, 2, 100, 100, 16, 16)], ids=str)
def test_deterministic_for_any_number_of_threads(for_thread_counts, shape):
    tensors = inputs(*shape)
    bias = torch.randn(shape[1], 13, 13, requires_grad=True)
    bounds = random_intervals(shape[0], shape[3], shape[4])

    def step(q, k, v, rb):
        return vlmkernels.interval_attention(q, k, v, *bounds, relative_bias=rb, grid=(7, 7))

    first, *others = for_thread_counts(lambda: result_and_gradients(step, [*tensors, bias]))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not NATIVE, reason="the reference is dense by design")
@pytest.mark.once
def test_memory(peak_memory):
    """Logits of 8192 x 8192 would take 256 MiB; inputs, result and gradients take 7 x 2 MiB."""
    script = """
from vlmkernels import intervals
tensors = [torch.randn(1, 1, 8192, 64, requires_grad=True) for _ in range(3)]
bounds = intervals.causal(8192)
vlmkernels.interval_attention(*(t[:, :, :64] for t in tensors), *(x[:64] for x in bounds)).sum().backward()
run = lambda: vlmkernels.interval_attention(*tensors, *bounds).sum().backward()
"""
    assert peak_memory(script) < 64 * 2**20


@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    tensors = [t.detach() for t in inputs(1, 1, 1, 1024, 1024, 64, 64)]
    bounds = everything(1024, 1024)
    assert busy_threads(lambda: vlmkernels.interval_attention(*tensors, *bounds)) >= 2


def good():
    return {
        "query": torch.zeros(2, 4, 5, 8), "key": torch.zeros(2, 2, 6, 8), "value": torch.zeros(2, 2, 6, 3),
        "start": torch.zeros(5, dtype=torch.int32), "end": torch.zeros(5, dtype=torch.int32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(4, 5, 8)}, r"four dimensions.*query \(4, 5, 8\)"),
        ({"key": torch.zeros(2, 3, 6, 8), "value": torch.zeros(2, 3, 6, 3)}, "multiple of those of key"),
        ({"key": torch.zeros(2, 2, 6, 7)}, "query and key must have the same width"),
        ({"value": torch.zeros(2, 2, 7, 3)}, "key and value must have the same number of tokens"),
        ({"value": torch.zeros(2, 4, 6, 3)}, "heads of query must be a multiple"),
        ({"key": torch.zeros(3, 2, 6, 8)}, "the same batch size"),
        (
            {"key": torch.zeros(2, 2, 6, 8).double()},
            "the same dtype, got query torch.float32, key torch.float64",
        ),
        (
            {"query": torch.zeros(2, 4, 5, 8).int()},
            "float32, float64, bfloat16 or float16, got query torch.int32",
        ),
        ({"start": torch.zeros(4).int()}, r"\[Tq\] = \(5,\) or \[B, Tq\] = \(2, 5\), got start \(4,\)"),
        ({"end": torch.zeros(5)}, "int32 or int64, got torch.int32 and torch.float32"),
        ({"end": None}, "end must be a tensor as start is, got None"),
        ({"start": intervals.causal(5)}, "end must be None where start is both, got a tensor"),
        ({"start": intervals.causal(4), "end": None}, r"got start \(4,\) and end \(4,\)"),
        ({"relative_bias": torch.zeros(4, 3, 3)}, r"relative_bias needs grid = \(rows, columns\)"),
        ({"relative_bias": torch.zeros(4, 3, 3), "grid": (2, 3)}, r"= \(4, 3, 5\), got \(4, 3, 3\)"),
        ({"grid": (2, 3)}, r"grid \(2, 3\) needs relative_bias"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        vlmkernels.interval_attention(**{**good(), **change})


@pytest.mark.parametrize("start", [3, None, (torch.zeros(5).int(), 3), (torch.zeros(5).int(),)])
def test_a_start_that_is_neither_a_tensor_nor_both(start):
    with pytest.raises(
        TypeError, match=r"start must be Intervals or \(dense Tensor, dense Tensor\) or dense"
    ):
        vlmkernels.interval_attention(**{**good(), "start": start, "end": None})


def test_all_faults_in_one_error():
    change = {"key": torch.zeros(2, 2, 6, 7), "end": torch.zeros(4).int(), "grid": (1, 1)}
    with pytest.raises(ValueError, match=r"(?s)the same width.*start and end.*grid"):
        vlmkernels.interval_attention(**{**good(), **change})
