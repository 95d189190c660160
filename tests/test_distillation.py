"""Divergences of softmaxes with targets, against the definition in float64."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.testing import assert_op_as_good, result_and_gradients, saved_activation_bytes

NATIVE = "reference" not in vlmkernels.info()["ops"]["distillation"]["CPU"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]
REDUCTIONS = ["batchmean", "mean", "sum", "none"]


def on_cuda(student, teacher, *, target=None, **options):
    target = None if target is None else target.cuda()
    return vlmkernels.distillation(student.cuda(), teacher.cuda(), target=target, **options).cpu()


OPS = {
    "dispatched": vlmkernels.distillation,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


def sample(rows, classes, *, dtype=torch.float32, std=2.0, ignored=0.3):
    """student [rows, classes], teacher likewise, target [rows]."""
    student, teacher = ((std * torch.randn(rows, classes)).to(dtype) for _ in range(2))
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = -100
    return student.requires_grad_(), teacher, target


def judge(student, teacher, op=vlmkernels.distillation, **options):
    assert_op_as_good(op, reference.distillation, (student, teacher), features=0, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("std", [0.01, 2.0, 8.0])
@pytest.mark.parametrize("shape", [(1, 1), (40, 5), (64, 130), (37, 1000), (5, 9001)], ids=str)
def test_forward_and_gradients(op, dtype, divergence, std, shape):
    if std != 2.0 and dtype == torch.float64:
        pytest.skip("terms that cancel, and a truth that has no more digits")
    student, teacher, target = sample(*shape, dtype=dtype, std=std)
    for temperature in (1.0, 3.0):
        options = {"temperature": temperature, "divergence": divergence, "reduction": "none", "op": OPS[op]}
        judge(student, teacher, **options)
        judge(student, teacher, target=target, hard_weight=0.4, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_options(op, dtype, divergence, reduction):
    student, teacher, target = sample(130, 70, dtype=dtype)
    options = {"divergence": divergence, "reduction": reduction, "op": OPS[op]}
    for beta, hard_weight, temperature in itertools.product((0.01, 0.7), (0.0, 0.5, 1.0), (0.25, 1.0)):
        judge(student, teacher, target=target, beta=beta, hard_weight=hard_weight, temperature=temperature,
              **options)  # fmt: skip


@pytest.mark.parametrize("temperature", [0.01, 40.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_extreme_temperatures(divergence, temperature):
    student, teacher, target = sample(60, 300)
    judge(student, teacher, divergence=divergence, temperature=temperature, reduction="none")
    judge(student, teacher, divergence=divergence, temperature=temperature, target=target, hard_weight=0.5,
          reduction="none")  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_softmax_of_almost_no_temperature_is_the_largest_class(divergence, temperature):
    student, teacher = torch.tensor([[0.0, 1.0, 5.0]], requires_grad=True), torch.tensor([[-1.0, 0.0, 3.0]])
    loss = vlmkernels.distillation(student, teacher, divergence=divergence, temperature=temperature)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, student)[0], torch.zeros(1, 3))


def test_equals_torch():
    student, teacher, target = sample(50, 80)
    log_s, log_p = (student / 2).log_softmax(1), (teacher / 2).log_softmax(1)
    op = vlmkernels.distillation
    kl = F.kl_div(log_s, log_p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(op(student, teacher, temperature=2.0), 4 * kl)
    kl = F.kl_div(log_p, log_s, reduction="batchmean", log_target=True)
    torch.testing.assert_close(op(student, teacher, temperature=2.0, divergence="reverse_kl"), 4 * kl)
    mixture = (0.3 * log_p.exp() + 0.7 * log_s.exp()).log()
    of_p, of_s = (F.kl_div(mixture, x, reduction="batchmean", log_target=True) for x in (log_p, log_s))
    got = op(student, teacher, temperature=2.0, divergence="jsd", beta=0.3)
    torch.testing.assert_close(got, 4 * (0.3 * of_p + 0.7 * of_s))
    got = op(student, teacher, temperature=2.0, target=target, hard_weight=1.0)
    torch.testing.assert_close(got, F.cross_entropy(student, target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits(dtype, divergence):
    """Whole rows far from 0, each elsewhere, and maxima that come late."""
    student, teacher, target = sample(40, 5000, dtype=torch.float32)
    rise = torch.linspace(0, 300, 5000)
    offset = torch.linspace(-3e4, 3e4, 40)[:, None]
    student, teacher = (student.detach() + rise + offset).to(dtype), (teacher + rise - offset).to(dtype)
    judge(student.requires_grad_(), teacher, divergence=divergence, reduction="none")
    judge(student, teacher, divergence=divergence, temperature=5.0, target=target, hard_weight=0.5,
          reduction="none")  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("masked", ["first", "last", "some"])
def test_classes_that_neither_can_be(dtype, divergence, masked):
    """They change nothing, and get no gradient; `first` are more than a piece that is read at once."""
    student, teacher, target = sample(20, 4500, dtype=dtype)
    which = {"first": slice(0, 3000), "last": slice(3000, None), "some": slice(None, None, 3)}[masked]
    possible = torch.ones(4500, dtype=torch.bool)
    possible[which] = False
    with torch.no_grad():
        student[:, which] = -torch.inf
        teacher[:, which] = -torch.inf
    target = torch.where(target >= 0, possible.nonzero()[0], target)
    options = {"divergence": divergence, "temperature": 2.0, "target": target, "hard_weight": 0.5}
    judge(student, teacher, reduction="none", **options)
    loss = vlmkernels.distillation(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss, student)
    assert (grad[:, which] == 0).all()
    with pytest.raises(IndexError, match=r"target must be in \[0, V = 9\) or -100, got 9"):
        vlmkernels.distillation(torch.zeros(2, 9), torch.zeros(2, 9), target=torch.tensor([-100, 9]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 2500])
def test_classes_that_one_cannot_be(dtype, at):
    student, teacher, _ = sample(6, 4500, dtype=dtype)
    hidden = teacher.clone()
    hidden[:, at : at + 2001] = -torch.inf
    judge(student, hidden, reduction="none")
    judge(student, hidden, divergence="jsd", beta=0.2, reduction="none")
    reverse = vlmkernels.distillation(student, hidden, divergence="reverse_kl", reduction="none")
    assert (reverse == torch.inf).all()

    with torch.no_grad():
        student[:, at : at + 2001] = -torch.inf
    judge(student, teacher, divergence="reverse_kl", reduction="none")
    judge(student, teacher, divergence="jsd", beta=0.2, reduction="none")
    forward, grad = result_and_gradients(vlmkernels.distillation, (student, teacher), reduction="none")[:2]
    want = result_and_gradients(reference.distillation, (student, teacher), reduction="none")[1]
    assert (forward == torch.inf).all()
    torch.testing.assert_close(grad, want)  # that of the probabilities, which are finite


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("at", [0, 3000])
@pytest.mark.parametrize("beside", [0.0, -torch.inf])
def test_nan_is_not_hidden(dtype, divergence, at, beside):
    """Neither by the maximum of later classes, nor by a weight of 0 in the other row."""
    for damaged in range(2):
        logits = [torch.randn(4, 5000).to(dtype) for _ in range(2)]
        for x in logits:
            x[:, :2000] = beside
        logits[damaged][1, at] = torch.nan
        logits[0].requires_grad_()
        loss, grad, _ = result_and_gradients(vlmkernels.distillation, logits, divergence=divergence,
                                             reduction="none")  # fmt: skip
        assert loss.isnan().tolist() == [False, True, False, False]
        assert grad.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_row_without_a_class_that_can_be_is_nan(divergence):
    for masked in range(2):
        logits = [torch.randn(3, 2100) for _ in range(2)]
        logits[masked][1] = -torch.inf
        loss = vlmkernels.distillation(*logits, divergence=divergence, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]


def test_terms_of_weight_0_are_not_computed():
    student, teacher, target = sample(20, 30)
    nothing = torch.full_like(teacher, torch.nan)
    loss = vlmkernels.distillation(student, nothing, target=target, hard_weight=1.0, temperature=7.0)
    want = F.cross_entropy(student, target)
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, want)))
    masked = student.detach().clone()
    masked[torch.arange(20), target.clamp_min(0)] = -torch.inf
    both = teacher.where(masked.isfinite(), -torch.inf)
    assert vlmkernels.distillation(masked, both, target=target).isfinite()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("hard_weight", [0.0, 0.5, 1.0])
def test_ignored_rows_are_not_read(divergence, hard_weight):
    student, teacher, target = sample(30, 40)
    options = {"target": target, "divergence": divergence, "hard_weight": hard_weight, "temperature": 2.0}
    poisoned = [x.detach().clone() for x in (student, teacher)]
    for x in poisoned:
        x[target == -100] = torch.nan
    poisoned[0].requires_grad_()
    for reduction in REDUCTIONS:
        got, want = (
            result_and_gradients(vlmkernels.distillation, logits, reduction=reduction, **options)
            for logits in (poisoned, (student, teacher))
        )
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
        assert (got[1][target == -100] == 0).all()
    rows = vlmkernels.distillation(*poisoned, reduction="none", **options)
    assert (rows[target == -100] == 0).all()
    counted = target != -100
    mean = vlmkernels.distillation(*poisoned, **options)
    torch.testing.assert_close(mean, rows.sum() / counted.sum())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 10_000])
def test_no_row_counts(reduction, ignore_index):
    student, teacher, _ = sample(5, 9)
    target = torch.full((5,), ignore_index)
    options = {"target": target, "ignore_index": ignore_index, "hard_weight": 0.3, "reduction": reduction}
    loss, grad, _ = result_and_gradients(vlmkernels.distillation, (student, teacher), **options)
    assert torch.equal(loss, torch.zeros(5 if reduction == "none" else ()))
    assert torch.equal(grad, torch.zeros(5, 9))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0), (1, 1), (4, 1)], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_empty_and_one_class(shape, divergence):
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    for reduction in REDUCTIONS:
        options = {"divergence": divergence, "reduction": reduction}
        loss, grad, _ = result_and_gradients(vlmkernels.distillation, (student, teacher), **options)
        assert torch.equal(loss, torch.zeros(shape[:1] if reduction == "none" else ()))
        assert torch.equal(grad, torch.zeros(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views(dtype):
    """Rows cut out of wider ones, columns, every second class, one row for all."""
    student, teacher, target = sample(24, 3003, dtype=dtype)
    views = {
        "cut": lambda x: torch.nn.functional.pad(x, (0, 61))[:, :3003],
        "columns": lambda x: x.T.contiguous().T,
        "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "expanded": lambda x: x[:1].expand(24, 3003),
    }
    for view in views.values():
        same = [view(x.detach()) for x in (student, teacher)]
        options = {"target": target, "hard_weight": 0.5}
        got = result_and_gradients(vlmkernels.distillation, [same[0].requires_grad_(), same[1]], **options)
        plain = [x.detach().contiguous() for x in same]
        want = result_and_gradients(vlmkernels.distillation, [plain[0].requires_grad_(), plain[1]], **options)
        if NATIVE:
            assert torch.equal(got[0], want[0])
            assert torch.equal(got[1], want[1])
        torch.testing.assert_close(got[:2], want[:2])


@pytest.mark.parametrize("ours", DTYPES, ids=str)
@pytest.mark.parametrize("theirs", DTYPES, ids=str)
def test_dtypes_of_student_and_teacher_may_differ(ours, theirs):
    student, teacher = torch.randn(30, 50).to(ours).requires_grad_(), torch.randn(30, 50).to(theirs)
    loss, grad, _ = result_and_gradients(vlmkernels.distillation, (student, teacher), temperature=2.0)
    wide = torch.promote_types(torch.promote_types(ours, theirs), torch.float32)
    want = reference.distillation(student.to(wide), teacher.to(wide), temperature=2.0)
    assert (loss.dtype, grad.dtype) == (wide, ours)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)


def test_teacher_gets_no_gradient():
    student, teacher, _ = sample(5, 7)
    teacher.requires_grad_()
    loss = vlmkernels.distillation(student, teacher)
    loss.backward()
    assert student.grad is not None
    assert teacher.grad is None
    assert not vlmkernels.distillation(student.detach(), teacher).requires_grad


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(divergence, reduction):
    student, teacher, target = sample(5, 6, dtype=torch.float64)

    def call(student):
        options = {"temperature": 1.7, "beta": 0.3, "target": target, "hard_weight": 0.4}
        return vlmkernels.distillation(
            student, teacher, divergence=divergence, reduction=reduction, **options
        )

    assert torch.autograd.gradcheck(call, (student,))


def test_second_derivative_is_refused():
    student, teacher, _ = sample(5, 5)
    (grad,) = torch.autograd.grad(vlmkernels.distillation(student, teacher), student, create_graph=True)
    with pytest.raises(RuntimeError, match="distillation has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.once
def test_registration(dtype, permuted, reduction):
    student, teacher, target = sample(6, 8, dtype=dtype)
    if permuted:
        student, teacher = (x.detach().T.contiguous().T for x in (student, teacher))
        student.requires_grad_()
    options = (2.0, "jsd", 0.3, 0.5, -100, reduction)
    op, bwd = torch.ops.vlmkernels.distillation.default, torch.ops.vlmkernels.distillation_bwd.default
    tests = {} if dtype == torch.float32 else {"test_utils": ("test_schema", "test_faketensor")}
    loss, stats, _ = op(student.detach(), teacher, target, *options, False)
    for need in (True, False):
        plain = (1.0, "forward_kl", 0.5, 0.0, -100, reduction, need)
        torch.library.opcheck(op, (student, teacher, target, *options, need), **tests)
        torch.library.opcheck(op, (student, teacher, None, *plain), **tests)
        arguments = (torch.ones_like(loss), student.detach(), teacher, target, stats, *options, [need])
        torch.library.opcheck(bwd, arguments, **tests)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0"),
        ({"divergence": "kl"}, "divergence must be 'forward_kl', 'reverse_kl' or 'jsd', got 'kl'"),
        ({"beta": 1.0}, r"beta must be in \(0, 1\), got 1"),
        ({"hard_weight": 1.5}, r"hard_weight must be in \[0, 1\], got 1.5"),
        ({"target": None}, "target must be given with hard_weight 0.5"),
        ({"reduction": "all"}, "reduction must be 'batchmean', 'mean', 'sum' or 'none', got 'all'"),
        ({"teacher": torch.zeros(3, 5)}, "teacher_logits must"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, "target must be"),
    ],
    ids=str,
)
def test_raw_ops_refuse(change, message):
    good = {
        "student": torch.zeros(3, 4), "teacher": torch.zeros(3, 4), "target": torch.tensor([0, 3, -100]),
        "temperature": 1.0, "divergence": "jsd", "beta": 0.5, "hard_weight": 0.5, "ignore_index": -100,
        "reduction": "mean",
    }  # fmt: skip
    torch.ops.vlmkernels.distillation(*good.values(), True)
    values = list((good | change).values())
    with pytest.raises(ValueError, match=f"distillation: .*{message}"):
        torch.ops.vlmkernels.distillation(*values, True)
    backward = [torch.ones(()), *values[:3], torch.ones(3, 6), *values[3:], [True]]
    with pytest.raises(ValueError, match=f"distillation_bwd: .*{message}"):
        torch.ops.vlmkernels.distillation_bwd(*backward)


@pytest.mark.once
def test_compile_fullgraph_dynamic():
    def step(student, teacher, target):
        return vlmkernels.distillation(student, teacher, temperature=2.0, target=target, hard_weight=0.1)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((5, 16), (9, 33)):
        student, teacher, target = sample(*shape)
        for got, want in zip(
            result_and_gradients(lambda s, t, f=compiled, y=target: f(s, t, y), (student, teacher)),
            result_and_gradients(lambda s, t, y=target: step(s, t, y), (student, teacher)),
            strict=True,
        ):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Loss(torch.nn.Module):
        def forward(self, student, teacher, target):
            return vlmkernels.distillation(student, teacher, target=target, divergence="jsd", hard_weight=0.5)

    loss = recorded(recorder, Loss(), sample(6, 9), [{0: torch.export.Dim("rows", min=2)}] * 3)
    student, teacher, target = sample(40, 9)
    got, want = loss(student, teacher, target), Loss()(student, teacher, target)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x, student)[0] for x in (got, want)))


def test_autocast_changes_nothing():
    student, teacher, target = sample(20, 30)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vlmkernels.distillation(student, teacher, target=target, hard_weight=0.5)
    assert torch.equal(loss, vlmkernels.distillation(student, teacher, target=target, hard_weight=0.5))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_six_numbers_of_a_row_and_the_gradient_are_kept(reduction):
    logits = sample(50, 300, dtype=torch.bfloat16)[:2]
    op = functools.partial(vlmkernels.distillation, divergence="jsd", reduction=reduction)
    assert saved_activation_bytes(op, *logits) == 50 * 6 * 4 + (50 * 300 * 2 if reduction == "mean" else 0)


@pytest.mark.sampled(3)
@pytest.mark.skipif(not NATIVE, reason="the reference stores softmaxes")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.once
def test_softmaxes_are_not_stored(peak_memory, divergence):
    """The logits have 61 MiB each, and so has the gradient."""
    used = peak_memory(f"""
