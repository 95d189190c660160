"""Distances of features, against the definition in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.testing import assert_op_as_good, result_and_gradients, saved_activation_bytes

NATIVE = "reference" not in vlmkernels.info()["ops"]["embedding_distillation"]["CPU"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DISTANCES = ["l1", "l2", "cosine", "smooth_l1"]
REDUCTIONS = ["mean", "sum", "none"]


def on_cuda(student, teacher, *, weight=None, **options):
    weight = None if weight is None else weight.cuda()
    return vlmkernels.embedding_distillation(student.cuda(), teacher.cuda(), weight=weight, **options).cpu()


OPS = {
    "dispatched": vlmkernels.embedding_distillation,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


def sample(rows, dim, *, dtype=torch.float32):
    """student [rows, dim], teacher likewise, weight [rows] of which some are 0."""
    student, teacher = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype)
    weight = torch.rand(rows) * (torch.rand(rows) < 0.8)
    return student.requires_grad_(), teacher, weight


def judge(student, teacher, op=vlmkernels.embedding_distillation, **options):
    assert_op_as_good(op, reference.embedding_distillation, (student, teacher), features=0, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalised"])
@pytest.mark.parametrize("shape", [(30, 2), (40, 5), (64, 130), (37, 1000), (300, 33)], ids=str)
def test_forward_and_gradients(op, dtype, distance, normalize, shape):
    student, teacher, weight = sample(*shape, dtype=dtype)
    options = {"distance": distance, "normalize": normalize, "op": OPS[op]}
    judge(student, teacher, reduction="none", **options)
    for reduction in REDUCTIONS:
        judge(student, teacher, weight=weight, reduction=reduction, **options)


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_feature(distance):
    """A unit vector of one number is 1 or -1, and has no gradient."""
    student, teacher, _ = sample(30, 1)
    if distance != "cosine":
        judge(student, teacher, distance=distance, normalize=False, reduction="none")
    options = {"distance": distance, "reduction": "none"}
    loss, grad, _ = result_and_gradients(vlmkernels.embedding_distillation, (student, teacher), **options)
    apart = student.sign() != teacher.sign()
    far = {"l1": 2.0, "l2": 4.0, "cosine": 2.0, "smooth_l1": 1.5}[distance]
    torch.testing.assert_close(loss, far * apart.float().squeeze(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad * student.abs(), torch.zeros(30, 1), rtol=0, atol=1e-6)


def test_equals_torch():
    student, teacher, _ = sample(50, 80)
    u, v, op = F.normalize(student), F.normalize(teacher), vlmkernels.embedding_distillation
    for distance, theirs in (("l1", F.l1_loss), ("l2", F.mse_loss), ("smooth_l1", F.smooth_l1_loss)):
        want = theirs(student, teacher, reduction="sum") / 50
        torch.testing.assert_close(op(student, teacher, distance=distance, normalize=False), want)
        torch.testing.assert_close(
            op(student, teacher, distance=distance), theirs(u, v, reduction="sum") / 50
        )
    want = 1 - F.cosine_similarity(student, teacher)
    for normalize in (False, True):
        got = op(student, teacher, distance="cosine", normalize=normalize, reduction="none")
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_rows_without_a_norm(distance, dtype):
    """Zeros, and numbers below the 1e-12 at which torch's normalisation stops dividing by the norm."""
    student, teacher, _ = sample(8, 20, dtype=dtype)
    with torch.no_grad():
        student[1] = 0
        student[2] *= 1e-15
        teacher[3] = 0
        student[4], teacher[4] = 0, 0
        teacher[5] = student[5]
        teacher[6] = -3 * student[6]
    judge(student, teacher, distance=distance, reduction="none")
    loss, grad, _ = result_and_gradients(
        vlmkernels.embedding_distillation, (student, teacher), distance=distance, reduction="none"
    )
    assert loss.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_features_that_are_equal(distance):
    student = torch.randn(6, 50, requires_grad=True)
    for normalize in (False, True):
        options = {"distance": distance, "normalize": normalize}
        features = (student, student.detach())
        loss, grad, _ = result_and_gradients(vlmkernels.embedding_distillation, features, **options)
        torch.testing.assert_close(loss, torch.zeros(()), rtol=0, atol=1e-6)
        torch.testing.assert_close(grad, torch.zeros(6, 50), rtol=0, atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_of_weight_0_are_not_read(distance, reduction):
    student, teacher, weight = sample(40, 30)
    out = weight == 0
    poisoned = [x.detach().clone() for x in (student, teacher)]
    for x in poisoned:
        x[out] = torch.nan
    poisoned[0].requires_grad_()
    options = {"distance": distance, "reduction": reduction, "weight": weight}
    got, want = (
        result_and_gradients(vlmkernels.embedding_distillation, features, **options)
        for features in (poisoned, (student, teacher))
    )
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert (got[1][out] == 0).all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_no_weight(distance, reduction):
    student, teacher, _ = sample(5, 9)
    options = {"distance": distance, "reduction": reduction, "weight": torch.zeros(5)}
    loss, grad, _ = result_and_gradients(vlmkernels.embedding_distillation, (student, teacher), **options)
    assert torch.equal(loss, torch.zeros(5 if reduction == "none" else ()))
    assert torch.equal(grad, torch.zeros(5, 9))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64], ids=str)
