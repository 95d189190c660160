"""linear_distillation on the CPU, under the sanitizer, against the reference in float64."""

import pytest
import torch

pytest.importorskip("triton")

import vlmkernels
from benchmarks.gpu.trace import OnTriton
from vlmkernels import reference
from vlmkernels.triton import _pairwise as pairwise
from vlmkernels.triton import _pairwise_classes as layer
from vlmkernels.triton import _rows, distillation
from vlmkernels.triton import linear_distillation as launcher

from .interpreter import interpreting
from .launches import recording
from .test_triton_rows import REDUCTIONS, kernels_of
from .trials import DTYPES, check, grid, sanitized
from .trials_pairwise import TwoModels

pytestmark = pytest.mark.sampled(5)

ONLINE = [{"divergence": name} for name in ("forward_kl", "reverse_kl", "jsd")]
OFFLINE = [{"divergence": name, "k": 20} for name in ("forward_kl", "jsd")]
of_forms = pytest.mark.parametrize("form", [*ONLINE, *OFFLINE], ids=str)
of_both = pytest.mark.parametrize("form", [{}, {"k": 20}], ids=["online", "offline"])


@pytest.fixture
def seven_rows(monkeypatch):
    """Chunks of seven rows, whose classes are read 64 at once."""
    monkeypatch.setattr(pairwise, "CHUNK_ROWS", 7)
    monkeypatch.setattr(layer, "CHUNK_BYTES", 0)
    monkeypatch.setattr(launcher, "READ", 64)
    monkeypatch.setattr(launcher, "NAMED", 16)
    for name in ("READ", "HELD", "WRITTEN"):
        monkeypatch.setattr(distillation, name, 64)
    monkeypatch.setattr(_rows, "TOTAL", 4)


@pytest.mark.parametrize(("dtype", "form"), grid(DTYPES, [*ONLINE, *OFFLINE]))
def test_block(dtype, form):
    check(TwoModels(12, 37, 60, dtype, targets=False, temperature=1.0, **form))
    check(TwoModels(12, 37, 60, dtype, hard_weight=0.4, biases=True, **form))


@pytest.mark.usefixtures("seven_rows")
@of_forms
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_reductions_and_ignored_rows(reduction, form):
    options = {"temperature": 0.25, "beta": 0.1, "reduction": reduction, "hard_weight": 0.5}
    check(TwoModels(10, 70, 12, torch.float32, ignored=0.4, **options, **form))


@of_both
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_row_counts(reduction, form):
    loss, *grads = check(TwoModels(5, 20, 6, torch.bfloat16, ignored=1.0, reduction=reduction, **form))
    assert all((x == 0).all() for x in (loss, *grads))


@of_both
@pytest.mark.parametrize(("dtype", "targets"), [(torch.float32, False), (torch.float16, True)])
@pytest.mark.parametrize("needed", [(), (0,), (1,), (2,), (1, 2)], ids=str)
def test_frozen_operands_cost_and_return_nothing(needed, dtype, targets, form):
    needs = tuple(i in needed for i in range(3))
    check(TwoModels(5, 40, 12, dtype, biases=True, needs=needs, targets=targets, **form))


