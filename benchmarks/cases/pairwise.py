"""Losses of pairs.

"one product" is the loss of CLIP on one matrix of logits and its transpose, where open_clip multiplies twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax, normalize

import vlmkernels
from benchmarks import peers
from benchmarks.cases.case import BF16, F32, Baseline, Case, cut, timed, type_name
from vlmkernels import _library, reference
from vlmkernels.ops import _contrastive_distillation_sweeps as distillation
from vlmkernels.ops import _pairwise as pairwise

T = 2.0  # of distillation


def _features(
    device: str, dtype: torch.dtype, n: int, m: int, d: int, *, frozen: bool, scale: float, bias: float | None
) -> dict[str, Tensor]:
    """Unit vectors whose positive pairs have a cosine of about 0.15, so that no loss is close to 0."""
    query = normalize(torch.randn(n, d, device=device), dim=-1)  # [N, D]
    key = torch.randn(m, d, device=device) / d**0.5  # [M, D]
    key[:n] += 0.15 * query
    tensors = {
        "query": query.to(dtype).requires_grad_(),
        "key": normalize(key, dim=-1).to(dtype).requires_grad_(not frozen),
    }
    tensors["scale"] = torch.tensor(scale, device=device, requires_grad=True)
    if bias is not None:
        tensors["bias"] = torch.tensor(bias, device=device, requires_grad=True)
    return tensors


def pairwise_flops(
    n: int, m: int, d: int, *, backward: bool, towers: int, recomputed: float
) -> tuple[float, float]:
    """FLOPs performed, and the least: a product forward, one per trained tower; plus what is recomputed."""
    product = 2.0 * n * m * d
    minimum = product * (1 + towers) if backward else product
    return minimum + (recomputed * product if backward else 0), minimum


def _pairwise_case(
    name: str,
    dtype: torch.dtype,
    n: int,
    m: int,
    d: int,
    baselines: tuple[Baseline, ...],
    *,
    op: str,
    quick: bool,
    ours: Callable[..., Tensor],
    recomputed: Callable[..., float],
    scale: float,
    bias: float | None = None,
    backward: bool = True,
    frozen: bool = False,
    **flags: Any,
) -> Case:
    sizes = cut(quick, n=n, m=m, d=d)
    towers = 1 if frozen else 2
    again = recomputed(dtype=dtype, **sizes)
    flops, minimum = pairwise_flops(**sizes, backward=backward, towers=towers, recomputed=again)
    rows = sizes["n"] + sizes["m"] + (sizes["n"] + (towers - 1) * sizes["m"]) * backward
    return Case(
        op=op,
        name=f"{name} {type_name(dtype)}",
        dtype=dtype,
        sizes=sizes,
        make_inputs=partial(_features, frozen=frozen, scale=scale, bias=bias),
        ours=ours,
        baselines=timed(quick, *baselines),
        flops=flops,
        min_flops=minimum,
        bytes=rows * sizes["d"] * dtype.itemsize,
        backward=backward,
        **flags,
    )


def _recomputed_by_info_nce(device: str, dtype: torch.dtype, n: int, m: int, d: int) -> float:
    """The part of the exponentials beyond the default `store_bytes`; the reference keeps none."""
    if not _library.has_kernel("info_nce_stats", device.upper()):
        return 1.0
    query, key = (torch.empty(1, dtype=dtype, device=device).expand(rows, d) for rows in (n, m))
    kept, everything = (pairwise.store_size(query, key, budget) for budget in (1 << 28, 1 << 62))
    return 1 - kept / everything if everything else 1.0


def _recomputed_by_sigmoid_loss(device: str, **sizes: Any) -> float:
    return 0.0 if _library.has_kernel("sigmoid_sweep", device.upper()) else 1.0


def _open_clip_loss(name: str, **options: Any) -> Callable[..., Tensor]:
    module = getattr(peers.load("open_clip.loss"), name)(**options)

    def loss(query: Tensor, key: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        return module(query, key, scale, bias)

    return loss


def _one_product() -> Callable[..., Tensor]:
    loss_of = peers.load("transformers.models.clip.modeling_clip:image_text_contrastive_loss")
    return lambda query, key, scale: loss_of(scale * (query @ key.T))


def _linear_cross_entropy(*, chunked: bool, symmetric: bool = True, **options: Any) -> Callable[..., Tensor]:
    linear_cross_entropy = peers.load("linear_cross_entropy")
    if chunked:
        options["options"] = peers.load("torch.nn:LinearCrossEntropyOptions")()

    def loss(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        target = torch.arange(len(query), device=query.device)
        rows = linear_cross_entropy(scale * query, key, target, **options)
        if not symmetric:
            return rows
        return (rows + linear_cross_entropy(scale * key, query, target, **options)) / 2

    return loss


def info_nce(quick: bool, device: str) -> list[Case]:
    """Two sweeps: 8 N M D operations, 6 N M D where the exponentials fit in `store_bytes`."""
    eager = Baseline("open_clip ClipLoss", partial(_open_clip_loss, "ClipLoss"), matrices=6)
    compiled = Baseline("torch.compile of open_clip ClipLoss", eager.make, True, 6)
    one = Baseline("one product (transformers)", _one_product, matrices=6)
    one_compiled = Baseline("torch.compile of one product", _one_product, True, 6)
    linear = Baseline("2 x F.linear_cross_entropy", partial(_linear_cross_entropy, chunked=False), matrices=6)
    chunked = Baseline("2 x F.linear_cross_entropy, chunked", partial(_linear_cross_entropy, chunked=True))
    case = partial(
        _pairwise_case,
        op="info_nce",
        quick=quick,
        ours=vlmkernels.info_nce,
        scale=100.0,
        recomputed=partial(_recomputed_by_info_nce, device),
    )

    def reference_with(**options: Any) -> tuple[Baseline, Baseline]:
        def make() -> Callable[..., Tensor]:
            return partial(reference.info_nce, **options)

        return Baseline("reference", make, matrices=8), Baseline(
            "torch.compile of the reference", make, True, 8
        )

    everyone = (eager, one, compiled, one_compiled, linear, chunked, *reference_with())
    cases = []
    for dtype in (F32, BF16):
        cases.append(case("N=4096 D=512", dtype, 4096, 4096, 512, everyone, memory=True, headline=True))
        for n in (64, 128, 256, 512, 1024):
            cases.append(case(f"N={n} D=512", dtype, n, n, 512, (eager, one, one_compiled)))
    cases.append(case("N=1024 D=768", F32, 1024, 1024, 768, (eager, one_compiled, chunked)))

    trio = (eager, compiled, one_compiled)
    cases.append(case("N=2048 D=512 frozen key", F32, 2048, 2048, 512, trio, frozen=True))
    cases.append(case("N=4096 D=512 forward only", F32, 4096, 4096, 512, trio, backward=False))

    rows_only = {"symmetric": False}
    make = partial(_linear_cross_entropy, chunked=False, **rows_only)
    wide = (
        Baseline("F.linear_cross_entropy", make),
        Baseline("torch.compile of F.linear_cross_entropy", make, True),
        Baseline("F.linear_cross_entropy, chunked", partial(make, chunked=True)),
        *reference_with(**rows_only),
    )
    ours = partial(vlmkernels.info_nce, **rows_only)
    cases.append(
        case("N=1024 M=4096 D=512 one direction", F32, 1024, 4096, 512, wide, ours=ours, memory=True)
    )

    smooth = {"label_smoothing": 0.1}
    smoothed = (
        Baseline("2 x F.linear_cross_entropy", partial(_linear_cross_entropy, chunked=False, **smooth)),
        *reference_with(**smooth),
    )
    ours = partial(vlmkernels.info_nce, **smooth)
    cases.append(case("N=2048 D=512 label smoothing 0.1", F32, 2048, 2048, 512, smoothed, ours=ours))

    long = partial(case, memory=True, long=True)
    cases.append(long("N=32768 D=512", BF16, 32768, 32768, 512, (eager, one_compiled, chunked)))
    cases.append(long("N=65536 D=512", F32, 65536, 65536, 512, (eager,)))
    cases.append(long("N=65536 D=512", BF16, 65536, 65536, 512, (eager, chunked)))
    return cases


def sigmoid_loss(quick: bool, device: str) -> list[Case]:
    """One sweep: the gradients are computed with the loss, 6 N M D operations."""
    make = partial(_open_clip_loss, "SigLipLoss")
    eager = Baseline("open_clip SigLipLoss", make, matrices=6)
    compiled = Baseline("torch.compile of open_clip SigLipLoss", make, True, 6)
    chunked = Baseline("open_clip SigLipLoss, chunk_size=256", partial(make, chunk_size=256))
    plain = Baseline("reference", lambda: reference.sigmoid_loss, matrices=8)
    plain_compiled = Baseline("torch.compile of the reference", plain.make, True, 8)
    case = partial(
        _pairwise_case,
        op="sigmoid_loss",
        quick=quick,
        ours=vlmkernels.sigmoid_loss,
        scale=10.0,
        bias=-10.0,
        recomputed=partial(_recomputed_by_sigmoid_loss, device),
    )
    everyone = (eager, chunked, compiled, plain, plain_compiled)
    pair = (eager, compiled)
    cases = []
    for dtype in (F32, BF16):
        cases.append(case("N=4096 D=512", dtype, 4096, 4096, 512, everyone, memory=True, headline=True))
        for n in (64, 128, 256, 512, 1024):
            cases.append(case(f"N={n} D=512", dtype, n, n, 512, pair))
    cases.append(case("N=1024 D=768", F32, 1024, 1024, 768, pair))
    cases.append(case("N=2048 D=512 frozen key", F32, 2048, 2048, 512, pair, frozen=True))
    cases.append(case("N=4096 D=512 forward only", F32, 4096, 4096, 512, pair, backward=False))
    cases.append(case("N=1024 M=4096 D=512", F32, 1024, 4096, 512, (plain, plain_compiled), memory=True))
    cases.append(case("N=65536 D=512", F32, 65536, 65536, 512, (eager,), memory=True, long=True))
    return cases


def _hidden(device: str, dtype: torch.dtype, n: int, d: int, v: int, *, ignored: float) -> dict[str, Tensor]:
    """Rows of unit variance and a head whose logits have it, as a trained model's."""
    hidden = torch.randn(n, d, device=device).to(dtype)  # [N, D]
    weight = (torch.randn(v, d, device=device) / d**0.5).to(dtype)  # [V, D]
    target = torch.randint(v, (n,), device=device)
    target = torch.where(torch.rand(n, device=device) < ignored, -100, target)
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "target": target}


