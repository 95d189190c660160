"""How many kernels a training step of an op launches: the host takes microseconds for each."""

import pytest
import torch

pytest.importorskip("triton")

import vlmkernels
from benchmarks.gpu import trace
from vlmkernels import (
    _providers,
    contrastive_distillation,
    distillation,
    embedding_distillation,
    info_nce,
    interval_attention,
    intervals,
    linear_distillation,
    perceiver_attention,
    reference,
    sigmoid_loss,
)
from vlmkernels.reference._dense import ACTIVATIONS

from .workloads import BF16, FP16, FP32, heads, meta

TOKENS = 1024
ROWS = 4096
FORWARD, *BACKWARD = [
    "_attention._forward", "_attention_bwd._query_grads", "_attention_bwd._query_ranges",
    "_attention_bwd._key_grads",
]  # fmt: skip


def launched(call, tensors, *rest) -> list[str]:
    """The kernels of a forward and of the backward to those tensors that require a gradient, torch's too."""
    forward, backward = launched_each_way(call, tensors, *rest)
    return forward + backward


def launched_each_way(call, tensors, *rest) -> tuple[list[str], list[str]]:
    step = trace.Pass()
    with trace.recording(step, "sm_90"):
        out = call(*tensors, *rest)
        forward = len(step.steps)
        out = out if isinstance(out, tuple) else (out,)
        wanted = [x for x in tensors if x.requires_grad]
        torch.autograd.grad(out, wanted, [x.detach() for x in out])
    names = [found.name for found in step.steps]
    return names[:forward], names[forward:]


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


