import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from vlmkernels import reference
from vlmkernels.reference.gated_linear_residual import gated_linear_residual_bwd
from vlmkernels.testing import assert_as_good, result_and_gradients

op = vlmkernels.gated_linear_residual
raw = torch.ops.vlmkernels.gated_linear_residual.default
raw_bwd = torch.ops.vlmkernels.gated_linear_residual_bwd.default
NATIVE = vlmkernels.info()["ops"]["gated_linear_residual"]["CPU"] != "reference"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLEMENTATIONS = {"dispatched": op, "reference": reference.gated_linear_residual}
if torch.cuda.is_available():
    IMPLEMENTATIONS["cuda"] = lambda *tensors, row_mask=None: op(
        *(t.cuda() for t in tensors), row_mask=None if row_mask is None else row_mask.cuda()
    ).cpu()


def inputs(rows, d, k, dtype=torch.float32, gate_shape=(), x_dtype=None, gate_dtype=torch.float32):
    """x [*rows, d], h [*rows, k], weight [d, k] and a gate; all require gradients."""
    x, h = torch.randn(*rows, d).to(x_dtype or dtype), torch.randn(*rows, k).to(dtype)
    weight = (torch.randn(d, k) / max(k, 1) ** 0.5).to(dtype)
    gate = torch.randn(gate_shape).to(gate_dtype if dtype != torch.float64 else dtype)
    return [t.requires_grad_() for t in (x, h, weight, gate)]


def plain(tensors, row_mask, orders=1):
    """Result and gradients in plain PyTorch, by autograd and by the formulas of the reference's backward.

    A single gate's gradient is one number, and how far off that is is chance: hence several orders of the sum
    over K.
    """
    found = []
    for _ in range(orders):
        order = torch.randperm(tensors[1].shape[-1]) if found else torch.arange(tensors[1].shape[-1])
        x, h, weight, gate = tensors
        shuffled = [
            x,
            h.detach()[..., order].requires_grad_(),
            weight.detach()[:, order].requires_grad_(),
            gate,
        ]
        results = result_and_gradients(reference.gated_linear_residual, shuffled, row_mask=row_mask)
        incoming = results[1]
        formulas = gated_linear_residual_bwd(
            incoming, *(t.detach() for t in shuffled[1:]), row_mask, (True, True, True)
        )
        back = torch.argsort(order)
        for dh, dweight, dgate in (results[2:], formulas):
            found.append([*results[:2], dh[..., back], dweight[:, back], dgate])
    return found


def assert_op_as_good(fn, tensors, row_mask=None):
    got = result_and_gradients(fn, tensors, row_mask=row_mask)
    double = tensors[1].dtype == torch.float64
    wide = [t.detach().to(torch.float64 if double else torch.float32).requires_grad_() for t in tensors]
    lows = plain(wide, row_mask, orders=4)
    exact = plain([t.detach().double().requires_grad_() for t in tensors], row_mask)[0]
    names = ["result", "dx", "dh", "dweight", "dgate"]
    for name, ours, truth, *theirs in zip(names, got, exact, *lows, strict=True):
        assert_as_good(ours, [low.to(ours.dtype) for low in theirs], truth, name=name)


