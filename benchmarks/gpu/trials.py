"""The cases of tests/gpu on a device: each kernel's launches on real memory, judged against float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import reason, synchronize
from tests.gpu import trials_cuda
from tests.gpu.cases import CASES, Case
from tests.gpu.interpreter import interpreting
from tests.gpu.trials import Trial, check
from vlmkernels._library import KERNELS

# The ops that a launcher serves
OPS = {
    "scale_grads": ("sigmoid_loss", "linear_cross_entropy", "linear_distillation", "distillation"),
}
POISONED = 1 << 28  # in storages up to so many bytes, NaN fills what no view covers


class Extension(NamedTuple):
    """A case of the kernels in CUDA C++, which the op itself runs."""

    variant: str
    op: str = "gated_residual"
    slow: bool = False
    far: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}, CUDA C++, {self.variant}"


def ops_of(case: str) -> tuple[str, ...]:
    """The ops that a case of this name is of."""
    launcher = case.partition(",")[0]
    return OPS.get(launcher, (launcher,))


def _every() -> list[Case | Extension]:
    every: list[Case | Extension] = list(CASES.values())
    if KERNELS.get(("gated_residual", "CUDA"), "").startswith("CUDA C++"):
        every += [Extension(variant) for variant in trials_cuda.CASES]
    return every


def cases_for(ops: Iterable[str], *, slow: bool, one_each: bool = False) -> list[Case | Extension]:
    """Those of `ops`, the first of each launcher before the others; with `one_each` only these."""
    wanted = set(ops)
    found = [c for c in _every() if wanted & set(ops_of(c.name)) and (slow or not c.slow)]
    first = list({(type(c), c.op): c for c in reversed(found)}.values())[::-1]
    return first if one_each else [*first, *(c for c in found if c not in first)]


class OnDevice:
    """A trial whose inputs are on `device` in the same layout; float64 judges on the CPU."""

    def __init__(self, trial: Trial, device: str):
        self.trial, self.device = trial, device

    def launch(self) -> Sequence[Tensor]:
        moved = _moved(self.trial, self.device, {})
        with torch.device(self.device):
            got = moved.launch()
        synchronize(self.device)
        return [x.cpu() for x in got]

    def judge(self, got: Sequence[Tensor]) -> None:
        self.trial.judge(got)


class Dispatched(OnDevice):
    """gated_residual and its backward as the dispatcher runs them."""

    def launch(self) -> Sequence[Tensor]:
        t = _moved(self.trial, self.device, {})
        ops = torch.ops.vlmkernels
        out = ops.gated_residual(t.x, t.y, t.given, t.mask)
        dy, dgate = ops.gated_residual_bwd(t.dout, t.y, t.given, t.mask, t.needs)
        synchronize(self.device)
        return [x.cpu() for x in (out, dy, dgate.to(t.gate.dtype))]


def _moved(x: Any, device: str, storages: dict[int, Tensor]) -> Any:
    """x with every tensor in it on `device`; tensors that shared memory share it again."""
    if isinstance(x, Tensor):
        return _placed(x, device, storages)
    if isinstance(x, (list, tuple)):
        return type(x)(_moved(item, device, storages) for item in x)
    if type(x).__module__.startswith("tests.gpu."):
        x = copy.copy(x)
        for name, value in vars(x).items():
            setattr(x, name, _moved(value, device, storages))
    return x


def _placed(x: Tensor, device: str, storages: dict[int, Tensor]) -> Tensor:
    owner = x.untyped_storage()
    if owner._cdata not in storages:
        storages[owner._cdata] = torch.empty(owner.nbytes(), dtype=torch.uint8, device=device)
        if owner.nbytes() <= POISONED:
            storages[owner._cdata].fill_(0xFF)
    where = storages[owner._cdata][: owner.nbytes() // x.element_size() * x.element_size()].view(x.dtype)
    once = [size if stride else min(size, 1) for size, stride in zip(x.shape, x.stride(), strict=True)]
    here = x.as_strided(once, x.stride(), x.storage_offset())
    where.as_strided(once, x.stride(), x.storage_offset()).copy_(here)
    return where.as_strided(x.shape, x.stride(), x.storage_offset())


@contextlib.contextmanager
def _as_they_are() -> Iterator[None]:
    yield


def executor(device: str) -> Callable[[], AbstractContextManager]:
    """The executor of the launches: the interpreter if there is no GPU."""
    return interpreting if device == "cpu" else _as_they_are


def run_one(case: Case | Extension, device: str) -> None:
    if isinstance(case, Extension):
        torch.manual_seed(0)
        check(Dispatched(trials_cuda.CASES[case.variant](), device), _as_they_are)
    else:
        with case.prepared() as trial:
            check(OnDevice(trial, device), executor(device))


def run_named(name: str, device: str) -> None:
    """Raises where the kernel of the case is wrong."""
    run_one(next(case for case in _every() if case.name == name), device)


def run_aloud(cases: Iterable[Case | Extension], device: str, say: Callable[[str], None]) -> bool:
    """Whether all are right; each is announced, so that what a tool prints has its place."""
    wrong = False
    for case in cases:
        say(f"case: {case.name}")
        try:
            run_one(case, device)
        except Exception as error:  # the cases behind it are watched all the same
            say(f"failed: {reason(error)}")
            wrong = True
    return not wrong
