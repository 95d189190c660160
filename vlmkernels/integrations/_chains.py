"""Which modules only call their children one after the other: x = self.a(x); x = self.b(x); ...

The bytecode of `forward` is compared, instruction by instruction, with that of the expected expression, so
that a class is not recognised any more if its authors change it.
"""

from __future__ import annotations

import functools
import inspect
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_ATTRIBUTES = ("co_code", "co_names", "co_argcount", "co_kwonlyargcount", "co_nlocals")
_OTHER_KINDS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE


def chain_of(cls: type[nn.Module]) -> tuple[str, ...] | None:
    """The names of the children in the order of their calls; None if forward does anything else."""
    return _chain(cls.forward.__code__) if isinstance(cls.forward, FunctionType) else None


def gated_of(cls: type[nn.Module]) -> tuple[str, str, str, str] | None:
    """The names of down, activation, gate and up if forward is down(activation(gate(x)) * up(x))."""
    return _gated(cls.forward.__code__) if isinstance(cls.forward, FunctionType) else None


@functools.cache
def _chain(code: CodeType) -> tuple[str, ...] | None:
    if not code.co_names:
        return None
    *first, last = code.co_names
    steps = [f"x = self.{name}(x)" for name in first]
    if _is(code, *steps, f"x = self.{last}(x)", "return x") or _is(code, *steps, f"return self.{last}(x)"):
        return code.co_names
    return None


@functools.cache
def _gated(code: CodeType) -> tuple[str, str, str, str] | None:
    if len(code.co_names) != 4:
        return None
    down, activation, gate, up = code.co_names
    line = f"self.{down}(self.{activation}(self.{gate}(x)) * self.{up}(x))"
    if _is(code, f"return {line}") or _is(code, f"y = {line}", "return y"):
        return down, activation, gate, up
    return None


def _is(code: CodeType, *lines: str) -> bool:
    source = "def forward(self, x):\n" + "\n".join(f"    {line}" for line in lines)
    namespace: dict[str, Any] = {}
    exec(compile(source, "<forward>", "exec", dont_inherit=True), namespace)
    wanted = namespace["forward"].__code__
    same = all(getattr(code, name) == getattr(wanted, name) for name in _ATTRIBUTES)
    return same and not code.co_flags & _OTHER_KINDS
