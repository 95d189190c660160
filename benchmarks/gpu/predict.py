"""Predictions: no kernel is faster than its slowest resource, and an op takes the sum of its kernels.

A kernel takes at least as long as the memory needs for its operands, as the units that multiply need for its
products at their peak, and, where tests/gpu/model.py has rates for the card, as the busiest pipe needs for
the machine code of the loop that multiplies, on the multiprocessor with the most programs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

import torch
import triton

from benchmarks.gpu import trace
from benchmarks.gpu.cards import CARDS, Card
from benchmarks.gpu.trace import Pass, Step
from benchmarks.gpu.workload import FORWARD, TRAINING, Workload
from benchmarks.gpu.workloads import workloads
from benchmarks.measure import ROOT
from benchmarks.run import git
from tests.gpu.launches import Launch
from tests.gpu.machine_code import TARGETS, machine_code
from tests.gpu.matrix import on
from tests.gpu.model import RATES, TURNS, Bound, bound, row_clocks

PREDICTIONS = ROOT / "benchmarks" / "gpu" / "predictions.json"
_BOUNDS: dict[str, Bound] = {}  # launches of equal code compile once
_CLOCKS: dict[str, dict[str, float]] = {}


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
        depths = [launch.arguments.get(name) for name in ("depth", "width")]
        key = repr((target, launch.name, source.signature, source.constants, source.attrs, options, depths))
        if key not in _BOUNDS:
            _BOUNDS[key] = bound(launch, machine_code(launch.compiled(TARGETS[target]), target))
    return _BOUNDS[key]


def busiest(launch: Launch, target: str) -> tuple[str, float] | None:
    """The busiest pipe of a program of a kernel of rows, and its clocks; None on cards without rates."""
    if target not in RATES:
        return None
    with on(target):
        source, options = launch.source(TARGETS[target])
        sizes = [launch.arguments.get(name) for name in ("classes", "depth")]
        key = repr((target, launch.name, source.signature, source.constants, source.attrs, options, sizes))
        if key not in _CLOCKS:
            _CLOCKS[key] = row_clocks(launch, machine_code(launch.compiled(TARGETS[target]), target))
    return max(_CLOCKS[key].items(), key=lambda item: item[1])


def _unpadded(launch: Launch) -> float:
    """The part of the depth that the last step along it does not pad: `Bound.share` counts no padding."""
    depth, step = launch.arguments.get("depth"), launch.config.get("BLOCK_K")
    return depth / (triton.cdiv(depth, step) * step) if depth else 1.0


def facts_of(step: Step, moved: int, card: Card) -> tuple[tuple, tuple[str, float] | None]:
    """The costs of a step for `estimate`, independent of the rates; and what its code allows.

    (bytes, FLOPs, their kind, the depth of a library's products, how much longer the fullest multiprocessor
    is busy than the average, microseconds that the machine code takes at least), (the busiest pipe, the share
    of the peak of products, or of the memory's bandwidth where there are none).
    """
    fullest, code, allowed = 1.0, 0.0, None
    if step.launch is not None and step.launch.name in TURNS:
        busy = busiest(step.launch, card.target)
        if busy is not None:
            programs = -(-math.prod(step.launch.grid) // card.multiprocessors)
            code = programs * busy[1] / (card.clock * 1e6)
            allowed = busy[0], min(step.bytes / (card.bandwidth * 1e9) / code, 1.0)
    elif step.flops and step.launch is not None:
        if step.even:
            programs = math.prod(step.launch.grid)
            fullest = -(-programs // card.multiprocessors) * card.multiprocessors / programs
        found = code_bound(step.launch, card.target)
        if found is not None:
            peak = card.peak("tf32" if step.kind == "tf32x3" else step.kind)
            code = step.flops * _unpadded(step.launch) / peak / found.share * fullest
            allowed = found.pipe, found.share
    fullest, code = float(f"{fullest:.6g}"), float(f"{code * 1e6:.6g}")
    return (moved, step.flops, step.kind, step.depth, fullest, code), allowed


def estimate(facts: Mapping[str, Any], card: Card) -> dict[str, Any]:
    """What the steps of `facts` take at least at the rates of a card, each at its slowest resource."""
    by_resource = dict.fromkeys(("memory", "products", "code"), 0.0)
    products = 0.0
    for count, moved, flops, kind, depth, fullest, code in facts["steps"]:
        at_peak = flops / card.peak(kind, depth) if flops else 0.0
        needs = {"memory": moved / (card.bandwidth * 1e9), "products": at_peak * fullest, "code": code / 1e6}
        slowest = max(needs, key=lambda name: needs[name])
        by_resource[slowest] += count * needs[slowest]
        products += count * at_peak
    total = sum(by_resource.values())
    largest = max(by_resource, key=lambda name: by_resource[name])
    return {
        "memory_us": _us(facts["bytes"] / (card.bandwidth * 1e9)),
        "products_us": _us(products),
        "us": _us(total),
        "bound": largest,
        "share": round(by_resource[largest] / total, 3),
    }


def on_card(workload: Workload, card: Card, direction: str) -> dict[str, Any]:
    """The prediction of one call."""
    passes = traced(workload, card.target, direction)
    code: dict[str, list] = {}
    steps = [step for this in passes for step in this.steps]
    moved = [size for this in passes for size in this.from_memory(card.cache << 20)]
    costs = []
    for step, size in zip(steps, moved, strict=True):
        cost, allowed = facts_of(step, size, card)
        costs.append(cost)
        if allowed is not None and step.launch is not None:
            code[step.launch.name] = [allowed[0], round(allowed[1], 3)]
    facts = {
        "bytes": sum(this.compulsory for this in passes),
        "moved": sum(moved),
        "flops": sum(step.flops for step in steps),
        "kernels": len(steps),
        "code": code,
        "steps": [[count, *cost] for cost, count in Counter(costs).items()],
    }
    return facts | estimate(facts, card)


def _us(seconds: float) -> float:
    return float(f"{seconds * 1e6:.4g}")


def entries(
    chosen: Iterable[Workload], cards: Iterable[Card], say: Callable[[str], None] = lambda line: None
) -> Iterator[dict[str, Any]]:
    cards = list(cards)
    for workload in (w for w in chosen if w.predicted):
        for direction in workload.directions:
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
    header = {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD") or "unknown",
        "triton": triton.__version__,
        "torch": torch.__version__,
    }
    return {"header": header, "entries": list(entries(workloads(quick=quick), CARDS.values(), say))}
