"""A CUDA graph captures every op: none waits for the host. On tensors without memory, and on a GPU."""

import contextlib
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

import vlmkernels
from benchmarks.gpu import timing, trace
from tests.gpu.launches import intercepting
from tests.gpu.matrix import on
from vlmkernels import intervals
from vlmkernels._library import KERNELS
from vlmkernels.triton import _pairwise, _pairwise_classes, _tiles


class OnCard(TorchDispatchMode):
    """Ops of the library run their kernels for CUDA on meta tensors, and nothing moves from or to the host.

    Such tensors raise by themselves where values decide: `item`, `nonzero`, `unique`, a mask as an index.
    """

    def __init__(self):
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "vlmkernels":
            self.ran.append(func._schema.name.removeprefix("vlmkernels::"))
            with self:
                return func.redispatch(trace.CUDA, *args, **kwargs)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        # A single number of the host is an argument of the launch
        devices = {x.device.type for x in made} | {x.device.type for x in read if x.dim()}
        assert len(devices) <= 1, f"{func} moves between {sorted(devices)}"
        return out


class NoNumbers(TorchFunctionMode):
    """No tensor is made of numbers of the host: that copy passes no dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor), f"{func.__name__} copies from the host"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_a_card():
    here = property(lambda x: x.device.type == "meta")
    with (
        mock.patch.object(torch.Tensor, "is_cuda", here),
        mock.patch.object(torch.cuda, "device_of", return_value=contextlib.nullcontext()),
        mock.patch.object(_tiles, "product", return_value=None),
        on("sm_90"),
        intercepting(lambda launch: None),
        NoNumbers(),
        OnCard() as mode,
    ):
        yield mode


def random(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, dtype=torch.float32).to(dtype).requires_grad_()


def ids(n):
    return torch.arange(n) % 7


def losses(dtype):
    """Calls: a name, the op, its tensors and its options."""
    n, m, d = 300, 400, 50
    query, key, keys = (random(rows, d, dtype=dtype) for rows in (n, n, m))
    scale, bias = (torch.full((), x, requires_grad=True) for x in (14.0, -10.0))
    by_index = {"positives": torch.where(torch.arange(n) % 5 == 0, -100, torch.arange(n))}
    by_id = {"positives": (torch.arange(n) % 7, torch.arange(m) % 7)}
    of_each = {"reduction": "none"}
    nce, sigmoid = vlmkernels.info_nce, vlmkernels.sigmoid_loss
    yield "info_nce", nce, (query, key, scale), {}
    yield "info_nce, normalised", nce, (query, key, scale), {"normalize": True}
    yield "info_nce, weighted", nce, (query, key, scale), {"label_smoothing": 0.1, "weight": torch.ones(n)}
    yield "info_nce of each row", nce, (query, key, scale), of_each
    yield "info_nce by id", nce, (query, keys, scale), by_id
    yield "info_nce by index", nce, (query, keys, scale), by_index | {"symmetric": False}
    teacher = {"teacher_query": random(n, 70, dtype=dtype), "teacher_key": random(n, 70, dtype=dtype)}
    teacher["teacher_scale"] = torch.full((), 20.0)
    distilled = vlmkernels.contrastive_distillation
    yield "contrastive_distillation", distilled, (query, key, scale), teacher
    yield "contrastive_distillation of each row", distilled, (query, key, scale), teacher | of_each
    of_hidden = vlmkernels.linear_cross_entropy
    target = {"target": by_index["positives"]}
    yield "linear_cross_entropy", of_hidden, (query, keys), target | {"label_smoothing": 0.1}
    yield "linear_cross_entropy of each row", of_hidden, (query, keys), target | of_each
    of_states, taught = (
        vlmkernels.linear_distillation,
        (random(n, 70, dtype=dtype), random(m, 70, dtype=dtype)),
    )
    layer = dict(zip(("teacher_hidden", "teacher_weight"), taught, strict=True))
    layer = {name: x.detach() for name, x in layer.items()}
    yield "linear_distillation", of_states, (query, keys), layer
    mixed = target | of_each | {"hard_weight": 0.5, "divergence": "reverse_kl"}
    yield "linear_distillation of each row", of_states, (query, keys), layer | mixed
    topk = {"teacher_topk": (torch.full((n, 3), -2.0), torch.arange(3).expand(n, 3).contiguous())}
    yield "linear_distillation, offline", of_states, (query, keys), topk | target | {"divergence": "jsd"}
    yield "sigmoid_loss", sigmoid, (query, key, scale, bias), {"normalize": True}
    yield "sigmoid_loss of each row", sigmoid, (query, key, scale, bias), of_each
    yield "sigmoid_loss by id", sigmoid, (query, keys, scale, bias), by_id
    yield "sigmoid_loss by index", sigmoid, (query, keys, scale, bias), by_index


def rows(dtype):
    student, teacher = random(60, 50, dtype=dtype), random(60, 50, dtype=dtype).detach()
    target = {"target": torch.where(torch.arange(60) % 5 == 0, -100, torch.arange(60) % 50)}
    op, of_each, mixed = vlmkernels.distillation, {"reduction": "none"}, target | {"hard_weight": 0.5}
    yield "distillation", op, (student, teacher), {}
    yield "distillation of each row", op, (student, teacher), of_each | {"divergence": "reverse_kl"}
    yield "distillation with targets", op, (student, teacher), mixed | {"divergence": "jsd"}
    of_features, weight = vlmkernels.embedding_distillation, {"weight": torch.rand(60)}
    for distance in ("l1", "l2", "cosine", "smooth_l1"):
        options = weight | {"distance": distance}
        yield f"embedding_distillation, {distance}", of_features, (student, teacher), options


def attention(dtype):
    b, h, t, d = 2, 4, 70, 40
    query, *heads = (random(b, heads, t, d, dtype=dtype) for heads in (h, 2, 2))
    bounds = intervals.causal(t)
    biased = {"relative_bias": random(h, 2 * 7 - 1, 2 * 10 - 1, dtype=dtype), "grid": (7, 10)}
    for name, bounds_of, options in (
        ("causal", bounds, {}),
        ("of each batch", [x.repeat(b, 1) for x in bounds], {}),
        ("biased", bounds, biased),
    ):
        yield (
            f"interval_attention, {name}",
            vlmkernels.interval_attention,
            (query, *heads, *bounds_of),
            options,
        )
    sources = [random(b, 2, n, d, dtype=dtype) for n in (50, 50, t, t)]
    for name, options in (("all", {}), ("lengths", {"media_lengths": torch.arange(b) + 10})):
        yield f"perceiver_attention, {name}", vlmkernels.perceiver_attention, (query, *sources), options


def layers(dtype):
    n, d, k = 60, 40, 50
    x, y, h = (random(3, n, width, dtype=dtype) for width in (d, d, k))
    up, down = random(k, d, dtype=dtype), random(d, k, dtype=dtype)
    wide, bias = random(k, dtype=dtype), random(d, dtype=dtype)
    masked = {"row_mask": torch.ones(3, n, dtype=torch.bool)}
    for gates in (1, d):
        gate = random(gates, dtype=torch.float32)
        yield f"gated_residual, {gates}", vlmkernels.gated_residual, (x, y, gate), masked
        arguments = (x, h, down, gate)
        yield f"gated_linear_residual, {gates}", vlmkernels.gated_linear_residual, arguments, masked
    levels = (random(2, *x.shape, dtype=dtype) for _ in range(2))
    yield "srau", vlmkernels.srau, (x, *levels), masked | {"tau": 0.2}
    gelu = {"activation": "gelu", "residual": x}
    yield "linear", vlmkernels.linear, (h, down, bias), gelu
    yield "mlp", vlmkernels.mlp, (x, up, wide, down, bias), gelu
    yield "gated_mlp", vlmkernels.gated_mlp, (x, up, random(k, d, dtype=dtype), down), gelu


def retrieval(dtype):
    query, key = random(60, 40, dtype=dtype).detach(), random(70, 40, dtype=dtype).detach()
    quantised = torch.ones(70, 40, dtype=torch.int8), {"key_scale": torch.ones(70)}
    yield "topk_similarity", vlmkernels.topk_similarity, (query, key, 5), {"normalize": True}
    yield "topk_similarity both ways", vlmkernels.topk_similarity, (query, key, 5), {"both": True}
    rescored = quantised[1] | {"rescore": key, "return_sorted": False}
    yield "relative_representation", vlmkernels.relative_representation, (query, key), {"k": 7}
    rep = query, torch.arange(40).repeat(60, 1)
    yield "relative_similarity", vlmkernels.relative_similarity, (rep, rep), {}
    hidden, options = random(6, 10, 40, dtype=dtype).detach(), {"alpha": 0.5, "beta": 1.0}
    states = query[:6, :10], hidden, hidden, query[:6, :10]
    yield "contrastive_search_score", vlmkernels.contrastive_search_score, states, options
    lengths = options | {"context_lengths": torch.arange(6)}
    yield "contrastive_search_score, lengths", vlmkernels.contrastive_search_score, states, lengths
    yield "topk_similarity rescored", vlmkernels.topk_similarity, (query, quantised[0], 5), rescored
    by_id = {"positives": (ids(60), ids(70))}
    yield "retrieval_ranks", vlmkernels.retrieval_ranks, (query, key), {}
    yield "retrieval_ranks by id", vlmkernels.retrieval_ranks, (query, key), by_id
    yield "mine_hard_negatives", vlmkernels.mine_hard_negatives, (query, key, 5), {"positives": ids(60)}
    filtered = by_id | {"groups": (ids(60), ids(70)), "margin": 0.1}
    yield "mine_hard_negatives filtered", vlmkernels.mine_hard_negatives, (query, key, 5), filtered


def detection(dtype):
    corners = torch.arange(40.0).reshape(10, 4)
    boxes = torch.cat([torch.arange(10.0)[:, None] % 2, corners], 1)
    features = random(2, 5, 30, 41, dtype=dtype)
    yield "roi_align", vlmkernels.roi_align, (features, boxes, 7), {"spatial_scale": 0.5}
    lists = [corners[:3], corners[3:]]
    yield "roi_align of lists", vlmkernels.roi_align, (features, lists, (3, 5)), {"sampling_ratio": 2}


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def calls(dtype):
    every = (losses, rows, attention, layers, retrieval, detection)
    return {name: call for make in every for name, *call in make(dtype)}


def moved(value, device):
    if isinstance(value, (tuple, list)):
        return (
            [moved(x, device) for x in value]
            if isinstance(value, list)
            else tuple(moved(x, device) for x in value)
        )
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().to(device).requires_grad_(value.requires_grad)


def step(op, tensors, options):
    """The result and the gradients of a call; the results, where there are no gradients."""
    out = op(*tensors, **options)
    results = out if isinstance(out, tuple) else (out,)
    if not any(x.requires_grad for x in results):
        return results
    trained = [x for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad]
    return out, *torch.autograd.grad(out, trained, torch.ones_like(out))


def op_of(name):
    return name.partition(",")[0].partition(" ")[0]


def test_no_op_is_missing():
    """But for the one whose values decide on the size of its result."""
    assert {*map(op_of, calls(torch.float32)), "nms"} == set(vlmkernels.ops.__all__)


# Whose forward forms the gradients by itself, or which have none
ALONE = {"linear_distillation", *vlmkernels.ops.WITHOUT_GRADIENTS}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", calls(torch.float32))
def test_an_op_does_not_wait(name, dtype):
    if KERNELS.get((op_of(name), "CUDA"), "").startswith("CUDA C++"):
        pytest.skip("the extension's kernel asks for the stream of a card")
    op, tensors, options = calls(dtype)[name]
    tensors, options = moved(tensors, "meta"), {k: moved(x, "meta") for k, x in options.items()}
    with on_a_card() as card:
        step(op, tensors, options)
    assert op_of(name) in card.ran
    of_torch = (op_of(name), "CUDA") not in KERNELS
    assert len(card.ran) > 1 or of_torch or op_of(name) in ALONE


WAITS = {
    "item": lambda x: x.sum().item(),
    "a condition": lambda x: 1 if (x > 0).any() else 0,
    "the nonzero elements": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: x + torch.ones(len(x)).to(x.device),
    "numbers of the host": lambda x: x + torch.tensor([1.0, 2.0], device=x.device),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen(name):
    with on_a_card(), pytest.raises((AssertionError, NotImplementedError, RuntimeError)):
        WAITS[name](torch.empty(2, device="meta"))


def repeats(op, tensors, options):
    """Whether the replay of a captured step gives the bits of the step."""
    tensors, options = moved(tensors, "cuda"), {k: moved(x, "cuda") for k, x in options.items()}
    expected = step(op, tensors, options)
    replay, results = timing.captured(lambda: step(op, tensors, options))
    for x in results:
        x.data.fill_(float("nan"))
    replay()
    return [torch.equal(got, wanted) for got, wanted in zip(results, expected, strict=True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", calls(torch.float32))
def test_a_graph_repeats_an_op(name, dtype):
    assert all(repeats(*calls(dtype)[name]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counted", [0, 1, 100, 300])
def test_a_graph_repeats_a_call_that_leaves_chunks_out(counted, dtype, monkeypatch):
    """The graph multiplies them: it does not know which rows count."""
    monkeypatch.setattr(_pairwise, "CHUNK_ROWS", 64)
    monkeypatch.setattr(_pairwise_classes, "CHUNK_BYTES", 0)
    target = torch.where(torch.arange(300) < 300 - counted, -100, torch.arange(300))
    tensors = random(300, 50, dtype=dtype), random(400, 50, dtype=dtype)
    assert all(repeats(vlmkernels.linear_cross_entropy, tensors, {"target": target}))
    taught = {f"teacher_{name}": x.detach() for name, x in zip(("hidden", "weight"), tensors, strict=True)}
    assert all(repeats(vlmkernels.linear_distillation, tensors, taught | {"target": target}))
