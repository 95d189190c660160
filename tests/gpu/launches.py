"""What a launcher would hand to a GPU: `with recording() as launches: info_nce_stats(...)` on CPU tensors.

A launch knows its kernel, grid and arguments, and compiles as Triton would compile it for any target:
pointers and sizes divisible by 16 and sizes of 1 are specialised from the arguments, not declared by hand.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

SM80 = GPUTarget("cuda", 80, 32)
_compiled_run = JITFunction.run


@functools.cache
def _backend(target: GPUTarget):
    return make_backend(target)


@functools.cache
def _binder(kernel: JITFunction, target: GPUTarget):
    return create_function_from_signature(kernel.signature, kernel.params, _backend(target))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One `kernel[grid](*args, **kwargs)`."""

    kernel: JITFunction
    grid: tuple[int, int, int]
    args: tuple
    kwargs: dict

    @property
    def name(self) -> str:
        """`module.kernel`, as in `info_nce._stats`."""
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"

    @functools.cached_property
    def arguments(self) -> dict:
        """Value of every parameter by its name, constants included."""
        return _binder(self.kernel, SM80)(*self.args, **self.kwargs)[0]

    @functools.cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in self.arguments.items() if isinstance(x, torch.Tensor)}

    @functools.cached_property
    def config(self) -> dict:
        """Constants of the launch: blocks, warps, stages, and what is None."""
        constants = {p.name: self.arguments[p.name] for p in self.kernel.params if p.is_constexpr}
        return constants | {k: v for k, v in self.kwargs.items() if k not in self.arguments}

    def source(self, target: GPUTarget) -> tuple[ASTSource, dict]:
        """What `triton.compile` takes: source and options."""
        kernel, backend = self.kernel, _backend(target)
        kwargs = self.kwargs | {"debug": False, "instrumentation_mode": ""}
        bound, specialization, options = _binder(kernel, target)(*self.args, **kwargs)
        options, signature, constants, attrs = kernel._pack_args(
            backend, kwargs, bound, specialization, options
        )
        return ASTSource(kernel, signature, constants, attrs), options.__dict__

    def compiled(self, target: GPUTarget = SM80) -> CompiledKernel:
        source, options = self.source(target)
        return triton.compile(source, target=target, options=options)


@contextlib.contextmanager
def intercepting(handle: Callable[[Launch], None]) -> Iterator[None]:
    """Give every launch inside to `handle` in place of a GPU."""
    if JITFunction.run is not _compiled_run:
        raise RuntimeError("launches are already intercepted")

    def run(self, *args, grid, warmup=False, **kwargs):
        if callable(grid):
            grid = grid(_binder(self, SM80)(*args, **kwargs)[0])
        handle(Launch(self, (*grid, 1, 1)[:3], args, kwargs))

    with mock.patch.object(JITFunction, "run", run):
        yield


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """The launches made inside, none of which runs: what they would have written stays as it was."""
    launches: list[Launch] = []
    with intercepting(launches.append):
        yield launches
