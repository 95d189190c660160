"""How many kernels a training step of an op launches: the host takes microseconds for each."""

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import trace
from vlmkernels import (
    contrastive_distillation,
    distillation,
    embedding_distillation,
    interval_attention,
    intervals,
    linear_distillation,
    perceiver_attention,
)

from .workloads import BF16, heads, meta

TOKENS = 1024


def launched(call, tensors, *rest) -> list[str]:
    """The kernels of a forward and of the backward to those tensors that require a gradient, torch's too."""
    step = trace.Pass()
    with trace.recording(step, "sm_90"):
        out = call(*tensors, *rest)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in tensors if x.requires_grad]
        torch.autograd.grad(out, wanted, [x.detach() for x in out])
    return [found.name for found in step.steps]


def attended(tokens=TOKENS, grad=True):
    return heads(8, tokens, 16, 72, BF16).requires_grad_(grad)


BOUNDS = {
    "causal": intervals.causal(TOKENS, device="meta"),
    "any": tuple(meta(8, TOKENS, dtype=torch.int32) for _ in range(2)),
    "padding": intervals.padding(meta(8, dtype=torch.int32), TOKENS),
}


@pytest.mark.parametrize("mask", BOUNDS)
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=str)
def test_interval_attention_takes_four_at_most(mask, frozen):
    tensors = [attended(grad=i not in frozen) for i in range(3)]
    names = launched(lambda *x: interval_attention(*x, return_lse=True), tensors, *BOUNDS[mask])
    ranges = mask != "padding"  # which queries see a block of keys, where they differ
    assert len(names) == (2 if frozen == (1, 2) else 3 + ranges), names


@pytest.mark.parametrize("lengths", [True, False])
def test_perceiver_attention_takes_four(lengths):
    tensors = [attended(tokens) for tokens in (64, TOKENS, TOKENS, 64, 64)]
    media = meta(8, dtype=torch.int32) if lengths else None
    names = launched(lambda *x: perceiver_attention(*x, media_lengths=media), tensors)
    assert len(names) == 4, names


ROWS, CLASSES = 512, 32000


def pair(rows=ROWS, width=512):
    """Of the student and of the teacher."""
    return meta(rows, width, dtype=BF16).requires_grad_(), meta(rows, width, dtype=BF16)


@pytest.mark.parametrize(("targets", "count"), [(False, 3), (True, 4)])
def test_distillation(targets, count):
    student, teacher = pair(ROWS, CLASSES)
    options = {"target": meta(ROWS, dtype=torch.int64), "hard_weight": 0.5} if targets else {}
    names = launched(lambda x: distillation(x, teacher, temperature=2.0, **options), [student])
    assert len(names) == count, names


@pytest.mark.parametrize(("weighted", "count"), [(False, 3), (True, 4)])
def test_embedding_distillation(weighted, count):
    student, teacher = pair()
    weight = meta(ROWS) if weighted else None
    names = launched(lambda x: embedding_distillation(x, teacher, weight=weight), [student])
    assert len(names) == count, names


def test_contrastive_distillation_takes_seven():
    (query, taught), (key, taught_key) = pair(), pair()
    scale = meta().requires_grad_()
    teacher = taught, taught_key, meta()
    names = launched(lambda *x: contrastive_distillation(*x, *teacher), [query, key, scale])
    assert len(names) == 7, names


@pytest.mark.parametrize(
    ("k", "targets", "count"), [(None, False, 10), (None, True, 13), (64, False, 10), (64, True, 12)]
)
def test_linear_distillation_of_a_chunk(k, targets, count):
    """Products, kernels of rows and sums, and two products with the incoming gradient."""
    (hidden, taught), (weight, teacher_weight) = pair(), pair(CLASSES)
    options = {"target": meta(ROWS, dtype=torch.int64), "hard_weight": 0.5} if targets else {}
    teacher = {"teacher_hidden": taught, "teacher_weight": teacher_weight}
    if k is not None:
        teacher = {"teacher_topk": (meta(ROWS, k), meta(ROWS, k, dtype=torch.int64))}
    names = launched(lambda *x: linear_distillation(*x, **teacher, **options), [hidden, weight])
    assert len(names) == count, names
    rows = 1 if k is not None else 2
    assert sum("distillation." in name for name in names) == rows, names
    assert names.count("cuBLAS") == 3 + (k is None), names
