import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.dense import ACTIVATIONS, DTYPES, assert_layer_as_good, plain_activation
from vlmkernels import reference
from vlmkernels.testing import result_and_gradients, saved_activation_bytes

op = vlmkernels.linear
raw = torch.ops.vlmkernels.linear.default
raw_bwd = torch.ops.vlmkernels.linear_bwd.default
NATIVE = vlmkernels.info()["ops"]["linear"]["CPU"] != "reference"
IMPLEMENTATIONS = {"dispatched": op, "reference": reference.linear}
if torch.cuda.is_available():
    IMPLEMENTATIONS["cuda"] = lambda *tensors, residual=None, **options: op(
        *(t.cuda() for t in tensors), residual=None if residual is None else residual.cuda(), **options
    ).cpu()


def inputs(rows, o, k, dtype=torch.float32):
    """x [*rows, k], weight [o, k] and bias [o]; all require gradients."""
    x, weight, bias = torch.randn(*rows, k), torch.randn(o, k) / max(k, 1) ** 0.5, torch.randn(o)
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


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
    ((5000,), 70, 3),
    ((1500,), 3, 1),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "o", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_forward_and_gradients(impl, dtype, rows, o, k, activation):
    assert_layer_as_good(
        IMPLEMENTATIONS[impl], reference.linear, inputs(rows, o, k, dtype), activation=activation
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 6, 200])
def test_activations(impl, dtype, activation, rows):
    assert_layer_as_good(
        IMPLEMENTATIONS[impl], reference.linear, inputs((rows,), 72, 40, dtype), activation=activation
    )


@pytest.mark.skipif(not NATIVE, reason="the reference runs torch's products only")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "silu", "relu"])
@pytest.mark.parametrize(
    ("rows", "o", "k"), [((), 37, 130), ((2, 5), 130, 37), ((200,), 72, 40), ((5000,), 70, 3)], ids=str
)
def test_products_of_torch(products, dtype, activation, rows, o, k):
    tensors = inputs(rows, o, k, dtype)
    for who in ("torch", "own"):
        products(who)
        assert_layer_as_good(op, reference.linear, tensors, activation=activation)
        assert_layer_as_good(op, reference.linear, tensors[:2], activation=activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_modules_of_torch(activation):
    tensors = inputs((4, 50), 48, 80, torch.float64)
    residual = torch.randn(4, 50, 48, dtype=torch.float64, requires_grad=True)
    got = result_and_gradients(
        lambda x, w, b, r: op(x, w, b, activation=activation, residual=r), [*tensors, residual]
    )
    want = result_and_gradients(
        lambda x, w, b, r: plain_activation(F.linear(x, w, b), activation) + r, [*tensors, residual]
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(not NATIVE, reason="torch's gelu loses the lower tail")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_activations_of_all_sizes(activation, dtype):
    """Each value against float64 on its own: tails far below the largest value count as well."""
    y = torch.cat([torch.linspace(-12, 12, 4001), torch.tensor([-90.0, -30.0, 0.0, 30.0, 90.0])]).to(dtype)[
        :, None
    ]
    y = torch.unique(y, dim=0).requires_grad_()
    weight = torch.ones(1, 1, dtype=dtype)
    out = op(y, weight, activation=activation)
    (slope,) = torch.autograd.grad(out.sum(), y)
    wide = y.detach().double().requires_grad_()
    exact = plain_activation(wide, activation)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact, rtol=12 * eps, atol=eps * 1e-3)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=12 * eps, atol=12 * eps)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 6, 200])
def test_residual(impl, dtype, residual_dtype, rows):
    residual = torch.randn(rows, 70).to(residual_dtype).requires_grad_()
    tensors = [*inputs((rows,), 70, 20, dtype), residual]

    def fn(x, weight, bias, residual):
        return IMPLEMENTATIONS[impl](x, weight, bias, activation="silu", residual=residual)

    out, *grads = result_and_gradients(fn, tensors)
    assert out.dtype == torch.promote_types(dtype, residual_dtype)
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]
    x, weight, bias, plain = (t.detach().double() for t in tensors)
    exact = F.silu(F.linear(x, weight, bias)) + plain
    eps = max(torch.finfo(t).eps for t in (dtype, out.dtype))
    torch.testing.assert_close(out.double(), exact, rtol=8 * eps, atol=8 * eps)


