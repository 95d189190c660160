"""What torch's FlopCounterMode counts for the ops: as much as for their composition in plain PyTorch."""

import itertools
from functools import partial

import pytest
import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

import vlmkernels
from tests.every_model import build
from vlmkernels import _library, intervals, reference
from vlmkernels.ops import FAMILIES


def counted(fn, tensors) -> tuple[int, int]:
    """FLOPs of the forward and of the backward."""
    with FlopCounterMode(display=False) as forward:
        out = fn(*tensors)
    with FlopCounterMode(display=False) as backward:
        if out.requires_grad:
            out.backward(torch.ones_like(out))
    return forward.get_total_flops(), backward.get_total_flops()


def trained_in_turn(*shapes):
    """Tensors of these shapes, of which every combination requires a gradient."""
    for needs in itertools.product((True, False), repeat=len(shapes)):
        yield [torch.randn(shape).requires_grad_(need) for shape, need in zip(shapes, needs, strict=True)]


# Of every op but attention: the tensors whose gradients are needed in turn, and what else it needs.
OPS = {
    "linear": (((2, 3, 5), (7, 5), (7,)), {"activation": "gelu"}),
    "mlp": (((2, 3, 5), (11, 5), (11,), (7, 11)), {"b2": None, "activation": "relu"}),
    "gated_mlp": (((2, 3, 5), (11, 5), (11, 5), (7, 11)), {}),
    "gated_residual": (((2, 3, 5), (2, 3, 5), (1,)), {}),
    "gated_linear_residual": (((2, 3, 5), (2, 3, 7), (5, 7), (5,)), {}),
    "contrastive_distillation": (
        ((6, 5), (6, 5), ()),
        {"teacher_query": torch.ones(6, 3), "teacher_key": torch.ones(6, 3), "teacher_scale": 2.0},
    ),
    "distillation": (((3, 5), (3, 5)), {"temperature": 2.0}),
    "embedding_distillation": (((3, 5), (3, 5)), {"distance": "cosine"}),
    "info_nce": (((6, 5), (6, 5), ()), {"label_smoothing": 0.1}),
    "linear_cross_entropy": (((3, 5), (7, 5)), {"target": torch.tensor([3, 0, 1]), "reduction": "none"}),
    "linear_distillation": (
        ((3, 5), (7, 5)),
        {"teacher_hidden": torch.ones(3, 4), "teacher_weight": torch.ones(7, 4), "reduction": "none"},
    ),
    "sigmoid_loss": (((6, 5), (6, 5), ()), {"bias": -1.0, "normalize": True, "reduction": "none"}),
    "srau": (((2, 3, 5), (4, 2, 3, 5), (4, 2, 3, 5)), {"tau": 0.2}),
}


def test_every_op_is_counted():
    others = (op for family in ("attention", "detection", "retrieval") for op in FAMILIES[family])
    assert {*OPS, *others} == set(vlmkernels.ops.__all__)


@pytest.mark.parametrize("op", OPS)
def test_products_count_as_in_the_composition(op):
    shapes, options = OPS[op]
    ours, plain = (partial(getattr(library, op), **options) for library in (vlmkernels, reference))
    for tensors in trained_in_turn(*shapes):
        assert counted(ours, tensors) == counted(plain, tensors)


def test_losses_of_all_sizes_count_alike():
    for n, m in ((6, 6), (600, 600), (6, 700)):
        options = {"symmetric": n == m}
        for tensors in trained_in_turn((n, 5), (m, 5)):
            plain = counted(lambda q, k, o=options: reference.info_nce(q, k, 2.0, **o), tensors)
            assert counted(lambda q, k, o=options: vlmkernels.info_nce(q, k, 2.0, **o), tensors) == plain
            plain = sum(counted(lambda q, k: reference.sigmoid_loss(q, k, 2.0, 0.0), tensors))
            # formed in the forward, where it is known how the backward ends
            assert sum(counted(lambda q, k: vlmkernels.sigmoid_loss(q, k, 2.0, 0.0), tensors)) == plain
            target = torch.zeros(n, dtype=torch.int64)
            plain = sum(counted(lambda h, w, t=target: reference.linear_cross_entropy(h, w, t), tensors))
            ours = sum(counted(lambda h, w, t=target: vlmkernels.linear_cross_entropy(h, w, t), tensors))
            assert ours == plain