def _eager_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """As causal language models of transformers compute it: the logits are rounded, then float32."""
    return cross_entropy(linear(hidden, weight).float(), target)


def _torch_linear_cross_entropy(*, chunked: bool) -> Callable[..., Tensor]:
    function = peers.load("linear_cross_entropy")
    options = {"options": peers.load("torch.nn:LinearCrossEntropyOptions")()} if chunked else {}
    return partial(_called_in_order, function, **options)


def _called_in_order(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, target: Tensor, **options: Any
) -> Tensor:
    return function(hidden, weight, target, **options)


def linear_cross_entropy(quick: bool, device: str) -> list[Case]:
    """One sweep, 6 N V D operations of the rows that are counted."""
    eager = Baseline("F.linear, F.cross_entropy", lambda: _eager_cross_entropy)
    compiled = Baseline("torch.compile of F.linear, F.cross_entropy", eager.make, True)
    whole = Baseline("F.linear_cross_entropy", partial(_torch_linear_cross_entropy, chunked=False))
    chunked = Baseline("F.linear_cross_entropy, chunked", partial(_torch_linear_cross_entropy, chunked=True))
    everyone = (eager, compiled, whole, chunked)

    def case(
        dtype: torch.dtype,
        n: int,
        d: int,
        v: int,
        *,
        ignored: float = 0.0,
        baselines: tuple[Baseline, ...] = everyone,
        **flags: Any,
    ) -> Case:
        sizes = cut(quick, n=n, d=d, v=v)
        rows = sizes["n"] * (1 - ignored)
        flops = 6.0 * rows * sizes["d"] * sizes["v"]
        note = f", {ignored:.0%} ignored" if ignored else ""
        return Case(
            op="linear_cross_entropy",
            name=f"[{n}, {d}] x {v} classes{note} {type_name(dtype)}",
            dtype=dtype,
            sizes=sizes,
            make_inputs=partial(_hidden, ignored=ignored),
            ours=vlmkernels.linear_cross_entropy,
            baselines=timed(quick, *baselines),
            flops=flops,
            min_flops=flops,
            bytes=2.0 * (rows + sizes["v"]) * sizes["d"] * dtype.itemsize,
            **flags,
        )

    cases = []
    for dtype in (F32, BF16):
        cases.append(case(dtype, 2048, 768, 50257, memory=True, headline=True))
        cases.append(case(dtype, 2048, 768, 50257, ignored=0.85))
        for n, d, v in ((64, 256, 1000), (256, 512, 8000), (512, 768, 30522)):
            cases.append(case(dtype, n, d, v))
        fastest = (compiled, whole)  # the others take minutes a call
        cases.append(case(dtype, 8192, 2048, 32000, baselines=fastest, memory=True, long=True))
    return cases