def test_dtypes_of_weights(dtype):
    weight = torch.tensor([1.5, 0, 1]).to(dtype)
    student, teacher, _ = sample(3, 9)
    got = vlmkernels.embedding_distillation(student, teacher, weight=weight)
    rows = vlmkernels.embedding_distillation(student, teacher, reduction="none")
    torch.testing.assert_close(got, (rows * weight.float()).sum() / weight.float().sum())


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("at", [0, 40])
def test_nan_is_not_hidden(distance, at):
    for damaged in range(2):
        features = [torch.randn(4, 41) for _ in range(2)]
        features[damaged][1, at] = torch.nan
        for normalize in (False, True):
            loss = vlmkernels.embedding_distillation(
                *features, distance=distance, normalize=normalize, reduction="none"
            )
            assert loss.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(shape, distance, reduction):
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    options = {"distance": distance, "reduction": reduction}
    got = result_and_gradients(vlmkernels.embedding_distillation, (student, teacher), **options)
    want = result_and_gradients(reference.embedding_distillation, (student, teacher), **options)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], torch.zeros(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype):
    student, teacher, weight = sample(24, 33, dtype=dtype)
    views = {
        "columns": lambda x: x.T.contiguous().T,
        "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda x: x[:1].expand(24, 33),
    }
    for view in views.values():
        same = [view(x.detach()) for x in (student, teacher)]
        plain = [x.contiguous() for x in same]
        got, want = (
            result_and_gradients(
                vlmkernels.embedding_distillation, (s.requires_grad_(), t), weight=weight.expand(24)
            )
            for s, t in (same, plain)
        )
        if NATIVE:
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[:2], want[:2])


@pytest.mark.parametrize("ours", DTYPES, ids=str)
@pytest.mark.parametrize("theirs", DTYPES, ids=str)
def test_dtypes_of_student_and_teacher_may_differ(ours, theirs):
    student, teacher = torch.randn(30, 50).to(ours).requires_grad_(), torch.randn(30, 50).to(theirs)
    loss, grad, _ = result_and_gradients(vlmkernels.embedding_distillation, (student, teacher))
    wide = torch.promote_types(torch.promote_types(ours, theirs), torch.float32)
    assert (loss.dtype, grad.dtype) == (wide, ours)
    want = reference.embedding_distillation(student.to(wide), teacher.to(wide))
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def test_teacher_and_weight_get_no_gradient():
    student, teacher, weight = sample(5, 7)
    teacher.requires_grad_()
    weight.requires_grad_()
    vlmkernels.embedding_distillation(student, teacher, weight=weight).backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert weight.grad is None
    assert not vlmkernels.embedding_distillation(student.detach(), teacher, weight=weight).requires_grad


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(distance, normalize, reduction):
    student, teacher, weight = sample(5, 6, dtype=torch.float64)

    def call(student):
        return vlmkernels.embedding_distillation(
            student, teacher, distance=distance, normalize=normalize, weight=weight, reduction=reduction
        )

    assert torch.autograd.gradcheck(call, (student,))