@pytest.mark.usefixtures("seven_rows")
@of_both
@pytest.mark.parametrize(("rows", "chunks"), [(0, 1), (7, 1), (8, 2)])
def test_chunks_in_which_no_row_counts_are_left_out(rows, chunks, form, monkeypatch):
    """To the same bits as with them, which is what a captured graph does."""

    def chunks_of(trial):
        with recording() as launches:
            trial.launch()
        return sum(launch.name.rpartition("._")[2] in ("forward", "offline") for launch in launches)

    trial = TwoModels(20, 70, 12, torch.float16, hard_weight=0.4, biases=True, ignored=0.0, **form)
    trial.target[torch.randperm(20)[rows:]] = trial.IGNORED
    assert chunks_of(trial) == 2 * chunks  # of the forward and of the backward
    few = check(trial)
    monkeypatch.setattr(layer, "_count", lambda counted: lambda: len(counted))
    assert chunks_of(trial) == 2 * 3
    for a, b in zip(few, check(trial), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("seven_rows")
@of_both
def test_rows_that_all_count_stay_where_they_are(form):
    """Neither ordered nor copied; in float32 the gradients are formed where they belong."""
    trial = TwoModels(16, 70, 12, torch.float32, targets=False, **form)
    with recording() as launches:
        trial.launch()
    assert not any("_move_rows" in launch.name for launch in launches)
    check(trial)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize(("dtype", "puts"), [(torch.float32, 0), (torch.bfloat16, 1)], ids=str)
def test_launches(dtype, puts, targets, reduction, monkeypatch):
    """Products of student and teacher, two kernels of a row, two products, and sums."""
    products = []
    monkeypatch.setattr(layer.tiles, "product", lambda a, b, into, add=False: products.append(add))
    h, w, g, v = (
        torch.empty(n, d, device="meta", dtype=dtype) for n, d in ((64, 32), (128, 32), (64, 48), (128, 48))
    )
    target = torch.empty(64, device="meta", dtype=torch.int64) if targets else None
    options = (2.0, "forward_kl", 0.5, 0.5 if targets else 0.0, -100, reduction)
    inputs = (h, w, g, v, None, None, None, None, target, *options)
    share, checked = ["_total"] * (targets and "mean" in reduction), ["aten::_assert_async"] * targets
    taken, put = ["_move_rows"] * 2 * targets, ["_move_rows"] * (targets or puts)
    rounded = ["aten::_to_copy"] * puts

    def made(call):
        products.clear()
        found = kernels_of(call, monkeypatch)
        return found, len(products)

    total = ["_total"] * (targets or reduction != "none")
    found = made(lambda: launcher.linear_distillation(*inputs, False, False, False))
    assert found == ([*taken, "_forward", *total, *checked], 2)
    found = made(lambda: launcher.linear_distillation(*inputs, True, True, False))
    formed = [*share, *taken, "_forward", "_backward", *put]
    assert found == ([*formed, *total, *rounded, *checked], 4)
    dloss = torch.empty(64 if reduction == "none" else (), device="meta")
    found = made(lambda: launcher.linear_distillation_bwd(dloss, *inputs, [True, False, False]))
    assert found == ([*share, *taken, "_forward", "_backward", *put], 3)


def test_logits_are_chunks_in_memory():
    """No tensor is larger than a chunk of logits or an operand."""
    trial = TwoModels(600, 60_000, 2, torch.bfloat16, width=2)
    with recording() as launches:
        trial.launch()
    (*_, last) = [launch.tensors for launch in launches if "distillation._backward" in launch.name]
    row = 60_000 * (4 + 4 + 2)
    held = layer.CHUNK_BYTES // row // 256 * 256
    assert last["STUDENT"].untyped_storage().nbytes() == 2 * held * 60_000 * 4
    assert last["OUT"].untyped_storage().nbytes() == held * 60_000 * 2
    assert held * row <= layer.CHUNK_BYTES


@pytest.mark.usefixtures("seven_rows")
@of_forms
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_classes_that_cannot_be(form, dtype):
    """Their logits are -inf, of whole reads as well: they get no gradient."""
    trial = TwoModels(5, 150, 12, dtype, biases=True, ignored=0.2, **form)
    masked = slice(0, 70) if "k" not in form else slice(0, 0)
    for bias in (trial.bias, trial.teacher_bias):
        if bias is not None:
            bias[masked] = -torch.inf
    if "k" in form:  # of those that the teacher does not name
        trial.bias[: form["k"]] = -torch.inf
        trial.indices = torch.arange(form["k"]).expand(5, -1) + 100
    _, dhidden, dweight, dbias = check(trial)
    assert dhidden.isfinite().all()
    gone = trial.bias == -torch.inf
    assert (dweight[gone] == 0).all()
    assert (dbias[gone] == 0).all()


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_a_rest_for_which_the_student_has_no_class(divergence):
    """An infinite KL divergence, and a finite JSD; without a rest nothing."""
    trial = TwoModels(4, 60, 12, torch.float32, divergence=divergence, k=20, biases=True, targets=False)
    trial.bias[:] = -torch.inf
    trial.bias[:20] = 0
    trial.indices = torch.arange(20).expand(4, 20).contiguous()
    trial.log_probs[1] = trial.log_probs[1].log_softmax(0) + 1e-6  # with what is stored of it
    with sanitized():
        loss, *grads = trial.launch()
    assert loss.isfinite().tolist() == [divergence == "jsd", True, *[divergence == "jsd"] * 2]
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.usefixtures("seven_rows")
@of_forms
@pytest.mark.parametrize("at", [0, 149])
def test_nan_is_not_hidden(form, at):
    trial = TwoModels(5, 150, 12, torch.float32, hard_weight=0.3, ignored=0.3, **form)
    trial.target[0] = trial.IGNORED
    trial.weight[at, 3] = float("nan")
    with sanitized():
        loss, dhidden, *_ = trial.launch()
    counted = trial.counted()
    assert loss[counted].isnan().all()
    assert dhidden[counted].isnan().any()
    assert (loss[~counted] == 0).all()
    assert (dhidden[~counted] == 0).all()


@pytest.mark.usefixtures("seven_rows")
@of_forms
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_large_logits(form, dtype):
    """Whole rows far from 0, and maxima that come late."""
    trial = TwoModels(5, 150, 12, dtype, hard_weight=0.5, biases=True, temperature=5.0, std=8.0, **form)
    for bias in (trial.bias, trial.teacher_bias):
        if bias is not None:
            bias += torch.linspace(-300, 100, 150).to(dtype)
    check(trial)


@pytest.mark.parametrize("temperature", [1e-30, 1e-6])
@of_both
def test_softmax_of_almost_no_temperature_is_the_largest_class(form, temperature):
    trial = TwoModels(
        1, 3, 3, torch.float32, width=3, temperature=temperature, targets=False, **(form and {"k": 1})
    )
    trial.hidden, trial.weight = torch.tensor([[0.0, 1.0, 5.0]]), torch.eye(3)
    if form:
        trial.log_probs, trial.indices = torch.zeros(1, 1), torch.tensor([[2]])
    else:
        trial.teacher_hidden, trial.teacher_weight = torch.tensor([[-1.0, 0.0, 3.0]]), torch.eye(3)
    with sanitized():
        results = trial.launch()
    assert all((x == 0).all() for x in results)


@pytest.mark.parametrize("scale", [1e-6, 65536.0])
@of_forms
def test_gradients_of_float16_stay_in_range(form, scale):
    """Those of the logits, whatever factor a scaled loss has."""
    trial = TwoModels(6, 70, 12, torch.float16, std=4.0, temperature=0.5, reduction="mean", **form)
    trial.dloss = torch.tensor(scale)
    loss, *grads = check(trial)
    assert loss.isfinite()
    assert scale > 1 or all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("student", DTYPES)
@pytest.mark.parametrize("teacher", [*DTYPES, torch.float64])
def test_dtypes_may_differ(student, teacher):
    trial = TwoModels(6, 40, 12, student, teacher=teacher, biases=True)
    if teacher != torch.float64:
        check(trial)
        return
    with recording() as launches:
        loss, *grads = trial.launch()
    assert launches == []
    assert {loss.dtype, *(x.dtype for x in grads)} == {torch.float64, student}
    torch.testing.assert_close(loss, trial.exact(torch.float64)[0])


@of_both
@pytest.mark.parametrize("size", [(0, 9, 4), (3, 0, 4), (3, 9, 0), (0, 0, 0)], ids=str)
def test_sizes_of_zero(size, form):
    form = form and {"k": min(size[1], 2)}
    for width in (0, 5):
        trial = TwoModels(*size, torch.float32, width=width, reduction="mean", targets=False, **form)
        with recording() as launches:
            got = trial.launch()
        assert launches == []
        for ours, theirs in zip(got, trial.exact(torch.float64), strict=True):
            torch.testing.assert_close(ours, theirs.float())


def test_the_forward_forms_the_gradients_of_the_backward():
    for form in (*ONLINE, *OFFLINE):
        trial = TwoModels(9, 40, 12, torch.bfloat16, hard_weight=0.5, reduction="mean", biases=True, **form)
        with sanitized():
            _, *formed = launcher.linear_distillation(*trial.inputs(), True, True, True)
            later = launcher.linear_distillation_bwd(torch.ones(()), *trial.inputs(), [True, True, True])
        for a, b in zip(formed, later, strict=True):
            assert torch.equal(a, b)


@of_both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_public_op_runs_it(form, reduction):
    """Forward and backward, composed as on CUDA tensors."""
    trial = TwoModels(9, 40, 12, torch.float32, hard_weight=0.5, reduction=reduction, **form)
    h, w, taught, teacher_weight, _, _, log_probs, indices, target, *options = trial.inputs()
    names = ("temperature", "divergence", "beta", "hard_weight", "ignore_index", "reduction")
    given = dict(zip(names, options, strict=True)) | {"target": target}
    if form:
        given["teacher_topk"] = (log_probs, indices)
    leaves, results = [h.clone().requires_grad_(), w.clone().requires_grad_()], []
    for op in (vlmkernels.linear_distillation, reference.linear_distillation):
        with sanitized(), OnTriton():
            loss = op(*leaves, taught, teacher_weight, **given)
            results.append((loss, *torch.autograd.grad(loss, leaves, trial.dloss)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("target", "valid"), [([0, 2, 4], True), ([0, 2, 5], False), ([-2, 2, 4], False)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_targets_are_asserted_on_the_device(target, valid, reduction, monkeypatch):
    said = []
    monkeypatch.setattr(torch, "_assert_async", lambda x, message: said.append((bool(x), message)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(layer.tiles, "product", lambda a, b, into, add=False: into.zero_())
    trial = TwoModels(3, 5, 4, torch.float32, reduction=reduction)
    trial.target = torch.tensor(target)
    with sanitized():
        launcher.linear_distillation(*trial.inputs(), False, False, False)
    assert said == [(valid, "linear_distillation: target must be in [0, V) or ignore_index")]


@pytest.mark.usefixtures("seven_rows")
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize(("entry", "index"), [(0, 0), (7, 40), (7, -1), (7, 3), (19, 3)])  # in blocks of 16
def test_classes_of_a_teacher_are_asserted_on_the_device(entry, index, ignored, monkeypatch):
    """That each is one, and none is twice in a row that counts."""
    said = []
    monkeypatch.setattr(torch, "_assert_async", lambda x, message: said.append((bool(x), message)))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(
        layer.tiles, "product", lambda a, b, into, add=False: into.copy_(a.float() @ b.float())
    )
    trial = TwoModels(9, 40, 4, torch.float32, k=20, ignored=0.0)
    trial.indices[:] = torch.arange(20)
    trial.indices[4, entry] = index
    if ignored:
        trial.target[4] = trial.IGNORED
    with interpreting():
        launcher.linear_distillation(*trial.inputs(), True, False, False)
    message = "linear_distillation: the indices of teacher_topk must be in [0, V) and differ in each row"
    assert said[0] == (ignored or entry == index, message)


def test_bad_arguments_are_refused_before_a_launch():
    trial = TwoModels(3, 5, 4, torch.float32, k=2, divergence="reverse_kl")
    with recording() as launches, pytest.raises(ValueError, match="linear_distillation: divergence must be"):
        launcher.linear_distillation(*trial.inputs(), False, False, False)
    trial = TwoModels(3, 5, 4, torch.float32)
    with recording() as more, pytest.raises(ValueError, match=r"_bwd: dloss must be \[3\], got \[7\]"):
        launcher.linear_distillation_bwd(torch.zeros(7), *trial.inputs(), [True] * 3)
    assert launches == more == []
