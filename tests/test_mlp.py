import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.dense import ACTIVATIONS, DTYPES, assert_layer_as_good, plain_activation
from vlmkernels import reference
from vlmkernels.testing import result_and_gradients, saved_activation_bytes

op = vlmkernels.mlp
raw = torch.ops.vlmkernels.mlp.default
raw_bwd = torch.ops.vlmkernels.mlp_bwd.default
NATIVE = vlmkernels.info()["ops"]["mlp"]["CPU"] != "reference"
IMPLEMENTATIONS = {"dispatched": op, "reference": reference.mlp}
if torch.cuda.is_available():
    IMPLEMENTATIONS["cuda"] = lambda *tensors, **options: op(*(t.cuda() for t in tensors), **options).cpu()


def inputs(rows, k, h, o, dtype=torch.float32):
    """x [*rows, k], w1 [h, k], b1 [h], w2 [o, h] and b2 [o]; all require gradients."""
    tensors = [
        torch.randn(*rows, k),
        torch.randn(h, k) / max(k, 1) ** 0.5,
        torch.randn(h),
        torch.randn(o, h) / max(h, 1) ** 0.5,
        torch.randn(o),
    ]
    return [t.to(dtype).requires_grad_() for t in tensors]


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
    assert_layer_as_good(
        IMPLEMENTATIONS[impl], reference.mlp, inputs(rows, k, h, o, dtype), activation="gelu"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 200])
def test_activations(dtype, activation, rows):
    assert_layer_as_good(op, reference.mlp, inputs((rows,), 40, 72, 24, dtype), activation=activation)