def test_second_derivative_is_refused():
    student, teacher, _ = sample(5, 5)
    loss = vlmkernels.embedding_distillation(student, teacher)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="embedding_distillation has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.once
def test_registration(permuted, reduction):
    student, teacher, weight = sample(6, 8)
    if permuted:
        student, teacher = (x.detach().T.contiguous().T for x in (student, teacher))
        student.requires_grad_()
    op = torch.ops.vlmkernels.embedding_distillation.default
    bwd = torch.ops.vlmkernels.embedding_distillation_bwd.default
    options = ("cosine", False, reduction)
    dloss = torch.ones_like(op(student.detach(), teacher, weight, *options, False)[0])
    for need in (True, False):
        torch.library.opcheck(op, (student, teacher, weight, *options, need))
        torch.library.opcheck(op, (student, teacher, None, "l1", True, reduction, need))
        torch.library.opcheck(bwd, (dloss, student.detach(), teacher, weight, *options, [need]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distance": "l3"}, "distance must be 'l1', 'l2', 'cosine' or 'smooth_l1', got 'l3'"),
        ({"reduction": "batchmean"}, "reduction must be 'mean', 'sum' or 'none', got 'batchmean'"),
        ({"teacher": torch.zeros(3, 5)}, "teacher must"),
        ({"weight": torch.zeros(4)}, "weight must be"),
    ],
    ids=str,
)
def test_raw_ops_refuse(change, message):
    good = {
        "student": torch.zeros(3, 4), "teacher": torch.zeros(3, 4), "weight": torch.zeros(3),
        "distance": "l1", "normalize": True, "reduction": "mean",
    }  # fmt: skip
    torch.ops.vlmkernels.embedding_distillation(*good.values(), True)
    values = (good | change).values()
    with pytest.raises(ValueError, match=f"embedding_distillation: .*{message}"):
        torch.ops.vlmkernels.embedding_distillation(*values, True)
    with pytest.raises(ValueError, match=f"embedding_distillation_bwd: .*{message}"):
        torch.ops.vlmkernels.embedding_distillation_bwd(torch.ones(()), *values, [True])


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(student, teacher, weight):
        return vlmkernels.embedding_distillation(student, teacher, distance="smooth_l1", weight=weight)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 16), (9, 33)):
        student, teacher, weight = sample(*shape)
        for got, want in zip(
            result_and_gradients(lambda s, t, f=compiled, w=weight: f(s, t, w), (student, teacher)),
            result_and_gradients(lambda s, t, w=weight: step(s, t, w), (student, teacher)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Loss(torch.nn.Module):
        def forward(self, student, teacher, weight):
            return vlmkernels.embedding_distillation(student, teacher, distance="l2", weight=weight)

    loss = recorded(recorder, Loss(), sample(6, 9), [{0: torch.export.Dim("rows", min=2)}] * 3)
    student, teacher, weight = sample(40, 9)
    got, want = loss(student, teacher, weight), Loss()(student, teacher, weight)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x, student)[0] for x in (got, want)))


