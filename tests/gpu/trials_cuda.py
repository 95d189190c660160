"""Trials of the CUDA C++ kernels: what their launchers are called with, and the verdict of float64."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .cuda import Request
from .trials import judge
from .trials_gated import Residual

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def placed(x: Tensor, shift: int, padding: int) -> Tensor:
    """x [rows, d], `shift` elements after an aligned address, `padding` elements between rows; NaN around."""
    rows, d = x.shape
    memory = torch.full((shift + rows * (d + padding),), float("nan"), dtype=x.dtype)
    return memory.as_strided((rows, d), (d + padding, 1), shift).copy_(x)


class Gated(Residual):
    """gated_residual and its backward; operands and results may be misaligned, operands in padded rows."""

    def __init__(self, n, d, dtype, *, gate_dtype=F32, shift=0, padding=0, **options):
        super().__init__(n, d, dtype, **options)
        self.x, self.dout = (placed(t, shift, padding) for t in (self.x, self.dout))
        self.y = placed(self.y, shift, 2 * padding)
        if self.mask is not None:
            self.dout[~self.mask] = float("nan")
        self.given = self.gate.to(gate_dtype)
        # The gradient of a float64 gate is as exact as the sums, which have the type of the operands.
        sums = torch.promote_types(F32, dtype)
        self.gate = self.given.to(sums) if gate_dtype.itemsize > sums.itemsize else self.given
        self.shift = shift

    def _empty(self, shape, dtype) -> Tensor:
        size = torch.Size(shape).numel()
        return torch.full((self.shift + size,), float("nan"), dtype=dtype)[self.shift :].reshape(shape)

    def requests(self) -> list[Request]:
        need_y, need_gate = self.needs
        out = self._empty(self.x.shape, self.dout.dtype)
        dy = self._empty(self.y.shape, self.y.dtype) if need_y else None
        dgate = self._empty(self.given.shape, self.given.dtype) if need_gate else None
        operands = self.y, self.given, self.mask
        return [Request(False, self.x, *operands, out, None), Request(True, self.dout, *operands, dy, dgate)]

    def judge(self, got) -> None:
        """As good as PyTorch with the rows in any of a few orders: its error of a small sum is luck."""
        given = self.x, self.y, self.dout, self.mask
        lows = []
        for order in (torch.arange(len(self.x)), *(torch.randperm(len(self.x)) for _ in range(4))):
            self.x, self.y, self.dout, self.mask = (t if t is None else t[order] for t in given)
            lows.append(self.expected()[2])
        self.x, self.y, self.dout, self.mask = given
        low = *self.expected()[:2], lows
        judge(("out", "dy", "dgate"), got, low, self.expected(F64), (True, *self.needs))

    def check(self, requests: Sequence[Request]) -> None:
        forward, backward = requests
        nothing = self.gate.new_empty(0)
        dy, dgate = (nothing if x is None else x for x in (backward.out, backward.dgate))
        self.judge((forward.out, dy, dgate.to(self.gate.dtype)))
        if self.mask is not None:
            assert torch.equal(forward.out[~self.mask], self.x[~self.mask])


# Sizes around accesses of 16 bytes, the 32 lanes of a row, the 256 threads and the rows that a thread takes;
# rows of more than 32 accesses take several blocks.
CASES = {
    "float32, one gate": lambda: Gated(37, 40, F32, masked=True, padding=8),
    "float32, gate per channel": lambda: Gated(130, 40, F32, per_channel=True),
    "float32, gate per channel, wide": lambda: Gated(300, 256, F32, per_channel=True),
    "float32, gate per channel, odd": lambda: Gated(70, 37, F32, per_channel=True, masked=True),
    "float32, rows misaligned": lambda: Gated(9, 48, F32, padding=3),
    "bfloat16, gate per channel": lambda: Gated(150, 264, BF16, per_channel=True, masked=True, padding=8),
    "bfloat16, one gate, wide": lambda: Gated(70, 300, BF16),
    "bfloat16 branch": lambda: Gated(33, 48, F32, y_dtype=BF16, gate_dtype=BF16, masked=True),
    "bfloat16 branch, misaligned": lambda: Gated(9, 48, F32, y_dtype=BF16, shift=1, masked=True),
    "float16 branch": lambda: Gated(33, 48, F32, y_dtype=F16, per_channel=True, gate_dtype=F16),
    "float16, one gate": lambda: Gated(65, 24, F16, gate_dtype=BF16),
    "float64, gate per channel": lambda: Gated(40, 70, F64, per_channel=True, gate_dtype=F64, masked=True),
    "float64, one gate": lambda: Gated(300, 3, F64, gate_dtype=F64),
    "one row": lambda: Gated(1, 1, BF16),
    "one channel, many rows": lambda: Gated(1100, 1, F32),
    "many channels, one row": lambda: Gated(1, 1100, F16, per_channel=True),
    "frozen branch": lambda: Gated(20, 16, F32, masked=True, needs=(False, True)),
    "frozen gate": lambda: Gated(20, 17, BF16, masked=True, needs=(True, False)),
    "float64 gate": lambda: Gated(20, 16, F32, per_channel=True, gate_dtype=F64),
    "everything masked": lambda: _masked(Gated(12, 16, F32, masked=True)),
}


def _masked(trial: Gated) -> Gated:
    trial.mask.fill_(False)
    return trial


def every_case() -> list[Gated]:
    """Every pair of types, access, kind of gate and kind of tiling."""
    pairs = [(F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (F32, BF16), (F32, F16)]
    sizes = [(1, 8), (3, 16), (37, 24), (129, 56), (70, 37), (40, 256), (9, 520), (2100, 2)]
    return [
        Gated(n, d, dtype, y_dtype=y, per_channel=per_channel, masked=masked, shift=shift, padding=8)
        for (dtype, y), (n, d), per_channel, masked, shift in itertools.product(
            pairs, sizes, (False, True), (False, True), (0, 1)
        )
    ]
