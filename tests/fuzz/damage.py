"""What may be wrong with an argument: a damage returns another value, or the same where it does not apply."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .draw import Draw

DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64),
    *(torch.uint64, torch.complex32, torch.complex64, torch.complex128),
)
INTEGERS = (-1, 0, 1, 2, -100, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63), 2**63)
NUMBERS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e300, -1e300, 1e-320, 3)
STRINGS = ("", "GELU", "gelu ", "mean\0", "noné", "x" * 10_000, "none", "sum")
HUGE = (2**31 - 1, 2**31, 2**33, 2**40, 2**59, 2**62)


def resized(draw: Draw, t: Tensor) -> Tensor:
    """Other sizes: a dimension longer, shorter, gone or added."""
    sizes = list(t.shape)
    if sizes and draw.random() < 0.8:
        i = draw.randrange(len(sizes))
        sizes[i] = draw.choice((0, 1, sizes[i] - 1, sizes[i] + 1, 2 * sizes[i], sizes[i] // 2, draw.size()))
        sizes[i] = max(sizes[i], 0)
        if draw.random() < 0.15:
            sizes = draw.choice(([], sizes[:-1], sizes[1:], [1, *sizes], [*sizes, 1], sizes[::-1], [0]))
    else:
        sizes = draw.choice(([], [0], [1], [1, *sizes], [t.numel()], [3, 0, 2], [1] * 9))
    count = torch.Size(sizes).numel()
    flat = t.reshape(-1)
    flat = flat if flat.numel() else torch.zeros(1, dtype=t.dtype)
    return flat.repeat(count // flat.numel() + 1)[:count].reshape(sizes)


def of_dtype(draw: Draw, t: Tensor) -> Tensor:
    dtype = draw.choice(DTYPES)
    if dtype in (torch.float4_e2m1fn_x2, torch.float8_e8m0fnu):
        return torch.zeros(t.shape, dtype=torch.uint8).view(dtype)
    return t.to(dtype)


def of_layout(draw: Draw, t: Tensor) -> Tensor:
    def quantized() -> Tensor:
        return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)

    def nested() -> Tensor:
        return torch.nested.nested_tensor([t, t])

    def jagged() -> Tensor:
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged)

    makers: list[Callable[[], Tensor]] = [t.to_sparse, t.to_mkldnn, quantized, nested, jagged]
    makers += [t.to_sparse_csr] if t.dim() == 2 else []
    return draw.choice(makers)()


def restrided(draw: Draw, t: Tensor) -> Tensor:
    """The same numbers in another order, with gaps, shared, or off their alignment."""
    kind = draw.randrange(5)
    if kind == 0 and t.dim() > 1:
        i, j = draw.sample(range(t.dim()), 2)
        return t.transpose(i, j).contiguous().transpose(i, j)
    if kind == 1 and t.dim():
        return t.repeat_interleave(2, -1)[..., ::2]
    if kind == 2 and t.dim():
        i = draw.randrange(t.dim())
        return t.narrow(i, 0, min(1, t.shape[i])).expand(t.shape) if t.shape[i] else t
    if kind == 3 and t.dim() and t.numel() > 1:
        return t.flatten().as_strided(t.shape, [draw.choice((0, 1)) for _ in t.shape])
    if t.numel() == 0:
        return t
    memory = torch.zeros(t.nbytes + 1, dtype=torch.uint8).numpy()
    memory[1:] = t.contiguous().reshape(-1).view(torch.uint8).numpy()
    return torch.frombuffer(memory, dtype=torch.uint8, offset=1).view(t.dtype).view(t.shape)


def elsewhere(draw: Draw, t: Tensor) -> Tensor:
    """Not plain memory of the CPU."""
    kind = draw.randrange(4)
    if kind == 0:
        return t.to("meta")
    if kind == 1 and t.dtype != torch.bool:
        return torch._neg_view(t)
    if kind == 2:
        return torch._efficientzerotensor(t.shape, dtype=t.dtype)
    return t.to(torch.complex64).conj()


def huge(draw: Draw, t: Tensor) -> Tensor:
    """One number read many times: sizes whose products leave the integers."""
    sizes = list(t.shape) or [1]
    for i in draw.sample(range(len(sizes)), draw.choice((1, 1, min(2, len(sizes))))):
        sizes[i] = draw.choice(HUGE)
    if draw.flag():
        sizes[draw.randrange(len(sizes))] = 0
        return torch.empty(sizes, dtype=t.dtype)
    return torch.ones((), dtype=t.dtype).expand(sizes)


def filled(draw: Draw, t: Tensor) -> Tensor:
    """Numbers that are not numbers, or indices of nothing."""
    t = t.clone()
    if t.numel() == 0 or t.is_complex():
        return t
    if t.dtype == torch.bool:
        return (t.to(torch.uint8) * 2 + 1).view(torch.bool)
    values = NUMBERS if t.is_floating_point() else INTEGERS
    value = draw.choice(values)
    if not t.is_floating_point():
        value = max(torch.iinfo(t.dtype).min, min(int(value), torch.iinfo(t.dtype).max))
    if draw.flag():
        return t.fill_(value)
    t.view(-1)[draw.randrange(t.numel())] = value
    return t


TENSORS = (
    resized,
    resized,
    resized,
    of_dtype,
    of_dtype,
    of_layout,
    restrided,
    elsewhere,
    huge,
    filled,
    filled,
)


def damaged(draw: Draw, value: Any, others: Sequence[Any]) -> Any:
    """Another value in its place, most often of its kind."""
    chance = draw.random()
    tensors = [other for other in others if isinstance(other, Tensor)]
    if chance < 0.06:
        return None
    if chance < 0.12 and tensors:
        return draw.choice(tensors)
    if isinstance(value, Tensor):
        try:
            return draw.choice(TENSORS)(draw, value) if value.numel() < 2**24 else value
        except Exception:  # torch does not make such a tensor
            return value
    if value is None:
        return damaged(draw, draw.choice(tensors), others) if tensors else torch.ones(draw.size())
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return draw.choice(INTEGERS)
    if isinstance(value, float):
        return draw.choice(NUMBERS)
    if isinstance(value, str):
        return draw.choice(STRINGS)
    if isinstance(value, list):
        return draw.choice(([], value[:-1], [*value, True], [True] * len(value), [False] * len(value)))
    return value


def shown(value: Any) -> str:
    """A value in a line."""
    if not isinstance(value, Tensor):
        text = repr(value)
        return text if len(text) < 80 else f"{text[:60]}... ({len(text)} characters)"
    if value.is_nested or value.layout != torch.strided:
        return f"a tensor of layout {value.layout}{', nested' if value.is_nested else ''}"
    plain = value.device.type == "cpu" and value.untyped_storage().nbytes() and value.numel()
    aligned = plain and value.data_ptr() % value.element_size() == 0
    return (
        f"{value.dtype} {tuple(value.shape)} strides {value.stride()} on {value.device}"
        f"{'' if aligned or not plain else ', not aligned'}"
    )