@pytest.mark.parametrize("mask", ["full", "causal", "padding"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_torch_takes_the_place_of_a_kernel(mask, deterministic, monkeypatch):
    """SDPA, as it would be chosen on a card; its backward only if that is in order."""
    torch.use_deterministic_algorithms(deterministic)
    provider = _providers.SdpaFlash()
    monkeypatch.setattr(_providers, "ALLOWED", ("sdpa",))
    monkeypatch.setattr(_providers, "sdpa_backend", lambda call: provider.backend.value)
    kind = provider.title, BF16, 72, torch.device("meta")
    monkeypatch.setattr(_providers, "_TRIED", {kind: ""})
    whole = {**BOUNDS, "full": intervals.full(TOKENS, device="meta")}[mask]
    tensors = [attended() for _ in range(3)]
    names = launched(lambda *x: interval_attention(*x), tensors, whole)
    flash = "aten::_scaled_dot_product_flash_attention"
    if mask == "padding":
        assert names == [FORWARD, BACKWARD[0], BACKWARD[2]]
    else:
        assert names == [flash, *([f"{flash}_backward"] if deterministic else BACKWARD)]


@pytest.mark.parametrize("mask", ["packed", "images"])
def test_flash_attn_takes_the_place_of_both_and_nothing_is_read_on_the_host(mask, monkeypatch):
    """Meta tensors have nothing to read: neither intervals nor the bounds of segments."""
    flash = _providers.Flash2

    def forward(self, call, q, k, v):
        return q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=FP32)

    kind = flash.title, BF16, 72, torch.device("meta")
    for owner, name, value in (
        (_providers, "ALLOWED", ("flash",)), (_providers, "SEGMENTS", True),
        (_providers, "_TRIED", {kind: ""}), (_providers, "_is_installed", lambda name: name == flash.module),
        (flash, "call_forward", forward), (flash, "call_backward", lambda *_: None),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, value)

    def call(*tensors):
        if mask == "packed":
            tensors = [x[:1] for x in tensors]
            whole = intervals.packed(meta(9, dtype=torch.int32), TOKENS)
        else:
            whole = intervals.media(meta(8, TOKENS, dtype=torch.int32), TOKENS // 8, 8)
        built.extend(whole.ends)
        return interval_attention(*tensors, whole)

    built = []
    names = launched(call, [attended() for _ in range(3)])
    assert [x.device.type for x in built] == ["meta"] * 2
    assert all(name.startswith("aten::") for name in names), names


@pytest.mark.parametrize("needed", [(0, 1, 2, 3), (3,), (1, 2, 3)], ids=str)
def test_a_relative_bias_takes_two_more(needed):
    tensors = [attended(576, grad=i in needed) for i in range(3)]
    tensors.append(meta(16, 47, 47).requires_grad_(3 in needed))
    bounds = intervals.full(576, 576, device="meta")

    def call(query, key, value, bias):
        return interval_attention(query, key, value, *bounds, relative_bias=bias, grid=(24, 24))

    names = launched(call, tensors)
    assert names[2:4] == ["interval_attention._bias_grads", "interval_attention._bias_sums"]
    keys = 2 * (1 in needed)  # with which queries see a block of keys
    assert len(names) == 2 + keys + 2, names


@pytest.mark.parametrize("lengths", [True, False])
def test_perceiver_attention_takes_four(lengths):
    tensors = [attended(tokens) for tokens in (64, TOKENS, TOKENS, 64, 64)]
    media = meta(8, dtype=torch.int32) if lengths else None
    names = launched(lambda *x: perceiver_attention(*x, media_lengths=media), tensors)
    assert len(names) == 4, names


def pairs(dtype=BF16, rows=ROWS):
    return [meta(rows, 512, dtype=dtype).requires_grad_() for _ in range(2)]


def scalars(count):
    return [meta().requires_grad_() for _ in range(count)]


def ids(count=2):
    return tuple(meta(ROWS, dtype=torch.int64) for _ in range(count))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"symmetric": False}, {"reduction": "sum"}, {"label_smoothing": 0.1}], ids=str
)
def test_info_nce_takes_three_and_four(options, dtype):
    forward, backward = launched_each_way(lambda *x: info_nce(*x, **options), [*pairs(dtype), *scalars(1)])
    assert [name.rpartition(".")[2] for name in forward] == ["_stats", "_losses", "_total"]
    assert [name.rpartition(".")[2] for name in backward] == ["_tile_grads", "cuBLAS", "cuBLAS", "_finish"]


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_info_nce_of_few_rows_takes_one_launch_in_the_backward(dtype):
    forward, backward = launched_each_way(info_nce, [*pairs(dtype, 1024), *scalars(1)])
    assert [name.rpartition(".")[2] for name in forward] == ["_stats", "_losses", "_total"]
    assert backward == ["_info_nce_small._grads"]


