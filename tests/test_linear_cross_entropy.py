import pytest
import torch
import torch.nn.functional as F

import vlmkernels
from tests.recorded import RECORDERS, recorded
from vlmkernels import reference
from vlmkernels.testing import assert_as_good, assert_op_as_good, result_and_gradients, saved_activation_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NATIVE = "reference" not in vlmkernels.info()["ops"]["linear_cross_entropy"]["CPU"]


def sample(rows, classes, dim, *, dtype=torch.float32, bias=False, ignored=0.3, std=1.0):
    """hidden [rows, dim], weight [classes, dim], target [rows], bias [classes] or None."""
    hidden = torch.randn(rows, dim).to(dtype).requires_grad_()
    weight = (std * torch.randn(classes, dim) / dim**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    target[torch.rand(rows) < ignored] = -100
    return hidden, weight, target, torch.randn(classes).to(dtype).requires_grad_() if bias else None


def judge(hidden, weight, target, bias, op=vlmkernels.linear_cross_entropy, **options):
    tensors = [hidden, weight] if bias is None else [hidden, weight, bias]

    def with_(fn):
        def call(hidden, weight, bias=None, **rest):
            return fn(hidden, weight, target, bias=bias, **rest)

        return call

    assert_op_as_good(with_(op), with_(reference.linear_cross_entropy), tensors, **options)


def on_cuda(hidden, weight, target, **options):
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    return vlmkernels.linear_cross_entropy(hidden.cuda(), weight.cuda(), target.cuda(), **options).cpu()


OPS = {
    "dispatched": vlmkernels.linear_cross_entropy,
    **({"cuda": on_cuda} if torch.cuda.is_available() else {}),
}
SIZES = [(1, 2, 3), (3, 5, 4), (37, 130, 33), (130, 37, 64), (300, 700, 70), (520, 260, 48)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("std", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_forward_and_gradients(op, dtype, std, sizes):
    tensors = sample(*sizes, dtype=dtype, std=std)
    judge(*tensors, op=OPS[op])
    judge(*tensors, op=OPS[op], reduction="none")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_options(op, dtype, reduction):
    tensors = sample(300, 400, 40, dtype=dtype, bias=True)
    scale = torch.rand(400) * 2
    scale[::5] = 0
    for options in (
        {},
        {"label_smoothing": 0.1},
        {"column_scale": scale},
        {"column_scale": -scale.to(dtype), "label_smoothing": 0.3},
    ):
        judge(*tensors, op=OPS[op], reduction=reduction, **options)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.once
def test_many_chunks_of_rows(op, dtype, monkeypatch):
    """More rows than the workspace holds logits of: sums over chunks, in both precisions."""
    if op == "cuda":
        launcher = pytest.importorskip("vlmkernels.triton.linear_cross_entropy")
        monkeypatch.setattr(launcher, "CHUNK_BYTES", 0)
    judge(*sample(1100, 33_000, 8, dtype=dtype, bias=True), op=OPS[op], label_smoothing=0.1)


def test_equals_torch():
    hidden, weight, target, bias = sample(200, 300, 32, bias=True)
    for smoothing in (0.0, 0.1):
        want = F.cross_entropy(F.linear(hidden, weight, bias), target, label_smoothing=smoothing)
        got = vlmkernels.linear_cross_entropy(hidden, weight, target, bias=bias, label_smoothing=smoothing)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_logits_that_are_rounded_would_be_seen(dtype):
    """The gradient of a loss on 16-bit logits is off by percents; the same judgement rejects it."""

    def rounded(hidden, weight, target, *, bias=None, reduction="mean"):
        return F.cross_entropy(F.linear(hidden, weight, bias).float(), target, reduction=reduction)

    tensors = sample(256, 1000, 256, dtype=dtype, std=8.0, ignored=0)
    judge(*tensors)
    with pytest.raises(AssertionError, match="above"):
        judge(*tensors, op=rounded)


def test_ignored_rows_are_not_read():
    hidden, weight, target, _ = sample(300, 200, 16)
    poisoned = hidden.detach().clone()
    poisoned[target == -100] = float("nan")
    poisoned.requires_grad_()
    loss = vlmkernels.linear_cross_entropy(poisoned, weight, target)
    dhidden, dweight = torch.autograd.grad(loss, (poisoned, weight))
    want = vlmkernels.linear_cross_entropy(hidden, weight, target)
    assert torch.equal(loss, want)
    assert torch.equal(dweight, torch.autograd.grad(want, weight)[0])
    assert torch.equal(dhidden[target == -100], torch.zeros_like(dhidden[target == -100]))
    rows = vlmkernels.linear_cross_entropy(poisoned, weight, target, reduction="none")
    assert torch.equal(rows[target == -100], torch.zeros(int((target == -100).sum())))


def test_ignored_rows_get_no_gradient_whatever_the_weight_is():
    hidden, weight, target, _ = sample(6, 20, 4, ignored=0)
    target[2] = -100
    with torch.no_grad():
        weight[3, 1] = torch.nan
    for reduction in ("mean", "none"):
        loss = vlmkernels.linear_cross_entropy(hidden, weight, target, reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), hidden)
        assert torch.equal(grad[2], torch.zeros(4))
        assert grad[0].isnan().any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 10_000])
