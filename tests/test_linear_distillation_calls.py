"""linear_distillation as an op: views, dtypes, registration, graphs, and what it refuses."""

import itertools

import pytest
import torch

import vlmkernels
from tests.recorded import RECORDERS, recorded
from tests.teachers import (
    DTYPES,
    NATIVE,
    judge,
    of_dtypes,
    of_teacher,
    results,
    sample,
    student,
    targets,
    with_bias,
)
from vlmkernels import reference
from vlmkernels.testing import result_and_gradients


@of_dtypes
@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_views_and_frozen_inputs(dtype, teacher):
    tensors, taught = sample(teacher, 300, 200, 24, dtype=dtype)
    want = results(tensors, **taught)
    permuted = [x.detach().T.contiguous().T.requires_grad_() for x in tensors[:2]]
    cut = torch.stack([tensors[2].detach()] * 2, 1)[:, 0].requires_grad_()

    def other(value):
        if isinstance(value, tuple):
            return tuple(map(other, value))
        return torch.stack([value] * 2, -1)[..., 1]

    views = {name: other(value) for name, value in taught.items()}
    for ours, theirs in zip(results([*permuted, cut], **views), want, strict=True):
        assert torch.equal(ours, theirs) if NATIVE else torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3)
    for frozen in itertools.product((True, False), repeat=3):
        leaves = [x.detach().requires_grad_(not cold) for x, cold in zip(tensors, frozen, strict=True)]
        for ours, theirs, cold in zip(results(leaves, **taught)[1:], want[1:], frozen, strict=True):
            assert ours is None if cold else torch.equal(ours, theirs)


@pytest.mark.parametrize("ours", DTYPES, ids=str)
@pytest.mark.parametrize("theirs", DTYPES, ids=str)
@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_dtypes_of_student_and_teacher_may_differ(ours, theirs, teacher):
    tensors = student(30, 300, 16, dtype=ours)
    taught = of_teacher(teacher, 30, 300, 9, dtype=theirs)
    if teacher == "topk":
        taught["teacher_topk"] = (taught["teacher_topk"][0].to(theirs), taught["teacher_topk"][1])
    loss, *grads = results(tensors, temperature=2.0, **taught)
    wide = torch.promote_types(ours, torch.float32)
    wide = torch.promote_types(wide, theirs) if teacher == "hidden" else wide
    assert loss.dtype == wide
    assert all(grad.dtype == ours for grad in grads)
    judge(tensors, temperature=2.0, **taught) if wide == torch.promote_types(ours, torch.float32) else None
    want = reference.linear_distillation(*(x.to(wide) for x in tensors[:2]), student_bias=tensors[2].to(wide),
                                         temperature=2.0, **taught)  # fmt: skip
    torch.testing.assert_close(loss, want * 1.0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("teacher", ["hidden", "topk"])
def test_teacher_gets_no_gradient(teacher):
    tensors, taught = sample(teacher)
    given = [x for value in taught.values() for x in (value if isinstance(value, tuple) else (value,))]
    for x in given:
        x.requires_grad_(x.is_floating_point())
    vlmkernels.linear_distillation(*tensors[:2], **taught).backward()
    assert tensors[0].grad is not None
    assert all(x.grad is None for x in given)
    assert not vlmkernels.linear_distillation(*(x.detach() for x in tensors[:2]), **taught).requires_grad


def raw(teacher, dtype=torch.float32, permuted=False, reduction="mean"):
    hidden, weight, bias = student(6, 8, 5, dtype=dtype)
    taught = of_teacher(teacher, 6, 8, 3, dtype=dtype, k=3)
    log_probs, indices = taught.get("teacher_topk", (None, None))
    names = ("teacher_hidden", "teacher_weight", "teacher_bias")
    teacher_hidden, teacher_weight, teacher_bias = (taught.get(name) for name in names)
    if permuted:
        hidden, weight = (x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight))
        teacher_hidden, teacher_weight = (
            None if x is None else x.T.contiguous().T for x in (teacher_hidden, teacher_weight)
        )
    tensors = (hidden, weight, teacher_hidden, teacher_weight, bias, teacher_bias, log_probs, indices)
    return (*tensors, targets(6, 8), 2.0, "jsd", 0.3, 0.5, -100, reduction)


@of_dtypes
@pytest.mark.parametrize("permuted", [False, True], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("teacher", ["hidden", "topk"])
@pytest.mark.once
def test_registration(dtype, permuted, teacher):
    op, bwd = (getattr(torch.ops.vlmkernels, f"linear_distillation{end}").default for end in ("", "_bwd"))
    some = ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*raw(teacher, dtype, permuted), True, True, True), test_utils=some)
    tests = {} if dtype == torch.float32 else {"test_utils": some}
    torch.library.opcheck(op, (*raw(teacher, dtype, permuted, "none"), False, False, False), **tests)
    values = [x.detach() if isinstance(x, torch.Tensor) else x for x in raw(teacher, dtype, permuted)]
    dloss = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    for needs in ([True] * 3, [False, True, False]):
        torch.library.opcheck(bwd, (dloss, *values, needs), test_utils=some)


