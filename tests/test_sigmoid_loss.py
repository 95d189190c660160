import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from vlmkernels import reference
from vlmkernels.ops import _pairwise_small
from vlmkernels.testing import assert_as_good, assert_op_as_good, result_and_gradients, unit_features


@pytest.fixture(autouse=True)
def _kernels_at_every_size(monkeypatch):
    monkeypatch.setattr(_pairwise_small, "LIMIT", 0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NATIVE = "reference" not in vlmkernels.info()["ops"]["sigmoid_loss"]["CPU"]


def judge(query, key, scale=10.0, bias=-10.0, op=vlmkernels.sigmoid_loss, **options):
    tensors = [
        t.detach().requires_grad_() for t in (query, key, torch.as_tensor(scale), torch.as_tensor(bias))
    ]
    assert_op_as_good(op, reference.sigmoid_loss, tensors, **options)


def on_cuda(*tensors, **options):
    def move(value):
        return (
            tuple(map(move, value))
            if isinstance(value, tuple)
            else value.cuda()
            if isinstance(value, torch.Tensor)
            else value
        )

    return vlmkernels.sigmoid_loss(*map(move, tensors), **{k: move(v) for k, v in options.items()}).cpu()


OPS = {"dispatched": vlmkernels.sigmoid_loss, **({"cuda": on_cuda} if torch.cuda.is_available() else {})}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 10.0, 100.0])
@pytest.mark.parametrize(
    ("rows", "cols", "dim"), [(2, 2, 3), (3, 5, 5), (37, 37, 33), (130, 200, 64), (300, 300, 70)]
)
def test_forward_and_gradients(op, dtype, scale, rows, cols, dim):
    query, key = unit_features(rows, cols, dim, dtype=dtype)
    judge(query, key, scale, op=OPS[op], reduction="none")
    judge(query, key, scale, op=OPS[op])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(op, dtype, reduction):
    query, key = unit_features(150, 400, 48, dtype=dtype)
    index = torch.randint(0, 400, (150,))
    index[::7] = -100
    ids = (torch.randint(0, 60, (150,)), torch.randint(0, 70, (400,)))
    for options in (
        {"positives": index},
        {"positives": ids},
        {"normalize": True},
        {"positives": ids, "normalize": True},
    ):
        judge(3 * query, 2 * key, 5.0, op=OPS[op], reduction=reduction, **options)


def test_equals_the_papers_pseudocode():
    query, key = unit_features(50, 50, 16)
    logits = query @ key.T * 10.0 - 10.0
    labels = 2 * torch.eye(50) - 1
    want = -F.logsigmoid(labels * logits).sum() / 50
    torch.testing.assert_close(vlmkernels.sigmoid_loss(query, key, 10.0, -10.0), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype):
    query, key = unit_features(140, 300, 24, dtype=dtype, similarity=0.9)
    judge(50 * query, key, 2.0, -50.0)
    judge(50 * query, key, 2.0, 80.0)
    judge(-query, key, 60.0, 0.0)


def test_confident_positives_keep_their_small_losses():
    """softplus(z) - z would leave nothing of a loss of 1e-9 beside logits of 20."""
    query = torch.eye(64)
    loss = vlmkernels.sigmoid_loss(query, query, 60.0, -30.0, reduction="none").double()
    exact = reference.sigmoid_loss(query.double(), query.double(), 60.0, -30.0, reduction="none")
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_scalar_gradients_have_their_shape_and_dtype(shape):
    query, key = unit_features(9, 9, 8, dtype=torch.bfloat16)
    scale = torch.full(shape, 4.0, dtype=torch.float64, requires_grad=True)
    bias = torch.full(shape, -4.0, dtype=torch.float16, requires_grad=True)
    dscale, dbias = torch.autograd.grad(vlmkernels.sigmoid_loss(query, key, scale, bias), (scale, bias))
    assert (dscale.shape, dscale.dtype) == (scale.shape, torch.float64)
    assert (dbias.shape, dbias.dtype) == (bias.shape, torch.float16)


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True, "reduction": "sum"}, {"reduction": "none"}], ids=str
)
def test_gradcheck(options):
    query, key = (3 * t for t in unit_features(5, 6, 4, dtype=torch.float64))
    scalars = (torch.tensor(2.0, dtype=torch.float64), torch.tensor([-1.0], dtype=torch.float64))
    tensors = [t.requires_grad_() for t in (query, key, *scalars)]
    assert torch.autograd.gradcheck(lambda *t: vlmkernels.sigmoid_loss(*t, **options), tensors)
    ids = (torch.tensor([0, 1, 1, 2, 9]), torch.tensor([1, 0, 2, 1, 7, 7]))
    assert torch.autograd.gradcheck(lambda *t: vlmkernels.sigmoid_loss(*t, positives=ids, **options), tensors)