INFO_NCE = {
    "normalised": ({"normalize": True}, 9),
    "weighted": ({"weight": meta(ROWS)}, 8),
    "each": ({"reduction": "none"}, 8),
    "index": ({"positives": ids()[0], "symmetric": False}, 9),
    "id": ({"positives": ids()}, 8),
    "all": (
        {"positives": ids(), "weight": meta(ROWS), "label_smoothing": 0.1, "normalize": True}, 10,
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", INFO_NCE)
def test_info_nce_with_options(form):
    options, count = INFO_NCE[form]
    names = launched(lambda *x: info_nce(*x, **options), [*pairs(), *scalars(1)])
    assert len(names) == count <= 16, names


SIGMOID_LOSS = {
    "plain": ({}, 5),
    "normalised": ({"normalize": True}, 6),
    "id": ({"positives": ids()}, 5),
    "index": ({"positives": ids()[0]}, 6),
}


@pytest.mark.parametrize("form", SIGMOID_LOSS)
def test_sigmoid_loss(form):
    options, count = SIGMOID_LOSS[form]
    forward, backward = launched_each_way(lambda *x: sigmoid_loss(*x, **options), [*pairs(), *scalars(2)])
    assert len(forward + backward) == count, (forward, backward)
    assert backward == ["_ahead._scale"]


PAIRS = "_sigmoid_loss_small._pairs"
FEW_ROWS = {
    "plain": (1024, {}, BF16, [PAIRS, "sigmoid_loss._finish"], ["_ahead._scale"]),
    "float32": (1024, {}, FP32, [PAIRS, "sigmoid_loss._finish"], ["_ahead._scale"]),
    "float16": (1024, {}, FP16, [PAIRS, "sigmoid_loss._finish"], [PAIRS, "sigmoid_loss._finish"]),
    "each": (1024, {"reduction": "none"}, BF16, [PAIRS], [PAIRS, "sigmoid_loss._finish"]),
    "one tile of rows": (64, {}, BF16, [PAIRS], ["_ahead._scale"]),
    "one tile of rows, float16": (64, {"reduction": "sum"}, FP16, [PAIRS], [PAIRS]),
}


@pytest.mark.parametrize("form", FEW_ROWS)
def test_sigmoid_loss_of_few_rows_takes_one_launch_and_one_for_sums_of_several_tiles(form):
    rows, options, dtype, *expected = FEW_ROWS[form]
    tensors = [*pairs(dtype, rows), *scalars(2)]
    assert list(launched_each_way(lambda *x: sigmoid_loss(*x, **options), tensors)) == expected


def test_sigmoid_loss_in_float16_computes_its_gradients_in_the_backward():
    forward, backward = launched_each_way(sigmoid_loss, [*pairs(FP16), *scalars(2)])
    assert len(forward + backward) == 6, (forward, backward)


def layer(op: str, bias: bool, residual: bool, grad: bool) -> tuple[list, dict]:
    """Arguments and options of a dense layer."""
    shapes = {"linear": [(64, 48)], "mlp": [(64, 48), (48, 64)], "gated_mlp": [(64, 48), (64, 48), (48, 64)]}
    x, *weights = (meta(*shape, dtype=BF16).requires_grad_(grad) for shape in ((32, 48), *shapes[op]))
    biases = [meta(len(weight), dtype=BF16).requires_grad_(grad) if bias else None for weight in weights]
    options = {"residual": meta(32, len(weights[-1]), dtype=BF16).requires_grad_(grad)} if residual else {}
    if op == "gated_mlp":
        names = ("b_gate", "b_up", "b_down")
        return [x, *weights], options | dict(zip(names, biases, strict=True))
    return [x, *(t for pair in zip(weights, biases, strict=True) for t in pair)], options


def steps(op, arguments, options) -> list[str]:
    """Of the forward and, where there are gradients, of the backward."""
    flat = [x for x in (*arguments, *options.values()) if isinstance(x, torch.Tensor) and x.requires_grad]
    step = trace.Pass()
    with trace.recording(step, "sm_90"):
        out = op(*arguments, **options)
        if flat:
            torch.autograd.grad(out, flat, out.detach())
    return [found.name for found in step.steps]


PRODUCTS = {"linear": 3, "mlp": 6, "gated_mlp": 9}


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", PRODUCTS)
def test_a_dense_layer_takes_no_more_than_torch(op, activation, bias, residual):
    """Beside its products one pass each way; the sums of its biases' gradients; the residual."""
    arguments, options = layer(op, bias, residual, grad=True)
    options |= {"activation": activation}
    ours, theirs = (steps(getattr(of, op), arguments, options) for of in (vlmkernels, reference))
    passes = 0 if activation == "none" and op != "gated_mlp" else 2
    added = residual and not (op == "linear" and passes)
    biases = {"linear": 1, "mlp": 2, "gated_mlp": 3}[op] if bias else 0
    assert len(ours) == PRODUCTS[op] + passes + added + biases, ours
    assert len(ours) <= len(theirs), (ours, theirs)


@pytest.mark.parametrize("op", PRODUCTS)
def test_a_dense_layer_without_a_backward_leaves_activations_to_cublas(op):
    count = {"linear": 1, "mlp": 2, "gated_mlp": 4}[op]
    for activation in ("relu", "gelu_tanh"):
        arguments, options = layer(op, True, False, grad=False)
        names = steps(getattr(vlmkernels, op), arguments, options | {"activation": activation})
        assert len(names) == count, names
    for activation in ("gelu", "silu"):
        names = steps(getattr(vlmkernels, op), arguments, options | {"activation": activation})
        assert len(names) == count + (op != "gated_mlp"), names


@pytest.mark.parametrize("elements", [1, 48])
def test_gated_residual_takes_three(elements):
    tensors = [meta(32, 48, dtype=BF16).requires_grad_() for _ in range(2)]
    gate = meta(elements, dtype=BF16).requires_grad_()
    names = launched(vlmkernels.gated_residual, [*tensors, gate])
    assert len(names) == 3, names


def test_srau_takes_two():
    tensors = [meta(*levels, 32, 48, dtype=BF16).requires_grad_() for levels in ((), (3,), (3,))]
    names = launched(lambda *inputs: vlmkernels.srau(*inputs, 0.2), tensors)
    assert len(names) == 2, names


@pytest.mark.parametrize("elements", [1, 48])
@pytest.mark.parametrize("frozen", [False, True])
def test_gated_linear_residual_takes_five(elements, frozen):
    """With the weight's gradient nothing of the size of h is written in float32."""
    x, h, weight = (meta(*shape, dtype=BF16).requires_grad_() for shape in ((32, 48), (32, 64), (48, 64)))
    gate = meta(elements, dtype=BF16).requires_grad_()
    names = launched(vlmkernels.gated_linear_residual, [x, h, weight.requires_grad_(not frozen), gate])
    assert len(names) == (4 if frozen and elements == 1 else 5), names


FEW, CLASSES = 512, 32000


def pair(rows=FEW, width=512):
    """Of the student and of the teacher."""
    return meta(rows, width, dtype=BF16).requires_grad_(), meta(rows, width, dtype=BF16)


@pytest.mark.parametrize(("targets", "count"), [(False, 3), (True, 4)])
def test_distillation(targets, count):
    student, teacher = pair(FEW, CLASSES)
    options = {"target": meta(FEW, dtype=torch.int64), "hard_weight": 0.5} if targets else {}
    names = launched(lambda x: distillation(x, teacher, temperature=2.0, **options), [student])
    assert len(names) == count, names


@pytest.mark.parametrize(("weighted", "count"), [(False, 3), (True, 4)])
def test_embedding_distillation(weighted, count):
    student, teacher = pair()
    weight = meta(FEW) if weighted else None
    names = launched(lambda x: embedding_distillation(x, teacher, weight=weight), [student])
    assert len(names) == count, names


def test_contrastive_distillation_takes_seven():
    (query, taught), (key, taught_key) = pair(), pair()
    scale = meta().requires_grad_()
    teacher = taught, taught_key, meta()
    names = launched(lambda *x: contrastive_distillation(*x, *teacher), [query, key, scale])
    assert len(names) == 7, names


@pytest.mark.parametrize(
    ("k", "targets", "count"), [(None, False, 9), (None, True, 12), (64, False, 9), (64, True, 11)]
)
def test_linear_distillation_of_a_chunk(k, targets, count):
    """Products, kernels of rows and sums, and one product with the incoming gradient."""
    (hidden, taught), (weight, teacher_weight) = pair(), pair(CLASSES)
    options = {"target": meta(FEW, dtype=torch.int64), "hard_weight": 0.5} if targets else {}
    teacher = {"teacher_hidden": taught, "teacher_weight": teacher_weight}
    if k is not None:
        teacher = {"teacher_topk": (meta(FEW, k), meta(FEW, k, dtype=torch.int64))}
    names = launched(lambda *x: linear_distillation(*x, **teacher, **options), [hidden, weight])
    assert len(names) == count, names
    rows = 1 if k is not None else 2
    assert sum("distillation." in name for name in names) == rows, names
    assert names.count("cuBLAS") == 3 + (k is None), names