@pytest.mark.once
def test_compile():
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(hidden, weight, bias, taught):
        return vlmkernels.linear_distillation(
            hidden * 2, weight, student_bias=bias, temperature=2.0, **taught
        )

    for rows, classes in ((20, 30), (33, 50)):
        tensors, taught = sample("hidden", rows, classes)
        got = result_and_gradients(lambda *x, t=taught: compiled(*x, t), tensors)
        doubled = with_bias(lambda h, w, **o: vlmkernels.linear_distillation(h * 2, w, temperature=2.0, **o))
        for ours, theirs in zip(got, result_and_gradients(doubled, tensors, **taught), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("teacher", ["hidden", "topk"])
@pytest.mark.once
def test_recorded(recorder, teacher):
    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, first, second, target):
            taught = {"teacher_topk": (first, second)}
            if teacher == "hidden":
                taught = {"teacher_hidden": first, "teacher_weight": second}
            return vlmkernels.linear_distillation(hidden, weight, target=target, hard_weight=0.5, **taught)

    def inputs(rows):
        (hidden, weight, _), taught = sample(teacher, rows, 9, 4, k=3)
        given = taught.get("teacher_topk") or (taught["teacher_hidden"], taught["teacher_weight"])
        return hidden, weight, *given, targets(rows, 9)

    rows = {0: torch.export.Dim("rows", min=2)}
    dynamic = [rows, None, rows, rows if teacher == "topk" else None, rows]
    loss = recorded(recorder, Loss(), inputs(6), dynamic)
    values = inputs(40)
    got, want = loss(*values), Loss()(*values)
    assert torch.equal(got, want)
    for ours, theirs in zip(*(torch.autograd.grad(x, values[:2]) for x in (got, want)), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast():
    tensors, taught = sample("hidden")
    with torch.autocast("cpu", torch.bfloat16):
        loss = with_bias(vlmkernels.linear_distillation)(*tensors, **taught)
    half = [x.bfloat16() for x in tensors]
    want = with_bias(vlmkernels.linear_distillation)(*half, **{k: x.bfloat16() for k, x in taught.items()})
    assert torch.equal(loss, want)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, tensors))


GOOD = {
    "student_hidden": torch.zeros(3, 4), "student_weight": torch.zeros(7, 4), "student_bias": torch.zeros(7),
    "teacher_hidden": torch.zeros(3, 2), "teacher_weight": torch.zeros(7, 2), "teacher_bias": torch.zeros(7),
    "target": torch.tensor([0, 6, -100]), "hard_weight": 0.5,
}  # fmt: skip


NO_TEACHER = {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}


TOPK = (torch.zeros(3, 2), torch.tensor([[0, 6], [5, 2], [3, 3]]))


ONE = "exactly one teacher must be given, teacher_hidden and teacher_weight or teacher_topk, got "


BAD = [
    (
        {"student_hidden": torch.zeros(3, 5)},
        "student_hidden must be [N, D] and student_weight [V, D], got [3, 5] and [7, 4]",
    ),
    ({"student_weight": torch.zeros(4)}, "got [3, 4] and [4]"),
    (
        {"teacher_weight": torch.zeros(7, 3)},
        "teacher_hidden must be [N, D] and teacher_weight [V, D], got [3, 2] and [7, 3]",
    ),
    ({"teacher_hidden": torch.zeros(2, 2)}, "must have as many rows as student_hidden, 3, got [2, 2]"),
    ({"teacher_weight": torch.zeros(8, 2)}, "must have as many rows as student_weight, 7, got [8, 2]"),
    ({"student_bias": torch.zeros(6)}, "student_bias must be [V] = [7], got [6]"),
    ({"teacher_bias": torch.zeros(6)}, "teacher_bias must be [V] = [7], got [6]"),
    (NO_TEACHER, ONE + "none"),
    ({"teacher_weight": None}, ONE + "teacher_hidden, teacher_bias"),
    ({"teacher_topk": TOPK}, ONE + "teacher_hidden, teacher_weight, teacher_bias, teacher_topk"),
    (NO_TEACHER | {"teacher_bias": torch.zeros(7), "teacher_topk": TOPK}, ONE + "teacher_bias, teacher_topk"),
    (
        NO_TEACHER | {"teacher_topk": (TOPK[0], TOPK[1].int())},
        "the indices of teacher_topk must be int64, got torch.int32",
    ),
    (NO_TEACHER | {"teacher_topk": (TOPK[0][:2], TOPK[1])}, "both [N = 3, k], got [2, 2] and [3, 2]"),
    (NO_TEACHER | {"teacher_topk": (TOPK[0][0], TOPK[1][0])}, "both [N = 3, k], got [2] and [2]"),
    (
        NO_TEACHER | {"teacher_topk": (torch.zeros(3, 8), torch.arange(8).expand(3, 8))},
        "teacher_topk must have at most V = 7 classes, got 8",
    ),
    (NO_TEACHER | {"teacher_topk": (TOPK[0].long(), TOPK[1])}, "teacher_topk must be float32"),
    (
        NO_TEACHER | {"teacher_topk": TOPK, "divergence": "reverse_kl"},
        "divergence must be 'forward_kl' or 'jsd' with teacher_topk, got 'reverse_kl'",
    ),
    ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
    ({"divergence": "kl"}, "divergence must be 'forward_kl', 'reverse_kl' or 'jsd', got 'kl'"),
    ({"beta": 1.0}, "beta must be in (0, 1), got 1.0"),
    ({"target": torch.zeros(4, dtype=torch.int64)}, "target must be int64 [3], got torch.int64 [4]"),
    ({"target": torch.zeros(3, dtype=torch.int32)}, "target must be int64 [3], got torch.int32 [3]"),
    ({"target": None}, "target must be given with hard_weight 0.5"),
    ({"hard_weight": 1.5}, "hard_weight must be in [0, 1], got 1.5"),
    ({"reduction": "all"}, "reduction must be 'batchmean', 'mean', 'sum' or 'none', got 'all'"),
]  # fmt: skip


