"""Losses of rows on the CPU, under the sanitizer, against the reference in float64."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from vlmkernels.reference.distillation import DIVERGENCES, distillation_bwd, distillation_fwd
from vlmkernels.reference.embedding_distillation import (
    DISTANCES,
    embedding_distillation_bwd,
    embedding_distillation_fwd,
)
from vlmkernels.triton import _rows, distillation, embedding_distillation

from .launches import recording
from .trials import DTYPES, check, grid, sanitized
from .trials_rows import Features, Logits

pytestmark = pytest.mark.sampled(5)

REDUCTIONS = ("batchmean", "mean", "sum", "none")


@pytest.fixture
def blocks(monkeypatch):
    """Rows of several blocks, and sums of several."""
    for name in ("READ", "HELD", "WRITTEN"):
        monkeypatch.setattr(distillation, name, 32)
    monkeypatch.setattr(embedding_distillation, "HELD", 32)
    monkeypatch.setattr(_rows, "TOTAL", 4)


@pytest.fixture(params=[False, True], ids=["one block", "blocks"])
def sizes_of_blocks(request):
    if request.param:
        request.getfixturevalue("blocks")


# distillation


@pytest.mark.usefixtures("sizes_of_blocks")
@pytest.mark.parametrize(
    ("size", "std", "divergence", "dtype"), grid([(9, 5), (6, 130)], [0.01, 8.0], DIVERGENCES, DTYPES)
)
def test_distillation(size, std, divergence, dtype):
    options = {"divergence": divergence, "std": std, "ignored": 0.0}
    check(Logits(*size, dtype, targets=False, temperature=1.0, **options))
    check(Logits(*size, dtype, hard_weight=0.4, temperature=3.0, **options))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("hard_weight", "reduction", "divergence"), grid([0.0, 0.5, 1.0], REDUCTIONS, DIVERGENCES)
)
def test_reductions_and_ignored_rows(hard_weight, reduction, divergence):
    for temperature, ignored in ((0.25, 0.4), (1.0, 0.4), (1.0, 1.0)):
        options = {"temperature": temperature, "beta": 0.1, "ignored": ignored, "reduction": reduction}
        check(Logits(7, 70, torch.float32, divergence=divergence, hard_weight=hard_weight, **options))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_large_logits(dtype, divergence):
    """Whole rows far from 0, each elsewhere, and maxima that come late."""
    trial = Logits(12, 150, dtype, divergence=divergence, hard_weight=0.5, ignored=0.0, temperature=5.0)
    rise, offset = torch.linspace(0, 300, 150), torch.linspace(-3e4, 3e4, 12)[:, None]
    trial.student = (trial.student.float() + rise + offset).to(dtype)
    trial.teacher = (trial.teacher.float() + rise - offset).to(dtype)
    check(trial)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    ("dtype", "masked", "least"),
    grid(
        DTYPES[:2],
        [slice(0, 70), slice(70, None), slice(None, None, 3)],
        [-torch.inf, torch.finfo(torch.float32).min],
    ),
)
def test_classes_that_cannot_be(dtype, masked, least):
    """Of both, or of one."""
    for divergence in DIVERGENCES:
        trial = Logits(5, 150, dtype, divergence=divergence, targets=False)
        for x in (trial.student, trial.teacher):
            x[:, masked] = least
        assert (check(trial)[1][:, masked] == 0).all()
    for divergence, kept in (("forward_kl", "student"), ("reverse_kl", "teacher"), ("jsd", "student")):
        trial = Logits(5, 150, dtype, divergence=divergence, targets=False)
        other = trial.teacher if kept == "student" else trial.student
        other[:, masked] = least
        check(trial)
    trial = Logits(5, 150, dtype, targets=False)
    trial.student[:, masked] = -torch.inf
    with sanitized():
        loss, grad, _ = trial.launch()
    assert (loss == torch.inf).all()
    assert grad.isfinite().all()


@pytest.mark.usefixtures("sizes_of_blocks")
def test_rows_of_the_least_number_are_uniform():
    trial = Logits(2, 70, torch.float32, divergence="jsd", targets=False)
    trial.student[0] = trial.teacher[1] = torch.finfo(torch.float32).min
    check(trial)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("damaged", ["student", "teacher"])
@pytest.mark.parametrize("at", [0, 100])
@pytest.mark.parametrize("beside", [0.0, -torch.inf])
def test_nan_is_not_hidden(divergence, damaged, at, beside):
    trial = Logits(4, 130, torch.float32, divergence=divergence, targets=False)
    for x in (trial.student, trial.teacher):
        x[:, :70] = beside
    getattr(trial, damaged)[1, at] = torch.nan
    with sanitized():
        loss, grad, _ = trial.launch()
    assert loss.isnan().tolist() == grad.isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_row_without_a_class_that_can_be_is_nan(divergence):
    for masked in ("student", "teacher"):
        trial = Logits(3, 70, torch.float32, divergence=divergence, targets=False)
        getattr(trial, masked)[1] = -torch.inf
        with sanitized():
            loss = trial.launch()[0]
        assert loss.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_softmax_of_almost_no_temperature_is_the_largest_class(divergence, temperature):
    options = {"divergence": divergence, "temperature": temperature, "beta": 0.5, "targets": False}
    trial = Logits(1, 3, torch.float32, **options)
    trial.student, trial.teacher = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[-1.0, 0.0, 3.0]])
    with sanitized():
        loss, grad, _ = trial.launch()
    assert (loss, *grad[0]) == (0, 0, 0, 0)


def test_what_is_kept_is_what_the_reference_keeps():
    for divergence in DIVERGENCES:
        trial = Logits(8, 50, torch.float32, divergence=divergence, hard_weight=0.5)
        stats, counted = check(trial)[2], trial.target >= 0
        torch.testing.assert_close(stats[counted], trial.exact(torch.float32)[2][counted])
        assert (stats[~counted] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("target", "valid"), [([0, -1, 4], True), ([0, -1, 5], False), ([-2, -1, 4], False)])
def test_targets_are_asserted_on_the_device(target, valid, reduction, monkeypatch):
    said = []
    monkeypatch.setattr(torch, "_assert_async", lambda x, message: said.append((bool(x), message)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(_rows, "TOTAL", 2)
    trial = Logits(3, 5, torch.float32, hard_weight=0.5, reduction=reduction)
    trial.target = torch.tensor(target)
    with sanitized():
        trial.launch()
    assert said == [(valid, "distillation: target must be in [0, V) or ignore_index")]


# embedding_distillation


@pytest.mark.usefixtures("sizes_of_blocks")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("size", [(35, 70)], ids=str)
def test_embedding_distillation(size, normalize, distance, dtype):
    check(Features(*size, dtype, distance=distance, normalize=normalize, weighted=False))
    check(Features(*size, dtype, distance=distance, normalize=normalize))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_and_weights(weighted, reduction, distance):
    trial = Features(13, 40, torch.float32, distance=distance, reduction=reduction, weighted=weighted)
    check(trial)
    if weighted:
        trial.weight = torch.zeros(13)
        assert all((x == 0).all() for x in check(trial))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("norm", [0.0, 1e-14, 1e-6, 1e6])
def test_short_and_long_rows(norm, distance):
    trial = Features(4, 40, torch.float32, distance=distance, weighted=False)
    trial.student[1] *= norm / trial.student[1].norm()
    trial.teacher[2] *= norm / trial.teacher[2].norm()
    check(trial)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", [False, True])
def test_equal_rows_have_no_distance(normalize, distance):
    trial = Features(5, 70, torch.bfloat16, distance=distance, normalize=normalize, weighted=False)
    trial.teacher = trial.student.clone()
    with sanitized():
        loss, grad = trial.launch()
    if distance == "cosine":
        assert loss.abs().max() < 1e-6
    else:
        assert (loss == 0).all()
        assert (grad == 0).all()


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("damaged", ["student", "teacher"])
def test_nan_of_features_is_not_hidden(damaged, normalize, distance):
    trial = Features(4, 70, torch.float32, distance=distance, normalize=normalize, weighted=False)
    getattr(trial, damaged)[1, 50] = torch.nan
    with sanitized():
        loss, grad = trial.launch()
    assert loss.isnan().tolist() == [False, True, False, False]
    if not (distance == "cosine" and not normalize):
        assert grad.isnan().any(1).tolist() == [False, True, False, False]


# Both


class Torch(TorchDispatchMode):
    """The operators of torch that would be kernels of their own."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        views = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if not views and "empty" not in func._schema.name:
            self.kernels.append(func._schema.name)
        return out