SHAPES = [
    ((1,), 1, 1),
    ((), 37, 130),
    ((3,), 37, 5),
    ((2, 5), 130, 37),
    ((7,), 64, 96),
    ((300,), 33, 257),
    ((150, 3), 260, 64),
    ((129,), 300, 600),
    ((140,), 1100, 530),
    ((700,), 530, 600),
    ((20_000,), 1, 3),
    ((1500,), 3, 1),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "d", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_forward_and_gradients(impl, dtype, rows, d, k, vector):
    tensors = inputs(rows, d, k, dtype, (d,) if vector else ())
    assert_op_as_good(IMPLEMENTATIONS[impl], tensors)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "kept"), [(6, 0.5), (500, 0.5), (700, 0.02), (400, 0.98)])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_forward_and_gradients_with_a_mask(impl, dtype, rows, kept, vector):
    tensors = inputs((rows,), 72, 40, dtype, (72,) if vector else ())
    mask = torch.rand(rows) < kept
    assert_op_as_good(IMPLEMENTATIONS[impl], tensors, row_mask=mask)


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_equals_linear_then_gated_residual(vector):
    tensors = inputs((4, 50), 48, 80, torch.float64, (48,) if vector else (1,))
    mask = torch.rand(4, 50) < 0.7
    got = result_and_gradients(op, tensors, row_mask=mask)
    want = result_and_gradients(
        lambda x, h, weight, gate: reference.gated_residual(x, F.linear(h, weight), gate, row_mask=mask),
        tensors,
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize("rows", [6, 300])
def test_mask_keeps_rows_whatever_h_holds(dtype, vector, rows):
    x, h, weight, gate = inputs((2, rows), 33, 70, dtype, (33,) if vector else ())
    mask = torch.rand(2, rows) < 0.5
    with torch.no_grad():
        h[~mask] = float("nan")
    out, dx, dh, dweight, dgate = result_and_gradients(op, (x, h, weight, gate), row_mask=mask)
    assert torch.equal(out[~mask], x[~mask])
    assert (dh[~mask] == 0).all()
    assert (dx != 0).all()
    for finite in (out, dh, dweight, dgate):
        assert torch.isfinite(finite).all()
    rows_kept = [x.detach()[mask], h.detach()[mask], weight, gate]
    want = reference.gated_linear_residual(*(t.double() for t in rows_kept))
    torch.testing.assert_close(out[mask].double(), want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("rows", [5, 300])
def test_all_rows_masked(rows):
    x, h, weight, gate = inputs((rows,), 40, 24)
    mask = torch.zeros(rows, dtype=torch.bool)
    out, dx, dh, dweight, dgate = result_and_gradients(op, (x, h, weight, gate), row_mask=mask)
    assert torch.equal(out, x)
    assert (dx != 0).all()
    assert dh.count_nonzero() == dweight.count_nonzero() == dgate.count_nonzero() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (40,)], ids=str)
def test_zero_gate_gives_x_and_a_gradient(dtype, shape):
    x, h, weight, _ = inputs((5,), 40, 24, dtype)
    gate = torch.zeros(shape, dtype=dtype, requires_grad=True)
    out, _, dh, dweight, dgate = result_and_gradients(op, (x, h, weight, gate))
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    assert dh.count_nonzero() == dweight.count_nonzero() == 0
    assert (dgate != 0).all()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 24), (24,), (1, 1)], ids=str)
def test_gate_gradient_has_the_gates_shape(shape):
    tensors = inputs((2, 3), 24, 10, gate_shape=shape, gate_dtype=torch.bfloat16)
    dgate = result_and_gradients(op, tensors)[4]
    assert dgate.shape == shape
    assert dgate.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("x_dtype", "dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
)
@pytest.mark.parametrize("rows", [6, 200])
def test_x_and_h_promote_and_the_gate_does_not(x_dtype, dtype, rows):
    x, h, weight, gate = inputs((rows,), 70, 20, dtype, (70,), x_dtype, torch.float64)
    out, *grads = result_and_gradients(op, (x, h, weight, gate))
    assert out.dtype == torch.promote_types(x_dtype, dtype)
    assert [g.dtype for g in grads] == [x_dtype, dtype, dtype, gate.dtype]
    exact = reference.gated_linear_residual(*(t.detach().double() for t in (x, h, weight, gate)))
    eps = torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=8 * eps, atol=40 * eps)