def test_autocast_casts_the_operands_and_not_the_residual():
    x, weight, bias = inputs((4, 9), 32, 48)
    residual = torch.randn(4, 9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out, dx, dweight, dbias = result_and_gradients(
            op, (x, weight, bias), activation="gelu", residual=residual
        )
        alone = op(x, weight)
        double = op(x.detach().double(), weight.detach().double())
        mixed = op(x.bfloat16(), weight, bias, activation="gelu", residual=residual)
    assert out.dtype == dx.dtype == dweight.dtype == dbias.dtype == torch.float32
    assert (alone.dtype, double.dtype) == (torch.bfloat16, torch.float64)
    low = [t.detach().bfloat16() for t in (x, weight, bias)]
    assert torch.equal(out, op(*low, activation="gelu", residual=residual))
    assert torch.equal(out, mixed)
    assert not torch.equal(out, op(x, weight, bias, activation="gelu", residual=residual))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    residual = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    tensors = [*inputs((3,), 7, 5, torch.float64), residual]
    assert torch.autograd.gradcheck(
        lambda x, w, b, r: op(x, w, b, activation=activation, residual=r), tensors
    )


@pytest.mark.parametrize("trained", range(1, 16), ids=lambda bits: f"{bits:04b}")
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_frozen_inputs(trained, activation):
    tensors = [*inputs((130,), 20, 36), torch.randn(130, 20, requires_grad=True)]

    def fn(x, weight, bias, residual):
        return op(x, weight, bias, activation=activation, residual=residual)

    everything = result_and_gradients(fn, tensors)
    some = [t.detach().requires_grad_(bool(trained >> i & 1)) for i, t in enumerate(tensors)]
    for got, want, tensor in zip(result_and_gradients(fn, some)[1:], everything[1:], some, strict=True):
        assert (got is not None) == tensor.requires_grad
        if got is not None:
            torch.testing.assert_close(got, want)


def test_what_the_backward_keeps():
    """x and the input of the activation; nothing of a layer that is frozen and has none."""
    x, weight, bias = inputs((256,), 64, 32)
    x = x.detach().requires_grad_()
    parameters = [weight, bias, x]
    y = 4 * 256 * 64
    frozen = [weight.detach(), bias.detach()]
    assert saved_activation_bytes(lambda: op(x, weight, bias), parameters=parameters) == 0
    assert saved_activation_bytes(lambda: op(x, weight, bias, activation="gelu"), parameters=parameters) == y
    assert saved_activation_bytes(lambda: op(2 * x, *frozen), parameters=[*parameters, *frozen]) == 0
    assert saved_activation_bytes(lambda: op(2 * x, weight), parameters=parameters) == 4 * 256 * 32


def test_called_raw_without_what_the_backward_keeps():
    tensors = inputs((5, 30), 20, 36)
    for keep in (True, False):
        got = result_and_gradients(lambda x, w, b, k=keep: raw(x, w, b, None, "gelu", k)[0], tensors)
        for ours, theirs in zip(got, result_and_gradients(op, tensors, activation="gelu"), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_unneeded_outputs_have_size_0():
    x, weight, bias = (t.detach() for t in inputs((5,), 6, 7))
    out, y = raw(x, weight, bias, None, "gelu", False)
    assert (out.shape, y.numel()) == ((5, 6), 0)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        sizes = [g.numel() for g in raw_bwd(out, x, weight, bias, None, "gelu", needs)]
        assert sizes == [size if need else 0 for size, need in zip((35, 42, 6), needs, strict=True)]


def test_second_derivative_is_refused():
    x, weight, bias = inputs((3,), 7, 5)
    (dx,) = torch.autograd.grad(op(x, weight, bias).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"vlmkernels\.linear has no second derivative"):
        dx.sum().backward()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.once
def test_registration(permuted, activation):
    x, weight, dout = torch.randn(5, 4, 10), torch.randn(6, 10), torch.randn(5, 4, 6)
    if permuted:
        x, dout, weight = x.permute(1, 0, 2), dout.permute(1, 0, 2), torch.randn(10, 6).T
    bias, residual, y = torch.randn(6), torch.randn_like(dout), torch.randn_like(dout)
    trained = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(raw, (*trained, activation, True))
    torch.library.opcheck(raw, (*trained[:2], None, None, activation, False))
    for needs in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(raw_bwd, (dout, x, weight, bias, y, activation, needs))
    torch.library.opcheck(raw_bwd, (dout, x, weight, None, None, activation, [True, True, False]))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(x, weight, bias, residual):
        return op(x, weight, bias, activation="gelu", residual=residual)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        tensors = [*inputs((rows,), 16, 24), torch.randn(rows, 16, requires_grad=True)]
        for got, want in zip(
            result_and_gradients(compiled, tensors), result_and_gradients(step, tensors), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_meta_device():
    x, weight, bias = (t.detach().to("meta").requires_grad_() for t in inputs((3, 4), 8, 5, torch.bfloat16))
    out = op(x, weight, bias, activation="relu", residual=torch.empty(3, 4, 8, device="meta"))
    assert (out.shape, out.dtype, out.device.type) == ((3, 4, 8), torch.float32, "meta")
    grads = torch.autograd.grad(out.sum(), (x, weight, bias))
    assert [g.shape for g in grads] == [x.shape, weight.shape, bias.shape]


@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize(
    ("rows", "o", "k"), [((0,), 8, 4), ((3,), 0, 4), ((3,), 8, 0), ((2, 0, 5), 8, 4)], ids=str
)
def test_empty(rows, o, k, activation):
    tensors = inputs(rows, o, k)
    got = result_and_gradients(op, tensors, activation=activation)
    want = result_and_gradients(reference.linear, tensors, activation=activation)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [10, 300])
def test_views_of_any_strides(rows):
    x = torch.randn(1, 9).expand(rows, 9).requires_grad_()
    weight = torch.randn(18, 12)[::2, ::2].T.requires_grad_()
    bias = torch.randn(1).expand(6).requires_grad_()
    residual = torch.randn(6, rows).T.requires_grad_()

    def fn(x, weight, bias, residual, op=op):
        return op(x, weight, bias, activation="gelu_tanh", residual=residual)

    tensors = (x, weight, bias, residual)
    want = result_and_gradients(lambda *t: fn(*t, op=reference.linear), tensors)
    for ours, theirs in zip(result_and_gradients(fn, tensors), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(op(x, weight).sum(), x)  # an expanded incoming gradient
    torch.testing.assert_close(dx, weight.detach().sum(0).expand(rows, 9))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [2, 200])
def test_infinities_and_nan_stay_in_their_rows(rows, activation):
    x, weight = torch.randn(rows, 3), torch.eye(4, 3)
    x[0], x[1] = float("inf"), float("nan")
    out = op(x, weight, activation=activation)
    assert (out[0, :3] == float("inf")).all() or torch.isnan(out[0, :3]).all()
    assert torch.isnan(out[1, :3]).all()
    assert torch.isfinite(out[2:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_long_sum_stays_exact(dtype):
    """One row and one column of many terms: a plain running sum in float32 would be worse than mm."""
    assert_layer_as_good(op, reference.linear, inputs((1,), 3, 20_000, dtype))
    assert_layer_as_good(op, reference.linear, inputs((20_000,), 3, 2, dtype))


@pytest.mark.skipif(not NATIVE, reason="torch splits sums by the number of threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [3, 70, 1500])
def test_deterministic_for_any_number_of_threads(for_thread_counts, products, dtype, rows):
    products("own")
    tensors = inputs((rows,), 270, 129, dtype)
    first, *others = for_thread_counts(lambda: result_and_gradients(op, tensors, activation="gelu"))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not NATIVE, reason="the reference may use torch's own threads")
@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads, products):
    products("own")
    tensors = [t.detach() for t in inputs((2048,), 512, 512)]
    assert busy_threads(lambda: op(*tensors, activation="gelu")) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, "x must be .* got a scalar"),
        ({"weight": torch.zeros(5, 4)}, r"weight must be \[\*, 5\], got \(5, 4\)"),
        ({"weight": torch.zeros(5)}, r"weight must be \[\*, 5\], got \(5,\)"),
        (
            {"weight": torch.zeros(4, 5, dtype=torch.float64)},
            "the same dtype, got x torch.float32, weight torch.float64",
        ),
        ({"bias": torch.zeros(4, dtype=torch.bfloat16)}, "the same dtype, got .* bias torch.bfloat16"),
        ({"bias": torch.zeros(5)}, r"bias must be \[4\], got \(5,\)"),
        ({"residual": torch.zeros(4)}, r"residual must be \(3, 4\), got \(4,\)"),
        ({"activation": "tanh"}, "activation must be one of none, gelu, .*, got 'tanh'"),
        (
            {"x": torch.zeros(3, 5, dtype=torch.int64)},
            "float32, float64, bfloat16 or float16, got x torch.int64",
        ),
        ({"residual": torch.zeros(3, 4, device="meta")}, r"the same device, got \['cpu', 'meta'\]"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {"x": torch.zeros(3, 5), "weight": torch.zeros(4, 5), "bias": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        op(**{**good, **change})


def test_all_faults_in_one_error():
    with pytest.raises(ValueError, match=r"(?s)weight.*bias.*activation.*residual"):
        op(torch.zeros(3, 4), torch.zeros(3, 5), torch.zeros(5), activation="", residual=torch.ones(1))
