"""What is predicted and measured on a GPU: the ops at sizes of real models, and their peers.

A workload is a case of `benchmarks.cases`; peers are imported when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, linear, log_softmax, logsigmoid, silu

import vlmkernels
from benchmarks import peers
from benchmarks.cases import attention as attention_cases
from benchmarks.cases import dense as dense_cases
from benchmarks.cases import pairwise as pairwise_cases
from benchmarks.cases import residual as residual_cases
from benchmarks.cases import rows as rows_cases
from benchmarks.cases.attention import bounds
from benchmarks.cases.case import Baseline
from benchmarks.gpu import attention_peers, retrieval_workloads
from benchmarks.gpu.workload import Workload, peer
from benchmarks.gpu.workload import cut as cut_if
from vlmkernels import reference
from vlmkernels.reference.interval_attention import visible

SCALE = 1 / 0.07  # where CLIP begins


# Losses


def one_product() -> Callable[..., Tensor]:
    """The loss of CLIP on one matrix of logits and its transpose."""

    def loss(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        logits = scale * (query @ key.T)  # [N, N]
        target = torch.arange(len(query), device=query.device)
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    return loss


def dense_sigmoid() -> Callable[..., Tensor]:
    """The loss of SigLIP on its matrix of logits."""

    def loss(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * (query @ key.T) + bias  # [N, N]
        signs = 2 * torch.eye(len(query), dtype=query.dtype, device=query.device) - 1
        return -logsigmoid(signs * logits).sum() / len(query)

    return loss


def _memeff() -> Callable[..., Tensor]:
    """Its temperature has no gradient; `stable` would scale those of the features."""
    loss_of = peers.load("memeff").MemoryEfficientCLIPLoss(
        temperature=1 / SCALE, normalized_inputs=True, stable=False
    )
    return lambda query, key, scale: loss_of(query, key) + 0 * scale


def _liger() -> Callable[..., Tensor]:
    linear_cross_entropy = peers.load("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def loss(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        target = torch.arange(len(query), device=query.device)
        rows = linear_cross_entropy(key, (scale * query).to(query.dtype), target)
        return (rows + linear_cross_entropy(query, (scale * key).to(key.dtype), target)) / 2

    return loss


def _siglip_kernel() -> Callable[..., Tensor]:
    loss_of = peers.load("siglip_kernel").fused_siglip_loss
    return lambda query, key, scale, bias: loss_of(query, key, scale.log(), bias)


def _pairwise(op: str, form: str, sizes: Mapping[str, int], type: str) -> Workload:
    chunked = partial(pairwise_cases._linear_cross_entropy, chunked=True)
    if op == "info_nce":
        bias, ours = None, vlmkernels.info_nce
        others = (
            *peer("one product", one_product),
            *peer("open_clip ClipLoss", partial(pairwise_cases._open_clip_loss, "ClipLoss")),
            Baseline("2 x F.linear_cross_entropy, chunked", chunked),
            Baseline("memeff", _memeff),
            Baseline("2 x Liger fused linear cross-entropy", _liger),
        )
    else:
        bias, ours = -10.0, vlmkernels.sigmoid_loss
        others = (
            *peer("dense SigLIP", dense_sigmoid),
            *peer("open_clip SigLipLoss", partial(pairwise_cases._open_clip_loss, "SigLipLoss")),
            Baseline("siglip-kernel", _siglip_kernel),
        )
    make = partial(pairwise_cases._features, frozen=False, scale=SCALE, bias=bias)
    return Workload(op, form, type, sizes, make, ours, others)


def _contrastive_distillation(form: str, sizes: Mapping[str, int], type: str) -> Workload:
    divergence = {"divergence": "cross_entropy"}  # open_clip's
    others = (
        *peer("distillation term of open_clip DistillClipLoss", pairwise_cases._open_clip_distillation),
        *peer("reference", lambda: partial(reference.contrastive_distillation, **divergence)),
    )
    make = partial(pairwise_cases._distilled, frozen=False)
    ours = partial(vlmkernels.contrastive_distillation, **divergence)
    return Workload("contrastive_distillation", form, type, sizes, make, ours, others)


def _liger_linear_cross_entropy() -> Callable[..., Tensor]:
    loss_of = peers.load("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, weight, target: loss_of(weight, hidden, target)


def _linear_cross_entropy(form: str, sizes: Mapping[str, int], type: str, ignored: float = 0.0) -> Workload:
    of_torch = pairwise_cases._torch_linear_cross_entropy
    others = (
        *peer("F.linear, F.cross_entropy", lambda: pairwise_cases._eager_cross_entropy),
        Baseline("F.linear_cross_entropy", partial(of_torch, chunked=False)),
        Baseline("F.linear_cross_entropy, chunked", partial(of_torch, chunked=True)),
        Baseline("Liger fused linear cross-entropy", _liger_linear_cross_entropy),
    )
    make = partial(pairwise_cases._hidden, ignored=ignored)
    return Workload("linear_cross_entropy", form, type, sizes, make, vlmkernels.linear_cross_entropy, others)


def _liger_distillation(divergence: str) -> Callable[..., Tensor]:
    """Of log-softmaxes, which torch makes before."""
    transformers, t = peers.load("liger_kernel.transformers"), rows_cases.T
    if divergence == "jsd":
        loss_of = transformers.LigerJSD(beta=0.5)
    else:
        loss_of = transformers.LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return t * t * loss_of(*(log_softmax(x.float() / t, 1) for x in (student_logits, teacher_logits)))

    return loss


def _distillation(form: str, sizes: Mapping[str, int], type: str, **options: object) -> Workload:
    options = {"temperature": rows_cases.T} | options
    divergence = str(options.get("divergence", "forward_kl"))
    if "hard_weight" in options:
        others = peer("F.kl_div of F.log_softmax, F.cross_entropy", lambda: rows_cases._kl_and_targets)
    elif divergence == "forward_kl":
        others = peer("F.kl_div of F.log_softmax", lambda: rows_cases._kl)
    else:
        others = peer("reference", lambda: partial(reference.distillation, **options))
    if divergence != "reverse_kl" and "hard_weight" not in options:
        name = "Liger JSD" if divergence == "jsd" else "Liger KL"
        others += (Baseline(f"{name} of F.log_softmax", partial(_liger_distillation, divergence)),)
    make = partial(rows_cases._logits, with_target="hard_weight" in options)
    return Workload(
        "distillation", form, type, sizes, make, partial(vlmkernels.distillation, **options), others
    )


def _liger_linear_distillation() -> Callable[..., Tensor]:
    t = pairwise_cases.T
    loss_of = peers.load("liger_kernel.transformers").LigerFusedLinearJSD(jsd_beta=0.5, temperature=t)

    def loss(
        student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
    ) -> Tensor:
        return t * t * loss_of(student_hidden, student_weight, teacher_hidden, teacher_weight)

    return loss


def _linear_distillation(
    form: str, sizes: Mapping[str, int], type: str, divergence: str = "forward_kl", k: int = 0
) -> Workload:
    options = {"temperature": pairwise_cases.T, "divergence": divergence}
    of = partial(pairwise_cases._offline if k else partial, **options)
    if k or divergence != "forward_kl":
        others = peer("reference", lambda: of(reference.linear_distillation))
    else:
        others = peer("F.linear, F.kl_div of F.log_softmax", lambda: pairwise_cases._eager_distillation)
    if divergence == "jsd" and not k:
        others += (Baseline("Liger fused linear JSD", _liger_linear_distillation),)
    make, ours = partial(pairwise_cases._two_models, k=k), of(vlmkernels.linear_distillation)
    return Workload("linear_distillation", form, type, sizes, make, ours, others)


def _embedding_distillation(distance: str, sizes: Mapping[str, int], type: str) -> Workload:
    plain, name = {
        "l1": (rows_cases._l1, "F.l1_loss of F.normalize"),
        "cosine": (rows_cases._cosine, "F.cosine_similarity"),
    }[distance]
    ours = partial(vlmkernels.embedding_distillation, distance=distance)
    make = rows_cases._pairs_of_features
    return Workload("embedding_distillation", distance, type, sizes, make, ours, peer(name, lambda: plain))


# Attention


def _heads(
    device: str, dtype: torch.dtype, batch: int, heads: int, queries: int, keys: int, width: int, *, mask: str
) -> dict[str, Tensor]:
    tensors = {
        name: torch.randn(batch, tokens, heads, width, device=device).to(dtype).transpose(1, 2)
        for name, tokens in (("query", queries), ("key", keys), ("value", keys))
    }
    tensors = {name: x.requires_grad_() for name, x in tensors.items()}
    tensors["start"], tensors["end"] = bounds(mask, queries, keys, device)
    if mask not in ("causal", "full"):
        tensors["mask"] = visible(tensors["start"], tensors["end"], keys)
    return tensors


def _flex(mask: str, queries: int, keys: int, device: str) -> Callable[..., Tensor]:
    return attention_cases._flex(mask, queries, keys, device)


def _interval_attention(mask: str, form: str, sizes: Mapping[str, int], type: str, device: str) -> Workload:
    name, options = {"full": ("SDPA", {}), "causal": ("SDPA is_causal", {"is_causal": True})}.get(
        mask, ("SDPA with the mask", {})
    )
    others = (
        *attention_peers.by_backend(name, partial(attention_cases._sdpa, **options)),
        Baseline("FlexAttention", partial(_flex, mask, sizes["queries"], sizes["keys"], device), True),
        Baseline("flash-attn", partial(attention_peers.flash, mask)),
    )
    if mask != "prefix-LM":
        shape = sizes["batch"], sizes["queries"], sizes["keys"]
        others += (
            Baseline("vlmkernels by its provider", partial(attention_peers.by_provider, mask, *shape)),
        )
    return Workload(
        "interval_attention", form, type, sizes, partial(_heads, mask=mask), attention_cases._ours, others,
        mask,
    )  # fmt: skip


def _perceiver_attention(form: str, sizes: Mapping[str, int], type: str) -> Workload:
    def flash() -> Callable[..., Tensor]:
        attend = peers.load("flash_attn").flash_attn_func

        def joined(query: Tensor, media: Tensor, latents: Tensor) -> Tensor:
            key, value = torch.cat([media, latents], 1).unbind(2)
            return attend(query.transpose(1, 2), key, value).flatten(2)

        return joined

    others = (
        *attention_peers.by_backend("SDPA on the concatenation", attention_cases._concatenated),
        Baseline("flash-attn on the concatenation", flash),
    )
    return Workload(
        "perceiver_attention", form, type, sizes, partial(attention_cases._latent_inputs, ragged=False),
        partial(attention_cases._latents_attend, vlmkernels.perceiver_attention), others,
    )  # fmt: skip


# Residual stream


def _gated_residual(form: str, sizes: Mapping[str, int], type: str) -> Workload:
    def plain() -> Callable[..., Tensor]:
        return lambda x, y, gate: x + gate.tanh() * y

    others = (*peer("x + gate.tanh() * y", plain), Baseline("reference", lambda: reference.gated_residual))
    return Workload(
        "gated_residual", form, type, sizes,
        partial(residual_cases._residual, vector=False, masked=False), vlmkernels.gated_residual, others,
    )  # fmt: skip


def _srau(form: str, sizes: Mapping[str, int], type: str) -> Workload:
    ours = partial(vlmkernels.srau, tau=0.2)
    others = (
        *peer("the authors' lines", lambda: residual_cases._eager_tail),
        Baseline("reference", lambda: partial(reference.srau, tau=0.2)),
    )
    return Workload("srau", form, type, sizes, residual_cases._levels, ours, others)


def _gated_linear_residual(form: str, sizes: Mapping[str, int], type: str) -> Workload:
    def plain() -> Callable[..., Tensor]:
        return lambda x, h, weight, gate: x + gate.tanh() * linear(h, weight)

    def two() -> Callable[..., Tensor]:
        return lambda x, h, weight, gate: vlmkernels.gated_residual(x, linear(h, weight), gate)

    others = (
        *peer("x + gate.tanh() * F.linear(h, weight)", plain),
        Baseline("F.linear, then gated_residual", two),
    )
    return Workload(
        "gated_linear_residual", form, type, sizes,
        partial(dense_cases._linear_residual, vector=False, masked=False),
        vlmkernels.gated_linear_residual, others,
    )  # fmt: skip


# Dense layers


def _layer(op: str, form: str, sizes: Mapping[str, int], type: str) -> Workload:
    def one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return gelu(linear(x, weight, bias))

    def two(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return linear(gelu(linear(x, w1, b1)), w2, b2)

    def gated(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return linear(silu(linear(x, w_gate)) * linear(x, w_up), w_down)

    make, plain, name = {
        "linear": (dense_cases._linear, one, "F.gelu(F.linear)"),
        "mlp": (dense_cases._mlp, two, "F.linear(F.gelu(F.linear))"),
        "gated_mlp": (dense_cases._gated, gated, "F.linear(F.silu(F.linear) * F.linear)"),
    }[op]
    ours = partial(getattr(vlmkernels, op), activation="silu" if op == "gated_mlp" else "gelu")
    return Workload(op, form, type, sizes, make, ours, peer(name, lambda: plain))


def workloads(*, quick: bool = False, device: str = "cuda") -> list[Workload]:
    """All of them; `quick` keeps the forms and cuts the sizes, for a CPU."""

    cut = partial(cut_if, quick)
    every = ("bf16", "fp32", "tf32")
    found = []
    for op, d, type in [("info_nce", 512, t) for t in every] + [("sigmoid_loss", 768, t) for t in every]:
        found.append(_pairwise(op, "N=4096", cut(n=4096, m=4096, d=d), type))
        if type == "bf16":
            found.append(_pairwise(op, "N=65536", cut(n=65536, m=65536, d=d), type))
    for type in every:
        sizes = cut(n=4096, m=4096, d=512, e=768)
        found.append(_contrastive_distillation("N=4096", sizes, type))
    sizes = cut(n=16384, m=16384, d=512, e=768)
    found.append(_contrastive_distillation("N=16384", sizes, "bf16"))
    for type in every:
        found.append(_linear_cross_entropy("GPT-2", cut(n=8192, d=768, v=50257), type))
    found.append(_linear_cross_entropy("TinyLlama", cut(n=8192, d=2048, v=32000), "bf16"))
    masked = cut(n=16384, d=768, v=30522)
    found.append(_linear_cross_entropy("BERT, 85 % ignored", masked, "bf16", 0.85))
    for type in ("bf16", "fp32"):
        found.append(_distillation("KL", cut(rows=8192, classes=32768), type))
        sizes = cut(rows=4096, classes=1000)
        found.append(_distillation("KL and targets", sizes, type, hard_weight=0.5))
    sizes = cut(rows=8192, classes=32768)
    found.append(_distillation("reverse KL", sizes, "bf16", divergence="reverse_kl"))
    found.append(_distillation("JSD, a row read twice", sizes, "bf16", divergence="jsd"))
    sizes = cut(rows=8192, classes=16384)
    found.append(_distillation("JSD, a row read once", sizes, "bf16", divergence="jsd"))
    for type in every:
        sizes = cut(n=8192, d=768, e=1600, v=50257)
        found.append(_linear_distillation("GPT-2 of GPT-2 XL", sizes, type))
    found.append(_linear_distillation("GPT-2 of GPT-2 XL, top 64", sizes, "bf16", k=64))
    sizes = cut(n=8192, d=2048, e=4096, v=32000)
    found.append(_linear_distillation("TinyLlama of Llama 2, JSD", sizes, "bf16", "jsd"))
    for type in ("bf16", "fp32"):
        found.append(_embedding_distillation("l1", cut(rows=65536, width=512), type))
    found.append(_embedding_distillation("cosine", cut(rows=65536, width=1024), "bf16"))
    forms = [
        ("full", "full", 16, 32, 1024, 1024, 64, ("bf16",)),
        ("full, 577 patches", "full", 32, 16, 577, 577, 64, ("bf16",)),
        ("full, 729 patches", "full", 32, 16, 729, 729, 72, ("bf16",)),
        ("causal", "causal", 8, 16, 2048, 2048, 64, every),
        ("causal, wide heads", "causal", 8, 16, 2048, 2048, 128, ("bf16",)),
        ("prefix-LM, a quarter", "prefix-LM", 8, 16, 2048, 2048, 64, ("bf16",)),
        ("Flamingo, 8 images of 64", "Flamingo", 8, 16, 2048, 512, 64, ("bf16",)),
    ]
    for form, mask, batch, heads, queries, keys, width, types in forms:
        sizes = cut(batch=batch, heads=heads, queries=queries, keys=keys, width=width)
        found += [_interval_attention(mask, form, sizes, type, device) for type in types]
    for type in every:
        sizes = cut(batch=64, media=256, latents=64)
        found.append(_perceiver_attention("64 latents, 256 media tokens", sizes, type))
    for type in ("bf16", "fp32"):
        found.append(_gated_residual("residual stream", cut(batch=8, tokens=2048, width=4096), type))
        found.append(_srau("VisualGPT", cut(batch=400, tokens=20, width=768, levels=3), type))
    for type in every:
        sizes = cut(rows=16384, width=4096, inner=512)
        found.append(_gated_linear_residual("attention output", sizes, type))
    found.append(_gated_linear_residual("feed-forward", cut(rows=16384, width=4096, inner=16384), "bf16"))
    for type in ("bf16", "tf32"):
        sizes = cut(rows=16384, inner=1024, width=4096)
        found += [_layer(op, "ViT-L", sizes, type) for op in ("linear", "mlp")]
        found.append(_layer("gated_mlp", "TinyLlama", cut(rows=8192, inner=2048, width=5632), type))
    return found + retrieval_workloads.of(quick)
