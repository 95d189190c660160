"""The PTX that nvcc makes of csrc/cuda, in the simulator: the launchers say which kernel runs on what."""

import ctypes
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import cuda, ptx

_RECORDER = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int,
    ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_int64),
)  # fmt: skip


@dataclasses.dataclass
class Launch:
    """A launch as the driver of a GPU would get it."""

    kernel: str  # its mangled name
    blocks: int
    threads: int
    arguments: list[bytes]


@functools.cache
def _driver(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.vlmk_scratch.restype = ctypes.c_int64
    library.vlmk_kernel_name.argtypes = [ctypes.c_void_p]
    library.vlmk_call.restype = library.vlmk_kernel_name.restype = ctypes.c_char_p
    return library


@functools.cache
def _program(path: Path, kernel: str) -> ptx.Program:
    return ptx.parse(path.read_text(), kernel)


def recorded(request: cuda.Request, csrc: Path = cuda.CSRC) -> tuple[list[Launch], torch.Tensor]:
    """What a call launches, and its scratch memory."""
    driver, launches = _driver(cuda.library(csrc)), []

    @_RECORDER
    def record(kernel, blocks, threads, count, arguments, sizes):
        values = [ctypes.string_at(arguments[i], sizes[i]) for i in range(count)]
        launches.append(Launch(driver.vlmk_kernel_name(kernel).decode(), blocks, threads, values))

    call = request.call([0 if x is None else x.data_ptr() for x in request.buffers])
    scratch = torch.full((driver.vlmk_scratch(ctypes.byref(call)),), float("nan"), dtype=torch.float64)
    call.scratch = scratch.data_ptr()
    driver.vlmk_record(record)
    try:
        failure = driver.vlmk_call(ctypes.byref(call))
    finally:
        driver.vlmk_record(None)
    assert failure is None, failure
    return launches, scratch


def run(requests: Sequence[cuda.Request], csrc: Path = cuda.CSRC) -> None:
    """The calls on the simulator; results and scratch memory are uninitialised at first."""
    code = cuda.compiled("ptx", "sm_80", csrc)
    for request in requests:
        launches, scratch = recorded(request, csrc)
        names = "dout" if request.backward else "x", "y", "gate", "row_mask", "out", "dgate"
        tensors = {n: x for n, x in zip(names, request.buffers, strict=True) if x is not None}
        tensors |= {"scratch": scratch} if request.dgate is not None else {}
        written = (tensors[n].untyped_storage() for n in ("out", "dgate", "scratch") if n in tensors)
        fresh = {storage.data_ptr(): np.zeros(storage.nbytes(), bool) for storage in written}
        for launch in launches:
            program = _program(code, launch.kernel)
            grid = launch.blocks, 1, 1
            ptx.run(program, grid, launch.threads, launch.arguments, tensors, fresh=fresh)