def kernels_of(call, monkeypatch) -> list[str]:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with recording() as launches, Torch() as mode:
        call()
    return [launch.name.rpartition(".")[2] for launch in launches] + mode.kernels


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("classes", [1000, 50257])
def test_launches_of_distillation(classes, targets, divergence, reduction, monkeypatch):
    """One reads the logits; one adds up, and divides by the rows that count; torch asserts the targets."""
    z, q = (torch.empty(64, classes, device="meta", dtype=torch.bfloat16) for _ in range(2))
    target = torch.empty(64, device="meta", dtype=torch.int64) if targets else None
    options = (2.0, divergence, 0.5, 0.5 if targets else 0.0, -100, reduction)
    stats, dloss = torch.empty(64, 6, device="meta"), torch.empty(64, device="meta")
    dloss = dloss if reduction == "none" else dloss[0]
    forward = kernels_of(lambda: distillation.distillation(z, q, target, *options, False), monkeypatch)
    total = ["_total"] if targets or reduction != "none" else []
    assert forward == ["_forward", *total] + ["aten::_assert_async"] * targets
    call = lambda: distillation.distillation_bwd(dloss, z, q, target, stats, *options, [True])  # noqa: E731
    counted = ["_total"] if targets and "mean" in reduction else []
    assert kernels_of(call, monkeypatch) == [*counted, "_backward"]
    call = lambda: distillation.distillation_bwd(dloss, z, q, target, stats, *options, [False])  # noqa: E731
    assert kernels_of(call, monkeypatch) == []


