"""The tensors of a TorchScript archive, by the names of its attributes; none of its code is run.

`torch.jit.load` runs code of the archive, which may write files. Here the pickle of its attributes is read as
data: only the opcodes for numbers, strings, containers and tensors have an effect, and no name in it is
looked up or called.
"""

from __future__ import annotations

import functools
import pickletools
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
# What annotates a container in these pickles; its first argument is the container.
TAGS = ("torch.jit._pickle restore_type_tag", "torch.jit._pickle build_intlist")


def is_archive(members: list[str]) -> bool:
    """Whether a zip file with these members is a TorchScript archive."""
    return any(name.endswith("/constants.pkl") for name in members)


def read(path: Path) -> dict[str, Tensor]:
    """Parameters, buffers and tensor attributes, named as in the module's state dict, on the CPU.

    Damaged archives raise errors of many types.
    """
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
        root = next(name for name in members if name.endswith("/constants.pkl")).removesuffix("constants.pkl")

        def content(name: str) -> bytes:
            info = archive.getinfo(root + name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{name} is compressed; TorchScript compresses only code")
            return archive.read(info)

        @functools.cache
        def storage(key: str) -> Tensor:  # [bytes] uint8
            data = bytearray(content(f"data/{key}"))
            return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

        if f"{root}byteorder" in members and content("byteorder").decode() != sys.byteorder:
            raise ValueError("its tensors have the byte order of another machine")
        module = _unpickle(content("data.pkl"), storage)
    return _named_tensors(module)


def _unpickle(pickled: bytes, storage: Callable[[str], Tensor]) -> Any:
    """The pickled object, modules as dicts of their attributes, all that is not data as None."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, argument, _ in pickletools.genops(pickled):
        match opcode.name:
            case "PROTO" | "STOP":
                pass
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "GLOBAL":
                stack.append(argument)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE" as name:
                stack.append(name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                count = int(name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                stack[-1].update({key: value})
            case "SETITEMS":
                items = since_mark()
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "NEWOBJ":
                stack[-2:] = [{}]
            case "BUILD":
                state = stack.pop()
                if isinstance(state, dict):
                    stack[-1].update(state)
            case "BINPERSID":
                _, kind, key, *_ = stack.pop()
                stack.append(storage(key).view(DTYPES[kind]))
            case "REDUCE":
                function, arguments = stack[-2:]
                stack[-2:] = [_reduced(function, arguments)]
            case name:
                raise ValueError(f"its pickle has the opcode {name}, which TorchScript does not write")
    return stack.pop()


def _reduced(function: str, arguments: tuple[Any, ...]) -> Any:
    if function == "torch._utils _rebuild_tensor_v2":
        flat, offset, size, stride, *_ = arguments
        return flat.as_strided(size, stride, offset)
    return arguments[0] if function in TAGS else None


def _named_tensors(module: Any) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    waiting = [("", module)]
    while waiting:
        prefix, attributes = waiting.pop()
        if id(attributes) in seen:
            raise ValueError(f"the module {prefix[:-1]} is also part of another")
        seen.add(id(attributes))
        for name, value in attributes.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}{name}"] = value
            elif isinstance(value, dict):
                waiting.append((f"{prefix}{name}.", value))
    return tensors
