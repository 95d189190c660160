"""One function per op: which inputs are measured, what they cost at least, and against whom.

Ours and every baseline are called with the same tensors by keyword. Baselines are imported through
`benchmarks.peers`, or are one line around an imported function; torch.compile gets static shapes. "one
product" is the loss of CLIP on one matrix of logits and its transpose, where open_clip multiplies twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import vlmkernels
from benchmarks import peers
from vlmkernels import _library, reference
from vlmkernels.ops import _contrastive

OURS = "vlmkernels"
QUICK_SIZE = 192
F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Baseline:
    name: str
    make: Callable[[], Callable[..., Tensor]]  # imports it; what it raises becomes the reason in the table
    compiled: bool = False
    matrices: int = 0  # N x M matrices in the features' precision that live at its peak

    def function(self) -> Callable[..., Tensor]:
        return torch.compile(self.make(), dynamic=False) if self.compiled else self.make()


@dataclass(frozen=True)
class Case:
    op: str
    name: str
    dtype: torch.dtype
    sizes: dict[str, int]
    make_inputs: Callable[..., dict[str, Tensor]]  # (device, dtype, **sizes)
    ours: Callable[..., Tensor]
    baselines: tuple[Baseline, ...]
    flops: float  # performed by our kernel, products only
    min_flops: float  # of any algorithm that forms the logits once
    bytes: float  # compulsory: every input read and every result written once
    backward: bool = True
    memory: bool = False
    long: bool = False
    headline: bool = False
    out_shape: tuple[str, ...] = field(default=())  # names of the sizes of the result; () for a loss

    @property
    def id(self) -> str:
        return f"{self.op}/{self.name}"

    def inputs(self, device: str, *, small: bool = False) -> tuple[dict[str, Tensor], Tensor | None]:
        """The tensors, and the gradient of the result (None for a loss); `small` cuts every size to 64."""
        torch.manual_seed(0)
        sizes = {name: min(size, 64) for name, size in self.sizes.items()} if small else self.sizes
        tensors = self.make_inputs(device, self.dtype, **sizes)
        if not (self.out_shape and self.backward):
            return tensors, None
        return tensors, torch.randn([sizes[name] for name in self.out_shape], device=device).to(self.dtype)

    def implementations(self) -> Iterator[tuple[str, bool, Callable[[], Callable[..., Tensor]]]]:
        """Name, whether it is compiled, and what makes the function: ours first."""
        yield OURS, False, lambda: self.ours
        for baseline in self.baselines:
            yield baseline.name, baseline.compiled, partial(self._function, baseline)

    def _function(self, baseline: Baseline) -> Callable[..., Tensor]:
        needed = baseline.matrices * self.sizes.get("n", 0) * self.sizes.get("m", 0) * self.dtype.itemsize
        if needed > available_bytes():
            raise MemoryError(
                f"needs about {needed / 2**30:.0f} GiB, {available_bytes() / 2**30:.0f} GiB are free"
            )
        return baseline.function()


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def all_cases(*, quick: bool = False, device: str = "cpu") -> list[Case]:
    """Every declared case; `quick` keeps the names, cuts the sizes and leaves torch.compile out."""
    cases = [*gated_residual(quick), *info_nce(quick, device), *sigmoid_loss(quick, device)]
    ids = [case.id for case in cases]
    assert len(set(ids)) == len(ids), "two cases of one name"
    return cases


def _cut(quick: bool, **sizes: int) -> dict[str, int]:
    return {name: min(size, QUICK_SIZE) for name, size in sizes.items()} if quick else sizes


def _kept(quick: bool, *baselines: Baseline) -> tuple[Baseline, ...]:
    return tuple(b for b in baselines if not (quick and b.compiled))


def _type_name(dtype: torch.dtype) -> str:
    return {F32: "fp32", BF16: "bf16"}[dtype]


# Contrastive losses


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


def contrastive_flops(
    n: int, m: int, d: int, *, backward: bool, towers: int, recomputed: float
) -> tuple[float, float]:
    """FLOPs performed, and the least: a product forward, one per trained tower; plus what is recomputed."""
    product = 2.0 * n * m * d
    minimum = product * (1 + towers) if backward else product
    return minimum + (recomputed * product if backward else 0), minimum


def _contrastive_case(
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
    sizes = _cut(quick, n=n, m=m, d=d)
    towers = 1 if frozen else 2
    again = recomputed(dtype=dtype, **sizes)
    flops, minimum = contrastive_flops(**sizes, backward=backward, towers=towers, recomputed=again)
    rows = sizes["n"] + sizes["m"] + (sizes["n"] + (towers - 1) * sizes["m"]) * backward
    return Case(
        op=op,
        name=f"{name} {_type_name(dtype)}",
        dtype=dtype,
        sizes=sizes,
        make_inputs=partial(_features, frozen=frozen, scale=scale, bias=bias),
        ours=ours,
        baselines=_kept(quick, *baselines),
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
    query, key = (torch.empty(rows, d, dtype=dtype, device="meta") for rows in (n, m))
    return 1 - _contrastive.store_size(query, key, 1 << 28) / _contrastive.store_size(query, key, 1 << 62)


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


def info_nce(quick: bool = False, device: str = "cpu") -> list[Case]:
    """Two sweeps: 8 N M D operations, 6 N M D where the exponentials fit in `store_bytes`."""
    eager = Baseline("open_clip ClipLoss", partial(_open_clip_loss, "ClipLoss"), matrices=6)
    compiled = Baseline("torch.compile of open_clip ClipLoss", eager.make, True, 6)
    one = Baseline("one product (transformers)", _one_product, matrices=6)
    one_compiled = Baseline("torch.compile of one product", _one_product, True, 6)
    linear = Baseline("2 x F.linear_cross_entropy", partial(_linear_cross_entropy, chunked=False), matrices=6)
    chunked = Baseline("2 x F.linear_cross_entropy, chunked", partial(_linear_cross_entropy, chunked=True))
    case = partial(
        _contrastive_case,
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


def sigmoid_loss(quick: bool = False, device: str = "cpu") -> list[Case]:
    """One sweep: the gradients are formed with the loss, 6 N M D operations."""
    make = partial(_open_clip_loss, "SigLipLoss")
    eager = Baseline("open_clip SigLipLoss", make, matrices=6)
    compiled = Baseline("torch.compile of open_clip SigLipLoss", make, True, 6)
    chunked = Baseline("open_clip SigLipLoss, chunk_size=256", partial(make, chunk_size=256))
    plain = Baseline("reference", lambda: reference.sigmoid_loss, matrices=8)
    plain_compiled = Baseline("torch.compile of the reference", plain.make, True, 8)
    case = partial(
        _contrastive_case,
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


# Elementwise


def _residual(
    device: str, dtype: torch.dtype, batch: int, tokens: int, width: int, *, vector: bool, masked: bool
) -> dict[str, Tensor]:
    shape = (batch, tokens, width)
    tensors = {name: torch.randn(shape, device=device).to(dtype).requires_grad_() for name in ("x", "y")}
    tensors["gate"] = torch.randn(width if vector else 1, device=device).to(dtype).requires_grad_()
    if masked:
        tensors["row_mask"] = torch.rand(shape[:-1], device=device) < 0.5
    return tensors


def residual_bytes(batch: int, tokens: int, width: int, *, itemsize: int, kept: float, masked: bool) -> float:
    """x read, y read where the mask keeps it, the sum written; then dout and y read where kept, dy written.

    dx is dout itself and moves nothing.
    """
    rows = batch * tokens
    return rows * width * itemsize * ((2 + kept) + (2 * kept + 1)) + 2 * rows * masked


def gated_residual(quick: bool = False) -> list[Case]:
    """Bound by memory: no product, six tensors moved."""
    eager = Baseline("x + gate.tanh() * y", lambda: lambda x, y, gate: x + gate.tanh() * y)
    compiled = Baseline("torch.compile of x + gate.tanh() * y", eager.make, True)
    plain = Baseline("reference", lambda: reference.gated_residual)
    plain_compiled = Baseline("torch.compile of the reference", plain.make, True)
    sizes = _cut(quick, batch=8, tokens=2048, width=1024)
    cases = []
    for dtype in (F32, BF16):
        for form in ("scalar gate", "vector gate", "scalar gate, half the rows masked"):
            masked = "masked" in form
            kept = 0.5 if masked else 1.0
            case = Case(
                op="gated_residual",
                name=f"[8, 2048, 1024] {form} {_type_name(dtype)}",
                dtype=dtype,
                sizes=sizes,
                make_inputs=partial(_residual, vector=form == "vector gate", masked=masked),
                ours=vlmkernels.gated_residual,
                baselines=_kept(
                    quick, *((plain, plain_compiled) if masked else (eager, compiled, plain_compiled))
                ),
                flops=0,
                min_flops=0,
                bytes=residual_bytes(**sizes, itemsize=dtype.itemsize, kept=kept, masked=masked),
                memory=form == "scalar gate",
                headline=form == "scalar gate",
                out_shape=("batch", "tokens", "width"),
            )
            cases.append(case)
    return cases
