"""Runs the cases of one source tree on request: `benchmarks.against` starts one for each tree.

    python benchmarks/worker.py TREE

Requests and answers are JSON, one a line, on standard input and output. The tree gives the library and the
cases of ops, which know its internals; the works on whole models, which use its public classes, are those
next to this file. This file and `measure.py` time both trees alike.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

TREE = Path(sys.argv[1])
sys.path[0] = str(TREE)

import torch  # noqa: E402

_spec = importlib.util.spec_from_file_location("measure", Path(__file__).with_name("measure.py"))
assert _spec is not None
assert _spec.loader is not None
measure = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(measure)


class Ops:
    """The cases of `benchmarks.run`."""

    def __init__(self, quick: bool, device: str) -> None:
        from benchmarks.cases import all_cases

        self.device = device
        self.cases = {case.id: case for case in all_cases(quick=quick, device=device)}

    def names(self) -> list[str]:
        return list(self.cases)

    def prepare(self, name: str, small: bool) -> tuple[Any, list[Any]]:
        """What is timed, and the tensors that are there before."""
        case = self.cases[name]
        tensors, dout = case.inputs(self.device, small=small)
        known = [t for t in (*tensors.values(), dout) if t is not None]
        return partial(measure.step, case.ours, tensors, dout, case.backward), known


class Models:
    """The works of `benchmarks.models`, on this library's own model."""

    def __init__(self, quick: bool, device: str) -> None:
        import vlmkernels  # noqa: F401  (that of the tree, before the path leads elsewhere)

        sys.path[0] = str(Path(__file__).parent.parent)
        from benchmarks.models import work

        self.work, self.quick = work, quick
        self.works = {each.name: each for each in work.works(quick)}

    def names(self) -> list[str]:
        return list(self.works)

    def prepare(self, name: str, small: bool) -> tuple[Any, list[Any]]:
        work = self.works[name]
        family = self.work.family_of(work, self.quick)
        model = self.work.prepared(family.systems[0], work)
        inputs = family.inputs(1 if small else work.batch)
        call = self.work.call_of(model, work, inputs)

        def step() -> tuple:
            return (call(), *(p.grad for p in model.module.parameters() if p.grad is not None))

        return step, [*inputs, *model.module.parameters(), *model.module.buffers()]


class Worker:
    def start(self, kind: str, quick: bool, device: str, threads: int) -> list[str]:
        torch.set_num_threads(threads)
        self.device = device
        self.source = {"ops": Ops, "models": Models}[kind](quick, device)
        return self.source.names()

    def prepare(self, name: str, result: str) -> None:
        """Calls it, writes its first result, and warms it up."""
        torch.manual_seed(0)
        self.call, self.known = self.source.prepare(name, small=False)
        torch.save(self.call()[0].detach(), result)
        self.call()

    def sample(self, repeats: int) -> float:
        return measure.seconds_per_call(self.call, repeats, partial(measure.synchronize, self.device))

    def peak(self, name: str) -> int:
        """Extra memory of one call; for a fresh process."""
        self.source.prepare(name, small=True)[0]()  # loads code and starts threads
        call, known = self.source.prepare(name, small=False)
        return measure.peak_extra(call, known, self.device)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # the reason in the row of this case
            answer = {"error": measure.reason(error)}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