@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("depth", [512, 20000])
def test_launches_of_embedding_distillation(depth, weighted, reduction, monkeypatch):
    x, y = (torch.empty(64, depth, device="meta", dtype=torch.bfloat16) for _ in range(2))
    weight = torch.empty(64, device="meta") if weighted else None
    options, dloss = ("l1", True, reduction), torch.empty(64, device="meta")
    dloss = dloss if reduction == "none" else dloss[0]
    op, bwd = embedding_distillation.embedding_distillation, embedding_distillation.embedding_distillation_bwd
    total = [] if reduction == "none" else ["_total"]
    assert kernels_of(lambda: op(x, y, weight, *options, False), monkeypatch) == ["_forward", *total]
    weights = ["_total"] if weighted and reduction == "mean" else []
    backward = kernels_of(lambda: bwd(dloss, x, y, weight, *options, [True]), monkeypatch)
    assert backward == [*weights, "_backward"]
    assert kernels_of(lambda: bwd(dloss, x, y, weight, *options, [False]), monkeypatch) == []


def test_a_forward_may_form_the_gradient():
    """As graphs ask for that were recorded on another device."""
    of = Logits(6, 40, torch.float32, hard_weight=0.5, reduction="mean")
    logits = (of.student, of.teacher, of.target)
    with sanitized():
        _, stats, formed = distillation.distillation(*logits, *of.options, True)
        later = distillation.distillation_bwd(torch.ones(()), *logits, stats, *of.options, [True])
    assert torch.equal(formed, later)
    of = Features(6, 40, torch.float32, reduction="sum")
    features = (of.student, of.teacher, of.weight, *of.options)
    with sanitized():
        _, formed = embedding_distillation.embedding_distillation(*features, True)
        later = embedding_distillation.embedding_distillation_bwd(torch.ones(()), *features, [True])
    assert torch.equal(formed, later)


