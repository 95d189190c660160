"""A live module gets another forward by a change of its class: it stays the object that it was.

Parameters, buffers, hooks, names, flags, and all who refer to the module are untouched. The new class is a
subclass of the old one, made once per (class, rule), with its name and module: code that looks a class up by
name (checkpoints, transformers' registries) finds the same.
"""

from __future__ import annotations

import inspect
import types
from typing import Any, ClassVar

import torch
from torch import nn

from vlmkernels._modules import is_exactly as is_exactly
from vlmkernels._modules import unheard as unheard


class Rule(nn.Module):
    """What is put before a class: the methods that differ, and which modules can have them."""

    patch_needs: ClassVar[frozenset[str]]  # of "loss", "attention", "linear" and "padding", what it takes
    patch_runs: ClassVar[str]  # what the report says of a patched module
    patch_origin: ClassVar[tuple[type[nn.Module], type[Rule]]]  # of a swapped class
    patch_class: ClassVar[type[nn.Module]]  # the swapped class itself, also in its subclasses

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        """Whether this rule speaks about the module."""
        raise NotImplementedError  # not abc: the swapped class would get its metaclass

    @classmethod
    def patch_refuses(cls, module: nn.Module) -> str | None:
        """Why the module cannot be kept exact; None when it can."""
        return None

    @classmethod
    def patch_bases(cls, original: type[nn.Module]) -> tuple[type, ...]:
        return (cls, original)

    @classmethod
    def patch_ready(cls) -> None:
        """What must be there before a module runs; called again where a pickled one is loaded."""

    @classmethod
    def patch_facts(cls, original: type[nn.Module]) -> dict[str, Any]:
        """What is found out once for a class, as attributes of the swapped one."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A swapped class cannot be found by name: it is made again from the two classes that can."""
        if type(self) is not self.patch_class:  # a subclass that somebody wrote
            return super().__reduce_ex__(protocol)
        return _new, self.patch_origin, *super().__reduce_ex__(protocol)[2:]


def _new(original: type[nn.Module], rule: type[Rule]) -> nn.Module:
    rule.patch_ready()
    cls = swapped(original, rule)
    return cls.__new__(cls)


_SWAPPED: dict[tuple[type[nn.Module], type[Rule]], type[nn.Module]] = {}


def swapped(original: type[nn.Module], rule: type[Rule]) -> type[nn.Module]:
    """The subclass of `original` with the methods of `rule`, always the same one."""
    if (original, rule) in _SWAPPED:
        return _SWAPPED[original, rule]
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace = {**names, **rule.patch_facts(original), "patch_origin": (original, rule)}
    if rule.forward is not nn.Module.forward:
        namespace["forward"] = _with_signature(rule.forward, original.forward)
    metaclass: Any = type(original)
    cls = metaclass(original.__name__, rule.patch_bases(original), namespace)
    cls.patch_class = cls
    return _SWAPPED.setdefault((original, rule), cls)


def _with_signature(forward: Any, original: Any) -> types.FunctionType:
    """A copy that shows the arguments of the original: trainers choose the columns of a data set by them."""
    copy = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copy.__kwdefaults__ = forward.__kwdefaults__
    copy.__doc__ = original.__doc__
    copy.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    return copy


def rule_of(module: nn.Module) -> type[Rule] | None:
    """The rule under which the module is patched."""
    return module.patch_origin[1] if isinstance(module, Rule) else None


def own(module: nn.Module) -> type[nn.Module]:
    """The class that the module has without a patch."""
    return module.patch_origin[0] if isinstance(module, Rule) else type(module)


def cannot_swap(module: nn.Module) -> str | None:
    """Why the class of no such module can be changed."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if "forward" in vars(module):
        return "its forward is replaced on the object, by accelerate for example"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return "its class has a way of its own of being pickled"
    return None


def swap(module: nn.Module, rule: type[Rule]) -> None:
    rule.patch_ready()
    module.__class__ = swapped(type(module), rule)  # type: ignore[assignment]


def cannot_restore(module: nn.Module) -> str | None:
    """Why a patched module cannot get its class back."""
    if type(module) is module.patch_class:
        return None
    return "its class was changed again after it was patched, by a parametrization for example"


def restore(module: nn.Module) -> None:
    module.__class__ = own(module)  # type: ignore[assignment]


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
