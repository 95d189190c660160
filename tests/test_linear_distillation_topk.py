"""linear_distillation from the likeliest classes of an offline teacher: what is left of its probability."""

import pytest
import torch
import torch.nn.functional as F

from tests.teachers import judge, of_dtypes, of_teacher, results, sample, student, targets, top


def outcomes(z, log_probs, indices, temperature):
    """Probabilities of student and teacher in float64, of the k classes and of all others."""
    s, p = [], []
    for row, logs, at in zip((z.double() / temperature).softmax(1), log_probs.double(), indices, strict=True):
        others = torch.ones(len(row), dtype=torch.bool)
        others[at] = False
        s.append(torch.cat([row[at], row[others].sum()[None]]))
        p.append(torch.cat([logs.exp(), (1 - logs.exp().sum()).clamp_min(0)[None]]))
    return torch.stack(s), torch.stack(p)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
@pytest.mark.parametrize("k", [1, 5, 59])
def test_what_the_teacher_does_not_say_is_one_outcome(divergence, k):
    tensors, taught = sample("topk", k=k, temperature=2.0)
    s, p = outcomes(F.linear(*tensors), *taught["teacher_topk"], 2.0)
    m = (p + s) / 2 if divergence == "jsd" else s
    want = torch.where(p > 0, p * (p / m).log(), 0)
    want = (want + s * (s / m).log()) / 2 if divergence == "jsd" else want
    got = results(tensors, divergence=divergence, temperature=2.0, reduction="none", **taught)[0]
    torch.testing.assert_close(got.double(), 4 * want.sum(1), rtol=1e-4, atol=1e-5)


@of_dtypes
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_all_classes_of_an_offline_teacher_are_the_teacher(dtype, divergence):
    """What rounding leaves of the sum of their probabilities is no outcome."""
    tensors = student(30, 300, 16, dtype=dtype)
    taught = of_teacher("hidden", 30, 300, 9, dtype=dtype)
    logits = taught["teacher_hidden"].float() @ taught["teacher_weight"].float().T + taught["teacher_bias"]
    topk = top(logits, 300)
    judge(tensors, divergence=divergence, teacher_topk=topk)
    options = {"divergence": divergence, "reduction": "none"}
    got, want = (results(tensors, **options, **given) for given in ({"teacher_topk": topk}, taught))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.01 if dtype.itemsize == 2 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_tails(divergence):
    """None, by probabilities whose sum is 1 or above; and everything, by k classes that cannot be."""
    tensors = student(20, 300, 16)
    indices = torch.stack([torch.randperm(300)[:4] for _ in range(20)])
    for probability in (0.25, 0.26):
        log_probs = torch.full((20, 4), probability).log()
        judge(tensors, divergence=divergence, reduction="none", teacher_topk=(log_probs, indices))
    nothing = torch.full((20, 4), -torch.inf), indices
    judge(tensors, divergence=divergence, reduction="none", teacher_topk=nothing)
    s, _ = outcomes(F.linear(*tensors), *nothing, 1.0)
    if divergence == "forward_kl":
        got = results(tensors, reduction="none", teacher_topk=nothing)[0]
        torch.testing.assert_close(got.double(), -s[:, 4].log(), rtol=1e-4, atol=1e-6)


@of_dtypes
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_no_class_of_an_offline_teacher(dtype, divergence):
    """Then both give everything to all other classes."""
    tensors = student(9, 300, 16, dtype=dtype)
    topk = torch.zeros(9, 0), torch.zeros(9, 0, dtype=torch.int64)
    loss, *grads = results(tensors, divergence=divergence, reduction="none", teacher_topk=topk)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-6)
    for grad in grads:
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-5)
    judge(tensors, divergence=divergence, target=targets(9, 300), hard_weight=0.5, teacher_topk=topk)


def test_a_tail_that_the_student_cannot_give():
    """The loss is infinite and the gradient that of the probabilities, as of a class in `distillation`."""
    hidden, weight, bias = student(5, 300, 8)
    with torch.no_grad():
        bias[4:] = -torch.inf
    topk = torch.full((5, 4), 0.2).log(), torch.arange(4).expand(5, 4)
    loss, *grads = results([hidden, weight, bias], teacher_topk=topk)
    assert loss == torch.inf
    assert all(grad.isfinite().all() for grad in grads)
    s = F.linear(hidden, weight, bias)[:, :4].softmax(1)
    torch.testing.assert_close(grads[2][:4], (s - 0.2).sum(0) / 10)  # the incoming gradient is 0.5
    assert (grads[2][4:] == 0).all()
    judge([hidden, weight, bias], divergence="jsd", reduction="none", teacher_topk=topk)


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_tail_far_below_the_students_classes(divergence):
    """Its classes share the teacher's tail however small their exponentials are beside the others."""
    hidden, weight, bias = student(5, 300, 8)
    with torch.no_grad():
        bias[:4] += 200
    topk = torch.full((5, 4), 0.2).log(), torch.arange(4).expand(5, 4)
    judge([hidden, weight, bias], divergence=divergence, reduction="none", teacher_topk=topk)
    if divergence == "forward_kl":
        *_, grad = results([hidden, weight, bias], teacher_topk=topk)
        among_others = F.linear(hidden, weight, bias)[:, 4:].softmax(1)
        torch.testing.assert_close(grad[4:], -0.2 * among_others.sum(0) / 10)  # the incoming one is 0.5


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_order_of_the_classes_is_nothing(divergence):
    tensors, taught = sample("topk")
    order = torch.rand(40, 20).argsort(1)
    shuffled = tuple(x.gather(1, order) for x in taught["teacher_topk"])
    options = {"divergence": divergence, "reduction": "none"}
    got, want = (
        results(tensors, teacher_topk=topk, **options) for topk in (shuffled, taught["teacher_topk"])
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
