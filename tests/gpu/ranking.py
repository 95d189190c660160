"""Tiles ranked by the static model: what `python -m tests.gpu.matrix --rank` prints.

The entries of the tables in vlmkernels/triton come from here. A tile that spills in a loop, or asks for more
shared memory than there is, is out; the others are ordered by the share of the peak of products that the
bounds of model.py leave them. Nothing is timed.
"""

import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

from vlmkernels.triton import _attention, _attention_bwd, _tiles
from vlmkernels.triton import _contrastive_distillation_bwd as _distilled_bwd
from vlmkernels.triton import contrastive_distillation as _distilled
from vlmkernels.triton import sigmoid_loss as _sigmoid

from .machine_code import TARGETS, machine_code
from .matrix import faults, launches
from .model import RATES, bound


class Sweep(NamedTuple):
    """A kernel at a workload, the entry of a table that it reads, and what else the entry might be."""

    workload: str
    kernel: str
    table: Callable[[], dict]
    exceptions: Callable[[], dict]  # of the table, by architecture
    key: tuple
    candidates: tuple

    def chosen(self, target: str) -> tuple:
        here = self.exceptions().get(target, {})
        return here.get((*self.key, False), here.get(self.key, self.table()[self.key]))  # attention: no bias


KINDS = (("bf16", "half", 64), ("tf32", "tf32", 32))  # of a workload, of the key of its tile; and its BLOCK_K


def _sizes(block_k: int, sides=((64, 64), (128, 64), (64, 128), (128, 128), (128, 256), (256, 64))) -> tuple:
    return tuple(
        _tiles.Tile(m, n, block_k, warps, stages)
        for (m, n), warps, stages in itertools.product(sides, (4, 8), (2, 3))
    )


def _attention_tiles(rows, cols, stages=(2,)) -> tuple:
    return tuple(
        _attention.Tile(m, n, warps, s) for m, n, warps, s in itertools.product(rows, cols, (4, 8), stages)
    )


def _sweeps() -> Iterator[Sweep]:
    def pairwise():
        return _tiles.TILES

    for kind, key, block_k in KINDS:
        for workload, kernel, table, exceptions in (
            (
                "info_nce {} of many devices", "info_nce._stats", lambda: _tiles.STATISTICS,
                lambda: _tiles.STATISTICS_ON,
            ),
            ("sigmoid {}", "sigmoid_loss._sweep", lambda: _sigmoid.SWEEP, lambda: _sigmoid.SWEEP_ON),
        ):  # fmt: skip
            yield Sweep(workload.format(kind), kernel, table, exceptions, (key, True), _sizes(block_k))
    for workload, kernel, exceptions in (
        ("info_nce {}", "_info_nce_bwd._tile_grads", lambda: _tiles.PRODUCTS_ON),
        ("gated_linear_residual {}", "gated_linear_residual._forward", lambda: _tiles.PRODUCTS_ON),
    ):
        for kind, key, block_k in KINDS:
            yield Sweep(workload.format(kind), kernel, pairwise, exceptions, (key, True), _sizes(block_k))
    for workload, kernel, table, exceptions in (
        (
            "contrastive_distillation {} of many devices",
            "contrastive_distillation._stats",
            lambda: _distilled.STATS,
            lambda: _distilled.STATS_ON,
        ),
        (
            "contrastive_distillation {}",
            "_contrastive_distillation_bwd._tile_grads",
            lambda: _distilled_bwd.GRADS,
            lambda: _distilled_bwd.GRADS_ON,
        ),
    ):
        for kind, key, block_k in KINDS:
            yield Sweep(workload.format(kind), kernel, table, exceptions, (key, True), _sizes(block_k))
    for half, width in _attention.FORWARD:
        workload = f"attention {'bf16' if half else 'fp32'} {width}"
        sides = (32, 64, 128) if half and width < 256 else (16, 32, 64)
        for kernel, table, exceptions in (
            ("_attention._forward", lambda: _attention.FORWARD, lambda: _attention.FORWARD_ON),
            (
                "_attention_bwd._query_grads",
                lambda: _attention_bwd.QUERY_GRADS,
                lambda: _attention_bwd.QUERY_GRADS_ON,
            ),
            (
                "_attention_bwd._key_grads",
                lambda: _attention_bwd.KEY_GRADS,
                lambda: _attention_bwd.KEY_GRADS_ON,
            ),
        ):
            candidates = _attention_tiles(sides, sides)
            yield Sweep(workload, kernel, table, exceptions, (half, width), candidates)


SWEEPS = list(_sweeps())


def measure(place: int, candidate: tuple, target: str) -> tuple[str, float, str]:
    """The tile, its rank (0 for one that is out), and why."""
    sweep = SWEEPS[place]
    name = f"{'x'.join(map(str, candidate[:-2]))} {candidate[-2]}w {candidate[-1]}s"
    entry, no_exception = {sweep.key: candidate}, {target: {}}
    with mock.patch.dict(sweep.table(), entry), mock.patch.dict(sweep.exceptions(), no_exception):
        launch = next(x for x in launches(sweep.workload, target) if x.name == sweep.kernel)
    try:
        code = machine_code(launch.compiled(TARGETS[target]), target)
    except Exception as error:  # the compilers raise what they like; a tile they refuse is out
        return name, 0, str(error).splitlines()[0][:60]
    wrong = "; ".join(faults(launch, code))
    if target not in RATES:
        return name, float(not wrong), wrong or f"{code.registers} registers, {code.programs} programs"
    b = bound(launch, code)
    pipes = ", ".join(f"{pipe} {clocks:.0f}" for pipe, clocks in b.pipes.items())
    facts = f"at most {b.share:.2f} ({b.pipe}), {code.registers} registers, {b.programs} programs; {pipes}"
    return name, 0 if wrong else b.rank, f"{wrong}; {facts}" if wrong else facts


def rank(targets: list[str], only: str = "", top: int = 6) -> int:
    """Print the sweeps whose name contains `only`; 1 if an entry of a table is out."""
    out = 0
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for (place, sweep), target in itertools.product(enumerate(SWEEPS), targets):
            if only not in f"{sweep.kernel}, {sweep.workload}":
                continue
            candidates = dict.fromkeys((sweep.chosen(target), *sweep.candidates))
            places, on = itertools.repeat(place), itertools.repeat(target)
            results = list(pool.map(measure, places, candidates, on, chunksize=2))
            current = results[0]
            out |= current[1] == 0
            ordered = sorted(results, key=lambda x: -x[1])
            kept = [x for x in ordered if x[1]]
            sys.stdout.write(f"{sweep.kernel}, {sweep.workload}, {target}: {len(kept)} of {len(results)}\n")
            for x in ordered[:top] + ([] if current in ordered[:top] else [current]):
                sys.stdout.write(f"{'*' if x == current else ' '} {x[1]:.3f} {x[0]:16} {x[2]}\n")
            sys.stdout.flush()
    return out
