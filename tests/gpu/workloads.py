"""The launches of real models: every Triton launcher at the sizes, types and variants it meets there.

Inputs are meta tensors: nothing is computed, and the launchers choose, allocate and specialise as on a GPU.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from vlmkernels.triton import _ahead as ahead
from vlmkernels.triton import _contrastive_distillation_bwd as distilled_bwd
from vlmkernels.triton import _info_nce_bwd as nce_bwd
from vlmkernels.triton import contrastive_distillation as distilled
from vlmkernels.triton import contrastive_search_score as decoding
from vlmkernels.triton import distillation as distil
from vlmkernels.triton import embedding_distillation as features_distil
from vlmkernels.triton import gated_linear_residual as linear
from vlmkernels.triton import gated_mlp as gated_layers
from vlmkernels.triton import gated_residual as gated
from vlmkernels.triton import info_nce as nce
from vlmkernels.triton import interval_attention as interval
from vlmkernels.triton import linear as one_layer
from vlmkernels.triton import linear_cross_entropy as cross
from vlmkernels.triton import linear_distillation as linear_distil
from vlmkernels.triton import mine_hard_negatives as mining
from vlmkernels.triton import mlp as two_layers
from vlmkernels.triton import nms as suppression
from vlmkernels.triton import perceiver_attention as perceiver
from vlmkernels.triton import relative_representation as powers
from vlmkernels.triton import relative_similarity as sparse
from vlmkernels.triton import retrieval_ranks as ranking
from vlmkernels.triton import roi_align as pooling
from vlmkernels.triton import sigmoid_loss, srau
from vlmkernels.triton import topk_similarity as topk

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WORKLOADS: dict[str, Callable[[], None]] = {}


def meta(*shape, dtype=FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def features(n, d, dtype, stride=None) -> Tensor:
    return meta(n, stride or d, dtype=dtype)[:, :d]


@contextlib.contextmanager
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def targets(n, m, form) -> tuple[Tensor | None, Tensor | None]:
    positives, key_ids = (meta(size, dtype=torch.int64) for size in (n, m))
    return {"pairs": (None, None), "index": (positives, None), "ids": (positives, key_ids)}[form]


def info_nce(
    n, m, d, dtype, *, normalize=False, symmetric=True, form="pairs", smoothing=0.0, weighted=False,
    reduction="mean", needs=(True, True, True), **kwargs,
):  # fmt: skip
    inputs = (features(n, d, dtype, **kwargs), features(m, d, dtype, **kwargs), meta(), *targets(n, m, form))
    weight = meta(n) if weighted else None
    options = (symmetric, smoothing, normalize, reduction, 1 << 28)
    loss, *stats = nce.info_nce(*inputs, weight, *options)
    nce_bwd.info_nce_bwd(loss, *inputs, weight, *stats, *options, needs)


def sigmoid(
    n, m, d, dtype, *, normalize=False, form="pairs", reduction="mean", loss=True, grads=True, scalars=True
):
    inputs = (features(n, d, dtype), features(m, d, dtype), meta(), meta(), *targets(n, m, form))
    options, scalars = (normalize, reduction), grads and scalars
    if loss:
        sigmoid_loss.sigmoid_loss(*inputs, *options, grads, grads, scalars)
    else:
        dloss = meta(*(n,) if reduction == "none" else ())
        sigmoid_loss.sigmoid_loss_bwd(dloss, *inputs, *options, (grads, grads, scalars, scalars))


def scaled(*grads: Tensor):
    ahead.scale_grads(meta(), *grads)


def distillation_of_pairs(
    n,
    m,
    d,
    e,
    dtype,
    *,
    symmetric=True,
    divergence="kl",
    reduction="mean",
    needs=(True, True, True),
    grads=True,
):
    options = (symmetric, divergence, reduction, 1 << 28)
    student, teacher = ((features(n, width, dtype), features(m, width, dtype), meta()) for width in (d, e))
    loss, *stats = distilled.contrastive_distillation(*student, *teacher, *options)
    if grads:
        distilled_bwd.contrastive_distillation_bwd(loss, *student, *teacher, *stats, *options, needs)


def cross_entropy(n, d, v, dtype, *, options=False, smoothing=0.0, grads=True):
    vectors = [meta(v, dtype=dtype), meta(v)] if options else [None, None]
    h, w = features(n, d, dtype), features(v, d, dtype)
    target, coef = meta(n, dtype=torch.int64), meta(n)
    cross.linear_cross_entropy_sweep(h, w, target, *vectors, coef, smoothing, grads, grads, grads and options)


def distillation(
    n, v, dtype, *, divergence="forward_kl", temperature=2.0, hard=0.0, target=False, reduction="batchmean",
):  # fmt: skip
    z, q = features(n, v, dtype), features(n, v, dtype)
    target = meta(n, dtype=torch.int64) if target or hard else None
    options = (temperature, divergence, 0.5, hard, -100, reduction)
    _, stats, _ = distil.distillation(z, q, target, *options, False)
    dloss = meta(*(n,) if reduction == "none" else ())
    distil.distillation_bwd(dloss, z, q, target, stats, *options, [True])


def two_models(
    n, d, e, v, dtype, *, k=None, divergence="forward_kl", hard=0.0, biases=False, grads=True,
):  # fmt: skip
    bias, target = meta(v, dtype=dtype) if biases else None, meta(n, dtype=torch.int64) if hard else None
    taught = (features(n, e, dtype), features(v, e, dtype)) if k is None else (None, None)
    topk = (None, None) if k is None else (meta(n, k), meta(n, k, dtype=torch.int64))
    linear_distil.linear_distillation(
        features(n, d, dtype), features(v, d, dtype), *taught, bias, bias if k is None else None, *topk,
        target, 2.0, divergence, 0.5, hard, -100, "mean", grads, grads, grads and biases,
    )  # fmt: skip


def embedding_distillation(n, d, dtype, *, distance="l1", normalize=True, weighted=False, reduction="mean"):
    x, y = features(n, d, dtype), features(n, d, dtype)
    weight = meta(n) if weighted else None
    features_distil.embedding_distillation(x, y, weight, distance, normalize, reduction, False)
    dloss = meta(*(n,) if reduction == "none" else ())
    features_distil.embedding_distillation_bwd(dloss, x, y, weight, distance, normalize, reduction, [True])


def relative_representation(n, k, dtype, *, p=8.0):
    powers.relative_representation(features(n, k, dtype), p)


def relative_similarity(n, m, k, length, dtype):
    image, text = (n, k), (m, length)
    sparse.relative_similarity(
        meta(*image, dtype=dtype), meta(*image, dtype=torch.int64), meta(*text, dtype=dtype),
        meta(*text, dtype=torch.int64),
    )  # fmt: skip


def contrastive_search(b, k, t, d, dtype, *, alpha=0.1, beta=2.0, lengths=False):
    decoding.contrastive_search_score(
        meta(b, k), meta(b, k, d, dtype=dtype), meta(b, t, d, dtype=dtype), meta(b, k),
        meta(b, dtype=torch.int64) if lengths else None, alpha, beta,
    )  # fmt: skip


def nms(n, dtype, *, groups=False):
    suppression.kept_bits(meta(n, 4, dtype=dtype), meta(n, dtype=torch.int64) if groups else None, 0.5)


def roi_align(batch, channels, height, width, boxes, size, dtype, *, ratio=2, aligned=True):
    options, corners = (0.25, ratio, aligned), meta(boxes, 5)
    out = pooling.roi_align(meta(batch, channels, height, width, dtype=dtype), corners, size, size, *options)
    pooling.roi_align_bwd(out, corners, batch, height, width, *options, [True])


def gated_residual(n, d, dtype, *, channels=False, mask=False, need_y=True, need_gate=True, low=None):
    x, y, gate = meta(n, d, dtype=dtype), meta(n, d, dtype=low or dtype), meta(d if channels else 1)
    row_mask = meta(n, dtype=torch.bool) if mask else None
    out = gated.gated_residual(x, y, gate, row_mask)
    gated.gated_residual_bwd(meta(n, d, dtype=out.dtype), y, gate, row_mask, (need_y, need_gate))


def levels(n, d, dtype, *, count=3, mask=False, paper=False, low=None, needs=(True, True, True)):
    language, visual = meta(n, d, dtype=dtype), meta(count, n, d, dtype=low or dtype)
    options = meta(n, dtype=torch.bool) if mask else None, 0.2, "paper" if paper else "code"
    out = srau.srau(language, visual, visual, *options)
    srau.srau_bwd(meta(n, d, dtype=out.dtype), language, visual, visual, *options, needs)


def gated_linear_residual(n, k, d, dtype, *, channels=False, mask=False, weight=True, residual=None):
    h, w, gate = features(n, k, dtype), features(d, k, dtype), meta(d if channels else 1)
    row_mask = meta(n, dtype=torch.bool) if mask else None
    x = features(n, d, residual or dtype)
    out = linear.gated_linear_residual(x, h, w, gate, row_mask)
    linear.gated_linear_residual_bwd(meta(n, d, dtype=out.dtype), h, w, gate, row_mask, (True, weight, True))


def layer(n, k, o, dtype, *, activation="gelu", bias=True, residual=None, needs=(True,) * 3):
    x, w, b = meta(n, k, dtype=dtype), meta(o, k, dtype=dtype), meta(o, dtype=dtype) if bias else None
    out, y = one_layer.linear(x, w, b, meta(n, o, dtype=residual) if residual else None, activation, True)
    one_layer.linear_bwd(out, x, w, b, y, activation, (*needs[:2], needs[2] and bias))


def layers(n, k, h, dtype, *, activation="gelu", bias=True, keep=True):
    x, w1, w2 = (meta(*shape, dtype=dtype) for shape in ((n, k), (h, k), (k, h)))
    b1, b2 = (meta(size, dtype=dtype) if bias else None for size in (h, k))
    out, y = two_layers.mlp(x, w1, b1, w2, b2, None, activation, keep)
    if keep:
        two_layers.mlp_bwd(out, x, w1, b1, w2, y, activation, (True, True, bias, True, bias))


def gated_layer(n, k, h, dtype, *, activation="silu", bias=False, keep=True, frozen=False):
    x, w_gate, w_up, w_down = (meta(*shape, dtype=dtype) for shape in ((n, k), (h, k), (h, k), (k, h)))
    biases = [meta(size, dtype=dtype) if bias else None for size in (h, h, k)]
    out, *kept = gated_layers.gated_mlp(x, w_gate, w_up, w_down, *biases, None, activation, keep)
    if keep:
        needs = (True, *[not frozen] * 3, *[bias] * 3)
        gated_layers.gated_mlp_bwd(out, x, w_gate, w_up, w_down, *biases[:2], *kept, activation, needs)


def heads(b, t, h, d, dtype) -> Tensor:
    """[B, H, T, D] as projections give it."""
    return meta(b, t, h, d, dtype=dtype).transpose(1, 2)


def attention(
    b, h, hkv, tq, tk, d, dtype, *, dv=None, grid=(0, 0), needs=(True, True, True), train=True, batched=False
):
    q, k, v = heads(b, tq, h, d, dtype), heads(b, tk, hkv, d, dtype), heads(b, tk, hkv, dv or d, dtype)
    start, end = (meta(*((b, tq) if batched else (tq,)), dtype=torch.int32) for _ in range(2))
    bias = meta(h, 2 * grid[0] - 1, 2 * grid[1] - 1) if grid[0] else None
    out, lse = interval.interval_attention(q, k, v, start, end, 0.125, bias, *grid)
    if train:
        interval.interval_attention_bwd(
            heads(b, tq, h, dv or d, dtype), None, q, k, v, start, end, out, lse, 0.125, bias, *grid,
            [*needs, bias is not None],
        )  # fmt: skip


def resampler(b, h, latents, media, d, dtype, *, lengths=True, needs=(True,) * 5):
    q, mk, mv, lk, lv = (heads(b, t, h, d, dtype) for t in (latents, media, media, latents, latents))
    media_lengths = meta(b, dtype=torch.int32) if lengths else None
    out, lse = perceiver.perceiver_attention(q, mk, mv, lk, lv, media_lengths, 0.125)
    perceiver.perceiver_attention_bwd(
        heads(b, latents, h, d, dtype), q, mk, mv, lk, lv, media_lengths, out, lse, 0.125, list(needs)
    )


def search(n, m, d, dtype, *, k=100, quantised=False, normalize=False, both=False):
    key, scale = (meta(m, d, dtype=torch.int8), meta(m)) if quantised else (features(m, d, dtype), None)
    topk.topk_similarity(features(n, d, dtype), key, scale, k, normalize, True, both)


def ranks(n, m, d, dtype, *, form="pairs"):
    ranking.retrieval_ranks(features(n, d, dtype), features(m, d, dtype), *targets(n, m, form))


def mined(n, m, d, dtype, *, form="pairs", grouped=False, margin=None, normalize=False):
    groups = targets(n, m, "ids") if grouped else (None, None)
    sides = features(n, d, dtype), features(m, d, dtype)
    mining.mine_hard_negatives(*sides, *targets(n, m, form), *groups, 16, margin, normalize)


def _add(name: str, call: Callable[..., None], *args, allow_tf32=False, **kwargs) -> None:
    def run():
        with tf32() if allow_tf32 else contextlib.nullcontext():
            call(*args, **kwargs)

    WORKLOADS[name] = run


for name, dtype in (("bf16", BF16), ("fp32", FP32)):
    _add(f"info_nce {name}", info_nce, 4096, 4096, 512, dtype)
    _add(f"info_nce {name} normalized", info_nce, 4096, 4096, 768, dtype, normalize=True)
    _add(f"info_nce {name} small", info_nce, 512, 512, 512, dtype)
    _add(f"info_nce {name} small normalized", info_nce, 512, 512, 512, dtype, normalize=True)
    _add(f"info_nce {name} ragged", info_nce, 4099, 4099, 500, dtype)
    _add(f"sigmoid {name}", sigmoid, 4096, 4096, 768, dtype)
    _add(f"sigmoid {name} small", sigmoid, 512, 512, 768, dtype)
    _add(f"sigmoid {name} small normalized", sigmoid, 512, 512, 768, dtype, normalize=True)
    _add(f"sigmoid {name} ragged", sigmoid, 4097, 4099, 500, dtype)
    _add(f"contrastive_distillation {name}", distillation_of_pairs, 4096, 4096, 512, 768, dtype)
    _add(f"contrastive_distillation {name} small", distillation_of_pairs, 512, 512, 512, 512, dtype)
    _add(f"contrastive_distillation {name} ragged", distillation_of_pairs, 4097, 4099, 500, 510, dtype)
    _add(f"cross_entropy {name}", cross_entropy, 8192, 768, 50257, dtype)
    _add(f"cross_entropy {name} small", cross_entropy, 64, 256, 1000, dtype)
    _add(f"distillation {name}", distillation, 8192, 32768, dtype)
    _add(f"distillation {name} JSD", distillation, 8192, 128256, dtype, divergence="jsd")
    _add(f"linear_distillation {name}", two_models, 8192, 768, 1600, 50257, dtype)
    _add(f"linear_distillation {name} small", two_models, 64, 256, 512, 1000, dtype)
    _add(f"linear_distillation {name} offline", two_models, 8192, 768, 0, 50257, dtype, k=64)
    _add(f"embedding {name}", embedding_distillation, 8192, 512, dtype)
    _add(f"relative_representation {name}", relative_representation, 8192, 800, dtype)
    _add(f"relative_similarity {name}", relative_similarity, 512, 1000, 800, 800, dtype)
    _add(f"contrastive_search {name}", contrastive_search, 8, 45, 16, 768, dtype)
    _add(f"nms {name}", nms, 10_000, dtype)
    _add(f"roi_align {name}", roi_align, 2, 256, 200, 304, 1000, 7, dtype)
    _add(f"gated_residual {name}", gated_residual, 8192, 768, dtype)
    _add(f"gated_residual {name} channels", gated_residual, 8192, 1024, dtype, channels=True, mask=True)
    _add(f"gated_residual {name} wide", gated_residual, 8192, 4096, dtype)
    _add(f"srau {name}", levels, 8192, 768, dtype)
    _add(f"srau {name} masked", levels, 8192, 1024, dtype, mask=True, paper=True)
    _add(f"gated_linear_residual {name}", gated_linear_residual, 8192, 4096, 1024, dtype, mask=True)
    _add(f"gated_linear_residual {name} small", gated_linear_residual, 256, 512, 2048, dtype, channels=True)
    _add(f"topk {name}", search, 4096, 60000, 512, dtype)
    _add(f"topk {name} few", search, 8, 60000, 512, dtype)
    _add(f"topk {name} int8", search, 512, 60000, 512, dtype, quantised=True, normalize=True)
    _add(f"topk {name} both", search, 512, 5000, 512, dtype, both=True, normalize=True)
    _add(f"ranks {name}", ranks, 5000, 5000, 512, dtype)
    _add(f"ranks {name} ids", ranks, 1000, 5000, 512, dtype, form="ids")
    _add(f"mined {name}", mined, 4096, 60000, 512, dtype, margin=0.1, normalize=True)
    _add(f"mined {name} ids", mined, 512, 60000, 512, dtype, form="ids", grouped=True)
    _add(f"linear {name}", layer, 8192, 768, 3072, dtype)
    _add(f"mlp {name}", layers, 8192, 768, 3072, dtype)
    _add(f"gated_mlp {name}", gated_layer, 8192, 2048, 5632, dtype)
    for width in (64, 128, 256) if dtype == BF16 else (64, 128):
        _add(f"attention {name} {width}", attention, 8, 16, 16, 1024, 1024, width, dtype)
        _add(f"attention {name} {width} biased", attention, 8, 12, 12, 640, 640, width, dtype, grid=(24, 24))
        _add(f"attention {name} {width} decode", attention, 8, 16, 4, 1, 1000, width, dtype, train=False)
    _add(f"attention {name} 80 grouped", attention, 8, 16, 4, 1021, 1021, 80, dtype, batched=True)
    _add(f"perceiver {name}", resampler, 8, 8, 64, 2048, 64, dtype)
_add("info_nce fp16 normalized", info_nce, 4096, 4096, 768, FP16, normalize=True)
_add("sigmoid fp16", sigmoid, 4096, 4096, 768, FP16)
_add("contrastive_distillation fp16", distillation_of_pairs, 4096, 4096, 512, 768, FP16)
_add("linear_distillation fp16", two_models, 8192, 768, 1600, 32000, FP16, divergence="reverse_kl")
_add("linear_distillation fp16 offline", two_models, 8192, 768, 0, 32000, FP16, k=64)
_add("cross_entropy fp16", cross_entropy, 8192, 2048, 32000, FP16, options=True)
_add("distillation fp16", distillation, 8192, 32768, FP16, hard=0.3, reduction="sum")
_add("embedding fp16", embedding_distillation, 8192, 1024, FP16)
_add("gated_residual fp16", gated_residual, 8192, 1024, FP16)
_add("srau fp16", levels, 8192, 1024, FP16)
_add("gated_linear_residual fp16", gated_linear_residual, 8192, 1024, 1024, FP16)
_add("topk fp16", search, 4096, 60000, 512, FP16)
_add("ranks fp16", ranks, 5000, 5000, 512, FP16)
_add("attention fp16 64", attention, 8, 16, 16, 1024, 1024, 64, FP16)
for name in ("", " small", " ragged"):
    size = {"": (4096, 4096), " small": (512, 512), " ragged": (4097, 4099)}[name]
    square = (size[1], size[1])
    if name == " small":
        _add("info_nce tf32 small normalized", info_nce, *square, 512, FP32, allow_tf32=True, normalize=True)
    _add(f"info_nce tf32{name}", info_nce, *square, 512 if name != " ragged" else 500, FP32, allow_tf32=True)
    _add(f"sigmoid tf32{name}", sigmoid, *size, 512 if name != " ragged" else 500, FP32, allow_tf32=True)
    if name == " small":
        _add("sigmoid tf32 small normalized", sigmoid, *size, 512, FP32, allow_tf32=True, normalize=True)
    widths = (512, 768) if name != " ragged" else (500, 510)
    _add(f"contrastive_distillation tf32{name}", distillation_of_pairs, *size, *widths, FP32, allow_tf32=True)
_add("info_nce bf16 of many devices", info_nce, 65536, 65536, 768, BF16, normalize=True)
_add("info_nce tf32 of many devices", info_nce, 65536, 65536, 768, FP32, allow_tf32=True)
_add(
    "info_nce bf16 one direction", info_nce, 1024, 8192, 768, BF16, form="index", symmetric=False,
    needs=(True, False, False),
)  # fmt: skip
for name, dtype in (("bf16", BF16), ("fp32", FP32)):
    every = {"form": "ids", "smoothing": 0.1, "weighted": True}
    _add(f"info_nce {name} by id", info_nce, 4096, 4096, 512, dtype, normalize=True, **every)
    _add(f"scale_grads {name}", scaled, *(features(4096, 768, dtype) for _ in range(2)), meta(), meta())
_add("info_nce fp16 small", info_nce, 1024, 1024, 768, FP16, form="ids", smoothing=0.1)
_add("info_nce bf16 of each row", info_nce, 4096, 4096, 512, BF16, weighted=True, reduction="none")
_add("info_nce bf16 one pair", info_nce, 1, 1, 1, BF16)
_add("sigmoid bf16 one pair", sigmoid, 1, 1, 1, BF16)
_add("sigmoid fp16 small", sigmoid, 1024, 1024, 768, FP16, form="ids", loss=False)
_add("sigmoid bf16 small, loss alone", sigmoid, 512, 512, 768, BF16, grads=False)
_add("sigmoid fp16 small of each row", sigmoid, 512, 512, 768, FP16, reduction="none", loss=False)
_add("sigmoid bf16 ids", sigmoid, 4096, 4096, 768, BF16, form="ids", normalize=True)
_add("sigmoid bf16 index", sigmoid, 4096, 4096, 768, BF16, form="index")
_add("sigmoid fp16 of each row", sigmoid, 4096, 4096, 768, FP16, reduction="none", loss=False)
_add("sigmoid bf16 loss alone", sigmoid, 4096, 4096, 768, BF16, grads=False)
_add("sigmoid bf16 frozen scale", sigmoid, 4096, 4096, 768, BF16, loss=False, scalars=False)
_add(
    "contrastive_distillation bf16 cross entropy",
    distillation_of_pairs,
    4096,
    4096,
    512,
    768,
    BF16,
    divergence="cross_entropy",
    reduction="none",
)
for name, dtype in (("bf16", BF16), ("tf32", FP32)):
    _add(
        f"contrastive_distillation {name} of many devices",
        distillation_of_pairs,
        4096,
        65536,
        512,
        768,
        dtype,
        allow_tf32=name == "tf32",
    )
_add("contrastive_distillation bf16 of large batches", distillation_of_pairs, 65536, 65536, 512, 768, BF16)
_add(
    "contrastive_distillation bf16 one direction",
    distillation_of_pairs,
    4096,
    4096,
    512,
    768,
    BF16,
    symmetric=False,
    needs=(True, False, False),
)
_add("contrastive_distillation bf16 one pair", distillation_of_pairs, 1, 1, 1, 1, BF16)
_add("cross_entropy bf16 options", cross_entropy, 4096, 768, 30522, BF16, options=True, smoothing=0.1)
_add("cross_entropy bf16 ragged", cross_entropy, 4097, 500, 50257, BF16)
_add("cross_entropy bf16 loss alone", cross_entropy, 8192, 4096, 128256, BF16, grads=False)
_add("cross_entropy bf16 one row", cross_entropy, 1, 1, 1, BF16)
_add("linear_distillation bf16 JSD", two_models, 8192, 2048, 4096, 32000, BF16, divergence="jsd", hard=0.5)
_add(
    "linear_distillation bf16 targets alone", two_models, 8192, 768, 1600, 50257, BF16, hard=1.0, biases=True
)
_add("linear_distillation bf16 loss alone", two_models, 8192, 768, 1600, 50257, BF16, grads=False)
_add("linear_distillation bf16 one row", two_models, 1, 1, 1, 1, BF16)
for name, k in (("", None), (" offline", 100)):
    options = {"divergence": "jsd", "hard": 0.5, "biases": True, "k": k}
    _add(f"linear_distillation bf16{name} ragged", two_models, 4097, 500, 510, 50257, BF16, **options)
_add("distillation bf16 of 1000 classes", distillation, 8192, 1000, BF16, hard=0.5)
_add("distillation bf16 reverse", distillation, 8192, 50304, BF16, divergence="reverse_kl", target=True)
_add("distillation bf16 JSD in registers", distillation, 8192, 16384, BF16, divergence="jsd")
_add("distillation bf16 ragged", distillation, 4097, 50257, BF16, divergence="jsd", hard=0.5)
_add("distillation bf16 targets alone", distillation, 8192, 32768, BF16, hard=1.0, reduction="none")
_add("distillation bf16 one class", distillation, 1, 1, BF16)
_add("embedding bf16 weighted", embedding_distillation, 8192, 4096, BF16, distance="smooth_l1", weighted=True)
_add("embedding bf16 ragged", embedding_distillation, 4097, 1001, BF16, distance="cosine", weighted=True)
_add("embedding bf16 long", embedding_distillation, 8192, 20000, BF16, distance="l2", normalize=False)
_add("embedding bf16 one element", embedding_distillation, 1, 1, BF16)
_add("relative_representation bf16 long", relative_representation, 512, 20000, BF16, p=2.5)
_add("relative_representation bf16 one element", relative_representation, 1, 1, BF16)
_add("relative_similarity bf16 ragged", relative_similarity, 1, 80001, 797, 300, BF16)
_add("relative_similarity bf16 one element", relative_similarity, 1, 1, 1, 1, BF16)
_add("contrastive_search bf16 lengths", contrastive_search, 1, 100, 200, 770, BF16, lengths=True)
_add("contrastive_search bf16 greedy", contrastive_search, 2, 1, 1, 770, BF16, alpha=0.0, beta=0.0)
_add("nms fp32 groups", nms, 999, FP32, groups=True)
_add("nms fp32 many", nms, 100_000, FP32)
_add("nms bf16 one box", nms, 1, BF16)
_add("roi_align bf16 masks", roi_align, 2, 256, 200, 304, 1000, 14, BF16, ratio=0, aligned=False)
_add("roi_align bf16 one element", roi_align, 1, 1, 1, 1, 1, 1, BF16)
_add("gated_residual bf16 ragged", gated_residual, 4097, 1001, BF16, mask=True)
_add("gated_residual bf16 frozen gate", gated_residual, 8192, 1024, BF16, need_gate=False)
_add("gated_residual bf16 gate alone", gated_residual, 8192, 1024, BF16, need_y=False)
_add("gated_residual fp32 and bf16", gated_residual, 8192, 1024, FP32, low=BF16)
_add("srau bf16 ragged", levels, 4097, 1001, BF16, count=1, mask=True)
_add("srau bf16 frozen text", levels, 8192, 1024, BF16, needs=(False, True, True))
_add("srau bf16 text alone", levels, 8192, 1024, BF16, needs=(True, False, False))
_add("srau fp32 and bf16", levels, 8192, 1024, FP32, low=BF16)
_add("gated_linear_residual bf16 ragged", gated_linear_residual, 4097, 1001, 1003, BF16)
_add("gated_linear_residual bf16 on fp32", gated_linear_residual, 8192, 1024, 1024, BF16, residual=FP32)
_add("gated_linear_residual tf32", gated_linear_residual, 8192, 4096, 1024, FP32, allow_tf32=True)
for activation in ("gelu_tanh", "quick_gelu", "silu", "relu", "squared_relu"):
    _add(f"linear bf16 {activation}", layer, 8192, 768, 3072, BF16, activation=activation)
_add("linear fp16", layer, 8192, 768, 3072, FP16, activation="quick_gelu")
_add("linear bf16 on fp32", layer, 8192, 768, 3072, BF16, residual=FP32)
_add("linear bf16 residual", layer, 8192, 768, 768, BF16, residual=BF16)
_add("linear bf16 ragged", layer, 4097, 768, 1001, BF16)
_add("linear bf16 frozen bias", layer, 8192, 768, 3072, BF16, bias=False)
_add("linear bf16 bias alone", layer, 8192, 768, 3072, BF16, needs=(False, False, True))
_add("linear bf16 one element", layer, 1, 1, 1, BF16)
_add("mlp bf16 quick_gelu", layers, 8192, 1024, 4096, BF16, activation="quick_gelu")
_add("mlp bf16 no gradient", layers, 8192, 768, 3072, BF16, keep=False)
for activation in ("none", "gelu", "gelu_tanh"):
    _add(f"gated_mlp bf16 {activation}", gated_layer, 8192, 2048, 5632, BF16, activation=activation)
_add("gated_mlp fp16 bias", gated_layer, 8192, 2048, 5632, FP16, bias=True)
_add("gated_mlp bf16 frozen", gated_layer, 8192, 2048, 5632, BF16, frozen=True)
_add("gated_mlp bf16 no gradient", gated_layer, 8192, 2048, 5632, BF16, keep=False)
_add("gated_linear_residual bf16 frozen", gated_linear_residual, 8192, 1024, 1024, BF16, weight=False)
for width in (64, 128):
    _add(f"attention tf32 {width}", attention, 8, 16, 16, 1024, 1024, width, FP32, allow_tf32=True)
    _add(
        f"attention tf32 {width} biased",
        attention,
        8,
        12,
        12,
        640,
        640,
        width,
        FP32,
        grid=(24, 24),
        allow_tf32=True,
    )
_add("perceiver bf16 128 without lengths", resampler, 8, 16, 64, 2048, 128, BF16, lengths=False)
_add("perceiver bf16 256", resampler, 8, 4, 64, 2048, 256, BF16, needs=(True, False, False, False, False))
_add("attention bf16 64 frozen values", attention, 8, 16, 16, 1024, 1024, 64, BF16, needs=(True, True, False))
_add("attention bf16 64 values alone", attention, 8, 16, 16, 1024, 1024, 64, BF16, needs=(False, False, True))
_add(
    "attention bf16 64 queries alone", attention, 8, 16, 16, 1024, 1024, 64, BF16, needs=(True, False, False)
)
for name, dtype in (("bf16", BF16), ("fp32", FP32)):
    needs = (False, True, True)
    _add(f"attention {name} 64 frozen queries", attention, 8, 16, 16, 1024, 1024, 64, dtype, needs=needs)
_add("attention bf16 128 values of 64", attention, 8, 16, 16, 1024, 1024, 128, BF16, dv=64)
_add("attention bf16 ragged", attention, 3, 5, 5, 1021, 1023, 37, BF16)
_add("attention bf16 72", attention, 8, 16, 16, 729, 729, 72, BF16)
_add("gated_residual bf16 one element", gated_residual, 1, 1, BF16)
_add("srau bf16 one element", levels, 1, 1, BF16)
_add("gated_linear_residual bf16 one element", gated_linear_residual, 1, 1, 1, BF16)
_add("attention bf16 one key", attention, 1, 1, 1, 1, 1, 1, BF16, grid=(1, 1))
