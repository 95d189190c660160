import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.parity import peer
from vlmkernels import reference
from vlmkernels.ops import _pairwise_small
from vlmkernels.testing import assert_as_good, assert_op_as_good, result_and_gradients, unit_features


@pytest.fixture(autouse=True)
def _kernels_at_every_size(monkeypatch):
    monkeypatch.setattr(_pairwise_small, "LIMIT", 0)


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ON = {"dispatched": "cpu", **({"cuda": "cuda"} if torch.cuda.is_available() else {})}
NATIVE = "reference" not in vlmkernels.info()["ops"]["contrastive_distillation"]["CPU"]
op, plain = vlmkernels.contrastive_distillation, reference.contrastive_distillation


def problem(n, m, d, dtype=torch.float32, *, near=None):
    """Student and teacher, of another width; `near` makes the teacher the student plus so much noise."""
    query, key = unit_features(n, m, d, dtype=torch.float64)
    if near is None:
        teacher = unit_features(n, m, d + 3, dtype=dtype)
    else:
        teacher = tuple(
            F.pad(x, (0, 3)).add(near * torch.randn(len(x), d + 3)).to(dtype) for x in (query, key)
        )
    return query.to(dtype), key.to(dtype), *teacher


def judge(tensors, scale=10.0, teacher_scale=20.0, device="cpu", store_bytes=2**28, **options):
    """Result and all gradients against the reference, which takes the teacher in the dtype it computes in."""
    query, key, *teacher = tensors
    leaves = [t.detach().requires_grad_() for t in (query, key, torch.as_tensor(scale))]

    def ours(*student, **options):
        moved = [x.to(device) for x in (*student, *teacher)]
        return op(*moved, teacher_scale, store_bytes=store_bytes, **options).cpu()

    def theirs(*student, **options):
        return plain(*student, *(x.to(student[0].dtype) for x in teacher), teacher_scale, **options)

    assert_op_as_good(ours, theirs, leaves, **options)


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "teacher_scale"), [(1.0, 1.0), (14.3, 100.0), (100.0, 20.0)])
@pytest.mark.parametrize(("rows", "dim"), [(1, 1), (3, 5), (37, 33), (130, 64), (300, 70)])
def test_forward_and_gradients(device, dtype, scale, teacher_scale, rows, dim):
    tensors = problem(rows, rows, dim, dtype)
    for store_bytes in (0, 2**28):
        judge(tensors, scale, teacher_scale, ON[device], store_bytes, reduction="none")


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", ["kl", "cross_entropy"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_options(device, dtype, divergence, reduction, symmetric):
    options = {"divergence": divergence, "reduction": reduction, "symmetric": symmetric}
    same = symmetric and reduction == "none"
    judge(problem(140, 140 if same else 530, 24, dtype), device=ON[device], **options)
    judge(problem(270, 270 if same else 33, 24, dtype), device=ON[device], store_bytes=0, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_problems(monkeypatch, dtype):
    """As users meet them; tests/test_pairwise_small.py has the rest."""
    monkeypatch.undo()
    for options in ({}, {"divergence": "cross_entropy", "reduction": "sum"}, {"symmetric": False}):
        judge(problem(37, 50, 33, dtype), 14.3, **options)


@pytest.mark.parametrize("store_tiles", [1, 2, 3, 5])
def test_any_part_of_the_logits_may_be_kept(store_tiles):
    judge(problem(300, 300, 40), store_bytes=store_tiles * 2 * 4 * 128 * 256)


@pytest.mark.parametrize("near", [1e-2, 1e-4])
def test_a_student_close_to_its_teacher(near):
    """The divergence and its gradients are differences of nearly equal numbers."""
    judge(problem(200, 300, 48, near=near), 30.0, 30.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(dtype):
    query, key, *_ = problem(200, 300, 48, dtype)
    tensors = [t.requires_grad_() for t in (query, key, torch.tensor(30.0))]
    teacher = query.detach().clone(), key.detach().clone(), 30.0
    loss, *grads = result_and_gradients(lambda *student: op(*student, *teacher), tensors)
    assert loss.abs() < 1e-6
    assert all(grad.abs().max() < 1e-6 for grad in grads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype):
    """Rows and columns whose logits lie hundreds apart, of the student, the teacher or both."""
    query, key, *teacher = problem(150, 300, 24, dtype)
    far = torch.linspace(0, 40, 150)[:, None].to(dtype), torch.linspace(40, 0, 300)[:, None].to(dtype)
    spread, spread_teacher = (
        (x * f for x, f in zip(pair, far, strict=True)) for pair in ((query, key), teacher)
    )
    spread, spread_teacher = tuple(spread), tuple(spread_teacher)
    for store_bytes in (0, 2**28):
        judge((*spread, *teacher), 1.0, 20.0, store_bytes=store_bytes)
        judge((query, key, *spread_teacher), 20.0, 1.0, store_bytes=store_bytes)
        judge((*spread, *spread_teacher), 1.0, -1.0, store_bytes=store_bytes, divergence="cross_entropy")


@pytest.mark.parametrize("divergence", ["kl", "cross_entropy"])
def test_equals_the_formulas_of_torch(divergence):
    query, key, *teacher = problem(50, 50, 16)
    student, taught = 10 * query @ key.T, 20 * teacher[0] @ teacher[1].T
    if divergence == "kl":
        want = sum(
            F.kl_div(a.log_softmax(1), b.log_softmax(1), reduction="batchmean", log_target=True)
            for a, b in ((student, taught), (student.T, taught.T))
        )
    else:
        want = sum(F.cross_entropy(a, b.softmax(1)) for a, b in ((student, taught), (student.T, taught.T)))
    got = op(query, key, 10.0, *teacher, 20.0, divergence=divergence)
    torch.testing.assert_close(got, want / 2)


@pytest.mark.once
def test_equals_the_distillation_of_open_clip():
    theirs = peer("open_clip.loss").DistillClipLoss()
    query, key, *teacher = problem(300, 300, 40)
    tensors = [t.requires_grad_() for t in (query, key, torch.tensor(30.0))]
    want = result_and_gradients(lambda *student: theirs(*student, *teacher, torch.tensor(50.0))[1], tensors)
    got = result_and_gradients(
        lambda *student: op(*student, *teacher, 50.0, divergence="cross_entropy"), tensors
    )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16"), ("float32", "float64")],
)
def test_a_teacher_of_another_dtype(student, teacher):
    query, key, *_ = problem(140, 300, 24, getattr(torch, student))
    teachers = problem(140, 300, 24, getattr(torch, teacher))[2:]
    got = op(query.requires_grad_(), key, 10.0, *teachers, 20.0)
    assert got.dtype == torch.promote_types(torch.float32, teachers[0].dtype)
    (dquery,) = torch.autograd.grad(got, query)
    exact = query.detach().double().requires_grad_()
    want = plain(exact, key.double(), 10.0, *(x.double() for x in teachers), 20.0)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert dquery.dtype == query.dtype
    low = query.detach().float().requires_grad_()
    (single,) = torch.autograd.grad(plain(low, key.float(), 10.0, *(x.float() for x in teachers), 20.0), low)
    assert_as_good(dquery, single.to(query.dtype), torch.autograd.grad(want, exact)[0])


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("value", [0.0, 4.0])
def test_scale_gradient_has_its_shape_and_dtype(shape, value):
    query, key, *teacher = problem(9, 9, 8)
    scale = torch.full(shape, value, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(op(query, key, scale, *teacher, 5.0), scale)
    (want,) = torch.autograd.grad(plain(query, key, scale, *teacher, 5.0), scale)
    assert (got.shape, got.dtype) == (scale.shape, torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    (both,) = torch.autograd.grad(op(query, key.requires_grad_(), scale, *teacher, 5.0), scale)
    torch.testing.assert_close(both, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": False, "reduction": "sum"}, {"symmetric": False, "reduction": "none"}],
    ids=str,
)
def test_gradcheck(options):
    query, key, *teacher = problem(5, 7, 4, torch.float64)
    tensors = [t.requires_grad_() for t in (3 * query, 3 * key, torch.tensor([2.0], dtype=torch.float64))]
    for divergence in ("kl", "cross_entropy"):
        assert torch.autograd.gradcheck(
            lambda *t, d=divergence: op(*t, *teacher, 5.0, divergence=d, **options), tensors
        )


def test_the_teacher_gets_no_gradient():
    query, key, *teacher = problem(6, 6, 4)
    teacher = [x.requires_grad_() for x in (*teacher, torch.tensor(5.0))]
    assert not op(query, key, 2.0, *teacher).requires_grad
    loss = op(query.requires_grad_(), key, 2.0, *teacher)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None, None, None)


def test_second_derivative_is_refused():
    query, key, *teacher = problem(5, 5, 4)
    query.requires_grad_()
    (grad,) = torch.autograd.grad(op(query, key, 2.0, *teacher, 3.0), query, create_graph=True)
    with pytest.raises(RuntimeError, match="contrastive_distillation has no second derivative"):
        grad.sum().backward()


def test_a_second_backward_gives_the_same():
    query, key, *teacher = problem(200, 200, 12)
    loss = op(query.requires_grad_(), key.requires_grad_(), 20.0, *teacher, 30.0)
    first = torch.autograd.grad(loss, (query, key), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (query, key))))


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.once
def test_registration(permuted):
    student, teacher = [torch.randn(6, 6) for _ in range(2)], [torch.randn(6, 6) for _ in range(2)]
    if permuted:
        student, teacher = [x.T for x in student], [x.T for x in teacher]
    raw, bwd = (
        getattr(torch.ops.vlmkernels, f"contrastive_distillation{end}").default for end in ("", "_bwd")
    )
    tensors = [x.requires_grad_() for x in (*student, torch.tensor(3.0))] + [*teacher, torch.tensor(4.0)]
    for options in ((True, "kl", "mean", 2**20), (False, "cross_entropy", "sum", 0), (True, "kl", "none", 0)):
        torch.library.opcheck(raw, (*tensors, *options))
        bare = [x.detach() for x in tensors]
        loss, *stats = raw(*bare, *options)
        for needs in ([True, True, True], [False, True, False]):
            torch.library.opcheck(bwd, (torch.ones_like(loss), *bare, *stats, *options, needs))


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    teacher = {n: problem(n, n, 16)[2:] for n in (5, 140)}

    def step(query, key, scale, *teacher):
        return op(query, key, scale, *teacher, 20.0) + op(
            query, key, 2.0, *teacher, scale, divergence="cross_entropy", symmetric=False
        )

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 140):
        tensors = [t.requires_grad_() for t in (*problem(rows, rows, 16)[:2], torch.tensor(7.0))]
        tensors += teacher[rows]
        for got, want in zip(
            result_and_gradients(compiled, tensors), result_and_gradients(step, tensors), strict=True
        ):
            torch.testing.assert_close(got, want)