def test_no_row_counts(reduction, ignore_index):
    hidden, weight, _, bias = sample(5, 9, 4, bias=True)
    target = torch.full((5,), ignore_index)
    options = {"bias": bias, "ignore_index": ignore_index, "reduction": reduction, "label_smoothing": 0.1}
    loss = vlmkernels.linear_cross_entropy(hidden, weight, target, **options)
    assert torch.equal(loss, torch.zeros(5 if reduction == "none" else ()))
    for grad in torch.autograd.grad(loss.sum(), (hidden, weight, bias)):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (), (2, 3, 5)], ids=str)
def test_leading_shapes(shape):
    hidden, weight = torch.randn(*shape, 8, requires_grad=True), torch.randn(11, 8)
    target = torch.randint(0, 11, shape)
    for reduction in ("mean", "none"):
        loss = vlmkernels.linear_cross_entropy(hidden, weight, target, reduction=reduction)
        assert loss.shape == (shape if reduction == "none" else ())
        want = reference.linear_cross_entropy(hidden, weight, target, reduction=reduction)
        torch.testing.assert_close(loss, want)
        (grad,) = torch.autograd.grad(loss.sum(), hidden)
        torch.testing.assert_close(grad, torch.autograd.grad(want.sum(), hidden)[0])


def test_no_width_and_one_class():
    loss = vlmkernels.linear_cross_entropy(
        torch.zeros(4, 0), torch.zeros(5, 0), torch.tensor([0, 1, 2, -100])
    )
    torch.testing.assert_close(loss, torch.tensor(5.0).log())
    hidden, weight, target, _ = sample(6, 1, 3)
    assert vlmkernels.linear_cross_entropy(hidden, weight, target) == 0


def test_views_and_frozen_inputs():
    hidden, weight, target, bias = sample(300, 200, 24, bias=True)
    want = result_and_gradients(lambda h, w, b: reference.linear_cross_entropy(h, w, target, bias=b),
                                (hidden, weight, bias))  # fmt: skip
    view = hidden.detach().T.contiguous().T.requires_grad_()
    columns = weight.detach().T.contiguous().T.requires_grad_()
    op = vlmkernels.linear_cross_entropy
    got = result_and_gradients(lambda h, w, b: op(h, w, target, bias=b), (view, columns, bias))
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    for frozen in range(3):
        leaves = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((hidden, weight, bias))]
        loss = op(leaves[0], leaves[1], target, bias=leaves[2])
        grads = iter(torch.autograd.grad(loss, [t for t in leaves if t.requires_grad]))
        for leaf, theirs in zip(leaves, want[1:], strict=True):
            if leaf.requires_grad:
                torch.testing.assert_close(next(grads), theirs / 0.5)  # the incoming gradient there is 0.5


def test_tied_weights():
    """One matrix is the embedding and the head: its gradients add up."""
    tokens = torch.randint(0, 50, (4, 9))
    table = torch.randn(50, 16, requires_grad=True)
    loss = vlmkernels.linear_cross_entropy(table[tokens[:, :-1]].tanh(), table, tokens[:, 1:])
    want = F.cross_entropy((table[tokens[:, :-1]].tanh() @ table.T).flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, table)[0] for x in (loss, want)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits(dtype):
    hidden, weight, target, bias = sample(140, 300, 24, dtype=dtype, bias=True, std=100.0)
    judge(hidden, weight, target, bias)
    masked = bias.detach().clone()
    masked[100:] = -torch.inf  # classes that cannot be
    target = target.clamp_max(99)
    loss = vlmkernels.linear_cross_entropy(hidden, weight, target, bias=masked)
    want = F.cross_entropy(hidden.double() @ weight[:100].double().T + masked[:100].double(), target)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(loss, weight)
    assert grad.isfinite().all()
    assert (grad[100:] == 0).all()


