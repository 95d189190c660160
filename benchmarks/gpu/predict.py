"""Predictions: no kernel is faster than its slowest resource, and an op takes the sum of its kernels.

A kernel takes at least as long as the memory needs for its operands, as the units that multiply need for its
products at their peak, and, where tests/gpu/model.py has rates for the card, as the busiest pipe needs for
the machine code of the loop that multiplies, on the multiprocessor with the most programs.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from typing import Any

import torch
import triton

from benchmarks.gpu import trace
from benchmarks.gpu.cards import CARDS, Card
from benchmarks.gpu.trace import Pass, Step
from benchmarks.gpu.workloads import Workload, workloads
from benchmarks.measure import ROOT
from tests.gpu.launches import Launch
from tests.gpu.machine_code import TARGETS, machine_code
from tests.gpu.matrix import on
from tests.gpu.model import RATES, Bound, bound

FORWARD, TRAINING = "forward", "training"
PREDICTIONS = ROOT / "benchmarks" / "gpu" / "predictions.json"
_BOUNDS: dict[str, Bound] = {}  # launches of equal code compile once


def traced(workload: Workload, target: str, direction: str) -> list[Pass]:
    """The passes of one call on `target`."""
    tensors = workload.tensors("meta")
    bounds = workload.intervals()
    forward, backward = Pass(), Pass()
    with workload.precision():
        with trace.recording(forward, target, bounds), torch.set_grad_enabled(direction == TRAINING):
            out = workload.ours(**tensors)
        forward.stays = {trace.storage(out)}
        if direction == FORWARD:
            return [forward]
        dout = torch.ones_like(out)
        with trace.recording(backward, target, bounds):
            grads = torch.autograd.grad(out, [x for x in tensors.values() if x.requires_grad], dout)
    forward.stays |= backward.read.keys()
    backward.stays = set(map(trace.storage, grads))
    return [forward, backward]


def code_bound(launch: Launch, target: str) -> Bound | None:
    """What the machine code allows, None on cards without rates."""
    if target not in RATES:
        return None
    with on(target):
        source, options = launch.source(TARGETS[target])
        depth = launch.arguments.get("depth")
        key = repr((target, launch.name, source.signature, source.constants, source.attrs, options, depth))
        if key not in _BOUNDS:
            _BOUNDS[key] = bound(launch, machine_code(launch.compiled(TARGETS[target]), target))
    return _BOUNDS[key]


def _unpadded(launch: Launch) -> float:
    """The part of the depth that the last step along it does not pad: `Bound.share` counts no padding."""
    depth, step = launch.arguments.get("depth"), launch.config.get("BLOCK_K")
    return depth / (triton.cdiv(depth, step) * step) if depth else 1.0


def seconds_of(step: Step, moved: int, card: Card) -> tuple[dict[str, float], Bound | None]:
    """What each resource needs at least, "memory", "products" and "code"; and the bound of the code."""
    needs = {"memory": moved / (card.bandwidth * 1e9)}
    found = None
    if step.flops:
        at_peak = step.flops / card.peak(step.kind)
        needs["products"] = at_peak
        if step.launch is not None:
            if step.even:
                programs = math.prod(step.launch.grid)
                fullest = -(-programs // card.multiprocessors) * card.multiprocessors / programs
                needs["products"] = at_peak * fullest
            found = code_bound(step.launch, card.target)
            if found is not None:
                peak = card.peak("tf32" if step.kind == "tf32x3" else step.kind)
                useful = step.flops * _unpadded(step.launch)
                needs["code"] = useful / peak / found.share * needs["products"] / at_peak
    return needs, found


def on_card(workload: Workload, card: Card, direction: str) -> dict[str, Any]:
    """The prediction of one call."""
    passes = traced(workload, card.target, direction)
    by_resource = dict.fromkeys(("memory", "products", "code"), 0.0)
    code: dict[str, list] = {}
    steps = [step for this in passes for step in this.steps]
    moved = [size for this in passes for size in this.from_memory(card.cache << 20)]
    for step, size in zip(steps, moved, strict=True):
        needs, found = seconds_of(step, size, card)
        slowest = max(needs, key=lambda name: needs[name])
        by_resource[slowest] += needs[slowest]
        if found is not None and step.launch is not None:
            code[step.launch.name] = [found.pipe, round(found.share, 3)]
    total = sum(by_resource.values())
    largest = max(by_resource, key=lambda name: by_resource[name])
    needed = sum(this.compulsory for this in passes)
    return {
        "bytes": needed,
        "moved": sum(moved),
        "flops": sum(step.flops for step in steps),
        "kernels": len(steps),
        "memory_us": _us(needed / (card.bandwidth * 1e9)),
        "products_us": _us(sum(step.flops / card.peak(step.kind) for step in steps if step.flops)),
        "us": _us(total),
        "bound": largest,
        "share": round(by_resource[largest] / total, 3),
        "code": code,
    }


def _us(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")


def entries(
    chosen: Iterable[Workload], cards: Iterable[Card], say: Callable[[str], None] = lambda line: None
) -> Iterator[dict[str, Any]]:
    cards = list(cards)
    for workload in chosen:
        for direction in (FORWARD, TRAINING):
            say(f"{workload.name}, {direction}")
            yield {
                "op": workload.op,
                "form": workload.form,
                "type": workload.type,
                "direction": direction,
                "sizes": dict(workload.sizes),
                "cards": {card.name: on_card(workload, card, direction) for card in cards},
            }


def predict(
    *, quick: bool = False, command: str, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """All workloads on all cards, and what made them."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    header = {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": done.stdout.strip() if done.returncode == 0 else "unknown",
        "triton": triton.__version__,
        "torch": torch.__version__,
    }
    return {"header": header, "entries": list(entries(workloads(quick=quick), CARDS.values(), say))}
