"""The losses on the kernels of `ops/_pairwise_small.py`, which hold the logits of small problems."""

import functools
import sys

import pytest
import torch

import vlmkernels
from vlmkernels import reference
from vlmkernels.ops import _pairwise_small
from vlmkernels.testing import assert_as_good, assert_op_as_good, result_and_gradients, unit_features

pytestmark = pytest.mark.skipif(
    not _pairwise_small.serves(torch.zeros(1, 1), torch.zeros(1, 1)), reason="needs the C++ extension"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CAPS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def taught(fn):
    """The divergence from a teacher, of another width, that a student's features determine."""

    @functools.wraps(fn)
    def loss(query, key, scale, **options):
        wide = [torch.cat([x, x[:, :1]], 1).detach() for x in (query.roll(1, 0), key)]
        return fn(query, key, scale, *wide, 20.0, **options)

    return loss


def distils(op):
    return op.__name__ == "contrastive_distillation"


LOSSES = {
    "info_nce": (vlmkernels.info_nce, reference.info_nce, ()),
    "sigmoid_loss": (vlmkernels.sigmoid_loss, reference.sigmoid_loss, (-10.0,)),
    "contrastive_distillation": (
        taught(vlmkernels.contrastive_distillation),
        taught(reference.contrastive_distillation),
        (),
    ),
}


@pytest.fixture(autouse=True)
def _only_the_held_logits(monkeypatch):
    """A problem that goes elsewhere fails."""

    def elsewhere(*arguments):
        raise AssertionError("the streaming kernels were called")

    for name in LOSSES:
        monkeypatch.setattr(sys.modules[f"vlmkernels.ops.{name}"], "_op", elsewhere)


@pytest.fixture(params=LOSSES)
def loss(request):
    return LOSSES[request.param]


def inputs(query, key, scale, *bias):
    scalars = [torch.as_tensor(x) for x in (scale, *bias)]
    return [t.detach().requires_grad_() for t in (query, key, *scalars)]


def same(got, want):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-3.0, 0.0, 1e-3, 14.3, 100.0])
@pytest.mark.parametrize(
    ("rows", "cols", "dim"),
    [(1, 1, 1), (2, 300, 7), (37, 37, 33), (64, 64, 64), (130, 200, 65), (300, 300, 530)],
)
def test_forward_and_gradients(dtype, scale, rows, cols, dim):
    query, key = unit_features(rows, cols, dim, dtype=dtype, similarity=0.3)
    caps = {1: CAPS[dtype], 2: CAPS[dtype]} if dtype in CAPS and 1 < scale < 100 and rows > 1 else None
    op, plain, _ = LOSSES["info_nce"]
    tensors = inputs(query, key, scale)
    for smoothing in (0.0, 0.1):
        options = {"symmetric": rows == cols, "label_smoothing": smoothing}
        assert_op_as_good(op, plain, tensors, caps=caps, **options)
    op, plain, bias = LOSSES["sigmoid_loss"]
    assert_op_as_good(op, plain, inputs(query, key, scale, *bias))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-3.0, 0.0, 1e-3, 14.3, 100.0])
@pytest.mark.parametrize(
    ("rows", "cols", "dim"),
    [(1, 1, 1), (2, 300, 7), (300, 2, 7), (37, 37, 33), (64, 64, 64), (200, 130, 65), (300, 300, 530)],
)
def test_distillation(dtype, scale, rows, cols, dim):
    query, key = unit_features(rows, cols, dim, dtype=dtype, similarity=0.3)
    op, plain, _ = LOSSES["contrastive_distillation"]
    for divergence, reduction, symmetric in (
        ("kl", "mean", True),
        ("kl", "sum", False),
        ("cross_entropy", "sum", True),
        ("cross_entropy", "mean", False),
    ):
        options = {"divergence": divergence, "reduction": reduction, "symmetric": symmetric}
        assert_op_as_good(op, plain, inputs(query, key, scale), **options)