@pytest.mark.parametrize("teacher", ["hidden", "topk", "unread"])
def test_an_offline_teacher_and_one_that_is_not_read_cost_no_products(teacher):
    taught = {"teacher_hidden": torch.ones(6, 3), "teacher_weight": torch.ones(7, 3)}
    if teacher == "topk":
        taught = {"teacher_topk": (torch.zeros(6, 1), torch.zeros(6, 1, dtype=torch.int64))}
    options = {
        "target": torch.zeros(6, dtype=torch.int64),
        "hard_weight": 1.0 if teacher == "unread" else 0.5,
    }
    for tensors in trained_in_turn((6, 5), (7, 5)):
        plain = sum(counted(partial(reference.linear_distillation, **taught, **options), tensors))
        assert sum(counted(partial(vlmkernels.linear_distillation, **taught, **options), tensors)) == plain
        products = 1 + sum(x.requires_grad for x in tensors)
        assert plain == 2 * 6 * 7 * (5 * products + (3 if teacher == "hidden" else 0))


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_attention_counts_as_scaled_dot_product_attention_of_all_keys(kv_heads):
    query, key, value = (2, 4, 5, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 3)
    start, end = intervals.causal(5)
    tensors = [torch.randn(shape, requires_grad=True) for shape in (query, key, value)]
    got = counted(lambda q, k, v: vlmkernels.interval_attention(q, k, v, start, end), tensors)
    shapes = query, (2, 4, 7, 8), (2, 4, 7, 3)  # every release of torch counts these, and shared heads alike
    assert got == (sdpa_flop_count(*shapes), sdpa_backward_flop_count((2, 4, 5, 3), *shapes))
    frozen = [tensors[0].detach(), tensors[1].detach(), tensors[2]]
    products = 2 * 2 * 4 * 5 * 7
    got = counted(lambda q, k, v: vlmkernels.interval_attention(q, k, v, start, end), frozen)
    assert got == (products * (8 + 3), products * (8 + 3))


def test_perceiver_attention_counts_the_keys_of_both_sources():
    query, media, latents = (2, 4, 3, 8), (2, 4, 7, 8), (2, 4, 3, 8)
    both = (2, 4, 10, 8)
    tensors = [torch.randn(s, requires_grad=True) for s in (query, media, media, latents, latents)]
    got = counted(vlmkernels.perceiver_attention, tensors)
    assert got == (sdpa_flop_count(query, both, both), sdpa_backward_flop_count(query, query, both, both))


def test_retrieval_counts_the_similarities_once():
    query, key = torch.randn(6, 5), torch.randn(7, 5)
    calls = (
        lambda: vlmkernels.topk_similarity(query, key, 2, both=True),
        lambda: vlmkernels.retrieval_ranks(query, key),
        lambda: vlmkernels.mine_hard_negatives(query, key, 2),
        lambda: vlmkernels.relative_representation(query, key, k=2),
    )
    for call in calls:
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 2 * 6 * 7 * 5


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_contrastive_search_counts_the_cosines_that_it_needs(alpha):
    hidden, context = torch.randn(2, 3, 5), torch.randn(2, 7, 5)
    prob, similarity = torch.rand(2, 3), torch.randn(2, 3)
    for library in (vlmkernels, reference):
        with FlopCounterMode(display=False) as counter:
            library.contrastive_search_score(prob, hidden, context, similarity, alpha=alpha, beta=1.0)
        assert counter.get_total_flops() == (2 * 2 * 3 * 7 * 5 if alpha else 0)


def test_sparse_products_count_nothing():
    rep = vlmkernels.relative_representation(torch.randn(6, 5), torch.randn(7, 5), k=2)
    for library in (vlmkernels, reference):
        with FlopCounterMode(display=False) as counter:
            library.relative_similarity(rep, rep)
        assert counter.get_total_flops() == 0


def test_boxes_count_nothing():
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3]])
    for library in (vlmkernels, reference):
        features = torch.randn(1, 2, 5, 6, requires_grad=True)
        assert counted(lambda x, of=library: of.nms(boxes, x, 0.5), [torch.rand(2)]) == (0, 0)
        out = counted(vlmkernels.roi_align, [features, [boxes], 2])
    assert out == (0, 0)


def test_every_op_has_a_formula():
    declared = {name for name in dir(torch.ops.vlmkernels) if not name.startswith("_")} | set(_library.OPS)
    packets = [getattr(torch.ops.vlmkernels, name) for name in declared]
    packets = [packet for packet in packets if isinstance(packet, torch._ops.OpOverloadPacket)]
    assert len(packets) >= 18
    assert [packet for packet in packets if packet not in flop_registry] == []


@pytest.mark.parametrize(
    "name", ["clip", "align", "simvlm", "virtex", "flamingo", "decoder", "resampler", "block"]
)
def test_every_linear_layer_of_a_model_has_its_line(name):
    case = build(name)
    with FlopCounterMode(display=False) as counter:
        case.run()
    counts = {module: sum(ops.values()) for module, ops in counter.get_flop_counts().items()}
    root = type(case.model).__name__
    linears = [path for path, module in case.model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert [path for path in linears if not counts.get(f"{root}.{path}")] == []
    assert counts["Global"] == counts[root]
