import pytest
import torch

import vlmkernels
from vlmkernels import reference
from vlmkernels.testing import assert_op_as_good, result_and_gradients

NATIVE = vlmkernels.info()["ops"]["gated_residual"]["CPU"] != "reference"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLEMENTATIONS = {"dispatched": vlmkernels.gated_residual, "reference": reference.gated_residual}
if torch.cuda.is_available():
    IMPLEMENTATIONS["cuda"] = lambda x, y, gate, row_mask=None: vlmkernels.gated_residual(
        x.cuda(), y.cuda(), gate.cuda(), row_mask=None if row_mask is None else row_mask.cuda()
    ).cpu()


def inputs(shape, dtype, gate_shape=(), gate_dtype=torch.float32):
    x, y = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    gate = torch.randn(gate_shape).to(gate_dtype if dtype != torch.float64 else dtype)
    return [t.requires_grad_() for t in (x, y, gate)]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 37), (2, 5, 130), (7, 64), (300, 257), (64,), (40_000, 1), (5000, 3)], ids=str
)
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_forward_and_gradients(impl, dtype, shape, vector):
    tensors = inputs(shape, dtype, shape[-1:] if vector else ())
    assert_op_as_good(IMPLEMENTATIONS[impl], reference.gated_residual, tensors, features=0)


def test_mask_keeps_rows_whatever_y_holds():
    x, y, gate = inputs((4, 6, 33), torch.float32, (33,))
    mask = torch.rand(4, 6) < 0.5
    with torch.no_grad():
        y[~mask] = float("nan")
    out, dx, dy, dgate = result_and_gradients(
        lambda *t: vlmkernels.gated_residual(*t, row_mask=mask), (x, y, gate)
    )
    assert torch.equal(out[~mask], x[~mask])
    assert torch.isfinite(out).all()
    assert torch.isfinite(dgate).all()
    assert (dy[~mask] == 0).all()
    assert (dx != 0).all()
    clean = y.detach().clone()
    clean[~mask] = 0
    kept = result_and_gradients(
        lambda *t: reference.gated_residual(*t, row_mask=mask), (x, clean.requires_grad_(), gate)
    )
    torch.testing.assert_close(dgate, kept[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_gate_gives_x_and_a_gradient(dtype):
    x, y, _ = inputs((5, 40), dtype)
    gate = torch.zeros(1, dtype=dtype, requires_grad=True)
    out = vlmkernels.gated_residual(x, y, gate)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()
    (dgate,) = torch.autograd.grad(out.sum(), gate)
    torch.testing.assert_close(dgate, y.detach().double().sum().to(dtype).reshape(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 24), (24,), (1, 1)], ids=str)
def test_gate_gradient_has_the_gates_shape(shape):
    x, y, gate = inputs((2, 3, 24), torch.float32, shape, torch.bfloat16)
    _, _, _, dgate = result_and_gradients(vlmkernels.gated_residual, (x, y, gate))
    assert dgate.shape == gate.shape
    assert dgate.dtype == gate.dtype


@pytest.mark.parametrize(
    ("left", "right"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16), (torch.float64, torch.float32)],
)
def test_x_and_y_promote_and_the_gate_does_not(left, right):
    x, y = torch.randn(3, 8).to(left).requires_grad_(), torch.randn(3, 8).to(right).requires_grad_()
    gate = torch.randn(8, dtype=torch.float64, requires_grad=True)
    out, dx, dy, dgate = result_and_gradients(vlmkernels.gated_residual, (x, y, gate))
    assert out.dtype == torch.promote_types(left, right)
    assert (dx.dtype, dy.dtype, dgate.dtype) == (left, right, torch.float64)
    tight = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(out, reference.gated_residual(x, y, gate), **tight)


def test_gradcheck():
    tensors = inputs((3, 7), torch.float64, (7,))
    assert torch.autograd.gradcheck(vlmkernels.gated_residual, tensors)
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda *t: vlmkernels.gated_residual(*t, row_mask=mask), tensors)