@pytest.mark.parametrize("formed", [False, True])
def test_arguments_of_distillation_are_checked_once(formed, monkeypatch):
    checked = []
    monkeypatch.setattr(distillation, "check", lambda op, *inputs, **more: checked.append(op))
    of = Logits(6, 40, torch.float32, reduction="mean")
    with recording():
        distillation.distillation(of.student, of.teacher, of.target, *of.options, formed)
    assert checked == ["distillation"]


VIEWS = {
    "cut": lambda x: torch.nn.functional.pad(x, (0, 7))[:, :50],
    "columns": lambda x: x.T.contiguous().T,
    "every second": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(6, 50),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("trial", [Logits, Features])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_change_no_bit(dtype, trial, view):
    plain, viewed = trial(6, 50, dtype), trial(6, 50, dtype)
    vars(viewed).update(vars(plain))
    plain.dloss = plain.dloss.contiguous()
    for name in ("student", "teacher"):
        same = view(getattr(plain, name).nan_to_num())
        setattr(plain, name, same.contiguous())
        setattr(viewed, name, same)
    with sanitized():
        for got, want in zip(viewed.launch(), plain.launch(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("trial", [Logits, Features])
@pytest.mark.parametrize("student", [*DTYPES, torch.float64])
@pytest.mark.parametrize("teacher", [*DTYPES, torch.float64])
def test_dtypes_may_differ(student, teacher, trial):
    of = trial(6, 40, student, teacher=teacher)
    if torch.float64 not in (student, teacher):
        check(of)
        return
    with recording() as launches:
        loss, grad, *_ = of.launch()
    assert launches == []
    assert (loss.dtype, grad.dtype) == (torch.float64, student)
    torch.testing.assert_close(loss, of.exact(torch.float64)[0])


@pytest.mark.parametrize("size", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_sizes_of_zero(size):
    x, y = torch.zeros(size), torch.zeros(size)
    for reduction in REDUCTIONS:
        options = (2.0, "jsd", 0.5, 0.0, -100, reduction)
        dloss = torch.ones(size[0]) if reduction == "none" else torch.ones(())
        with recording() as launches:
            loss, stats, _ = distillation.distillation(x, y, None, *options, False)
            grad = distillation.distillation_bwd(dloss, x, y, None, stats, *options, [True])
        want = distillation_fwd(x, y, None, *options, False)
        assert torch.equal(loss, want[0])
        assert torch.equal(stats, want[1])
        assert torch.equal(grad, distillation_bwd(dloss, x, y, None, stats, *options, [True]))
        if reduction == "batchmean":
            continue
        options = ("cosine", True, reduction)
        with recording() as more:
            loss, _ = embedding_distillation.embedding_distillation(x, y, None, *options, False)
            grad = embedding_distillation.embedding_distillation_bwd(dloss, x, y, None, *options, [True])
        assert torch.equal(loss, embedding_distillation_fwd(x, y, None, *options, False)[0])
        assert torch.equal(grad, embedding_distillation_bwd(dloss, x, y, None, *options, [True]))
        assert launches == more == []


@pytest.mark.parametrize("op", ["distillation", "embedding_distillation"])
def test_bad_arguments_are_refused_before_a_launch(op):
    module = importlib.import_module(f"vlmkernels.triton.{op}")
    x, y = torch.zeros(3, 4), torch.zeros(3, 5)
    options = (1.0, "forward_kl", 0.5, 0.0, -100, "mean") if op == "distillation" else ("l1", True, "mean")
    with recording() as launches, pytest.raises(ValueError, match=f"{op}: .* must have the same shape"):
        getattr(module, op)(x, y, None, *options, False)
    saved = (torch.zeros(3, 6),) if op == "distillation" else ()
    with recording() as more, pytest.raises(ValueError, match=rf"{op}_bwd: .*dloss must be \[\], got \[7\]"):
        getattr(module, f"{op}_bwd")(torch.zeros(7), x, x, None, *saved, *options, [True])
    assert launches == more == []