def test_shapes_on_the_meta_device():
    query, key, *teacher = (x.to("meta") for x in problem(300, 400, 8))
    loss = op(query.requires_grad_(), key.requires_grad_(), 5.0, *teacher, 5.0)
    loss.backward()
    assert loss.shape == ()
    assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)


def test_autocast_casts_features_only():
    query, key, *teacher = problem(40, 40, 16)
    scale = torch.tensor(30.1)
    with torch.autocast("cpu", torch.bfloat16):
        got = op(query, key, scale, *teacher, scale)
    assert got.dtype == torch.float32
    cast = [x.bfloat16() for x in (query, key, *teacher)]
    assert torch.equal(got, op(*cast[:2], scale, *cast[2:], scale))


@pytest.mark.parametrize(("dim", "teacher_dim"), [(0, 3), (6, 0), (6, 3)])
@pytest.mark.parametrize(("rows", "cols"), [(0, 0), (0, 5), (1, 1), (1, 300), (130, 300)])
def test_empty_and_single(rows, cols, dim, teacher_dim):
    tensors = [torch.randn(n, dim, requires_grad=True) for n in (rows, cols)]
    tensors.append(torch.tensor(2.0, requires_grad=True))
    teacher = [torch.randn(n, teacher_dim) for n in (rows, cols)]
    got, want = (result_and_gradients(lambda *t, f=f: f(*t, *teacher, 3.0), tensors) for f in (op, plain))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_views_and_frozen_inputs():
    query, key = torch.randn(12, 40).T.requires_grad_(), torch.randn(1, 12).expand(40, 12)
    teacher = torch.randn(40, 30)[:, ::3], torch.randn(40, 1).expand(40, 10)
    scale = torch.tensor(2.0, requires_grad=True)
    got, want = (
        result_and_gradients(lambda *t, f=f: f(*t, *teacher, 3.0), (query, key, scale)) for f in (op, plain)
    )
    assert got[2] is None
    for i in (0, 1, 3):
        torch.testing.assert_close(got[i], want[i])