@pytest.mark.skipif(not NATIVE, reason="the reference runs torch's products only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 300, 4200])
def test_products_of_torch(products, dtype, rows):
    tensors = inputs((rows,), 20, 36, 12, dtype)
    for who in ("torch", "own"):
        products(who)
        assert_layer_as_good(op, reference.mlp, tensors, activation="gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_modules_of_torch(activation):
    tensors = inputs((4, 50), 48, 80, 32, torch.float64)
    residual = torch.randn(4, 50, 32, dtype=torch.float64, requires_grad=True)

    def ours(x, w1, b1, w2, b2, r):
        return op(x, w1, b1, w2, b2, activation=activation, residual=r)

    def theirs(x, w1, b1, w2, b2, r):
        return F.linear(plain_activation(F.linear(x, w1, b1), activation), w2, b2) + r

    got, want = (result_and_gradients(fn, [*tensors, residual]) for fn in (ours, theirs))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_autocast_casts_the_operands_and_not_the_residual():
    tensors, residual = inputs((4, 9), 32, 48, 16), torch.randn(4, 9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out, *grads = result_and_gradients(op, tensors, activation="gelu", residual=residual)
        alone = op(*tensors, activation="gelu")
        double = op(*(t.detach().double() for t in tensors), activation="gelu")
    assert {t.dtype for t in (out, *grads)} == {torch.float32}
    assert (alone.dtype, double.dtype) == (torch.bfloat16, torch.float64)
    assert torch.equal(
        out, op(*(t.detach().bfloat16() for t in tensors), activation="gelu", residual=residual)
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    tensors = [
        *inputs((3,), 5, 7, 4, torch.float64),
        torch.randn(3, 4, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(
        lambda x, w1, b1, w2, b2, r: op(x, w1, b1, w2, b2, activation=activation, residual=r), tensors
    )


@pytest.mark.parametrize("trained", range(1, 32), ids=lambda bits: f"{bits:05b}")
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "formed again"])
def test_frozen_inputs(trained, keep):
    tensors = inputs((130,), 20, 36, 12)

    def fn(*tensors):
        return raw(*tensors, None, "gelu", keep)[0]

    everything = result_and_gradients(fn, tensors)
    some = [t.detach().requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(tensors)]
    for got, want, tensor in zip(result_and_gradients(fn, some)[1:], everything[1:], some, strict=True):
        assert (got is not None) == tensor.requires_grad
        if got is not None:
            torch.testing.assert_close(got, want)


def test_what_the_backward_keeps():
    """x and the input of the activation."""
    x, *weights = inputs((256,), 32, 64, 16)
    known = [x, *weights]
    y = 4 * 256 * 64
    assert saved_activation_bytes(lambda: op(x, *weights, activation="gelu"), parameters=known) == y
    frozen = [t.detach() for t in weights]
    assert saved_activation_bytes(lambda: op(2 * x, *frozen, activation="gelu"), parameters=frozen) == y


def test_unneeded_outputs_have_size_0():
    x, w1, b1, w2, b2 = (t.detach() for t in inputs((5,), 6, 7, 3))
    out, y = raw(x, w1, b1, w2, b2, None, "gelu", False)
    assert (out.shape, y.numel()) == ((5, 3), 0)
    for needed in range(5):
        needs = [i == needed for i in range(5)]
        grads = raw_bwd(out, x, w1, b1, w2, None, "gelu", needs)
        sizes = [t.numel() if need else 0 for t, need in zip((x, w1, b1, w2, b2), needs, strict=True)]
        assert [g.numel() for g in grads] == sizes


def test_second_derivative_is_refused():
    x, *weights = inputs((3,), 7, 5, 4)
    (dx,) = torch.autograd.grad(op(x, *weights, activation="silu").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"vlmkernels\.mlp has no second derivative"):
        dx.sum().backward()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    x, w1, w2, dout = torch.randn(5, 4, 10), torch.randn(8, 10), torch.randn(6, 8), torch.randn(5, 4, 6)
    if permuted:
        x, dout, w1, w2 = x.permute(1, 0, 2), dout.permute(1, 0, 2), torch.randn(10, 8).T, torch.randn(8, 6).T
    b1, b2, y = torch.randn(8), torch.randn(6), torch.randn(*x.shape[:-1], 8)
    trained = [t.detach().requires_grad_() for t in (x, w1, b1, w2, b2, torch.randn_like(dout))]
    torch.library.opcheck(raw, (*trained, "gelu", True))
    torch.library.opcheck(raw, (x, w1, None, w2, None, None, "none", False))
    for needs in ([True] * 5, [False, True, False, False, True], [True, False, True, False, False]):
        torch.library.opcheck(raw_bwd, (dout, x, w1, b1, w2, y, "gelu", needs))
    torch.library.opcheck(raw_bwd, (dout, x, w1, None, w2, None, "gelu", [True] * 5))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(*tensors):
        return op(*tensors, activation="gelu")

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        tensors = inputs((rows,), 16, 24, 8)
        for got, want in zip(
            result_and_gradients(compiled, tensors), result_and_gradients(step, tensors), strict=True
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
    got, want = (result_and_gradients(fn, tensors, activation="gelu") for fn in (op, reference.mlp))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [10, 300])
def test_views_of_any_strides(rows):
    tensors = (
        torch.randn(1, 9).expand(rows, 9),
        torch.randn(18, 12)[::2, ::2].T,
        torch.randn(1).expand(6),
        torch.randn(6, 4).T,
        torch.randn(8)[::2],
        torch.randn(4, rows).T,
    )
    tensors = [t.requires_grad_() for t in tensors]

    def run(fn):
        return result_and_gradients(
            lambda x, w1, b1, w2, b2, r: fn(x, w1, b1, w2, b2, activation="relu", residual=r), tensors
        )

    for ours, theirs in zip(run(op), run(reference.mlp), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not NATIVE, reason="torch splits sums by the number of threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 1500])
def test_deterministic_for_any_number_of_threads(for_thread_counts, products, dtype, rows):
    products("own")
    tensors = inputs((rows,), 129, 270, 70, dtype)
    first, *others = for_thread_counts(lambda: result_and_gradients(op, tensors, activation="gelu"))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not NATIVE, reason="the reference holds the hidden layer")
@pytest.mark.once
@pytest.mark.parametrize(("who", "mebibytes"), [("own", 32), ("torch", 112)])
def test_the_hidden_layer_is_never_stored_whole(peak_memory, who, mebibytes):
    """Without a backward it would take 128 MiB beside the result's 4; what torch's products take varies."""
    script = f"""
from vlmkernels import _calibration
_calibration.apply(_calibration.all_products({who!r}))
x, b1, b2 = torch.randn(32768, 32), torch.randn(1024), torch.randn(32)
w1, w2 = torch.randn(1024, 32), torch.randn(32, 1024)
def run(rows=32768):
    vlmkernels.mlp(x[:rows], w1, b1, w2, b2, activation="gelu")
run(512)
"""
    assert peak_memory(script) < mebibytes << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w1": torch.zeros(5, 4)}, r"w1 must be \[\*, 5\], got \(5, 4\)"),
        ({"w2": torch.zeros(3, 4)}, r"w2 must be \[\*, 6\], got \(3, 4\)"),
        ({"b1": torch.zeros(5)}, r"b1 must be \[6\], got \(5,\)"),
        ({"b2": torch.zeros(6)}, r"b2 must be \[4\], got \(6,\)"),
        ({"w2": torch.zeros(4, 6, dtype=torch.float64)}, "the same dtype, got x torch.float32"),
        ({"residual": torch.zeros(3, 6)}, r"residual must be \(3, 4\), got \(3, 6\)"),
        ({"activation": "swish"}, "activation must be one of none, gelu, .*, got 'swish'"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {
        "x": torch.zeros(3, 5), "w1": torch.zeros(6, 5), "b1": None, "w2": torch.zeros(4, 6), "b2": None,
        "activation": "gelu",
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})
