import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.dense import ACTIVATIONS, DTYPES, assert_layer_as_good, plain_activation
from vlmkernels import reference
from vlmkernels.testing import result_and_gradients, saved_activation_bytes

op = vlmkernels.gated_mlp
raw = torch.ops.vlmkernels.gated_mlp.default
raw_bwd = torch.ops.vlmkernels.gated_mlp_bwd.default
NATIVE = vlmkernels.info()["ops"]["gated_mlp"]["CPU"] != "reference"
IMPLEMENTATIONS = {"dispatched": op, "reference": reference.gated_mlp}
if torch.cuda.is_available():
    IMPLEMENTATIONS["cuda"] = lambda *tensors, **options: op(
        *(t.cuda() for t in tensors),
        **{name: o.cuda() if isinstance(o, torch.Tensor) else o for name, o in options.items()},
    ).cpu()


def inputs(rows, k, h, o, dtype=torch.float32):
    """x [*rows, k], w_gate and w_up [h, k], w_down [o, h], b_gate, b_up [h], b_down [o]."""
    tensors = [
        torch.randn(*rows, k),
        torch.randn(h, k) / max(k, 1) ** 0.5,
        torch.randn(h, k) / max(k, 1) ** 0.5,
        torch.randn(o, h) / max(h, 1) ** 0.5,
        torch.randn(h),
        torch.randn(h),
        torch.randn(o),
    ]
    return [t.to(dtype).requires_grad_() for t in tensors]


def with_biases(fn):
    return lambda x, w_gate, w_up, w_down, b_gate, b_up, b_down, **options: fn(
        x, w_gate, w_up, w_down, b_gate=b_gate, b_up=b_up, b_down=b_down, **options
    )


SHAPES = [
    ((1,), 1, 1, 1),
    ((), 37, 130, 5),
    ((2, 5), 130, 37, 64),
    ((130,), 33, 257, 40),
    ((700,), 96, 300, 70),
    ((2100,), 5, 9, 3),
    ((4200,), 3, 2, 4),
]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "k", "h", "o"), SHAPES, ids=str)
def test_forward_and_gradients(impl, dtype, rows, k, h, o):
    tensors = inputs(rows, k, h, o, dtype)
    fn, plain = with_biases(IMPLEMENTATIONS[impl]), with_biases(reference.gated_mlp)
    assert_layer_as_good(fn, plain, tensors, inner=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 200])
def test_activations(dtype, activation, rows):
    tensors = inputs((rows,), 40, 72, 24, dtype)[:4]
    assert_layer_as_good(op, reference.gated_mlp, tensors, inner=3, activation=activation)