def _two_models(
    device: str, dtype: torch.dtype, n: int, d: int, e: int, v: int, *, k: int
) -> dict[str, Tensor]:
    """A student of width d and a teacher of width e, or the k likeliest classes of its rows."""
    student, teacher = (_hidden(device, dtype, n, width, v, ignored=0.0) for width in (d, e))
    inputs = {f"student_{name}": student[name] for name in ("hidden", "weight")}
    hidden, weight = (teacher[name].detach() for name in ("hidden", "weight"))
    if not k:
        return inputs | {"teacher_hidden": hidden, "teacher_weight": weight}
    log_probs, indices = log_softmax(linear(hidden, weight).float() / T, 1).topk(min(k, v))
    return inputs | {"log_probs": log_probs, "indices": indices}


def _offline(op: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    def loss(student_hidden: Tensor, student_weight: Tensor, log_probs: Tensor, indices: Tensor) -> Tensor:
        return op(student_hidden, student_weight, teacher_topk=(log_probs, indices), **options)

    return loss


def _eager_distillation(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> Tensor:
    """Of logits that are rounded, then float32."""
    logits = linear(student_hidden, student_weight), linear(teacher_hidden, teacher_weight)
    log_s, log_p = (log_softmax(x.float() / T, 1) for x in logits)
    return T * T * kl_div(log_s, log_p, reduction="batchmean", log_target=True)


def linear_distillation(quick: bool, device: str) -> list[Case]:
    """One sweep: 6 N V D operations of the student and 2 N V E of a teacher that is not offline."""
    eager = Baseline("F.linear, F.kl_div of F.log_softmax", lambda: _eager_distillation)

    def case(
        dtype: torch.dtype,
        n: int,
        d: int,
        e: int,
        v: int,
        divergence: str = "forward_kl",
        k: int = 0,
        **flags: Any,
    ) -> Case:
        form = partial(_offline if k else partial, temperature=T, divergence=divergence)
        plain = Baseline("reference", lambda: form(reference.linear_distillation))
        peer = eager if divergence == "forward_kl" and not k else plain
        compiled = Baseline(f"torch.compile of {peer.name}", peer.make, True)
        sizes = cut(quick, n=n, d=d, e=e, v=v)
        n_, d_, e_, v_ = sizes.values()
        flops = n_ * v_ * (6.0 * d_ + (0.0 if k else 2.0 * e_))
        of_teacher = 12.0 * n_ * k if k else (n_ + v_) * e_ * dtype.itemsize
        note = f", top {k}" if k else ""
        return Case(
            op="linear_distillation",
            name=f"[{n}, {d}] of [{n}, {e}] x {v} classes, {divergence}{note} {type_name(dtype)}",
            dtype=dtype,
            sizes=sizes,
            make_inputs=partial(_two_models, k=k),
            ours=form(vlmkernels.linear_distillation),
            baselines=timed(quick, peer, compiled),
            flops=flops,
            min_flops=flops,
            bytes=2.0 * (n_ + v_) * d_ * dtype.itemsize + of_teacher,
            **flags,
        )

    cases = []
    for dtype in (F32, BF16):
        large = partial(case, dtype, 1024, 512, 1024, 32_000)
        cases += [large(memory=True, headline=True), large("jsd", memory=True), large(k=64, memory=True)]
        for n, d, e, v in ((64, 256, 512, 1000), (256, 512, 1024, 8000)):
            cases.append(case(dtype, n, d, e, v))
    return cases


def _distilled(
    device: str, dtype: torch.dtype, n: int, m: int, d: int, e: int, *, frozen: bool
) -> dict[str, Tensor]:
    """A student's features with those of a teacher of width e, whose scales are those of trained models."""
    student = _features(device, dtype, n, m, d, frozen=frozen, scale=50.0, bias=None)
    teacher = _features(device, dtype, n, m, e, frozen=frozen, scale=100.0, bias=None)
    return student | {f"teacher_{name}": tensor.detach() for name, tensor in teacher.items()}


def _open_clip_distillation() -> Callable[..., Tensor]:
    module = peers.load("open_clip.loss").DistillClipLoss()

    def loss(query: Tensor, key: Tensor, scale: Tensor, **teacher: Tensor) -> Tensor:
        taught = (teacher[f"teacher_{name}"] for name in ("query", "key", "scale"))
        pairs = zip(module.get_logits(*taught), module.get_logits(query, key, scale), strict=True)
        rows, columns = (module.dist_loss(theirs, ours) for theirs, ours in pairs)
        return (rows + columns) / 2

    return loss


def contrastive_distillation(quick: bool, device: str) -> list[Case]:
    """Two sweeps: 8 N M D + 4 N M E operations, 6 N M D + 2 N M E where the logits fit in `store_bytes`."""
    eager = Baseline("distillation term of open_clip DistillClipLoss", _open_clip_distillation, matrices=10)
    compiled = Baseline(f"torch.compile of the {eager.name}", eager.make, True, 8)
    form = {"divergence": "cross_entropy"}  # open_clip's
    plain = Baseline("reference", lambda: partial(reference.contrastive_distillation, **form), matrices=10)
    plain_compiled = Baseline("torch.compile of the reference", plain.make, True, 8)

    def case(
        name: str,
        dtype: torch.dtype,
        n: int,
        baselines: tuple[Baseline, ...],
        *,
        e: int = 512,
        frozen: bool = False,
        backward: bool = True,
        **flags: Any,
    ) -> Case:
        sizes = cut(quick, n=n, m=n, d=512, e=e)
        n, d, e = sizes["n"], sizes["d"], sizes["e"]
        towers = 1 if frozen else 2
        again = _recomputed_by_distillation(device, dtype, n)
        each = partial(pairwise_flops, n, n, backward=backward, recomputed=again)
        student, teacher = each(d, towers=towers), each(e, towers=0)
        return Case(
            op="contrastive_distillation",
            name=f"{name} {type_name(dtype)}",
            dtype=dtype,
            sizes=sizes,
            make_inputs=partial(_distilled, frozen=frozen),
            ours=partial(vlmkernels.contrastive_distillation, **form),
            baselines=timed(quick, *baselines),
            flops=student[0] + teacher[0],
            min_flops=student[1] + teacher[1],
            bytes=n * ((2 + towers * backward) * d + 2 * e) * dtype.itemsize,
            backward=backward,
            **flags,
        )

    everyone = (eager, compiled, plain, plain_compiled)
    trio = (eager, compiled, plain_compiled)
    cases = []
    for dtype in (F32, BF16):
        cases.append(case("N=4096 D=512", dtype, 4096, everyone, memory=True, headline=True))
        for n in (64, 128, 256, 512, 1024):
            cases.append(case(f"N={n} D=512", dtype, n, trio))
        cases.append(case("N=16384 D=512", dtype, 16384, (eager, plain_compiled), memory=True, long=True))
    cases.append(case("N=2048 D=512, teacher 768", F32, 2048, trio, e=768))
    cases.append(case("N=2048 D=512 frozen key", F32, 2048, trio, frozen=True))
    cases.append(case("N=4096 D=512 forward only", F32, 4096, trio, backward=False))
    return cases


def _recomputed_by_distillation(device: str, dtype: torch.dtype, n: int) -> float:
    """The part of the logits beyond the default `store_bytes`; the reference keeps none."""
    if not _library.has_kernel("contrastive_distillation_stats", device.upper()):
        return 1.0
    features = torch.empty(1, dtype=dtype, device=device).expand(n, 1)
    kept, everything = (
        distillation.store_size(features, features, torch.promote_types(dtype, F32), budget)
        for budget in (1 << 28, 1 << 62)
    )
    return 1 - kept / everything if everything else 1.0


CASES = (contrastive_distillation, info_nce, linear_cross_entropy, linear_distillation, sigmoid_loss)