@pytest.mark.parametrize("divergence", ["kl", "cross_entropy"])
@pytest.mark.parametrize("near", [1e-4, 1e-2])
def test_a_student_close_to_its_teacher(near, divergence):
    """The divergence and its gradients are differences of nearly equal numbers."""
    query, key = unit_features(200, 300, 48)
    teacher = [x + near * torch.randn_like(x) for x in (query, key)]

    def of(fn):
        def loss(query, key, scale):
            return fn(query, key, scale, *(x.to(query.dtype) for x in teacher), 30.0, divergence=divergence)

        return loss

    tensors = inputs(query, key, 30.0)
    assert_op_as_good(
        *map(of, (vlmkernels.contrastive_distillation, reference.contrastive_distillation)), tensors
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(dtype):
    query, key, scale = inputs(*unit_features(200, 300, 48, dtype=dtype), 30.0)
    teacher = query.detach().clone(), key.detach().clone(), 30.0
    for result in result_and_gradients(
        lambda *student: vlmkernels.contrastive_distillation(*student, *teacher), (query, key, scale)
    ):
        assert result.abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["info_nce", "sigmoid_loss"])
def test_normalised_features(name, dtype):
    op, plain, bias = LOSSES[name]
    query, key = unit_features(130, 130, 48, dtype=dtype)
    uneven = torch.linspace(0.1, 30, 130)[:, None].to(dtype)
    assert_op_as_good(op, plain, inputs(uneven * query, key / uneven, 8.0, *bias), normalize=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype):
    query, key = unit_features(260, 300, 24, dtype=dtype)
    uneven, spread = query.clone(), key.clone()
    uneven[::3] *= 60
    spread[::5] *= 20
    op, plain, _ = LOSSES["info_nce"]
    assert_op_as_good(op, plain, inputs(uneven, spread, 10.0), symmetric=False)
    assert_op_as_good(op, plain, inputs(uneven, spread[:260], 10.0))
    low = (3 + 0.2 * torch.rand(40, 8)).to(dtype)
    assert_op_as_good(op, plain, inputs(low, -low.flip(0), 100.0))  # all logits about -7700
    op, plain, _ = LOSSES["contrastive_distillation"]
    for divergence in ("kl", "cross_entropy"):
        assert_op_as_good(op, plain, inputs(uneven, spread, 10.0), divergence=divergence)
        assert_op_as_good(op, plain, inputs(low, -low.flip(0), 100.0), divergence=divergence)
    op, plain, _ = LOSSES["sigmoid_loss"]
    assert_op_as_good(op, plain, inputs(50 * query, key, 2.0, 80.0))