@pytest.mark.skipif(not NATIVE, reason="the reference runs torch's products only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 300, 4200])
def test_products_of_torch(products, dtype, rows):
    tensors = inputs((rows,), 20, 36, 12, dtype)
    for who in ("torch", "own"):
        products(who)
        assert_layer_as_good(with_biases(op), with_biases(reference.gated_mlp), tensors, inner=3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_modules_of_torch(activation):
    tensors = [*inputs((4, 50), 48, 80, 32, torch.float64), torch.randn(4, 50, 32, dtype=torch.float64)]

    def ours(*tensors):
        return with_biases(op)(*tensors[:-1], activation=activation, residual=tensors[-1])

    def theirs(x, w_gate, w_up, w_down, b_gate, b_up, b_down, r):
        hidden = plain_activation(F.linear(x, w_gate, b_gate), activation) * F.linear(x, w_up, b_up)
        return F.linear(hidden, w_down, b_down) + r

    tensors[-1].requires_grad_()
    got, want = (result_and_gradients(fn, tensors) for fn in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_autocast_casts_the_operands_and_not_the_residual():
    tensors, residual = inputs((4, 9), 32, 48, 16), torch.randn(4, 9, 16)
    fn = with_biases(op)
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = result_and_gradients(fn, tensors, residual=residual)
        alone = fn(*tensors)
    assert {t.dtype for t in (out, *grads)} == {torch.float32}
    assert alone.dtype == torch.bfloat16
    assert torch.equal(out, fn(*(t.detach().bfloat16() for t in tensors), residual=residual))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = inputs((3,), 5, 7, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda *t: with_biases(op)(*t, activation=activation), tensors)


@pytest.mark.parametrize("trained", range(1, 128, 3), ids=lambda bits: f"{bits:07b}")
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "formed again"])
def test_frozen_inputs(trained, keep):
    tensors = inputs((130,), 20, 36, 12)

    def fn(*tensors):
        return raw(*tensors, None, "silu", keep)[0]

    everything = result_and_gradients(fn, tensors)
    some = [t.detach().requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(tensors)]
    for got, want, tensor in zip(result_and_gradients(fn, some)[1:], everything[1:], some, strict=True):
        assert (got is not None) == tensor.requires_grad
        if got is not None:
            torch.testing.assert_close(got, want)


def test_what_the_backward_keeps():
    """x and the two products before the activation."""
    tensors = inputs((256,), 32, 64, 16)
    kept = saved_activation_bytes(lambda: with_biases(op)(*tensors), parameters=tensors)
    assert kept == 2 * 4 * 256 * 64


def test_unneeded_outputs_have_size_0():
    tensors = [t.detach() for t in inputs((5,), 6, 7, 3)]
    x, w_gate, w_up, w_down, b_gate, b_up, _ = tensors
    out, gate, up = raw(*tensors, None, "silu", False)
    assert (out.shape, gate.numel(), up.numel()) == ((5, 3), 0, 0)
    for needed in range(7):
        needs = [i == needed for i in range(7)]
        grads = raw_bwd(out, x, w_gate, w_up, w_down, b_gate, b_up, None, None, "silu", needs)
        sizes = [t.numel() if need else 0 for t, need in zip(tensors, needs, strict=True)]
        assert [g.numel() for g in grads] == sizes


def test_second_derivative_is_refused():
    x, *weights = inputs((3,), 7, 5, 4)[:4]
    (dx,) = torch.autograd.grad(op(x, *weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"vlmkernels\.gated_mlp has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    x, dout, w_gate, w_down = (torch.randn(s) for s in ((5, 4, 10), (5, 4, 6), (8, 10), (6, 8)))
    if permuted:
        x, dout, w_gate = x.permute(1, 0, 2), dout.permute(1, 0, 2), torch.randn(10, 8).T
    w_up, b, b_down = torch.randn(8, 10), torch.randn(8), torch.randn(6)
    gate, up = (torch.randn(*x.shape[:-1], 8) for _ in range(2))
    trained = [t.detach().requires_grad_() for t in (x, w_gate, w_up, w_down, b, b, b_down, dout)]
    torch.library.opcheck(raw, (*trained, "silu", True))
    torch.library.opcheck(raw, (x, w_gate, w_up, w_down, None, None, None, None, "none", False))
    for needs in ([True] * 7, [i == 1 for i in range(7)], [i in (0, 4) for i in range(7)]):
        torch.library.opcheck(raw_bwd, (dout, x, w_gate, w_up, w_down, b, b, gate, up, "silu", needs))
    torch.library.opcheck(
        raw_bwd, (dout, x, w_gate, w_up, w_down, None, None, None, None, "silu", [True] * 7)
    )


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    compiled = torch.compile(with_biases(op), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        tensors = inputs((rows,), 16, 24, 8)
        for got, want in zip(
            result_and_gradients(compiled, tensors),
            result_and_gradients(with_biases(op), tensors),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("rows", "k", "h", "o"),
    [
        ((0,), 8, 4, 2),
        ((3,), 0, 4, 2),
        ((3,), 8, 0, 2),
        ((2313,), 3, 0, 100),
        ((3,), 8, 4, 0),
        ((2, 0, 5), 8, 4, 2),
    ],
    ids=str,
)
def test_empty(rows, k, h, o):
    tensors = inputs(rows, k, h, o)
    got, want = (result_and_gradients(with_biases(fn), tensors) for fn in (op, reference.gated_mlp))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not NATIVE, reason="torch splits sums by the number of threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 1500])
def test_deterministic_for_any_number_of_threads(for_thread_counts, products, dtype, rows):
    products("own")
    tensors = inputs((rows,), 129, 270, 70, dtype)
    first, *others = for_thread_counts(lambda: result_and_gradients(with_biases(op), tensors))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w_gate": torch.zeros(6, 4)}, r"w_gate must be \[\*, 5\], got \(6, 4\)"),
        ({"w_up": torch.zeros(5, 5)}, r"w_up must be \[6, 5\], got \(5, 5\)"),
        ({"w_down": torch.zeros(3, 4)}, r"w_down must be \[\*, 6\], got \(3, 4\)"),
        ({"b_up": torch.zeros(5)}, r"b_up must be \[6\], got \(5,\)"),
        ({"b_down": torch.zeros(4).double()}, "the same dtype, got x torch.float32"),
        ({"residual": torch.zeros(4)}, r"residual must be \(3, 4\), got \(4,\)"),
        ({"activation": None}, "activation must be one of none, gelu, .*, got None"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {"x": torch.zeros(3, 5), "w_gate": torch.zeros(6, 5), "w_up": torch.zeros(6, 5)}
    good["w_down"] = torch.zeros(4, 6)
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
