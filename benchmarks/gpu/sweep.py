"""Times of the tiles that an entry of a table might have, on the card: `python -m benchmarks.gpu sweep OP`.

The candidates are those that tests/gpu/ranking.py orders by its model. A tile is timed within a call of the
op, whose results must stay what they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from benchmarks import measure
from benchmarks.gpu import pages, trace
from benchmarks.gpu.predict import traced
from benchmarks.gpu.timing import Timer, rounds_of, timer_for
from benchmarks.gpu.workload import TRAINING, TYPES, Workload
from benchmarks.gpu.workloads import workloads
from benchmarks.run import disagreement
from tests.gpu.interpreter import interpreting
from tests.gpu.launches import Launch
from tests.gpu.matrix import on
from tests.gpu.ranking import SWEEPS, Sweep
from vlmkernels.ops import _pairwise_small
from vlmkernels.triton import _attention, _attention_bwd, _tiles

FORMS = {"interval_attention": "full", "gated_linear_residual": "attention output"}
KINDS = {"half": "bf16", "tf32": "tf32", True: "bf16", False: "fp32"}  # as the keys of the tables have them


def op_of(sweep: Sweep) -> str:
    module = sweep.kernel.partition(".")[0].removeprefix("_").removesuffix("_bwd")
    return "interval_attention" if module == "attention" else module


OPS = list(dict.fromkeys(map(op_of, SWEEPS)))
Task = tuple[int, tuple]  # a place in SWEEPS, and a tile


def type_of(sweep: Sweep) -> str:
    return KINDS[sweep.key[0]]


def name_of(sweep: Sweep, target: str) -> str:
    heads = f", heads of {sweep.key[1]}" if op_of(sweep) == "interval_attention" else ""
    return f"{sweep.kernel}, {type_of(sweep)}{heads}, {target}"


def workload_of(sweep: Sweep, *, quick: bool, device: str) -> Workload:
    """The call in which the tiles are timed."""
    op = op_of(sweep)
    form = FORMS.get(op, "N=4096")
    found = next(w for w in workloads(quick=quick, device=device) if (w.op, w.form) == (op, form))
    sizes = dict(found.sizes)
    if op == "interval_attention":
        width = sweep.key[1]
        sizes |= {"heads": max(1, sizes["heads"] * sizes["width"] // width), "width": width}
    return dataclasses.replace(found, type=type_of(sweep), sizes=sizes)


def candidates(sweep: Sweep, target: str, *, quick: bool) -> list[tuple]:
    """The tile of the table first."""
    found = list(dict.fromkeys((sweep.chosen(target), *sweep.candidates)))
    return found[:2] if quick else found


@contextlib.contextmanager
def in_table(sweep: Sweep, tile: tuple, target: str) -> Iterator[None]:
    """Launches inside take this tile; no problem is too small for the entry."""
    with (
        mock.patch.dict(sweep.table(), {sweep.key: tile}),
        mock.patch.dict(sweep.exceptions(), {target: {}}),
        mock.patch.object(_tiles, "LARGE", 0),
    ):
        yield


def compile_tile(task: Task, target: GPUTarget) -> None:
    """Into Triton's cache, on a machine without GPU too."""
    sweep, name = SWEEPS[task[0]], f"sm_{target.arch}"
    of = workload_of(sweep, quick=False, device="cuda")
    with in_table(sweep, task[1], name):
        steps = [step for this in traced(of, name, TRAINING) for step in this.steps]
    launch = next(step.launch for step in steps if step.name == sweep.kernel)
    assert launch is not None
    with on(name):
        launch.compiled(target)


@contextlib.contextmanager
def timing_launches(
    kernel: str, timer: Timer, taken: list[list[float]], rounds: tuple[int, int]
) -> Iterator[None]:
    """Every launch of the kernel is repeated and timed."""
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(launch, self, *args, **kwargs)
        result = call()
        if Launch(self, (1, 1, 1), (), {}).name == kernel:
            taken.append(rounds_of({"": call}, timer, seconds=0.1, rounds=rounds)[""])
        return result

    with mock.patch.object(JITFunction, "run", run):
        yield