student, teacher = torch.randn(512, 31_250, requires_grad=True), torch.randn(512, 31_250)
def run():
    vlmkernels.distillation(student, teacher, divergence={divergence!r}).backward()
""")
    assert used < 80 * 2**20


def test_determinism(for_thread_counts):
    student, teacher, target = sample(300, 2600)

    def run():
        options = {"target": target, "temperature": 3.0, "hard_weight": 0.2, "divergence": "jsd"}
        return result_and_gradients(vlmkernels.distillation, (student, teacher), **options)[:2]

    first, *others = for_thread_counts(run)
    if NATIVE:
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


BAD = [
    ({"student_logits": torch.zeros(3, 5)}, "must have the same shape [N, V], got (3, 5) and (3, 4)"),
    ({"student_logits": torch.zeros(4), "teacher_logits": torch.zeros(4)}, "[N, V], got (4,) and (4,)"),
    ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    ({"temperature": float("inf")}, "temperature must be positive and finite, got inf"),
    ({"temperature": float("nan")}, "temperature must be positive and finite, got nan"),
    ({"divergence": "kl"}, "divergence must be 'forward_kl', 'reverse_kl' or 'jsd', got 'kl'"),
    ({"beta": 0.0}, "beta must be in (0, 1), got 0.0"),
    ({"beta": 1.0}, "beta must be in (0, 1), got 1.0"),
    ({"target": torch.zeros(4, dtype=torch.int64)}, "target must be [N] = (3,), got (4,)"),
    ({"target": torch.zeros(3, dtype=torch.int32)}, "target must be int64, got torch.int32"),
    ({"hard_weight": 1.5}, "hard_weight must be in [0, 1], got 1.5"),
    ({"hard_weight": 0.5, "target": None}, "target must be given with hard_weight 0.5"),
    ({"reduction": "all"}, "reduction must be 'batchmean', 'mean', 'sum' or 'none', got 'all'"),
    ({"ignore_index": 2**63}, "ignore_index must fit in int64, got 9223372036854775808"),
    ({"teacher_logits": torch.zeros(3, 4, dtype=torch.int64)}, "must be float32"),
    ({"teacher_logits": torch.zeros(3, 4, device="meta")}, "must be on the same device"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.once
def test_bad_input(change, message):
    good = {"student_logits": torch.zeros(3, 4), "teacher_logits": torch.zeros(3, 4)}
    good["target"] = torch.tensor([0, 3, -100])
    vlmkernels.distillation(**good)
    with pytest.raises(ValueError, match="distillation: ") as error:
        vlmkernels.distillation(**good | change)
    assert message in str(error.value)


def test_all_faults_in_one_error():
    with pytest.raises(ValueError, match=r"(?s)temperature.*beta.*hard_weight.*target.*reduction.*shape"):
        vlmkernels.distillation(
            torch.zeros(3, 4), torch.zeros(3, 5), temperature=-1.0, beta=2.0, hard_weight=2.0, reduction="x"
        )


@pytest.mark.parametrize("name", ["temperature", "beta", "hard_weight"])
def test_options_are_numbers(name):
    """A tensor would get no gradient."""
    options = {"target": torch.zeros(2, dtype=torch.int64), name: torch.tensor(0.5)}
    with pytest.raises(TypeError, match=name):
        vlmkernels.distillation(torch.zeros(2, 3), torch.zeros(2, 3), **options)


@pytest.mark.parametrize("wrong", [4, -1, -(2**63), 2**63 - 1])
def test_targets_out_of_range(wrong):
    options = {"target": torch.tensor([0, wrong, -100])}
    with pytest.raises(
        IndexError, match=rf"distillation: target must be in \[0, V = 4\) or -100, got {wrong}"
    ):
        vlmkernels.distillation(torch.zeros(3, 4), torch.zeros(3, 4), **options)
