"""Distillation from hidden states, and from the likeliest classes of an offline teacher."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.teachers import (
    FORMS,
    NATIVE,
    REDUCTIONS,
    judge,
    of_dtypes,
    of_forms,
    of_teacher,
    results,
    sample,
    student,
    targets,
    top,
)
from vlmkernels import reference
from vlmkernels.testing import assert_as_good, result_and_gradients, saved_activation_bytes


def moved(value):
    if isinstance(value, tuple):
        return tuple(map(moved, value))
    return value.cuda() if isinstance(value, torch.Tensor) else value


def on_cuda(*tensors, **options):
    options = {name: moved(value) for name, value in options.items()}
    return vlmkernels.linear_distillation(*map(moved, tensors), **options).cpu()


OPS = {
    "dispatched": vlmkernels.linear_distillation,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}


SIZES = [(1, 1, 2, 3), (37, 130, 33, 20), (130, 37, 64, 70), (300, 700, 70, 33)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("op", OPS)
@of_dtypes
@of_forms
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_gradients(op, dtype, teacher, divergence, sizes):
    n, v, d, e = sizes
    mean, mixed = {"reduction": "mean"}, {"target": targets(n, v), "hard_weight": 0.4, "reduction": "none"}
    for std, options in ((1.0, mean), (8.0, {"reduction": "none"}), (8.0, mixed)):
        tensors = student(n, v, d, dtype=dtype, std=std)
        taught = of_teacher(teacher, n, v, e, dtype=dtype, std=std, temperature=2.0)
        judge(tensors, OPS[op], divergence=divergence, temperature=2.0, **taught, **options)


@pytest.mark.parametrize("op", OPS)
@of_dtypes
@of_forms
def test_options(op, dtype, teacher, divergence):
    tensors = student(140, 150, 24, dtype=dtype, bias=False)
    target = targets(140, 150)
    for temperature, hard_weight, reduction in (
        (0.25, 0.0, "none"),
        (0.25, 0.5, "batchmean"),
        (1.0, 0.0, "sum"),
        (1.0, 0.5, "none"),
        (1.0, 1.0, "none"),
    ):
        taught = of_teacher(teacher, 140, 150, 9, dtype=dtype, temperature=temperature)
        judge(tensors, OPS[op], divergence=divergence, beta=0.3, temperature=temperature, target=target,
              hard_weight=hard_weight, reduction=reduction, **taught)  # fmt: skip


@pytest.mark.parametrize("beta", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_beta(teacher, beta):
    tensors, taught = sample(teacher)
    judge(tensors, divergence="jsd", beta=beta, reduction="none", **taught)


@pytest.mark.parametrize("temperature", [0.1, 40.0])
@of_forms
def test_extreme_temperatures(teacher, divergence, temperature):
    tensors, taught = sample(teacher, temperature=temperature)
    options = taught | {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    judge(tensors, **options)
    judge(tensors, target=targets(40, 60), hard_weight=0.5, **options)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
@of_forms
def test_softmax_of_almost_no_temperature_is_the_largest_class(teacher, divergence, temperature):
    logits, weight = torch.tensor([[0.0, 1.0, 5.0]], requires_grad=True), torch.eye(3, requires_grad=True)
    taught = {"teacher_hidden": torch.tensor([[-1.0, 0.0, 3.0]]), "teacher_weight": torch.eye(3)}
    if teacher == "topk":
        taught = {"teacher_topk": (torch.zeros(1, 1), torch.tensor([[2]]))}
    loss, *grads = results([logits, weight], divergence=divergence, temperature=temperature, **taught)
    assert loss == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("teacher", "divergence", "classes", "dtype"),
    [
        ("hidden", "forward_kl", 33_000, torch.float32),
        ("hidden", "jsd", 33_000, torch.bfloat16),
        ("topk", "forward_kl", 67_000, torch.float32),
    ],
    ids=str,
)
@pytest.mark.once
def test_many_chunks_of_rows(op, teacher, divergence, classes, dtype):
    """More rows than the workspace holds logits of: sums over chunks, in both precisions."""
    tensors = student(260, classes, 8, dtype=dtype)
    judge(tensors, OPS[op], divergence=divergence, target=targets(260, classes, 0.0), hard_weight=0.2,
          reduction="none", **of_teacher(teacher, 260, classes, 5, dtype=dtype, k=20))  # fmt: skip


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_is_distillation_of_the_logits(divergence):
    tensors, taught = sample("hidden")
    options = {"temperature": 2.0, "divergence": divergence, "target": targets(40, 60), "hard_weight": 0.3}
    teacher = F.linear(*taught.values())

    def of_logits(hidden, weight, bias, **options):
        return vlmkernels.distillation(F.linear(hidden, weight, bias), teacher, **options)

    for ours, theirs in zip(
        results(tensors, **taught, **options),
        result_and_gradients(of_logits, tensors, **options),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@of_dtypes
@of_forms
def test_large_logits(dtype, teacher, divergence):
    """Maxima that come late, far from 0."""
    hidden, weight, bias = student(40, 2000, 8, dtype=dtype)
    with torch.no_grad():
        bias += torch.linspace(-1000, 1000, 2000).to(dtype)
    taught = of_teacher(teacher, 40, 2000, 9, dtype=dtype)
    if teacher == "hidden":
        taught["teacher_bias"] = taught["teacher_bias"] + torch.linspace(-1000, 1000, 2000).to(dtype)
    judge([hidden, weight, bias], divergence=divergence, reduction="none", **taught)
    judge([hidden, weight, bias], divergence=divergence, temperature=5.0, target=targets(40, 2000),
          hard_weight=0.5, **taught)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_that_are_rounded_would_be_seen(dtype):
    """Their gradient is off by percents; the same judgement rejects it."""

    def rounded(hidden, weight, teacher_hidden, teacher_weight, *, student_bias, teacher_bias, **options):
        logits = F.linear(hidden, weight, student_bias)
        taught = F.linear(teacher_hidden, teacher_weight, teacher_bias)
        return reference.distillation(logits, taught, **options)

    tensors = student(256, 1000, 256, dtype=dtype, std=8.0)
    taught = of_teacher("hidden", 256, 1000, 64, dtype=dtype, std=8.0)
    judge(tensors, **taught)
    with pytest.raises(AssertionError, match="above"):
        judge(tensors, rounded, **taught)


@of_dtypes
@of_forms
@pytest.mark.parametrize("masked", [slice(0, 300), slice(200, None), slice(None, None, 3)], ids=str)
def test_classes_that_neither_can_be(dtype, teacher, divergence, masked):
    hidden, weight, bias = student(20, 600, 8, dtype=dtype)
    taught = of_teacher("hidden", 20, 600, 9, dtype=dtype)
    with torch.no_grad():
        bias[masked] = taught["teacher_bias"][masked] = -torch.inf
    possible = bias.isfinite().nonzero().squeeze(1)
    if teacher == "topk":
        logits = (
            taught["teacher_hidden"].float() @ taught["teacher_weight"].float().T + taught["teacher_bias"]
        )
        taught = {"teacher_topk": top(logits, 50)}
    target = possible[torch.randint(0, len(possible), (20,))]
    options = taught | {"divergence": divergence, "temperature": 1.0, "target": target, "hard_weight": 0.5}
    judge([hidden, weight, bias], reduction="none", **options)
    loss, *grads = results([hidden, weight, bias], **options)
    assert loss.isfinite()
    for grad in grads[1:]:
        assert (grad[masked] == 0).all()


@of_dtypes
@of_forms
@pytest.mark.parametrize("at", [0, 300, 900])
@pytest.mark.parametrize("beside", [0.0, -torch.inf])
def test_nan_is_not_hidden(dtype, teacher, divergence, at, beside):
    """Neither by the maximum of later classes, nor by a weight of 0 in the other distribution."""
    damages = {"hidden": ("student_bias", "teacher_bias"), "topk": ("student_bias", "log_probs")}[teacher]
    for damage in damages:
        hidden, weight, bias = student(7, 1000, 8, dtype=dtype)
        taught = of_teacher(teacher, 7, 1000, 9, dtype=dtype)
        with torch.no_grad():
            for x in (bias, taught.get("teacher_bias", bias)):
                x[:250] = beside
            {"student_bias": bias, "teacher_bias": taught.get("teacher_bias", bias)}.get(damage, bias[:0])[
                at : at + 1
            ] = torch.nan
            if damage == "log_probs":
                taught["teacher_topk"][0][:, at // 3] = torch.nan
        loss, *grads = results([hidden, weight, bias], divergence=divergence, reduction="none", **taught)
        assert loss.isnan().all()
        assert grads[0].isnan().any(1).all()
        assert all(grad.isnan().any() for grad in grads)


@of_forms
@pytest.mark.parametrize("hard_weight", [0.0, 0.5, 1.0])
def test_ignored_rows_are_not_read(teacher, divergence, hard_weight):
    tensors, taught = sample(teacher)
    target = targets(40, 60)
    out = target == -100
    options = {"target": target, "divergence": divergence, "hard_weight": hard_weight}
    poisoned = [tensors[0].detach().clone(), *tensors[1:]]
    poisoned[0][out] = torch.nan
    poisoned[0].requires_grad_()
    if teacher == "hidden":
        other = taught | {"teacher_hidden": taught["teacher_hidden"].clone()}
        other["teacher_hidden"][out] = torch.nan
    else:
        other = {"teacher_topk": tuple(x.clone() for x in taught["teacher_topk"])}
        other["teacher_topk"][0][out] = torch.nan
        other["teacher_topk"][1][out] = torch.tensor([-7, 5000, 3, 3] * 5)
    for reduction in REDUCTIONS:
        got = results(poisoned, reduction=reduction, **options, **other)
        want = results(tensors, reduction=reduction, **options, **taught)
        for ours, theirs in zip(got, want, strict=True):
            assert torch.equal(ours, theirs)
        assert (got[1][out] == 0).all()
    rows = vlmkernels.linear_distillation(*poisoned[:2], reduction="none", **options, **other)
    assert (rows[out] == 0).all()


def test_terms_of_weight_0_are_not_computed():
    tensors, taught = sample("hidden")
    target = targets(40, 60)
    want = result_and_gradients(lambda h, w, b: F.cross_entropy(F.linear(h, w, b), target), tensors)
    nothing = {name: torch.full_like(x, torch.nan) for name, x in taught.items()}
    wrong = torch.zeros(40, 3), torch.full((40, 3), 77)
    for given in (nothing, {"teacher_topk": wrong}):
        got = results(tensors, target=target, hard_weight=1.0, temperature=7.0, **given)
        for ours, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(ours, theirs)
    hidden, weight, bias = tensors
    with torch.no_grad():
        bias[5] = taught["teacher_bias"][5] = -torch.inf
    assert results([hidden, weight, bias], target=torch.full((40,), 5), **taught)[0].isfinite()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 10_000])
@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_no_row_counts(reduction, ignore_index, teacher):
    tensors, taught = sample(teacher, rows=5)
    options = {"target": torch.full((5,), ignore_index), "ignore_index": ignore_index, "hard_weight": 0.3}
    loss, *grads = results(tensors, reduction=reduction, **options, **taught)
    assert torch.equal(loss, torch.zeros(5 if reduction == "none" else ()))
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize(
    "sizes", [(0, 8, 3, 4), (0, 0, 3, 4), (3, 0, 2, 2), (4, 1, 3, 2), (4, 6, 0, 0)], ids=str
)
@of_forms
def test_empty_and_one_class(sizes, teacher, divergence):
    n, v, d, e = sizes
    tensors = [torch.zeros(n, d), torch.zeros(v, d)]
    tensors = [x.requires_grad_() for x in tensors]
    taught = {"teacher_hidden": torch.zeros(n, e), "teacher_weight": torch.zeros(v, e)}
    if teacher == "topk":
        taught = {"teacher_topk": (torch.full((n, v), -math.log(max(v, 1))), torch.arange(v).expand(n, v))}
    for reduction in REDUCTIONS:
        loss, *grads = results(tensors, divergence=divergence, reduction=reduction, **taught)
        assert loss.shape == ((n,) if reduction == "none" else ())
        for got in (loss, *grads):
            torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@of_forms
def test_gradcheck(teacher, divergence, reduction):
    tensors = student(5, 6, 4, dtype=torch.float64)
    taught = of_teacher(teacher, 5, 6, 3, dtype=torch.float64)
    target = targets(5, 6)

    def call(hidden, weight, bias):
        options = {"temperature": 1.7, "beta": 0.3, "target": target, "hard_weight": 0.4}
        return vlmkernels.linear_distillation(
            hidden, weight, student_bias=bias, divergence=divergence, reduction=reduction, **taught, **options
        )

    assert torch.autograd.gradcheck(call, tensors)


def test_second_derivative_is_refused():
    tensors, taught = sample("hidden")
    loss = vlmkernels.linear_distillation(*tensors[:2], **taught)
    (grad,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_distillation has no second derivative"):
        grad.sum().backward()


def test_small_incoming_gradients_in_float16():
    """The factor of a loss scaler reaches the sums before they are rounded to float16."""
    tensors = student(2048, 300, 16, dtype=torch.float16, std=0.1)[:2]
    taught = of_teacher("hidden", 2048, 300, 8, dtype=torch.float16, std=0.1)
    (grad,) = torch.autograd.grad(
        vlmkernels.linear_distillation(*tensors, **taught), tensors[0], torch.tensor(65536.0)
    )
    exact = reference.linear_distillation(*(x.double() for x in tensors), **taught)
    (truth,) = torch.autograd.grad(exact, tensors[0], torch.tensor(65536.0, dtype=torch.float64))
    assert_as_good(grad, truth.half(), truth.double())


@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_nothing_is_kept_but_gradients(teacher):
    (hidden, weight, _), taught = sample(teacher, 500, 3000, 16, k=4)
    given = [x for value in taught.values() for x in (value if isinstance(value, tuple) else (value,))]

    def kept(weight):
        return saved_activation_bytes(
            lambda h, w, *_: vlmkernels.linear_distillation(h, w, **taught), hidden, weight, *given
        )

    assert kept(weight) <= 4 * (hidden.numel() + weight.numel()) + 64
    assert kept(weight.detach()) <= 4 * hidden.numel() + 64


@pytest.mark.skipif(not NATIVE, reason="the reference has all logits")
@pytest.mark.once
def test_logits_are_never_all_there(peak_memory):
    """2,048 x 30,000 logits are 234 MiB, of student and of teacher; a chunk of both is at most 128 MiB."""
    used = peak_memory("""
hidden, weight = torch.randn(2048, 32, requires_grad=True), torch.randn(30_000, 32, requires_grad=True)
teacher = torch.randn(2048, 48), torch.randn(30_000, 48)
def run():
    vlmkernels.linear_distillation(hidden, weight, *teacher, divergence="jsd").backward()
""")
    assert used < 3 * 2**26


def test_determinism(for_thread_counts):
    for dtype, (teacher, divergence) in itertools.product((torch.float32, torch.bfloat16), FORMS):
        tensors, taught = sample(teacher, 600, 700, 96, dtype=dtype)
        options = taught | {"divergence": divergence, "target": targets(600, 700), "hard_weight": 0.2}
        first, *others = for_thread_counts(lambda t=tensors, o=options: results(t, **o))
        if NATIVE:
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
