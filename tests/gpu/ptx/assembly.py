"""Small PTX kernels for tests: the text around a few instructions, and their run on tensors."""

from collections.abc import Sequence

import torch

from . import Counters, parse, run

HEAD = """.version 8.7
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
.reg .pred %p<64>;
.reg .b16 %rs<64>;
.reg .b32 %r<64>;
.reg .b64 %rd<64>;
.shared .align 16 .b8 fixed[{shared}];
mov.u32 %r63, %tid.x;
cvt.u64.u32 %rd63, %r63;
{body}
ret;
}}
"""


def kernel(body: str, tensors: int, *, threads: int = 32, shared: int = 1024) -> str:
    """`body` finds its thread in %r63 and %rd63, and the address of tensor i in %rd<50 + i>."""
    names = [f"kernel_param_{i}" for i in range(tensors)]
    loads = [f"ld.param.u64 %rd{50 + i}, [{name}];" for i, name in enumerate(names)]
    parameters = ", ".join(f".param .u64 {name}" for name in names)
    body = "\n".join([*loads, body])
    return HEAD.format(parameters=parameters, threads=threads, shared=shared, body=body)


def execute(
    body: str,
    *tensors: torch.Tensor,
    threads: int = 32,
    grid: Sequence[int] = (1, 1, 1),
    shared: int = 1024,
    fresh: dict | None = None,
    counters: Counters | None = None,
) -> None:
    """Run `body` on tensors, called A, B, C, ... in messages."""
    text = kernel(body, len(tensors), threads=threads, shared=shared)
    named = {chr(ord("A") + i): x for i, x in enumerate(tensors)}
    pointers = [x.data_ptr().to_bytes(8, "little") for x in tensors]
    run(parse(text), tuple(grid), threads, pointers, named, fresh=fresh, counters=counters)


def element(register: str, tensor: int, size: int) -> str:
    """The address of this thread's element of `size` bytes of a tensor, in a register."""
    return f"mul.lo.s64 {register}, %rd63, {size};\nadd.s64 {register}, {register}, %rd{50 + tensor};"