def _results(of: Workload, tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    out = of.ours(**tensors)
    return out, *torch.autograd.grad(
        out, [x for x in tensors.values() if x.requires_grad], torch.randn_like(out)
    )


@functools.lru_cache(maxsize=1)
def _given(
    place: int, device: str, quick: bool, target: str
) -> tuple[Workload, Mapping[str, Tensor], tuple[Tensor, ...]]:
    """The call of a sweep, its arguments, and what it gives by the table as it is."""
    of = workload_of(SWEEPS[place], quick=quick, device=device)
    with of.precision(), runs_on(device):
        tensors = of.tensors(device)
        return of, tensors, _results(of, tensors)


@contextlib.contextmanager
def runs_on(device: str) -> Iterator[None]:
    """The kernels of a GPU; without one they are interpreted."""
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(mock.patch.object(_pairwise_small, "LIMIT", 0))  # a path for small losses
            stack.enter_context(interpreting())
            stack.enter_context(trace.OnTriton())
        yield


def measure_tile(task: Task, device: str, quick: bool, target: str) -> dict[str, float]:
    """Seconds of the kernel in one call with this tile."""
    place, tile = task
    sweep = SWEEPS[place]
    of, tensors, expected = _given(place, device, quick, target)
    taken: list[list[float]] = []
    rounds = (2, 2) if quick else (5, 50)
    with (
        in_table(sweep, tile, target),
        of.precision(),
        runs_on(device),
        timing_launches(sweep.kernel, timer_for(device), taken, rounds),
    ):
        got = _results(of, tensors)
    for ours, theirs in zip(got, expected, strict=True):
        rounded = torch.bfloat16 if of.type == "tf32" else TYPES[of.type]
        if wrong := disagreement(theirs, ours, rounded):
            raise ArithmeticError(wrong)
    spreads = [measure.spread(of_launch) for of_launch in taken]
    return {name: sum(spread[name] for spread in spreads) for name in spreads[0]}


def shown(tile: Sequence[int]) -> str:
    return f"Tile({', '.join(map(str, tile))})"


def _entry(sweep: Sweep, target: str) -> tuple[str, str]:
    """The table that has the tile of a sweep on `target`, and the key there."""
    table, key = sweep.table(), sweep.key
    for other in ((*sweep.key, False), sweep.key):
        if other in sweep.exceptions().get(target, {}):
            table, key = sweep.exceptions(), other
    for module in (_tiles, _attention, _attention_bwd):
        for name, value in vars(module).items():
            if value is table:
                return f"{module.__name__.replace('.', '/')}.py: {name}", repr(key).replace("'", '"')
    raise LookupError(f"no table of {sweep.kernel}")


def difference(sweep: Sweep, target: str, times: Mapping[str, Mapping[str, Any]]) -> str:
    """The change of the table to the fastest tile; nothing where the two times overlap."""
    timed = {tile: x for tile, x in times.items() if "why_not" not in x}
    now = shown(sweep.chosen(target))
    head = f"{name_of(sweep, target)}: {len(timed)} of {len(times)} tiles ran"
    if now not in timed:
        return f"{head}; not that of the table: {times[now]['why_not']}"
    best = min(timed, key=lambda tile: timed[tile]["median"])
    if timed[best]["p80"] >= timed[now]["p20"]:
        return f"{head}; none is faster than {now}, {pages.time(timed[now]['median'] * 1e6)}"
    table, key = _entry(sweep, target)
    lines = [head, f"--- {table}", f"+++ on {target}"]
    for sign, tile in (("-", now), ("+", best)):
        lines.append(f"{sign}    {key}: {tile},  # {pages.time(timed[tile]['median'] * 1e6)}")
    return "\n".join(lines)
