"""Host time of a training step of the losses: their Python, without Triton's launches and cuBLAS's calls.

    python -m benchmarks.gpu.overhead            microseconds of the processor, without and with the backward
    python -m benchmarks.gpu.overhead --profile  and where the latter go

The public ops run on CPU tensors with their kernels for CUDA; a launch does nothing.
"""

import argparse
import contextlib
import cProfile
import pstats
import statistics
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

import vlmkernels
from vlmkernels._library import IN_PYTHON
from vlmkernels.ops import _pairwise_small
from vlmkernels.triton import _ahead, _info_nce_bwd, _tiles, info_nce, sigmoid_loss

KERNELS = {
    "info_nce": info_nce.info_nce,
    "info_nce_bwd": _info_nce_bwd.info_nce_bwd,
    "sigmoid_loss": sigmoid_loss.sigmoid_loss,
    "sigmoid_loss_bwd": sigmoid_loss.sigmoid_loss_bwd,
    "scale_grads": _ahead.scale_grads,
}
ROWS, WIDTH = 64, 64
HERE = contextlib.nullcontext()


@contextlib.contextmanager
def launching_nothing() -> Iterator[None]:
    instead = (
        (Tensor, "is_cuda", property(lambda x: True)),
        (torch.cuda, "device_of", lambda x: HERE),
        (_pairwise_small, "serves", lambda *_: False),
        (_tiles, "architecture", lambda x: "sm_90"),
        (_tiles, "memory", lambda x: 80 << 30),
        (_tiles, "product", lambda *_, **__: None),
        (JITFunction, "run", lambda *_, **__: None),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, stub in instead:
            stack.enter_context(mock.patch.object(owner, name, stub))
        launchers = {(name, "CPU"): launcher for name, launcher in KERNELS.items()}
        stack.enter_context(mock.patch.dict(IN_PYTHON, launchers))
        yield


def _product_sum(query: Tensor, key: Tensor) -> Tensor:
    """Of PyTorch, a yardstick of the machine."""
    return (query * key).sum(dtype=torch.float32)


def calls(op: Callable, scalars: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """A call, and one with its backward."""
    shapes = [(ROWS, WIDTH)] * 2 + [()] * scalars
    dtypes = [torch.bfloat16] * 2 + [torch.float32] * scalars
    inputs = [
        torch.empty(shape, dtype=dtype, requires_grad=True)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    dloss = torch.empty(())
    return lambda: op(*inputs), lambda: torch.autograd.grad(op(*inputs), inputs, dloss)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.overhead", description=__doc__)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--calls", type=int, default=200, help="of a measurement; 9 of them are made")
    options = parser.parse_args()
    with launching_nothing():
        for op, scalars in ((_product_sum, 0), (vlmkernels.info_nce, 1), (vlmkernels.sigmoid_loss, 2)):
            forward, step = calls(op, scalars)
            for what, call in (("forward", forward), ("forward and backward", step)):
                times = timeit.repeat(call, timer=time.process_time, number=options.calls, repeat=9)
                microseconds = [1e6 * x / options.calls for x in times]
                middle, best = statistics.median(microseconds), min(microseconds)
                name = f"{op.__name__.lstrip('_')} N={ROWS} D={WIDTH} bf16, {what}"
                sys.stdout.write(f"{name}: {middle:.0f} us, at best {best:.0f}\n")
            if options.profile:
                profile = cProfile.Profile(time.process_time)
                profile.runcall(lambda c=step: [c() for _ in range(options.calls)])
                pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