PUBLIC_BAD = [
    ({"ignore_index": 2**63}, "ignore_index must fit in int64, got 9223372036854775808"),
    (
        {"student_weight": torch.zeros(7, 4, dtype=torch.float64)},
        "must have the same dtype, got student_hidden",
    ),
    ({"teacher_bias": torch.zeros(7, dtype=torch.float64)}, "must have the same dtype, got teacher_hidden"),
    ({"teacher_weight": torch.zeros(7, 2, dtype=torch.int64)}, "must be float32"),
    ({"teacher_weight": torch.zeros(7, 2, device="meta")}, "must be on the same device"),
]


@pytest.mark.parametrize(
    ("change", "message"), BAD + PUBLIC_BAD, ids=[message for _, message in BAD + PUBLIC_BAD]
)
@pytest.mark.once
def test_bad_input(change, message):
    vlmkernels.linear_distillation(**GOOD)
    with pytest.raises(ValueError, match="linear_distillation: ") as error:
        vlmkernels.linear_distillation(**GOOD | change)
    assert message in str(error.value)


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_raw_ops_refuse(change, message):
    if "teacher_topk must be float32" in message:
        pytest.skip("dtypes are checked by the public op and by the kernels")
    names = (
        "student_hidden",
        "student_weight",
        "teacher_hidden",
        "teacher_weight",
        "student_bias",
        "teacher_bias",
    )
    options = {"temperature": 1.0, "divergence": "forward_kl", "beta": 0.5, "hard_weight": 0.5}
    options |= {"ignore_index": -100, "reduction": "mean"}
    given = options | GOOD | {"teacher_topk": (None, None)} | change
    values = [given[name] for name in names] + [*given["teacher_topk"], given["target"]]
    values += [given[name] for name in options]
    for name, before, needs in (("", [], [True] * 3), ("_bwd", [torch.ones(())], [[True] * 3])):
        with pytest.raises(ValueError, match=f"linear_distillation{name}: ") as error:
            getattr(torch.ops.vlmkernels, f"linear_distillation{name}")(*before, *values, *needs)
        assert message in str(error.value)


def test_all_faults_in_one_error():
    with pytest.raises(
        ValueError, match=r"(?s)temperature.*beta.*hard_weight.*target.*reduction.*student_hidden"
    ):
        vlmkernels.linear_distillation(
            torch.zeros(3, 4), torch.zeros(3, 5), temperature=-1.0, beta=2.0, hard_weight=2.0, reduction="x"
        )


@pytest.mark.parametrize(
    "change", [{"temperature": torch.tensor(1.0)}, {"teacher_topk": (TOPK[0],)}], ids=str
)
def test_wrong_types(change):
    with pytest.raises(TypeError, match=f"linear_distillation: {next(iter(change))}"):
        vlmkernels.linear_distillation(**GOOD | change)


@pytest.mark.parametrize("wrong", [7, -1, -(2**63), 2**63 - 1])
def test_indices_out_of_range(wrong):
    tensors, op = (GOOD["student_hidden"], GOOD["student_weight"]), vlmkernels.linear_distillation
    rest = {"teacher_hidden": torch.zeros(3, 2), "teacher_weight": torch.zeros(7, 2)}
    with pytest.raises(IndexError, match=rf"target must be in \[0, V = 7\) or -100, got {wrong}"):
        op(*tensors, target=torch.tensor([0, wrong, -100]), **rest)
    message = rf"linear_distillation: the indices of teacher_topk must be in \[0, V = 7\), got {wrong}"
    with pytest.raises(IndexError, match=message):
        op(*tensors, teacher_topk=(TOPK[0], torch.tensor([[0, 6], [wrong, 2], [3, 4]])))


def test_a_class_twice_in_a_row():
    with pytest.raises(ValueError, match="the indices of teacher_topk must differ in each row, got 3 twice"):
        vlmkernels.linear_distillation(GOOD["student_hidden"], GOOD["student_weight"], teacher_topk=TOPK)