def test_autocast_casts_h_and_weight_only():
    x, h, weight, gate = inputs((4, 9), 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        out, dx, dh, dweight, dgate = result_and_gradients(op, (x, h, weight, gate))
        mixed = op(x, h.bfloat16(), weight, gate)
        double = op(*(t.detach().double() for t in (x, h, weight, gate)))
    assert out.dtype == dx.dtype == dh.dtype == dweight.dtype == dgate.dtype == torch.float32
    assert double.dtype == torch.float64
    assert torch.equal(out, op(x, h.bfloat16(), weight.bfloat16(), gate))
    assert torch.equal(out, mixed)
    assert not torch.equal(out, op(x, h, weight, gate))


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_gradcheck(vector):
    tensors = inputs((3,), 7, 5, torch.float64, (7,) if vector else (1,))
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(op, tensors)
    assert torch.autograd.gradcheck(lambda *t: op(*t, row_mask=mask), tensors)


@pytest.mark.parametrize("trained", range(1, 16), ids=lambda bits: f"{bits:04b}")
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_frozen_inputs(trained, vector):
    tensors = inputs((130,), 20, 36, gate_shape=(20,) if vector else ())
    everything = result_and_gradients(op, tensors)
    some = [t.detach().requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(tensors)]
    for got, want, wanted in zip(
        result_and_gradients(op, some)[1:], everything[1:], [t.requires_grad for t in some], strict=True
    ):
        assert (got is not None) == wanted
        if wanted:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_unneeded_gradients_have_size_0():
    x, h, weight, gate = (t.detach() for t in inputs((5,), 6, 7))
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        sizes = [g.numel() for g in raw_bwd(x, h, weight, gate, None, needs)]
        assert sizes == [
            size if need else 0 for size, need in zip((h.numel(), weight.numel(), 1), needs, strict=True)
        ]


def test_second_derivative_is_refused():
    x, h, weight, gate = inputs((3,), 7, 5)
    (dh,) = torch.autograd.grad(op(x, h, weight, gate).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_linear_residual has no second derivative"):
        dh.sum().backward()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.once
def test_registration(permuted, vector):
    x, h, weight = torch.randn(5, 4, 6), torch.randn(5, 4, 10), torch.randn(6, 10)
    dout = torch.randn(5, 4, 6)
    if permuted:
        x, h, dout = (t.permute(1, 0, 2) for t in (x, h, dout))
        weight = torch.randn(10, 6).T
    gate, mask = torch.randn(6 if vector else 1), torch.rand(x.shape[:-1]) < 0.5
    trained = [t.detach().requires_grad_() for t in (x, h, weight, gate)]
    torch.library.opcheck(raw, (*trained, mask))
    torch.library.opcheck(raw, (*trained, None))
    for needs in ((True, True, True), (False, True, True), (True, False, True), (False, False, True)):
        torch.library.opcheck(raw_bwd, (dout, h, weight, gate, mask, needs))
    torch.library.opcheck(raw_bwd, (dout, h, weight, gate, None, [True, True, False]))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(x, h, weight, gate, mask):
        return op(x, h, weight, gate, row_mask=mask)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        tensors = inputs((rows,), 16, 24, gate_shape=(16,))
        mask = torch.rand(rows) < 0.5
        for got, want in zip(
            result_and_gradients(lambda *t, m=mask: compiled(*t, m), tensors),
            result_and_gradients(lambda *t, m=mask: step(*t, m), tensors),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


def test_meta_device():
    x, h, weight, gate = (
        t.detach().to("meta").requires_grad_() for t in inputs((3, 4), 8, 5, torch.bfloat16)
    )
    out = op(x.float(), h, weight, gate)
    assert (out.shape, out.dtype, out.device.type) == ((3, 4, 8), torch.float32, "meta")
    assert [g.shape for g in torch.autograd.grad(out.sum(), (h, weight))] == [h.shape, weight.shape]


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.parametrize(
    ("rows", "d", "k"), [((0,), 8, 4), ((3,), 0, 4), ((3,), 8, 0), ((2, 0, 5), 8, 4)], ids=str
)
def test_empty(rows, d, k, vector):
    x, h, weight, gate = inputs(rows, d, k, gate_shape=(d,) if vector else (1,))
    out, dx, dh, dweight, dgate = result_and_gradients(op, (x, h, weight, gate))
    assert torch.equal(out, x)
    assert (dx.shape, dh.shape, dweight.shape, dgate.shape) == (x.shape, h.shape, weight.shape, gate.shape)
    assert dh.count_nonzero() == dweight.count_nonzero() == dgate.count_nonzero() == 0


@pytest.mark.parametrize("rows", [10, 300])
def test_views_of_any_strides(rows):
    x = torch.randn(6, rows).T.requires_grad_()
    h = torch.randn(1, 9).expand(rows, 9).requires_grad_()
    weight = torch.randn(18, 12)[::2, ::2].T.requires_grad_()
    gate = torch.randn(1).expand(6).requires_grad_()
    mask = torch.rand(2 * rows)[::2] < 0.5
    got = result_and_gradients(op, (x, h, weight, gate), row_mask=mask)
    want = result_and_gradients(reference.gated_linear_residual, (x, h, weight, gate), row_mask=mask)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (dh,) = torch.autograd.grad(op(x, h, weight, gate).sum(), h)  # an expanded incoming gradient
    torch.testing.assert_close(dh, (gate.detach().tanh() @ weight.detach()).expand(rows, 9))


@pytest.mark.parametrize("rows", [2, 200])
def test_extreme_values(rows):
    x, h, weight = torch.full((rows, 4), 3e38), torch.zeros(rows, 3), torch.eye(4, 3)
    h[:, 1], h[:, 2] = 1e-30, -1e38
    for gate in (torch.tensor(50.0), torch.tensor(-50.0), torch.tensor(1e-6)):
        torch.testing.assert_close(
            op(x, h, weight, gate), reference.gated_linear_residual(x, h, weight, gate), rtol=1e-6, atol=0
        )
    h[0, 0] = float("inf")
    out = op(x, h, weight, torch.tensor(1.0))
    assert out[0, 0] == float("inf")
    assert torch.isfinite(out[1:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_sum_stays_exact(dtype):
    """One row and one column of many terms: a plain running sum in float32 would be worse than mm."""
    tensors = inputs((1,), 3, 20_000, dtype)
    assert_op_as_good(op, tensors)
    tensors = inputs((20_000,), 3, 2, dtype)
    assert_op_as_good(op, tensors)


@pytest.mark.skipif(not NATIVE, reason="torch splits sums by the number of threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 70, 1500])
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, False)], ids=str)
def test_deterministic_for_any_number_of_threads(for_thread_counts, dtype, rows, trained):
    x, h, weight, gate = inputs((rows,), 270, 129, dtype)
    h, weight = (t.detach().requires_grad_(need) for t, need in zip((h, weight), trained, strict=True))
    mask = torch.rand(rows) < 0.9
    first, *others = for_thread_counts(lambda: result_and_gradients(op, (x, h, weight, gate), row_mask=mask))
    for other in others:
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not NATIVE, reason="the reference forms the branch")
@pytest.mark.once
def test_the_branch_is_never_stored(peak_memory):
    """The result takes 64 MiB, and so would the branch, and its gradient."""
    script = """
x, h = torch.randn(16384, 1024), torch.randn(16384, 64, requires_grad=True)
weight, gate = torch.randn(1024, 64, requires_grad=True), torch.zeros(1, requires_grad=True)
incoming = torch.randn(16384, 1024)
def run(rows=16384):
    out = vlmkernels.gated_linear_residual(x[:rows], h[:rows], weight, gate)
    torch.autograd.grad(out, (h, weight, gate), incoming[:rows])
run(512)
"""
    assert peak_memory(script) < (64 + 48) << 20


@pytest.mark.skipif(not NATIVE, reason="the reference may use torch's own threads")
@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    x, h, weight, gate = (t.detach() for t in inputs((2048,), 512, 512))
    assert busy_threads(lambda: op(x, h, weight, gate)) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(2, 5)}, r"same rows, got \(3, 4\) and \(2, 5\)"),
        ({"h": torch.tensor(1.0)}, r"same rows, got \(3, 4\) and \(\)"),
        ({"x": torch.tensor(1.0)}, "same rows"),
        ({"weight": torch.zeros(5, 4)}, r"weight must be \[D, K\] = \(4, 5\), got \(5, 4\)"),
        ({"weight": torch.zeros(4)}, r"weight must be \[D, K\] = \(4, 5\), got \(4,\)"),
        (
            {"weight": torch.zeros(4, 5, dtype=torch.float64)},
            "the same dtype, got h torch.float32, weight torch.float64",
        ),
        ({"gate": torch.zeros(3)}, r"1 or D = 4 elements, got \(3,\)"),
        (
            {"row_mask": torch.ones(4, dtype=torch.bool)},
            r"row_mask must be bool \(3,\), got torch.bool \(4,\)",
        ),
        ({"row_mask": torch.ones(3)}, "row_mask must be bool"),
        (
            {"x": torch.zeros(3, 4, dtype=torch.int64)},
            "float32, float64, bfloat16 or float16, got x torch.int64",
        ),
        ({"gate": torch.zeros(1, device="meta")}, r"the same device, got \['cpu', 'meta'\]"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {
        "x": torch.zeros(3, 4), "h": torch.zeros(3, 5), "weight": torch.zeros(4, 5), "gate": torch.zeros(1)
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})


def test_all_faults_in_one_error():
    with pytest.raises(ValueError, match=r"(?s)weight.*gate.*row_mask"):
        op(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(5, 4), torch.zeros(2), row_mask=torch.ones(1))