def test_confident_pairs_keep_their_small_losses():
    query = torch.eye(64)
    got = vlmkernels.sigmoid_loss(query, query, 60.0, -30.0).double()
    exact = reference.sigmoid_loss(query.double(), query.double(), 60.0, -30.0)
    torch.testing.assert_close(got, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("options", [{}, {"normalize": True}], ids=str)
@pytest.mark.parametrize("name", ["info_nce", "sigmoid_loss"])
def test_gradcheck(name, options):
    op, _, bias = LOSSES[name]
    query, key = (3 * t for t in unit_features(5, 5, 4, dtype=torch.float64))
    scalars = [torch.tensor([x], dtype=torch.float64) for x in (2.0, *bias)]
    tensors = [t.requires_grad_() for t in (query, key, *scalars)]
    assert torch.autograd.gradcheck(lambda *t: op(*t, **options), tensors)
    if not bias:
        for more in ({"label_smoothing": 0.2}, {"symmetric": False, "label_smoothing": 0.1}):
            assert torch.autograd.gradcheck(lambda *t, m=more: op(*t, **m, **options), tensors)


@pytest.mark.parametrize(("rows", "cols"), [(5, 7), (7, 5)])
def test_gradcheck_of_distillation(rows, cols):
    query, key, *teacher = (3 * torch.randn(n, d, dtype=torch.float64) for d in (4, 6) for n in (rows, cols))
    tensors = [t.requires_grad_() for t in (query, key, torch.tensor([0.2], dtype=torch.float64))]
    for options in ({}, {"symmetric": False, "reduction": "sum"}, {"divergence": "cross_entropy"}):
        assert torch.autograd.gradcheck(
            lambda *t, o=options: vlmkernels.contrastive_distillation(*t, *teacher, 0.1, **o), tensors
        )


def test_second_derivative_is_refused(loss):
    op, _, bias = loss
    query, key, *scalars = inputs(*unit_features(5, 5, 4), 2.0, *bias)
    (grad,) = torch.autograd.grad(op(query, key, *scalars), query, create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(op(query, key, *scalars), query)[0])
    with pytest.raises(RuntimeError, match=f"vlmkernels.{op.__name__} has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 3)], ids=str)
def test_frozen_inputs(loss, wanted):
    """Those that are wanted, and without a gradient the same loss."""
    op, _, bias = loss
    tensors = inputs(*unit_features(70, 70, 20), 5.0, *bias)
    wanted = [i for i in wanted if i < len(tensors)]
    everything = result_and_gradients(op, tensors)
    some = result_and_gradients(op, [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)])
    assert same(some, [everything[0], *(g if i in wanted else None for i, g in enumerate(everything[1:]))])
    with torch.no_grad():
        assert torch.equal(op(*tensors), everything[0])


def test_scalar_gradients_have_their_shape_and_dtype():
    query, key = unit_features(9, 9, 8, dtype=torch.bfloat16)
    scale = torch.full((1,), 4.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-4.0, dtype=torch.float16, requires_grad=True)
    dscale, dbias = torch.autograd.grad(vlmkernels.sigmoid_loss(query, key, scale, bias), (scale, bias))
    assert (dscale.shape, dscale.dtype) == ((1,), torch.float64)
    assert (dbias.shape, dbias.dtype) == ((), torch.float16)


def test_views(loss):
    op, plain, bias = loss
    query, key = torch.randn(12, 40).T, torch.randn(40, 24)[:, ::2]
    tensors = inputs(query, key, 2.0, *bias)
    torch.testing.assert_close(result_and_gradients(op, tensors), result_and_gradients(plain, tensors))
    one = torch.randn(1, 12).expand(40, 12)
    torch.testing.assert_close(op(query, one, 2.0, *bias), plain(query, one, 2.0, *bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaled_losses_as_a_grad_scaler_makes_them(loss, dtype):
    """2^16 is no float16 number, and without it the gradients of float16 features are below its range."""
    op, plain, bias = loss
    features = unit_features(300, 300, 64, dtype=dtype)

    def grads(fn, work):
        leaves = [x.to(work).requires_grad_() for x in features]
        return torch.autograd.grad(2.0**16 * fn(*leaves, 10.0, *bias), leaves)

    ours = grads(op, dtype)
    single, exact = grads(plain, torch.float32), grads(plain, torch.float64)
    for got, low, truth in zip(ours, single, exact, strict=True):
        assert_as_good(got, low.to(dtype), truth, cap=0.005)


def test_gradients_twice_from_one_graph(loss):
    op, _, bias = loss
    tensors = inputs(*unit_features(140, 140, 16), 9.0, *bias)
    result = op(*tensors)
    first = torch.autograd.grad(result, tensors, retain_graph=True)
    assert same(first, torch.autograd.grad(result, tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_for_any_number_of_threads(loss, for_thread_counts, dtype):
    op, _, bias = loss
    tensors = inputs(*unit_features(300, 300, 256, dtype=dtype), 20.0, *bias)
    options = {} if distils(op) else {"normalize": True}
    first, *others = for_thread_counts(lambda: result_and_gradients(op, tensors, **options))
    assert all(same(other, first) for other in others)


def test_nan_is_not_hidden(loss):
    op, _, bias = loss
    for dtype in (torch.float32, torch.bfloat16):
        query, key = unit_features(200, 200, 16, dtype=dtype)
        query[150, 3] = float("nan")
        result, dquery, *_ = result_and_gradients(op, inputs(query, key, 5.0, *bias))
        assert result.isnan()
        assert dquery[150].isnan().any()


def test_which_problems_are_small():
    def serves(n, m, d, **options):
        return _pairwise_small.serves(torch.zeros(n, d, **options), torch.zeros(m, d, **options))

    assert serves(1024, 1024, 4)
    assert serves(1, 1024, 4, dtype=torch.float64)
    assert not serves(1025, 1025, 4)
    assert not serves(4, 1025, 4)
    assert not serves(0, 4, 4)
    assert not serves(4, 4, 0)
    assert not serves(4, 4, 4, device="meta")
    with torch.autocast("cpu"):
        assert not serves(4, 4, 4)
    with torch._subclasses.FakeTensorMode():
        assert not serves(4, 4, 4)
    x = torch.zeros(4, 4)
    assert _pairwise_small.serves(x, x, x[:, :3], x[:, :3])
    assert not _pairwise_small.serves(x, x, x[:, :0], x[:, :0])
    assert not _pairwise_small.serves(x, x, x.bfloat16(), x.bfloat16())
