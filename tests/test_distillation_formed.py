"""Gradients of `distillation` that the forward formed: scaled, and from the exponentials that it kept."""

import pytest
import torch

import vlmkernels
from tests.test_distillation import DIVERGENCES, DTYPES, sample


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("hard", [{}, {"hard_weight": 0.3}, {"hard_weight": 1.0}], ids=str)
def test_incoming_gradients(hard, divergence, dtype):
    """The gradient that the forward formed, scaled; float16 has no room for it, so it is formed later."""
    student, teacher, target = sample(9, 5000, dtype=dtype)
    options = {"divergence": divergence, "temperature": 2.0, "target": target, **hard}
    loss = vlmkernels.distillation(student, teacher, **options)
    unit, half, again = (
        torch.autograd.grad(loss, student, torch.tensor(by, dtype=loss.dtype), retain_graph=True)[0]
        for by in (1.0, 0.5, 1.0)
    )
    assert torch.equal(again, unit)
    torch.testing.assert_close(half, unit / 2)
    unit.zero_()  # it is no view of what the graph retains
    assert torch.equal(torch.autograd.grad(loss, student)[0], again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("temperature", "hard_weight"), [(1.0, 0.0), (3.0, 0.0), (1.0, 0.5), (3.0, 0.5), (1.0, 1.0)]
)
def test_raw_ops_agree(temperature, hard_weight, divergence, dtype):
    """The gradient from the exponentials that the forward kept, and that from the logits, at maxima that rise
    along the row, with classes that cannot be.
    """
    student, teacher, target = sample(7, 9000, dtype=dtype)
    with torch.no_grad():
        rising = torch.linspace(0, 60, 9000)
        student += rising
        teacher += rising.roll(3000)
        student[:, 5:4100:7] = teacher[:, 5:4000:7] = -torch.inf
        target[target >= 0] = 6  # a class that can be
    op, bwd = torch.ops.vlmkernels.distillation, torch.ops.vlmkernels.distillation_bwd
    for reduction in ("mean", "none"):
        inputs = (teacher, target, temperature, divergence, 0.3, hard_weight, -100, reduction)
        loss, stats, formed = op(student.detach(), *inputs, True)
        plain, same, nothing = op(student.detach(), *inputs, False)
        want = bwd(torch.ones_like(loss), student.detach(), *inputs[:2], stats, *inputs[2:], [True])
        assert nothing.numel() == 0
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(stats, same)
        torch.testing.assert_close(formed, want)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradients_of_single_rows_are_formed_anew(divergence):
    """Only the raw op forms them: they belong to each row's own loss, and no one factor scales them."""
    student, teacher, _ = sample(7, 7)
    options = (None, 1.0, divergence, 0.5, 0.0, -100, "none")
    formed = torch.ops.vlmkernels.distillation(student, teacher, *options, True)[0]
    plain = vlmkernels.distillation(student, teacher, divergence=divergence, reduction="none")
    dloss = torch.rand(7)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student, dloss) for loss in (formed, plain)))
