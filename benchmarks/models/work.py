"""What is timed of a model: a training step, images embedded, texts embedded; and where its time goes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vlmkernels
from benchmarks import measure

from . import language
from .systems import OURS, STEP, Family, Model, System, contrastive, precision

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of a result against ours (relative Frobenius error); bfloat16 is rounded in other places by every library
AGREE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PARTS = (
    (
        "linear layers",
        r"vlmkernels::(linear|mlp|gated_mlp)|aten::(addmm|mm|linear|bmm|mkldnn_linear)|mkldnn::",
    ),
    ("attention", r"vlmkernels::(interval|perceiver)_attention|aten::.*scaled_dot_product|aten::_flash_att"),
    ("convolutions", r"aten::.*conv"),
    (
        "loss",
        r"vlmkernels::(info_nce|sigmoid_loss|linear_cross_entropy)|aten::.*(log_softmax|nll_loss|cross_entropy)",
    ),
    ("norms", r"aten::.*(layer_norm|batch_norm|linalg_vector_norm)"),
    ("activations", r"aten::(gelu|sigmoid|silu|tanh|relu)"),
    ("copies and casts", r"aten::(copy_|_to_copy|cat|contiguous|clone|fill_|zero_)"),
    ("additions and products of elements", r"aten::(add|mul|sub|div|sum)"),
)


@dataclass(frozen=True)
class Work:
    family: str
    what: str  # "training step", "images", "texts"
    batch: int
    type: str  # a key of DTYPES

    @property
    def name(self) -> str:
        unit = "" if self.what == STEP else " embedded"
        return f"{self.family}, {self.what}{unit}, batch {self.batch}, {self.type}"

    @property
    def training(self) -> bool:
        return self.what == STEP


def families(quick: bool) -> Iterator[Family]:
    yield from contrastive(quick)
    yield from language.families(quick)


def works(quick: bool) -> Iterator[Work]:
    """All that is timed, in its order."""
    for family in families(quick):
        for what, batches in family.batches.items():
            for batch in (2,) if quick else batches:
                yield from (Work(family.name, what, batch, kind) for kind in DTYPES)


def family_of(work: Work, quick: bool) -> Family:
    return next(family for family in families(quick) if family.name == work.family)


def call_of(model: Model, work: Work, inputs: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    """One training step (its loss; gradients are left in the parameters), or the embeddings of a batch."""
    images, tokens = inputs[0], model.padded(inputs[1])
    dtype = DTYPES[work.type]
    if not work.training:
        return partial(_embed, _embedding(model, work, images, tokens), dtype)
    return partial(_step, model, images, tokens, dtype)


def _embedding(model: Model, work: Work, images: Tensor, tokens: Tensor) -> Callable[[], Tensor]:
    embed, x = (model.images, images) if work.what == "images" else (model.texts, tokens)
    assert embed is not None, f"{work.family} embeds no {work.what}"
    return partial(embed, x)


@torch.inference_mode()
def _embed(embed: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    with precision(dtype):
        return embed()


def _step(model: Model, images: Tensor, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    model.module.zero_grad(set_to_none=True)
    with precision(dtype):
        loss = model.loss(images, tokens)
    loss.backward()
    return loss.detach()


def prepared(system: System, work: Work) -> Model:
    """The model in the mode that the work asks for; ours embeds with packed weights."""
    model = system.model()
    model.module.train(work.training)
    if system.name == OURS and not work.training:
        vlmkernels.prepare_for_inference(model.module)
    return model


def result_of(model: Model, work: Work, call: Callable[[], Tensor]) -> list[Tensor]:
    """What must agree between systems: embeddings or loss, and in float32 the norm of all gradients."""
    out = [call().clone()]
    if work.training and work.type == "fp32":
        grads = [p.grad for p in model.module.parameters() if p.grad is not None]
        out.append(torch.stack([grad.double().norm() for grad in grads]).norm())
    return out


def disagreement(ours: list[Tensor], theirs: list[Tensor], work: Work) -> str | None:
    for name, a, b in zip(("result", "norm of the gradients"), ours, theirs, strict=False):
        error = float((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-6))
        if not error <= AGREE[DTYPES[work.type]]:
            return f"its {name} differs from ours by {error:.1e} (relative)"
    return None


def flops_of(model: Model, work: Work, inputs: tuple[Tensor, Tensor]) -> int:
    """Of matrix products, attention and convolutions in one call of an eager peer.

    A backward counts as two forwards: torch's counter takes the weight gradient of a grouped convolution for
    that of a dense one.
    """
    images, tokens = inputs[0], model.padded(inputs[1])
    call = partial(model.loss, images, tokens) if work.training else _embedding(model, work, images, tokens)
    with FlopCounterMode(display=False) as counter, precision(DTYPES[work.type]):
        call()
    return counter.get_total_flops() * (3 if work.training else 1)


def parts_of(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of one call by what they are spent on."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    out = dict.fromkeys([name for name, _ in PARTS] + ["other"], 0.0)
    for event in profile.key_averages():
        # An op's forward counts as that of its autograd function
        key = re.sub("^vlmkernels_", "vlmkernels::", event.key)
        name = next((name for name, pattern in PARTS if re.match(pattern, key)), "other")
        out[name] += event.self_cpu_time_total / 1e6
    return {name: seconds for name, seconds in out.items() if seconds}


def peak_bytes(work: Work, system: System, quick: bool) -> int:
    """Peak of one call above the parameters, the inputs and what it returns; for a fresh process."""
    model = prepared(system, work)
    family = family_of(work, quick)
    inputs = family.inputs(work.batch)
    call = call_of(model, work, inputs)
    if system.compiled:
        call()
    else:
        call_of(model, work, family.inputs(1))()
    model.module.zero_grad(set_to_none=True)
    known = [*inputs, *model.module.parameters(), *model.module.buffers()]

    def run() -> tuple:
        out = call()
        return (out, *(p.grad for p in model.module.parameters()))

    return measure.peak_extra(run, known)


def optimizer_step(module: nn.Module) -> Callable[[], Any]:
    """One step of torch's fused AdamW on all parameters, whose gradients must be there."""
    return torch.optim.AdamW(module.parameters(), lr=1e-5, fused=True).step