@pytest.mark.skipif(not NATIVE, reason="torch splits a sum by the number of threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_for_any_number_of_threads(for_thread_counts, dtype):
    query, key, *teacher = problem(1100, 1100, 24, dtype)
    tensors = [t.requires_grad_() for t in (query, key, torch.tensor(20.0))]
    for store_bytes in (0, 2**22):

        def step(*student, store_bytes=store_bytes):
            return op(*student, *teacher, 30.0, store_bytes=store_bytes)

        first, *others = for_thread_counts(lambda step=step: result_and_gradients(step, tensors))
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not NATIVE, reason="the reference keeps no logits")
def test_kept_logits_give_the_same_bits():
    query, key, *teacher = problem(400, 700, 24)
    tensors = [t.requires_grad_() for t in (query, key, torch.tensor(20.0))]
    results = [
        result_and_gradients(lambda *t, b=b: op(*t, *teacher, 30.0, store_bytes=b), tensors)
        for b in (0, 2**21, 2**28)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.sampled(2)
@pytest.mark.skipif(not NATIVE, reason="the reference is dense by design")
@pytest.mark.parametrize("store_bytes", [0, 2**24])
@pytest.mark.once
def test_memory(peak_memory, store_bytes):
    """Each of the matrices would take 256 MiB, more than the op may hold beyond its store."""
    script = """
query, key, *teacher = (torch.randn(8192, 64, requires_grad=True) for _ in range(4))
run = lambda: vlmkernels.contrastive_distillation(
    query, key, 0.1, *teacher, 0.2, store_bytes={store}
).backward()
"""
    assert peak_memory(script.format(store=store_bytes)) < 80 * 2**20 + store_bytes


@pytest.mark.once
def test_large_op_uses_more_than_one_thread(busy_threads):
    query, key, *teacher = problem(1024, 1024, 128)
    assert busy_threads(lambda: op(query, key, 10.0, *teacher, 10.0)) >= 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(4, 6)}, r"got query \(4, 5\) and key \(4, 6\)"),
        ({"teacher_key": torch.zeros(4, 6)}, r"got teacher_query \(4, 3\) and teacher_key \(4, 6\)"),
        ({"teacher_key": torch.zeros(5, 3)}, "as many rows as query and key, 4 and 4, got 4 and 5"),
        ({"teacher_query": torch.zeros(4, 3).double()}, "teacher_query and teacher_key must have the same"),
        ({"teacher_query": torch.zeros(4, 3, device="meta")}, "on the same device"),
        ({"divergence": "js"}, "divergence must be 'kl' or 'cross_entropy', got 'js'"),
        ({"reduction": "batchmean"}, "'batchmean'"),
        ({"scale": torch.ones(2)}, "scale must be a float or"),
        ({"teacher_scale": torch.ones(2)}, "teacher_scale must be a float or"),
        ({"teacher_scale": 1e300}, "teacher_scale must be in the range"),
        ({"store_bytes": -1}, r"store_bytes must be in \[0, 2\*\*63\), got -1"),
        (
            {"query": torch.zeros(3, 5), "teacher_query": torch.zeros(3, 3), "reduction": "none"},
            "needs M == N when symmetric, got N = 3 and M = 4",
        ),
        (
            {"key": torch.zeros(0, 5), "teacher_key": torch.zeros(0, 3)},
            "key must have rows, since query has 4",
        ),
    ],
)
@pytest.mark.once
def test_bad_input(change, message):
    good = {"query": torch.zeros(4, 5), "key": torch.zeros(4, 5), "scale": 1.0}
    good |= {"teacher_query": torch.zeros(4, 3), "teacher_key": torch.zeros(4, 3), "teacher_scale": 1.0}
    with pytest.raises(ValueError, match=f"contrastive_distillation: .*{message}"):
        op(**{**good, **change})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scaled_losses_as_a_grad_scaler_makes_them(dtype):
    """2^16 is no float16 number, and without it the gradients of float16 features are below its range."""
    query, key, *teacher = problem(600, 600, 64, dtype)

    def grads(fn, work):
        leaves = [x.to(work).requires_grad_() for x in (query, key)]
        return torch.autograd.grad(2.0**16 * fn(*leaves, 10.0, *(x.to(work) for x in teacher), 20.0), leaves)

    ours, single, exact = grads(op, dtype), grads(plain, torch.float32), grads(plain, torch.float64)
    for got, low, truth in zip(ours, single, exact, strict=True):
        assert_as_good(got, low.to(dtype), truth, cap=0.005)