def test_second_derivative_is_refused():
    x, y, gate = inputs((3, 7), torch.float32)
    (dy,) = torch.autograd.grad(vlmkernels.gated_residual(x, y, gate).sum(), y, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_residual has no second derivative"):
        dy.sum().backward()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
@pytest.mark.once
def test_registration(permuted, vector):
    x, y = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    if permuted:
        x, y = x.permute(1, 0, 2), y.permute(1, 0, 2)
    gate, mask = torch.randn(6 if vector else 1, requires_grad=True), torch.rand(x.shape[:-1]) < 0.5
    torch.library.opcheck(
        torch.ops.vlmkernels.gated_residual.default, (x.requires_grad_(), y.requires_grad_(), gate, mask)
    )
    torch.library.opcheck(torch.ops.vlmkernels.gated_residual.default, (x, y, gate, None))
    dout = torch.randn(5, 4, 6).permute(1, 0, 2) if permuted else torch.randn(5, 4, 6)
    bwd = torch.ops.vlmkernels.gated_residual_bwd.default
    torch.library.opcheck(bwd, (dout, y.detach(), gate.detach(), mask, [True, True]))
    torch.library.opcheck(bwd, (dout, y.detach(), gate.detach(), None, [False, True]))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(x, y, gate, mask):
        return vlmkernels.gated_residual(x, y, gate, row_mask=mask)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x, y, gate = inputs((rows, 16), torch.float32, (16,))
        mask = torch.rand(rows) < 0.5
        for got, want in zip(
            result_and_gradients(lambda *t, f=compiled, m=mask: f(*t, m), (x, y, gate)),
            result_and_gradients(lambda *t, m=mask: step(*t, m), (x, y, gate)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,), (2, 0, 5)], ids=str)
def test_empty(shape):
    x, y, gate = inputs(shape, torch.float32)
    out, dx, dy, dgate = result_and_gradients(vlmkernels.gated_residual, (x, y, gate))
    assert out.shape == dx.shape == dy.shape == torch.Size(shape)
    assert dgate == 0


def test_views_and_frozen_inputs():
    x = torch.randn(6, 10).T.requires_grad_()
    y = torch.randn(1, 6).expand(10, 6)
    gate = torch.randn(1)
    out, dx, dy, dgate = result_and_gradients(vlmkernels.gated_residual, (x, y, gate))
    torch.testing.assert_close(out, reference.gated_residual(x, y, gate))
    assert dy is None
    assert dgate is None
    torch.testing.assert_close(dx, (torch.arange(60) % 65 / 64 + 0.5).reshape(10, 6))


def test_extreme_values():
    x, y = torch.full((2, 4), 3e38), torch.tensor([[1e-30, -1e38, 0.0, float("inf")]] * 2)
    for gate in (torch.tensor(50.0), torch.tensor(-50.0), torch.tensor(1e-6)):
        torch.testing.assert_close(
            vlmkernels.gated_residual(x, y, gate), reference.gated_residual(x, y, gate), rtol=1e-6, atol=0
        )


@pytest.mark.skipif(not NATIVE, reason="torch splits a sum by the number of threads")
def test_deterministic_for_any_number_of_threads():
    x, y, gate = inputs((3000, 129), torch.float32)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(result_and_gradients(vlmkernels.gated_residual, (x, y, gate)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    x, gate = torch.randn(4096, 1024), torch.randn(1)
    assert busy_threads(lambda: vlmkernels.gated_residual(x, x, gate)) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.zeros(3, 5)}, r"x \(3, 4\) and y \(3, 5\)"),
        ({"gate": torch.zeros(3)}, r"1 or D = 4 elements, got \(3,\)"),
        (
            {"row_mask": torch.ones(4, dtype=torch.bool)},
            r"row_mask must be bool \(3,\), got torch.bool \(4,\)",
        ),
        ({"row_mask": torch.ones(3)}, r"row_mask must be bool"),
        (
            {"x": torch.zeros(3, 4, dtype=torch.int64)},
            "float32, float64, bfloat16 or float16, got x torch.int64",
        ),
        ({"x": torch.tensor(1.0), "y": torch.tensor(1.0)}, "the same shape"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {"x": torch.zeros(3, 4), "y": torch.zeros(3, 4), "gate": torch.zeros(1)}
    with pytest.raises(ValueError, match=message):
        vlmkernels.gated_residual(**{**good, **change})


def test_all_faults_in_one_error():
    with pytest.raises(ValueError, match=r"(?s)gate.*row_mask"):
        vlmkernels.gated_residual(
            torch.zeros(3, 4), torch.zeros(3, 4), torch.zeros(2), row_mask=torch.ones(1)
        )
