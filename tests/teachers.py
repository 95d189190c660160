"""Students and teachers for the tests of linear_distillation, and its judgement."""

import pytest
import torch

import vlmkernels
from vlmkernels import reference
from vlmkernels.testing import assert_op_as_good, result_and_gradients

NATIVE = "reference" not in vlmkernels.info()["ops"]["linear_distillation"]["CPU"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
REDUCTIONS = ["batchmean", "mean", "sum", "none"]
FORMS = [
    *(("hidden", divergence) for divergence in ("forward_kl", "reverse_kl", "jsd")),
    *(("topk", divergence) for divergence in ("forward_kl", "jsd")),
]
of_forms = pytest.mark.parametrize(("teacher", "divergence"), FORMS)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def student(rows, classes, dim, *, dtype=torch.float32, bias=True, std=1.0):
    """hidden [rows, dim], weight [classes, dim], bias [classes]."""
    hidden = torch.randn(rows, dim).to(dtype).requires_grad_()
    weight = (std * torch.randn(classes, dim) / dim**0.5).to(dtype).requires_grad_()
    return [hidden, weight, *([torch.randn(classes).to(dtype).requires_grad_()] if bias else [])]


def top(logits, k, temperature=1.0):
    """What an offline teacher is stored as, in an order of its own in each row."""
    log_probs, indices = (logits.float() / temperature).log_softmax(1).topk(k)
    order = torch.rand(indices.shape).argsort(1)
    return log_probs.gather(1, order), indices.gather(1, order)


def of_teacher(kind, rows, classes, dim, *, dtype=torch.float32, std=1.0, temperature=1.0, k=None):
    hidden, weight, bias = (x.detach() for x in student(rows, classes, dim, dtype=dtype, std=std))
    if kind == "hidden":
        return {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}
    logits = hidden.double() @ weight.double().T + bias
    return {"teacher_topk": top(logits, classes // 3 if k is None else k, temperature)}


def targets(rows, classes, ignored=0.3):
    return torch.where(torch.rand(rows) < ignored, -100, torch.randint(0, classes, (rows,)))


def with_bias(op):
    def call(hidden, weight, bias=None, **options):
        return op(hidden, weight, student_bias=bias, **options)

    return call


def judge(tensors, op=vlmkernels.linear_distillation, **options):
    """Of a result with one element, PyTorch's error in several orders of the features counts."""
    features = 0 if options.get("reduction") == "none" else 2
    ours, theirs = with_bias(op), with_bias(reference.linear_distillation)
    assert_op_as_good(ours, theirs, tensors, features=features, **options)


def results(tensors, **options):
    return result_and_gradients(with_bias(vlmkernels.linear_distillation), tensors, **options)


def sample(kind, rows=40, classes=60, dim=16, **teacher):
    """The student's tensors and the teacher as options."""
    dtype = teacher.get("dtype", torch.float32)
    return student(rows, classes, dim, dtype=dtype), of_teacher(kind, rows, classes, dim + 7, **teacher)
