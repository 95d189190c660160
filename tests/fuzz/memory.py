"""Tensors between inaccessible pages: reading or writing out of bounds ends the process."""

import ctypes
import mmap

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
SIZE = 2**26  # of the memory of one argument; only what is used takes space
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _protect(address: int, size: int, access: int) -> None:
    if size and _libc.mprotect(address, size, access):
        raise OSError(ctypes.get_errno(), "mprotect")


class Guarded:
    """Memory with a closed page at either end, for one tensor at a time."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, SIZE + 2 * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        for page in (self.address, self.address + PAGE + SIZE):
            _protect(page, PAGE, 0)
        self.closed = (self.address, 0)

    def copy(self, t: Tensor, *, at_end: bool) -> Tensor:
        """`t` with its strides in read-only memory that ends or begins at a closed page."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        size = extent * t.element_size()
        offset = PAGE + (SIZE - size if at_end else t.data_ptr() % t.element_size())
        _protect(*self.closed, mmap.PROT_READ | mmap.PROT_WRITE)
        memory = torch.frombuffer(self.map, dtype=torch.uint8, count=size, offset=offset)
        memory.copy_(torch.as_strided(t, (extent,), (1,)).view(torch.uint8))
        first = (self.address + offset) // PAGE * PAGE
        last = -(-(self.address + offset + size) // PAGE) * PAGE
        self.closed = (first, last - first)
        _protect(*self.closed, mmap.PROT_READ)
        return memory.view(t.dtype).as_strided(t.shape, t.stride())


_memory: list[Guarded] = []


def guarded(values: list, *, at_end: bool) -> list:
    """The values, with every plain tensor of the CPU in guarded memory."""
    kept = []
    for i, value in enumerate(values):
        if i == len(_memory):
            _memory.append(Guarded())
        kept.append(_memory[i].copy(value, at_end=at_end) if _plain(value) else value)
    return kept


def _plain(value: object) -> bool:
    return (
        type(value) is Tensor
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_nested or value.is_quantized or value.is_conj() or value.is_neg())
        and not value._is_zerotensor()
        and value.untyped_storage().nbytes() > 0
        and value.numel() > 0
        and value.nbytes < SIZE
    )