def test_nan_is_not_hidden():
    hidden, weight, target, _ = sample(5, 300, 4, ignored=0)
    with torch.no_grad():
        weight[280, 2] = torch.nan
    loss = vlmkernels.linear_cross_entropy(hidden, weight, target)
    assert loss.isnan()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(loss, (hidden, weight)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 130, 20_000])
@pytest.mark.parametrize("beside", [0.0, -torch.inf])
def test_nan_is_not_hidden_by_the_maximum_of_later_classes(dtype, at, beside):
    """Many blocks of classes; the ones before are all possible, or none of them is."""
    hidden, weight, target, _ = sample(9, 40_000, 4, dtype=dtype, ignored=0)
    bias = torch.zeros(40_000, dtype=dtype)
    bias[:20_000] = beside
    target.clamp_min_(20_001)
    loss = vlmkernels.linear_cross_entropy(hidden, weight, target, bias=bias, reduction="none")
    assert loss.isfinite().all()
    bias[at] = torch.nan
    loss = vlmkernels.linear_cross_entropy(hidden, weight, target, bias=bias, reduction="none")
    assert loss.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_target_that_cannot_be(dtype, smoothing):
    """Its loss is inf, as in torch, and its gradient that of probability 0."""
    hidden, weight, target, bias = sample(150, 300, 8, dtype=dtype, bias=True, ignored=0)
    with torch.no_grad():
        bias[7] = -torch.inf
    target[:50] = 7
    options = {"label_smoothing": smoothing, "reduction": "none"}
    loss = vlmkernels.linear_cross_entropy(hidden, weight, target, bias=bias, **options)
    want = F.cross_entropy(hidden.double() @ weight.double().T + bias.double(), target, **options)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    assert (loss[:50] == torch.inf).all()
    exact, wide = [tuple(x.detach().to(to).requires_grad_() for x in (hidden, weight, bias))
                   for to in (torch.float64, torch.promote_types(dtype, torch.float32))]  # fmt: skip
    grads = []
    for leaves, fn in ((exact, reference.linear_cross_entropy), (wide, reference.linear_cross_entropy),
                       ((hidden, weight, bias), vlmkernels.linear_cross_entropy)):  # fmt: skip
        loss = fn(*leaves[:2], target, bias=leaves[2], label_smoothing=smoothing)
        grads.append(torch.autograd.grad(loss, leaves))
    for truth, theirs, ours in zip(*grads, strict=True):
        assert_as_good(ours, theirs.to(dtype), truth)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(reduction):
    hidden, weight, target, bias = sample(6, 5, 4, dtype=torch.float64, bias=True)
    scale = torch.rand(5, dtype=torch.float64)

    def call(hidden, weight, bias):
        return vlmkernels.linear_cross_entropy(
            hidden, weight, target, bias=bias, column_scale=scale, label_smoothing=0.2, reduction=reduction
        )

    assert torch.autograd.gradcheck(call, (hidden, weight, bias))


def test_second_derivative_is_refused():
    hidden, weight, target, _ = sample(5, 5, 4)
    loss = vlmkernels.linear_cross_entropy(hidden, weight, target)
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("change", [{"reduction": "batchmean"}, {"label_smoothing": 1.0}], ids=str)
def test_raw_ops_refuse_options(change):
    good = {"ignore_index": -100, "label_smoothing": 0.0, "reduction": "mean"}
    tensors = (torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, 6, -100]), None, None)
    ((name, _),) = change.items()
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {name} must be "):
        torch.ops.vlmkernels.linear_cross_entropy(*tensors, *(good | change).values(), True, True, True)
    tensors = (torch.ones(()), *tensors)
    with pytest.raises(ValueError, match=f"linear_cross_entropy_bwd: {name} must be "):
        torch.ops.vlmkernels.linear_cross_entropy_bwd(*tensors, *(good | change).values(), [True] * 3)


