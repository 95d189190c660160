"""Ops under forward-mode derivatives and torch.func: right, or an error, never a silent zero."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch._ops import OpOverloadPacket

import vlmkernels as vk
from tests.every_model import build
from vlmkernels import _native, intervals
from vlmkernels.ops import WITHOUT_GRADIENTS

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

START, END = intervals.causal(5)
W, V = torch.randn(8, 6), torch.randn(6, 8)
TARGET = torch.tensor([3, 0, -100, 7])
CORNERS = torch.tensor([[1.0, 0, 0, 5, 4], [0, 1, 1, 9, 9]])
TEACHER, CLASSES, TOP = torch.randn(6, 3), torch.randn(8, 3), torch.tensor([[0, 7, 2]] * 4)

# Each as a function of one tensor, which is every operand that can have a derivative.
OPS = {
    "linear": (lambda x: vk.linear(x, W, activation="gelu", residual=x @ W.T), (4, 6)),
    "mlp": (lambda x: vk.mlp(x, W, None, V, None, activation="gelu"), (4, 6)),
    "gated_mlp": (lambda x: vk.gated_mlp(x, W, 2 * W, V), (4, 6)),
    "gated_residual": (lambda x: vk.gated_residual(x, 2 * x, x[0]), (4, 6)),
    "gated_linear_residual": (lambda x: vk.gated_linear_residual(x, x, W[:6], x[0, :1]), (4, 6)),
    "contrastive_distillation": (
        lambda x: vk.contrastive_distillation(x, x + 1, 2.0, TEACHER, TEACHER, 3.0),
        (6, 4),
    ),
    "distillation": (lambda x: vk.distillation(x, x.roll(1, 0).detach(), temperature=2.0), (4, 6)),
    "embedding_distillation": (lambda x: vk.embedding_distillation(x, x.roll(1, 0).detach()), (4, 6)),
    "info_nce": (lambda x: vk.info_nce(x, x + 1, 2.0), (6, 4)),
    "info_nce streamed": (lambda x: vk.info_nce(x, x + 1, 2.0, reduction="none"), (6, 4)),
    "linear_cross_entropy": (lambda x: vk.linear_cross_entropy(x, W, TARGET), (4, 6)),
    "linear_distillation": (lambda x: vk.linear_distillation(x, W, TEACHER[:4], CLASSES), (4, 6)),
    "linear_distillation offline": (
        lambda x: vk.linear_distillation(x, W, teacher_topk=(-CLASSES[:4].abs(), TOP), reduction="none"),
        (4, 6),
    ),
    "sigmoid_loss": (lambda x: vk.sigmoid_loss(x, x + 1, 2.0, 0.0), (6, 4)),
    "sigmoid_loss streamed": (lambda x: vk.sigmoid_loss(x, x + 1, 2.0, 0.0, reduction="none"), (6, 4)),
    "roi_align": (lambda x: vk.roi_align(x, CORNERS, 2), (2, 3, 5, 6)),
    "srau": (lambda x: vk.srau(x[0], x, 2 * x, 0.2), (3, 4, 6)),
    "interval_attention": (lambda x: vk.interval_attention(x, x, x, START, END), (2, 2, 5, 8)),
    "perceiver_attention": (lambda x: vk.perceiver_attention(x, x, x, x, x), (2, 2, 5, 8)),
}
every = pytest.mark.parametrize("op", OPS)


def test_no_op_is_missing():
    assert {*(name.split()[0] for name in OPS), *WITHOUT_GRADIENTS} == set(vk.ops.__all__)


@every
def test_forward_mode_is_refused(op):
    fn, shape = OPS[op]
    x, message = torch.randn(shape), f"vlmkernels.{op.split()[0]} has no forward-mode derivative"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(fn, (x,), (torch.ones_like(x),))
    with pytest.raises(RuntimeError, match=message):
        torch.func.jacfwd(fn)(x)
    for trained in (False, True):
        with forward_ad.dual_level(), torch.set_grad_enabled(trained):
            dual = forward_ad.make_dual(x.clone().requires_grad_(trained), torch.ones_like(x))
            with pytest.raises(RuntimeError, match=message):
                fn(dual)


APART = torch.arange(4.0)[:, None] * 3 + torch.tensor([0, 0, 2, 2])
AT = torch.arange(6).repeat(4, 1)
INDICES = {
    "nms": lambda x: (vk.nms(APART, x[:, 0], 0.5),),
    "mine_hard_negatives": lambda x: (vk.mine_hard_negatives(x, x + 1, 2),),
    "retrieval_ranks": lambda x: vk.retrieval_ranks(x, x + 1),
    "topk_similarity": lambda x: vk.topk_similarity(x, x + 1, 2),
    "relative_representation": lambda x: vk.relative_representation(x, W, k=2),
    "relative_similarity": lambda x: (vk.relative_similarity((x, AT), (x + 1, AT)),),
    "contrastive_search_score": lambda x: vk.contrastive_search_score(
        x, x[..., None], x[..., None], x, alpha=0.5, beta=1.0
    ),
}


def test_ops_without_a_derivative():
    assert set(INDICES) == set(WITHOUT_GRADIENTS)
    x = torch.randn(4, 6)
    for op, fn in INDICES.items():
        first = "topk_similarity" if op == "relative_representation" else op
        with pytest.raises(RuntimeError, match=f"vlmkernels.{first} has no forward-mode derivative"):
            torch.func.jvp(fn, (x,), (torch.ones_like(x),))
        with pytest.raises(RuntimeError, match=f"vlmkernels.{first} has no derivative under torch.func"):
            torch.func.grad(lambda x, fn=fn: fn(x)[0].float().sum())(x)
        xs = torch.randn(3, 4, 6)
        for got, want in zip(torch.vmap(fn)(xs), zip(*map(fn, xs), strict=True), strict=True):
            assert torch.equal(got, torch.stack(want))
        assert not any(result.requires_grad for result in fn(x.requires_grad_()))


def test_forward_mode_of_raw_ops_and_of_backwards_is_refused():
    x = torch.randn(4, 6, requires_grad=True)
    out = vk.linear(x, W)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(4, 8), torch.ones(4, 8))
        with pytest.raises(RuntimeError, match=r"vlmkernels\.linear has no forward-mode derivative"):
            torch.autograd.grad(out, x, dual)
        dual = forward_ad.make_dual(torch.ones(4, 6), torch.ones(4, 6))
        with pytest.raises(RuntimeError, match=r"vlmkernels\.linear has no forward-mode derivative"):
            torch.ops.vlmkernels.linear(dual, W, None, None, "none", False)


@pytest.mark.skipif(
    _native.extension is None, reason="the ops that others are made of have C++ kernels alone"
)
def test_no_raw_op_loses_a_derivative_in_silence():
    names = [name for name in dir(torch.ops.vlmkernels) if not name.startswith("_")]
    packets = [name for name in names if isinstance(getattr(torch.ops.vlmkernels, name), OpOverloadPacket)]
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert [name for name in packets if not has_kernel(f"vlmkernels::{name}", "Autograd")] == []
    x, scale, rows = torch.randn(4, 5), torch.tensor(2.0), torch.ones(4)
    at, ops = torch.arange(4), torch.ops.vlmkernels
    calls = [
        lambda q: ops.small_loss(q, x, scale, None, True, 0.0, False, True, True, True),
        lambda q: ops.small_distillation(q, x, scale, x, x, scale, *[True] * 6),
        lambda q: ops.contrastive_distillation_stats(q, x, scale, x, x, scale, True, False, 0),
        lambda q: ops.info_nce_stats(q, x, scale, None, None, at, True, 0, 0),
        lambda q: ops.sigmoid_sweep(
            q, x, scale, scale, None, None, at, None, None, rows, True, True, True, True
        ),
        lambda q: ops.scale_grads(scale, q)[0],
        lambda q: ops.linear_cross_entropy_sweep(q, x, at, None, None, rows, 0.0, True, True, False),
        lambda q: ops.linear_distillation_sweep(
            q, x, x, x, *[None] * 5, rows, 1.0, "jsd", 0.5, 0.0, True, True, False
        ),
    ]
    for call in calls:
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward AD"):
            call(forward_ad.make_dual(x, x))
        with pytest.raises(RuntimeError, match=r"derivative for vlmkernels::\w+ is not implemented"):
            call(x.clone().requires_grad_())[0].sum().backward()


def test_ops_on_constants_run_inside_of_forward_mode():
    def fn(x):
        return x.sum() * vk.linear(torch.ones(2, 6), W).sum()

    x = torch.randn(3)
    want = 3 * 2 * W.sum()
    torch.testing.assert_close(torch.func.jvp(fn, (x,), (torch.ones(3),))[1], want)
    torch.testing.assert_close(torch.func.grad(fn)(x).sum(), want)


@every
def test_gradients_of_torch_func_are_refused(op):
    fn, shape = OPS[op]
    message = f"vlmkernels.{op.split()[0]} has no derivative under torch.func"
    for transform in (torch.func.grad, torch.func.jacrev):
        with pytest.raises(RuntimeError, match=message):
            transform(lambda x: fn(x).sum())(torch.randn(shape))
    with pytest.raises(RuntimeError, match=message):
        torch.vmap(torch.func.grad(lambda x: fn(x).sum()))(torch.randn(2, *shape))


@every
def test_vmap_gives_what_a_loop_gives(op):
    fn, shape = OPS[op]
    xs = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)
    if "linear" in op or "mlp" in op:
        xs = xs.detach().float().requires_grad_()
    got, want = torch.vmap(fn)(xs), torch.stack([fn(x) for x in xs])
    torch.testing.assert_close(got, want)
    ours, theirs = (torch.autograd.grad(out.square().sum(), xs)[0] for out in (got, want))
    torch.testing.assert_close(ours, theirs)


@every
def test_batched_gradients_are_those_of_a_loop(op):
    fn, shape = OPS[op]
    x = torch.randn(shape, requires_grad=True)
    out = fn(x)
    incoming = torch.randn(3, *out.shape)
    (got,) = torch.autograd.grad(out, x, incoming, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(out, x, each, retain_graph=True)[0] for each in incoming]
    torch.testing.assert_close(got, torch.stack(want))


@pytest.mark.parametrize("name", ["resampler", "resampler-rms", "block", "block-swiglu"])
def test_layers_that_keep_little(name):
    case = build(name)
    first, *rest = case.batch()

    def fn(x):
        return case.model(x, *rest)

    with pytest.raises(RuntimeError, match=r"vlmkernels\.\w+ has no forward-mode derivative"):
        torch.func.jvp(fn, (first,), (torch.ones_like(first),))
    with pytest.raises(RuntimeError, match=r"vlmkernels\.\w+ has no derivative under torch\.func"):
        torch.func.grad(lambda x: fn(x).sum())(first)
    got = torch.vmap(fn)(torch.stack([first, 2 * first]))
    torch.testing.assert_close(got, torch.stack([fn(first), fn(2 * first)]))
    x = first.clone().requires_grad_()
    out = fn(x)
    incoming = torch.randn(2, *out.shape, dtype=out.dtype)
    (got,) = torch.autograd.grad(out, x, incoming, is_grads_batched=True, retain_graph=True)
    want = [torch.autograd.grad(out, x, each, retain_graph=True)[0] for each in incoming]
    torch.testing.assert_close(got, torch.stack(want))


def test_packed_weights_are_not_used():
    layer = nn.Linear(6, 8).eval()
    x, tangent = torch.randn(3, 6), torch.ones(3, 6)
    with torch.no_grad(), vk.prepare_for_inference(layer):
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (tangent,))[1], tangent @ layer.weight.T)
        with pytest.raises(RuntimeError, match="forward-mode"):
            torch.func.jvp(lambda x: vk.linear(x, layer.weight), (x,), (tangent,))