def test_autocast_changes_nothing():
    student, teacher, weight = sample(20, 30)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vlmkernels.embedding_distillation(student, teacher, weight=weight)
    assert torch.equal(loss, vlmkernels.embedding_distillation(student, teacher, weight=weight))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradient_is_kept(reduction):
    op = functools.partial(vlmkernels.embedding_distillation, reduction=reduction)
    features = sample(50, 300, dtype=torch.bfloat16)[:2]
    assert saved_activation_bytes(op, *features) == (50 * 300 * 2 if reduction == "mean" else 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("distance", DISTANCES)
def test_incoming_gradients(distance, dtype):
    """The gradient that the forward formed, scaled; float16 has no room for it, so it is formed later."""
    student, teacher, weight = sample(40, 50, dtype=dtype)
    loss = vlmkernels.embedding_distillation(student, teacher, distance=distance, weight=weight)
    unit, half, again = (
        torch.autograd.grad(loss, student, torch.tensor(by, dtype=loss.dtype), retain_graph=True)[0]
        for by in (1.0, 0.5, 1.0)
    )
    assert torch.equal(again, unit)
    assert torch.equal(half, unit / 2) or dtype == torch.float16  # which rounds small numbers
    torch.testing.assert_close(half, unit / 2)
    unit.zero_()  # it is no view of what the graph retains
    assert torch.equal(torch.autograd.grad(loss, student)[0], again)


@pytest.mark.parametrize("formed", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_raw_ops_agree(reduction, formed):
    """A gradient formed in the forward of single rows belongs to each row's own loss, and is formed anew."""
    student, teacher, weight = sample(7, 7)
    op, bwd = torch.ops.vlmkernels.embedding_distillation, torch.ops.vlmkernels.embedding_distillation_bwd
    inputs = (teacher, weight, "l2", True, reduction)
    loss, _ = op(student, *inputs, formed)
    dloss = torch.rand_like(loss)
    (got,) = torch.autograd.grad(loss, student, dloss)
    torch.testing.assert_close(got, bwd(dloss, student.detach(), *inputs, [True]))
    loss, grad = op(student.detach(), *inputs, formed)
    want = bwd(torch.ones_like(loss), student.detach(), *inputs, [formed])
    torch.testing.assert_close(grad, want)


def test_determinism(for_thread_counts):
    student, teacher, weight = sample(3000, 130)

    def run():
        return result_and_gradients(vlmkernels.embedding_distillation, (student, teacher), weight=weight)[:2]

    first, *others = for_thread_counts(run)
    if NATIVE:
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


BAD = [
    ({"student": torch.zeros(3, 5)}, "must have the same shape [N, D], got (3, 5) and (3, 4)"),
    ({"student": torch.zeros(4), "teacher": torch.zeros(4)}, "[N, D], got (4,) and (4,)"),
    ({"distance": "l3"}, "distance must be 'l1', 'l2', 'cosine' or 'smooth_l1', got 'l3'"),
    ({"weight": torch.zeros(4)}, "weight must be [N] = (3,), got (4,)"),
    ({"weight": torch.zeros(3, dtype=torch.complex64)}, "weight must be float32"),
    ({"reduction": "batchmean"}, "reduction must be 'mean', 'sum' or 'none', got 'batchmean'"),
    ({"teacher": torch.zeros(3, 4, dtype=torch.int64)}, "must be float32"),
    ({"teacher": torch.zeros(3, 4, device="meta")}, "must be on the same device"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.once
def test_bad_input(change, message):
    good = {"student": torch.zeros(3, 4), "teacher": torch.zeros(3, 4), "weight": torch.ones(3)}
    vlmkernels.embedding_distillation(**good)
    with pytest.raises(ValueError, match="embedding_distillation: ") as error:
        vlmkernels.embedding_distillation(**good | change)
    assert message in str(error.value)


def test_all_faults_in_one_error():
    with pytest.raises(ValueError, match=r"(?s)distance.*reduction.*shape.*weight"):
        vlmkernels.embedding_distillation(
            torch.zeros(3, 4), torch.zeros(3, 5), distance="x", reduction="x", weight=torch.zeros(1)
        )