def raw(dtype=torch.float32, permuted=False):
    hidden, weight, target, bias = sample(7, 9, 6, dtype=dtype, bias=True)
    if permuted:
        hidden, weight = (x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight))
    return hidden, weight, target, bias, torch.rand(9), -100, 0.1, "mean", True, True, True


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.once
def test_registration(dtype, permuted):
    op = torch.ops.vlmkernels.linear_cross_entropy.default
    torch.library.opcheck(op, raw(dtype, permuted), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(op, (*raw(dtype, permuted)[:-3], False, False, False))
    bwd = torch.ops.vlmkernels.linear_cross_entropy_bwd.default
    arguments = [x.detach() if isinstance(x, torch.Tensor) else x for x in raw(dtype, permuted)[:-3]]
    dloss = torch.ones((), dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(bwd, (dloss, *arguments, [True] * 3), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.once
def test_compile():
    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(hidden, weight, target, bias):
        return vlmkernels.linear_cross_entropy(hidden * 2, weight, target, bias=bias, label_smoothing=0.1)

    for sizes in ((20, 30, 16), (33, 50, 24)):
        tensors = sample(*sizes, bias=True)
        leaves = (tensors[0], tensors[1], tensors[3])
        loss = compiled(*tensors)
        want = reference.linear_cross_entropy(
            tensors[0] * 2, tensors[1], tensors[2], bias=tensors[3], label_smoothing=0.1
        )
        torch.testing.assert_close(loss, want)
        for ours, theirs in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(want, leaves), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.once
def test_recorded(recorder):
    class Loss(torch.nn.Module):
        def forward(self, hidden, weight, target):
            return vlmkernels.linear_cross_entropy(hidden, weight, target)

    hidden, weight, target, _ = sample(6, 9, 4)
    rows = {0: torch.export.Dim("rows", min=2)}
    loss = recorded(recorder, Loss(), (hidden, weight, target), [rows, None, rows])
    hidden, _, target, _ = sample(40, 9, 4)
    want, got = vlmkernels.linear_cross_entropy(hidden, weight, target), loss(hidden, weight, target)
    assert torch.equal(got, want)
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (got, want)), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast():
    hidden, weight, target, bias = sample(64, 90, 32, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = vlmkernels.linear_cross_entropy(hidden, weight, target, bias=bias)
    want = vlmkernels.linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), target, bias=bias.bfloat16())
    assert torch.equal(loss, want)
    assert all(grad.dtype == torch.float32 for grad in torch.autograd.grad(loss, (hidden, weight, bias)))


def test_small_incoming_gradients_in_float16():
    """The factor of a loss scaler reaches the sums before they are rounded to float16."""
    hidden, weight, target, _ = sample(4096, 300, 16, dtype=torch.float16, ignored=0, std=0.1)
    loss = vlmkernels.linear_cross_entropy(hidden, weight, target)
    (grad,) = torch.autograd.grad(loss, hidden, torch.tensor(65536.0))
    exact = reference.linear_cross_entropy(hidden.double(), weight.double(), target)
    (truth,) = torch.autograd.grad(exact, hidden, torch.tensor(65536.0, dtype=torch.float64))
    assert_as_good(grad, truth.half(), truth.double())


def test_nothing_is_kept_but_gradients():
    hidden, weight, target, _ = sample(500, 3000, 16)
    kept = saved_activation_bytes(lambda h, w: vlmkernels.linear_cross_entropy(h, w, target), hidden, weight)
    assert kept <= 4 * (hidden.numel() + weight.numel()) + 8 * target.numel() + 64
    frozen = saved_activation_bytes(
        lambda h, w: vlmkernels.linear_cross_entropy(h, w, target), hidden, weight.detach()
    )
    assert frozen <= 4 * hidden.numel() + 8 * target.numel() + 64


@pytest.mark.skipif(not NATIVE, reason="the reference has all logits")
@pytest.mark.once
def test_logits_are_never_all_there(peak_memory):
    """4,096 x 30,000 logits are 469 MiB; a chunk of them and the gradients of 512 x 30,000 are not."""
    used = peak_memory("""
hidden, weight = torch.randn(4096, 32, requires_grad=True), torch.randn(30_000, 32, requires_grad=True)
target = torch.randint(0, 30_000, (4096,))
def run():
    vlmkernels.linear_cross_entropy(hidden, weight, target).backward()
""")
    assert used < 2**28


def test_determinism(for_thread_counts):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, target, bias = sample(700, 900, 96, dtype=dtype, bias=True)

        def run(tensors=(hidden, weight, target, bias)):
            hidden, weight, target, bias = tensors
            loss = vlmkernels.linear_cross_entropy(hidden, weight, target, bias=bias, label_smoothing=0.1)
            return loss, *torch.autograd.grad(loss, (hidden, weight, bias))

        first, *others = for_thread_counts(run)
        if NATIVE:
            assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


BAD = [
    ({"hidden": torch.zeros(3, 5)}, "hidden must be [..., D] and weight [V, D], got hidden (3, 5)"),
    ({"weight": torch.zeros(4)}, "weight (4,)"),
    ({"target": torch.zeros(4, dtype=torch.int64)}, "target must be (3,), got (4,)"),
    ({"target": torch.zeros(3, dtype=torch.int32)}, "target must be int64, got torch.int32"),
    ({"bias": torch.zeros(6)}, "bias must be [V] = (7,), got (6,)"),
    ({"column_scale": torch.zeros(1)}, "column_scale must be [V] = (7,), got (1,)"),
    ({"ignore_index": 2**63}, "ignore_index must fit in int64, got 9223372036854775808"),
    ({"label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
    ({"reduction": "batchmean"}, "reduction must be 'mean', 'sum' or 'none', got 'batchmean'"),
    ({"weight": torch.zeros(7, 4, dtype=torch.float64)}, "must have the same dtype"),
    ({"hidden": torch.zeros(3, 4, dtype=torch.int64)}, "must be float32"),
    ({"weight": torch.zeros(7, 4, device="meta")}, "must be on the same device"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
@pytest.mark.once
def test_bad_input(change, message):
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "target": torch.tensor([0, 6, -100])}
    vlmkernels.linear_cross_entropy(**good)
    with pytest.raises(ValueError, match="linear_cross_entropy: ") as error:
        vlmkernels.linear_cross_entropy(**good | change)
    assert message in str(error.value)


@pytest.mark.parametrize("outside", [-1, 7, -99, 2**40])
def test_targets_outside(outside):
    hidden, weight, target = torch.zeros(3, 4), torch.zeros(7, 4), torch.tensor([0, outside, -100])
    with pytest.raises(IndexError, match=f"target must be in .0, V = 7. or -100, got {outside}"):
        vlmkernels.linear_cross_entropy(hidden, weight, target)
    with pytest.raises(TypeError, match="label_smoothing must be float"):
        vlmkernels.linear_cross_entropy(hidden, weight, target, label_smoothing=torch.tensor(0.1))


@pytest.mark.parametrize("op", ["linear_cross_entropy", "sigmoid_loss"])
def test_gradients_handed_over_are_no_longer_the_graphs(op):
    """Those that the forward formed: changed in place, they must not change what a retained graph gives."""
    torch.manual_seed(0)
    x, w = torch.randn(9, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    other = (torch.arange(9),) if op == "linear_cross_entropy" else (1.0, 0.5)
    for factor in (1.0, 3.0):
        loss = factor * getattr(vlmkernels, op)(x, w, *other)
        kept = torch.autograd.grad(loss, (x, w), retain_graph=True)
        expected = [grad.clone() for grad in kept]
        for grad in kept:
            grad.zero_()
        loss.backward(retain_graph=True)
        for grad, value in zip((x.grad, w.grad), expected, strict=True):
            assert torch.equal(grad, value)
            grad.zero_()
        loss.backward()
        assert torch.equal(x.grad, expected[0])
        assert torch.equal(w.grad, expected[1])
        x.grad = w.grad = None


def test_a_tied_embedding_adds_to_the_gradient_in_place():
    """No third matrix [V, D]: autograd owns the gradient that the forward formed."""
    torch.manual_seed(0)
    table, tokens = torch.randn(30, 8, requires_grad=True), torch.arange(9)
    loss = vlmkernels.linear_cross_entropy(torch.nn.functional.embedding(tokens, table), table, tokens)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss.backward()
    names = [event.key for event in profile.key_averages()]
    assert "aten::add_" in names
    assert "aten::add" not in names


def test_gradients_formed_for_single_rows_are_formed_anew():
    """Only the raw op forms them: they belong to each row's own loss, and no one factor scales them."""
    hidden, weight, target = torch.randn(7, 7), torch.randn(7, 7), torch.randint(7, (7,))
    inputs, dloss = (hidden.requires_grad_(), weight.requires_grad_()), torch.rand(7)
    options = (target, None, None, -100, 0.0, "none")
    formed = torch.ops.vlmkernels.linear_cross_entropy(*inputs, *options, True, True, False)[0]
    plain = vlmkernels.linear_cross_entropy(*inputs, target, reduction="none")
    torch.testing.assert_close(*(torch.autograd.grad(loss, inputs, dloss) for loss in (formed, plain)))
