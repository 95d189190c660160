"""Valid arguments of every raw op, `torch.ops.vlmkernels.*`, drawn in order by a function of its name."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmkernels.reference._dense import ACTIVATIONS
from vlmkernels.reference.contrastive_distillation import DIVERGENCES

from . import raw_detection, raw_retrieval
from .children import Wrong
from .damage import damaged, shown
from .draw import Draw, targets, work
from .memory import guarded

ops = torch.ops.vlmkernels
ARGUMENTS: dict[str, Callable[[Draw], list]] = {**raw_detection.ARGUMENTS, **raw_retrieval.ARGUMENTS}


def arguments(make: Callable[[Draw], list]) -> Callable[[Draw], list]:
    ARGUMENTS[make.__name__] = make
    return make


@arguments
def gated_residual(draw: Draw) -> list:
    lead, d = draw.lead(), draw.size()
    x, y = draw.floats(*lead, d), draw.floats(*lead, d)
    return [x, y, draw.gate(d), draw.maybe(draw.mask(*lead))]


@arguments
def gated_residual_bwd(draw: Draw) -> list:
    return [*gated_residual(draw), draw.needs(2)]


@arguments
def gated_linear_residual(draw: Draw) -> list:
    rows, d, k = (*draw.lead(), draw.size()), draw.size(), draw.size()
    h, weight = (draw.floats(*shape) for shape in ((*rows, k), (d, k)))
    return [draw.floats(*rows, d), h, weight.to(h.dtype), draw.gate(d), draw.maybe(draw.mask(*rows))]


@arguments
def gated_linear_residual_bwd(draw: Draw) -> list:
    x, h, weight, gate, mask = gated_linear_residual(draw)
    return [x, h, weight, gate, mask, draw.needs(3)]


def layer(draw: Draw, dtype: torch.dtype, outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
    return draw.floats(outputs, inputs, dtype=dtype), draw.maybe(draw.floats(outputs, dtype=dtype))


def layer_input(draw: Draw) -> Tensor:
    return draw.floats(*draw.lead(), draw.size(), draw.size())


def residual(draw: Draw, x: Tensor, outputs: int) -> Tensor | None:
    return draw.maybe(draw.floats(*x.shape[:-1], outputs))


@arguments
def linear(draw: Draw) -> list:
    x, o = layer_input(draw), draw.size()
    weight, bias = layer(draw, x.dtype, o, x.shape[-1])
    return [x, weight, bias, residual(draw, x, o), draw.choice(ACTIVATIONS), draw.flag()]


@arguments
def linear_bwd(draw: Draw) -> list:
    x, weight, bias, _, activation, _ = linear(draw)
    dout = draw.floats(*x.shape[:-1], len(weight))
    y = draw.maybe(draw.floats(*dout.shape, dtype=x.dtype))
    needs = draw.needs(3)
    again = activation != "none" and y is None
    return [dout, x if needs[1] or again else draw.maybe(x), weight, bias, y, activation, needs]


@arguments
def mlp(draw: Draw) -> list:
    x, hidden, o = layer_input(draw), draw.size(), draw.size()
    first, second = layer(draw, x.dtype, hidden, x.shape[-1]), layer(draw, x.dtype, o, hidden)
    return [x, *first, *second, residual(draw, x, o), draw.choice(ACTIVATIONS), draw.flag()]


@arguments
def mlp_bwd(draw: Draw) -> list:
    x, w1, b1, w2, _, _, activation, _ = mlp(draw)
    dout = draw.floats(*x.shape[:-1], len(w2))
    y = draw.maybe(draw.floats(*x.shape[:-1], len(w1), dtype=x.dtype))
    needs = draw.needs(5)
    return [dout, x if needs[1] or y is None else draw.maybe(x), w1, b1, w2, y, activation, needs]


@arguments
def gated_mlp(draw: Draw) -> list:
    x, hidden, o = layer_input(draw), draw.size(), draw.size()
    (w_gate, b_gate), (w_up, b_up) = (layer(draw, x.dtype, hidden, x.shape[-1]) for _ in range(2))
    w_down, b_down = layer(draw, x.dtype, o, hidden)
    options = residual(draw, x, o), draw.choice(ACTIVATIONS), draw.flag()
    return [x, w_gate, w_up, w_down, b_gate, b_up, b_down, *options]


@arguments
def gated_mlp_bwd(draw: Draw) -> list:
    x, w_gate, w_up, w_down, b_gate, b_up, _, _, activation, _ = gated_mlp(draw)
    dout = draw.floats(*x.shape[:-1], len(w_down))
    kept = [draw.floats(*x.shape[:-1], len(w_up), dtype=x.dtype) for _ in range(2)]
    kept = kept if draw.flag() else [None, None]
    needs = draw.needs(7)
    x = x if needs[1] or needs[2] or kept[0] is None else draw.maybe(x)
    return [dout, x, w_gate, w_up, w_down, b_gate, b_up, *kept, activation, needs]


def heads(draw: Draw) -> tuple[int, int, int]:
    kv_heads = draw.choice((1, 1, 2, 3))
    return draw.small(), kv_heads * draw.choice((1, 1, 2)), kv_heads


@arguments
def interval_attention(draw: Draw) -> list:
    (b, h, hkv), tq, tk, dtype = heads(draw), draw.size(), draw.size(), draw.dtype()
    dh, dv = draw.size(), draw.size()
    shapes = (b, h, tq, dh), (b, hkv, tk, dh), (b, hkv, tk, dv)
    bounds = draw.choice(((tq,), (b, tq)))
    int_type = draw.choice((torch.int32, torch.int64))
    start, end = (torch.randint(-3, tk + 4, bounds, dtype=int_type) for _ in range(2))
    rows, cols = draw.choice(((0, 0), (1, 1), (2, 3), (5, 4)))
    bias = draw.floats(h, 2 * rows - 1, 2 * cols - 1) if rows else None
    scale = draw.choice((1.0, 0.125, -2.0, 0.0))
    causal = draw.choice((None, None, False, True))
    ends = (draw.maybe(torch.tensor([0, tokens], dtype=torch.int32)) for tokens in (b * tq, b * tk))
    tensors = (draw.floats(*shape, dtype=dtype) for shape in shapes)
    return [*tensors, start, end, scale, bias, rows, cols, causal, *ends]


@arguments
def interval_attention_bwd(draw: Draw) -> list:
    *inputs, scale, bias, rows, cols, causal, query_ends, key_ends = interval_attention(draw)
    options = scale, bias, rows, cols, causal, query_ends, key_ends
    out, lse = ops.interval_attention(*inputs, *options)
    dout, dlse = torch.randn(out.shape).to(out.dtype), draw.maybe(torch.randn(lse.shape).to(lse.dtype))
    needs = [*draw.needs(3), bias is not None and draw.flag()]
    return [dout, dlse, *inputs, out, lse, *options, needs]


@arguments
def perceiver_attention(draw: Draw) -> list:
    (b, h, hkv), dtype, dh, dv = heads(draw), draw.dtype(), draw.size(), draw.size()
    media, latents = draw.size(), draw.size()
    shapes = [(b, h, draw.size(), dh)]
    shapes += [(b, hkv, count, d) for count in (media, latents) for d in (dh, dv)]
    lengths = draw.ids(b, media + 3, draw.choice((torch.int32, torch.int64)))
    return [*(draw.floats(*shape, dtype=dtype) for shape in shapes), draw.maybe(lengths), 0.125]


@arguments
def perceiver_attention_bwd(draw: Draw) -> list:
    *inputs, scale = perceiver_attention(draw)
    out, lse = ops.perceiver_attention(*inputs, scale)
    return [torch.randn(out.shape).to(out.dtype), *inputs, out, lse, scale, draw.needs(5)]


def features(draw: Draw, *, zero: bool = True) -> tuple[Tensor, Tensor]:
    n, d, dtype = draw.size(zero=zero), draw.size(zero=zero), draw.dtype()
    return draw.floats(n, d, dtype=dtype), draw.floats(n, d, dtype=dtype)


def norms(draw: Draw, query: Tensor, key: Tensor) -> list[Tensor | None]:
    if draw.flag():
        return [None, None]
    return [torch.rand(len(x), dtype=work(x.dtype)) + 0.5 for x in (query, key)]


@arguments
def small_loss(draw: Draw) -> list:
    query, key = features(draw, zero=False)
    symmetric = draw.flag()
    key = key if symmetric else torch.cat([key, key[: draw.small()]])
    bias = None if symmetric else draw.maybe(draw.scalar())
    return [query, key, draw.scalar(), bias, symmetric, 0.1, draw.flag(), *draw.needs(3)]


@arguments
def small_distillation(draw: Draw) -> list:
    query, key = features(draw, zero=False)
    key = torch.cat([key, key[: draw.small()]])
    width = draw.size(zero=False)
    teacher = [draw.floats(len(x), width, dtype=query.dtype) for x in (query, key)]
    flags = [draw.flag() for _ in range(3)]
    return [query, key, draw.scalar(), *teacher, draw.scalar(), *flags, *draw.needs(3)]


@arguments
def small_loss_bwd(draw: Draw) -> list:
    if draw.flag():
        inputs = small_loss(draw)
        bias, normalize, formed = inputs[3], inputs[6], ops.small_loss(*inputs)[1:]
    else:
        inputs = small_distillation(draw)
        bias, normalize, formed = None, False, ops.small_distillation(*inputs)[1:]
    need_query, need_key, need_scalars = inputs[-3:]
    needs = [need_query, need_key, need_scalars, need_scalars and bias is not None]
    dloss = draw.floats(dtype=work(inputs[0].dtype))
    return [dloss, *inputs[:3], bias, *formed, normalize, needs]


@arguments
def info_nce(draw: Draw) -> list:
    query, key = features(draw)
    positives, key_ids = targets(draw, query, key)
    symmetric = draw.flag() and (positives is None or key_ids is not None)
    weight = draw.maybe(torch.rand(len(query)))
    reduction = draw.choice(("mean", "sum", "none"))
    options = symmetric, draw.choice((0.0, 0.1)), draw.flag(), reduction, draw.choice((0, 2**20))
    return [query, key, draw.scalar(), positives, key_ids, weight, *options]


@arguments
def info_nce_bwd(draw: Draw) -> list:
    inputs = info_nce(draw)
    tensors, options = inputs[:6], inputs[6:]
    loss, *stats = ops.info_nce(*inputs)
    return [torch.randn(loss.shape).to(loss.dtype), *tensors, *stats, *options, draw.needs(3)]


@arguments
def info_nce_stats(draw: Draw) -> list:
    query, key = features(draw, zero=False)
    key = torch.cat([key, key[: draw.small()]])
    index = torch.where(torch.rand(len(query)) < 0.8, draw.ids(len(query), len(key)), -1)
    store = draw.choice((0, 128 * 256 * (4 if query.dtype == torch.float16 else query.itemsize) + 64, 2**18))
    memory = store, draw.choice((0, 2**18))
    return [query, key, draw.scalar(), *norms(draw, query, key), index, draw.flag(), *memory]


@arguments
def info_nce_grads(draw: Draw) -> list:
    inputs = info_nce_stats(draw)
    query, key, scale, a, b, index, _, _, workspace_bytes = inputs
    row_max, row_sum, _, _, col_max, col_sum, _, store = ops.info_nce_stats(*inputs)
    extra = [draw.maybe(draw.floats(*x.shape, dtype=work(x.dtype))) for x in (query, key)]
    coefficients = [torch.rand_like(x) for x in (row_max, col_max, row_max)]
    stats = [row_max, row_sum.log(), col_max, col_sum.log(), *coefficients]
    return [query, key, scale, a, b, index, *stats, *extra, store, workspace_bytes, draw.flag(), draw.flag()]


@arguments
def contrastive_distillation(draw: Draw) -> list:
    query, key = features(draw)
    symmetric, reduction = draw.flag(), draw.choice(("mean", "sum", "none"))
    if not symmetric or reduction != "none":
        key = torch.cat([key, key[: draw.small()]])
    options = symmetric, draw.choice(DIVERGENCES), reduction, draw.choice((0, 2**20))
    return [query, key, draw.scalar(), *teacher(draw, query, key), *options]


def teacher(draw: Draw, query: Tensor, key: Tensor, *, same: bool = False) -> list[Tensor]:
    d, dtype = draw.size(zero=not same), query.dtype if same else draw.dtype()
    return [*(draw.floats(len(x), d, dtype=dtype) for x in (query, key)), draw.scalar()]


@arguments
def contrastive_distillation_bwd(draw: Draw) -> list:
    inputs = contrastive_distillation(draw)
    loss, *stats = ops.contrastive_distillation(*inputs)
    dloss = torch.randn(loss.shape).to(loss.dtype)
    return [dloss, *inputs[:6], *stats, *inputs[6:], draw.needs(3)]


@arguments
def contrastive_distillation_stats(draw: Draw) -> list:
    query, key = features(draw, zero=False)
    key = torch.cat([key, key[: draw.small()]])
    store = draw.choice((0, 2 * 128 * 256 * work(query.dtype).itemsize, 2**20))
    tensors = [query, key, draw.scalar(), *teacher(draw, query, key, same=True)]
    return [*tensors, draw.flag(), draw.flag(), store]


@arguments
def contrastive_distillation_grads(draw: Draw) -> list:
    inputs = contrastive_distillation_stats(draw)
    _, rows, _, cols, store = ops.contrastive_distillation_stats(*inputs)
    coefficients = [torch.rand_like(x[0]) for x in (rows, cols)]
    memory = draw.choice((0, 2**18))
    return [*inputs[:6], rows, cols, *coefficients, store, memory, draw.flag(), draw.flag()]


@arguments
def sigmoid_loss(draw: Draw) -> list:
    query, key = features(draw)
    options = draw.flag(), draw.choice(("mean", "sum", "none"))
    needs = draw.needs(3) if options[1] != "none" else [False] * 3
    return [query, key, draw.scalar(), draw.scalar(), *targets(draw, query, key), *options, *needs]


@arguments
def sigmoid_loss_bwd(draw: Draw) -> list:
    inputs = sigmoid_loss(draw)[:-3]
    reduction = inputs[-1]
    dloss = draw.floats(*((len(inputs[0]),) if reduction == "none" else ()), dtype=work(inputs[0].dtype))
    return [dloss, *inputs, draw.needs(4)]


@arguments
def sigmoid_sweep(draw: Draw) -> list:
    query, key = features(draw, zero=False)
    if draw.flag():
        form: list[Any] = [None, draw.ids(len(query), 5), draw.ids(len(key), 5)]
    else:
        form = [draw.ids(len(query), len(key)), None, None]
    coefficients = torch.rand(len(query), dtype=work(query.dtype))
    scalars = [draw.scalar(), draw.scalar()]
    return [query, key, *scalars, *norms(draw, query, key), *form, coefficients, *draw.needs(4)]


def hidden(draw: Draw, *, ignored: bool, zero: bool) -> list:
    """hidden, weight, target, bias and column_scale."""
    n, v, d = draw.size(), draw.size(zero=zero), draw.size(zero=zero)
    x = draw.floats(n, d)
    target = draw.ids(n, v) if v else torch.full((n,), -100)
    if ignored:
        target = torch.where(torch.rand(n) < 0.7, target, -100)
    bias = draw.maybe(draw.floats(v, dtype=x.dtype))
    return [x, draw.floats(v, d, dtype=x.dtype), target, bias, draw.maybe(draw.floats(v))]


@arguments
def linear_cross_entropy(draw: Draw) -> list:
    tensors = hidden(draw, ignored=True, zero=True)
    reduction = draw.choice(("mean", "sum", "none"))
    needs = draw.needs(3) if reduction != "none" else [False] * 3
    return [*tensors, -100, draw.choice((0.0, 0.1)), reduction, *needs]


@arguments
def linear_cross_entropy_bwd(draw: Draw) -> list:
    inputs = linear_cross_entropy(draw)[:-3]
    dloss = draw.floats(*(inputs[2].shape if inputs[-1] == "none" else ()), dtype=work(inputs[0].dtype))
    return [dloss, *inputs, draw.needs(3)]


@arguments
def linear_cross_entropy_sweep(draw: Draw) -> list:
    tensors = hidden(draw, ignored=False, zero=False)
    coefficients = torch.rand(len(tensors[0]), dtype=work(tensors[0].dtype))
    return [*tensors, coefficients, draw.choice((0.0, 0.1)), *draw.needs(3)]


def taught(draw: Draw, *, ignored: bool, zero: bool, least: float) -> list:
    """The tensors of linear_distillation, and its options; a hard_weight of 1 needs no teacher."""
    student, weight, target, bias, _ = hidden(draw, ignored=ignored, zero=zero)
    (n, _), (v, _) = student.shape, weight.shape
    target = draw.maybe(target)
    hard_weight = 0.0 if target is None else draw.choice((0.0, 0.5, 1.0))
    layer: list[Tensor | None] = [None] * 3
    topk: list[Tensor | None] = [None] * 2
    divergences: tuple[str, ...] = ("forward_kl", "jsd")
    if hard_weight < least and draw.flag():
        k = draw.randrange(v + 1)
        indices = torch.rand(n, v).argsort(1)[:, :k]
        topk = [torch.rand(n, k, dtype=work(student.dtype)).log() - 3, indices]
    elif hard_weight < least:
        d, dtype = draw.size(zero=zero), draw.dtype()
        dtype = student.dtype if not zero and torch.float64 in (dtype, student.dtype) else dtype
        layer = [draw.floats(*shape, dtype=dtype) for shape in ((n, d), (v, d), (v,))]
        layer[2], divergences = draw.maybe(layer[2]), (*divergences, "reverse_kl")
    tensors = [student, weight, *layer[:2], bias, layer[2], *topk, target]
    return [*tensors, draw.choice((1.0, 3.0)), draw.choice(divergences), 0.3, hard_weight]


@arguments
def linear_distillation(draw: Draw) -> list:
    inputs = taught(draw, ignored=True, zero=True, least=2.0)
    reduction = draw.choice(("batchmean", "mean", "sum", "none"))
    needs = draw.needs(3) if reduction != "none" else [False] * 3
    return [*inputs, -100, reduction, *needs]


@arguments
def linear_distillation_bwd(draw: Draw) -> list:
    inputs = linear_distillation(draw)[:-3]
    dloss = draw.floats(*((len(inputs[0]),) if inputs[-1] == "none" else ()), dtype=work(inputs[0].dtype))
    return [dloss, *inputs, draw.needs(3)]


@arguments
def linear_distillation_sweep(draw: Draw) -> list:
    inputs = taught(draw, ignored=False, zero=False, least=1.0)
    if inputs[7] is not None:
        inputs[7] = inputs[7].sort(1).values
    coefficients = torch.rand(len(inputs[0]), dtype=work(inputs[0].dtype))
    return [*inputs[:9], coefficients, *inputs[9:], *draw.needs(3)]


@arguments
def distillation(draw: Draw) -> list:
    n, v = draw.size(), draw.size()
    student = draw.floats(n, v)
    teacher = draw.floats(n, v, dtype=draw.choice((student.dtype, draw.dtype())))
    target = torch.where(torch.rand(n) < 0.7, draw.ids(n, v), -100) if v else torch.full((n,), -100)
    target = draw.maybe(target)
    hard_weight = 0.0 if target is None else draw.choice((0.0, 0.5, 1.0))
    temperature, divergence = draw.choice((1.0, 3.0)), draw.choice(("forward_kl", "reverse_kl", "jsd"))
    reduction = draw.choice(("batchmean", "mean", "sum", "none"))
    options = [temperature, divergence, 0.3, hard_weight, -100, reduction]
    return [student, teacher, target, *options, draw.flag()]


@arguments
def distillation_bwd(draw: Draw) -> list:
    inputs = distillation(draw)
    loss, stats, _ = ops.distillation(*inputs)
    return [torch.randn(loss.shape).to(loss.dtype), *inputs[:3], stats, *inputs[3:-1], draw.needs(1)]


@arguments
def embedding_distillation(draw: Draw) -> list:
    n, d = draw.size(), draw.size()
    student = draw.floats(n, d)
    teacher = draw.floats(n, d, dtype=draw.choice((student.dtype, draw.dtype())))
    weight = draw.maybe(torch.rand(n, dtype=work(student.dtype)))
    distance = draw.choice(("l1", "l2", "cosine", "smooth_l1"))
    reduction = draw.choice(("mean", "sum", "none"))
    return [student, teacher, weight, distance, draw.flag(), reduction, draw.flag()]


@arguments
def embedding_distillation_bwd(draw: Draw) -> list:
    inputs = embedding_distillation(draw)
    loss, _ = ops.embedding_distillation(*inputs)
    return [torch.randn(loss.shape).to(loss.dtype), *inputs[:-1], draw.needs(1)]


@arguments
def srau(draw: Draw) -> list:
    shape, levels = (*draw.lead(), draw.size()), draw.choice(((), (1,), (2,), (3,)))
    visual, logits = (draw.floats(*levels, *shape) for _ in range(2))
    mask, tau = draw.maybe(draw.mask(*shape[:-1])), draw.choice((0.0, 0.2, 0.5))
    return [draw.floats(*shape), visual, logits, mask, tau, draw.choice(("code", "paper"))]


@arguments
def srau_bwd(draw: Draw) -> list:
    inputs = srau(draw)
    return [draw.floats(*inputs[0].shape), *inputs, draw.needs(3)]


@functools.cache
def names() -> list[str]:
    """The ops that have a kernel for CPU tensors here."""
    every = (name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "vlmkernels::" in name)
    known = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    return sorted(name for name in every if known(f"vlmkernels::{name}", "CPU"))


def drawn(seed: int) -> tuple[str, list, list[int]]:
    """An op, its arguments, and which of them are damaged."""
    draw = Draw(seed)
    name = draw.choice(names())
    values = ARGUMENTS[name](draw)
    which = sorted(draw.sample(range(len(values)), min(len(values), draw.choice((0, 1, 1, 1, 2, 3)))))
    for i in which:
        values[i] = damaged(draw, values[i], values)
    return name, guarded(values, at_end=draw.flag()), which


def call(seed: int) -> bool:
    name, values, which = drawn(seed)
    try:
        getattr(ops, name)(*values)
    except Exception as error:
        if not which:
            raise Wrong(f"{name} refuses valid arguments: {error}")
        if "INTERNAL ASSERT" in str(error):
            raise Wrong(f"{name}: {error}")
        return False
    return True


def told(seed: int) -> str:
    """The call as text."""
    name, values, which = drawn(seed)
    arguments = getattr(ops, name).default._schema.arguments
    lines = [
        f"  {argument.name} = {shown(value)}{' (damaged)' if i in which else ''}"
        for i, (argument, value) in enumerate(zip(arguments, values, strict=True))
    ]
    return "\n".join([f"torch.ops.vlmkernels.{name}", *lines])


@arguments
def scale_grads(draw: Draw) -> list:
    return [draw.scalar(), *(draw.maybe(draw.floats(draw.size(), draw.size())) for _ in range(4))]