def test_second_derivative_is_refused():
    query, key = unit_features(5, 5, 4)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(
        vlmkernels.sigmoid_loss(query, key, 2.0, 0.0, reduction="none").sum(), query, create_graph=True
    )
    with pytest.raises(RuntimeError, match="sigmoid_loss has no second derivative"):
        grad.sum().backward()


def test_second_derivative_of_gradients_formed_ahead_is_refused():
    query, key = unit_features(5, 5, 4)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(vlmkernels.sigmoid_loss(query, key, 2.0, 0.0), query, create_graph=True)
    with pytest.raises(RuntimeError, match=r"sigmoid_loss has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    query, key = unit_features(6, 6, 6)
    if permuted:
        query, key = query.T, key.T
    op, bwd = torch.ops.vlmkernels.sigmoid_loss.default, torch.ops.vlmkernels.sigmoid_loss_bwd.default
    scale, bias = torch.tensor(3.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True)
    query, key = query.detach().requires_grad_(), key.detach().requires_grad_()
    ids = (torch.arange(6) // 2, torch.arange(6) // 3)
    for inputs in (
        (query, key, scale, bias, None, None, False, "mean", False, False, False),
        (query, key, scale, bias, None, None, True, "mean", True, True, True),
        (query, key, scale, bias, *ids, False, "none", False, False, False),
        (
            query,
            key.detach(),
            scale,
            bias,
            torch.tensor([1, 2, -100, 0, 5, 5]),
            None,
            False,
            "sum",
            True,
            False,
            True,
        ),
    ):
        torch.library.opcheck(op, inputs)
        plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        dloss = torch.ones(6) if inputs[7] == "none" else torch.tensor(1.0)
        torch.library.opcheck(bwd, (dloss, *plain[:8], [True, True, True, True]))
        torch.library.opcheck(bwd, (dloss, *plain[:8], [False, True, False, True]))


def test_raw_op_without_flags_recomputes():
    query, key = (t.requires_grad_() for t in unit_features(7, 7, 5))
    scale, bias = torch.tensor(3.0), torch.tensor(-3.0)
    raw = torch.ops.vlmkernels.sigmoid_loss(
        query, key, scale, bias, None, None, False, "mean", False, False, False
    )[0]
    got = torch.autograd.grad(raw, (query, key))
    want = torch.autograd.grad(vlmkernels.sigmoid_loss(query, key, scale, bias), (query, key))
    torch.testing.assert_close(got, want)


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(query, key, scale, bias):
        return vlmkernels.sigmoid_loss(query, key, scale, bias) + vlmkernels.sigmoid_loss(
            query, key, 2.0, -1.0, normalize=True
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 140):
        tensors = [
            t.requires_grad_()
            for t in (*unit_features(rows, rows, 16), torch.tensor(7.0), torch.tensor(-5.0))
        ]
        for got, want in zip(
            result_and_gradients(compiled, tensors), result_and_gradients(step, tensors), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_shapes_on_the_meta_device():
    query, key = (torch.empty(300, 8, device="meta", requires_grad=True) for _ in range(2))
    loss = vlmkernels.sigmoid_loss(query, key, 5.0, -1.0)
    loss.backward()
    assert loss.shape == ()
    assert query.grad.shape == key.grad.shape == (300, 8)


def test_autocast_casts_features_only():
    query, key = unit_features(40, 40, 16)
    scale, bias = torch.tensor(30.0), torch.tensor(-10.3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = vlmkernels.sigmoid_loss(query, key, scale, bias)
    assert got.dtype == torch.float32
    assert torch.equal(got, vlmkernels.sigmoid_loss(query.bfloat16(), key.bfloat16(), scale, bias))


@pytest.mark.parametrize("dim", [0, 6])
@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (0, 5), (1, 1), (1, 300), (130, 300)])
def test_empty_and_single(rows, cols, dim):
    tensors = [torch.randn(n, dim, requires_grad=True) for n in (rows, cols)]
    tensors += [torch.tensor(2.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)]
    got, want = (
        result_and_gradients(fn, tensors) for fn in (vlmkernels.sigmoid_loss, reference.sigmoid_loss)
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_no_keys_at_all():
    query, key = torch.randn(4, 6, requires_grad=True), torch.randn(0, 6)
    ids = (torch.arange(4), torch.arange(0))
    loss, dquery, *_ = result_and_gradients(
        vlmkernels.sigmoid_loss, (query, key, torch.tensor(2.0), torch.tensor(0.0)), positives=ids
    )
    assert loss == 0
    assert (dquery == 0).all()


def test_views_and_frozen_inputs():
    query, key = torch.randn(12, 40).T.requires_grad_(), torch.randn(1, 12).expand(40, 12)
    scale, bias = torch.tensor(2.0), torch.tensor(-1.0, requires_grad=True)
    got = result_and_gradients(vlmkernels.sigmoid_loss, (query, key, scale, bias), normalize=True)
    want = result_and_gradients(reference.sigmoid_loss, (query, key, scale, bias), normalize=True)
    assert got[2] is None
    assert got[3] is None
    for i in (0, 1, 4):
        torch.testing.assert_close(got[i], want[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_for_any_number_of_threads(dtype):
    query, key = unit_features(1100, 1100, 24, dtype=dtype)
    tensors = [t.requires_grad_() for t in (query, key, torch.tensor(20.0), torch.tensor(-10.0))]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3) if NATIVE else (1, 1, 1):
            torch.set_num_threads(count)
            results.append(result_and_gradients(vlmkernels.sigmoid_loss, tensors))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(not NATIVE, reason="the reference is dense by design")
@pytest.mark.once
def test_memory(peak_memory):
    """The full matrix would take 256 MiB, four times what the op may hold."""
    script = """
query, key = (torch.randn(8192, 64, requires_grad=True) for _ in range(2))
run = lambda: vlmkernels.sigmoid_loss(query, key, 0.1, 0.0).backward()
"""
    assert peak_memory(script) < 64 * 2**20


@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    query, key = unit_features(1024, 1024, 128)
    assert busy_threads(lambda: vlmkernels.sigmoid_loss(query, key, 10.0, -10.0)) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(4, 6)}, r"query \(4, 5\) and key \(4, 6\)"),
        ({"key": torch.zeros(3, 5)}, "M must be at least N, got N = 4 and M = 3"),
        ({"positives": torch.zeros(3, dtype=torch.int64)}, r"positives must be int64 of shape \(4,\)"),
        ({"positives": (torch.zeros(4, dtype=torch.int64), torch.zeros(4))}, r"positives\[1\]"),
        ({"reduction": "avg"}, "'avg'"),
        ({"scale": torch.ones(2)}, "scale must be a float or"),
        ({"bias": torch.ones(2)}, "bias must be a float or"),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {"query": torch.zeros(4, 5), "key": torch.zeros(4, 5), "scale": 1.0, "bias": 0.0}
    with pytest.raises(ValueError, match=message):
        vlmkernels.sigmoid_loss(**{**good, **change})


def test_positive_out_of_range_is_an_index_error():
    with pytest.raises(IndexError, match=r"\[0, M = 4\) or -100"):
        vlmkernels.sigmoid_loss(
            torch.zeros(2, 5), torch.zeros(4, 5), 1.0, 0.0, positives=torch.tensor([0, 7])
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_problems(monkeypatch, dtype):
    """As users meet them; tests/test_pairwise_small.py has the rest."""
    monkeypatch.undo()
    query, key = unit_features(37, 50, 33, dtype=dtype)
    judge(3 * query, key)
    judge(3 * query, key, normalize=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaled_losses_as_a_grad_scaler_makes_them(dtype):
    """2^16 is no float16 number, and without it the gradients of float16 features are below its range."""
    features = unit_features(600, 600, 64, dtype=dtype)

    def grads(op, work):
        leaves = [x.to(work).requires_grad_() for x in features]
        return torch.autograd.grad(2.0**16 * op(*leaves, 10.0, -10.0), leaves)

    ours = grads(vlmkernels.sigmoid_loss, dtype)
    single, exact = grads(reference.sigmoid_loss, torch.float32), grads(reference.sigmoid_loss, torch.float64)
    for got, low, truth in zip(ours, single, exact, strict=True):
        assert_as_good(got, low.to(dtype), truth, cap=0.005)


@pytest.mark.skipif(not NATIVE, reason="torch splits a sum by the number of threads")
def test_sums_over_many_rows_are_deterministic_for_any_number_of_threads(for_thread_counts):
    query, key = (t.requires_grad_() for t in unit_features(40_000, 60, 8))
    options = {"positives": torch.randint(0, 60, (40_000,))}
    tensors = (query, key, torch.tensor(20.0, requires_grad=True), torch.tensor(-3.0, requires_grad=True))
    first, *others = for_thread_counts(
        lambda: result_and_gradients(vlmkernels.sigmoid_loss, tensors, **options)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
