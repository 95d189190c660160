"""Replaces the forward of a live module by changing its class; the module remains the same object.

Parameters, buffers, hooks, names, flags and references to the module are unchanged. The new class is a
subclass of the old one, created once per (class, rule), with the same name and module, so that code that
looks a class up by name (checkpoints, transformers' registries) finds the original.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import _symbolic_trace

from vlmkernels._modules import has_own_forward, is_transformed

_FAKE, _PROXY = torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY


class Rule(nn.Module):
    """A mixin that is put before a class: the methods that differ, and which modules it applies to."""

    patch_needs: ClassVar[frozenset[str]]  # the options of `patch` that are required
    patch_runs: ClassVar[str]  # the report's text for a patched module
    patch_methods: ClassVar[tuple[str, ...]] = ("forward",)  # of the original class, overridden by ours
    patch_origin: ClassVar[tuple[type[nn.Module], type[Rule]]]  # of a swapped class
    patch_class: ClassVar[type[nn.Module]]  # the swapped class itself, also in its subclasses

    @classmethod
    def patch_matches(cls, module: nn.Module) -> bool:
        """Whether this rule applies to the module."""
        raise NotImplementedError  # every rule has its own; with abc, swapped classes would get its metaclass

    @classmethod
    def patch_refuses(cls, module: nn.Module) -> str | None:
        """Why the result would not be exact; None if it is."""
        return None

    @classmethod
    def patch_bases(cls, original: type[nn.Module]) -> tuple[type, ...]:
        return (cls, original)

    @classmethod
    def patch_ready(cls) -> None:
        """Sets up what a module needs to run; called again when a pickled module is loaded."""

    @classmethod
    def patch_facts(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Facts that are computed once per class, as attributes of the swapped class."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A swapped class cannot be found by name: it is recreated from the two classes that can."""
        if type(self) is not self.patch_class:  # a subclass written by a user
            return super().__reduce_ex__(protocol)
        return _new, self.patch_origin, *super().__reduce_ex__(protocol)[2:]


def _new(original: type[nn.Module], rule: type[Rule]) -> nn.Module:
    rule.patch_ready()
    cls = swapped(original, rule)
    return cls.__new__(cls)


_SWAPPED: dict[tuple[type[nn.Module], type[Rule]], type[nn.Module]] = {}


def swapped(original: type[nn.Module], rule: type[Rule]) -> type[nn.Module]:
    """The subclass of `original` with the methods of `rule`; every call returns the same class."""
    if (original, rule) in _SWAPPED:
        return _SWAPPED[original, rule]
    names = ("__module__", "__qualname__", "__doc__")
    namespace: dict[str, Any] = {name: getattr(original, name) for name in names}
    annotated = (vars(c)["__annotations__"] for c in original.__mro__ if "__annotations__" in vars(c))
    namespace["__annotations__"] = next(annotated, {})  # TorchScript reads them
    namespace |= rule.patch_facts(original) | {"patch_origin": (original, rule)}
    namespace |= {name: override(getattr(rule, name), original, name) for name in rule.patch_methods}
    metaclass: Any = type(original)
    cls = metaclass(original.__name__, rule.patch_bases(original), namespace)
    cls.patch_class = cls
    return _SWAPPED.setdefault((original, rule), cls)


def override(ours: Callable, original: type[nn.Module], name: str) -> Callable:
    """A method that runs ours, or the original one if the call is transformed or the original was replaced.

    It has the signature, source and names of the original one, which trainers that choose the columns of a
    data set by its arguments, torch.fx and TorchScript inspect.
    """
    own = getattr(original, name)
    both = zip(_arguments(own), _arguments(ours), strict=False)
    patch_names = {theirs: mine for theirs, mine in both if theirs != mine}
    # Names that no other module has.
    patch_ours, patch_own, patch_traced = ours, own, is_traced_or_transformed
    patch_original, patch_name = original, name

    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        current = getattr(patch_original, patch_name)
        if current is not patch_own or patch_traced():
            return current(self, *args, **kwargs)
        if patch_names and kwargs:
            kwargs = {patch_names.get(name, name): value for name, value in kwargs.items()}
        return patch_ours(self, *args, **kwargs)

    known = getattr(own, "__globals__", globals())  # where TorchScript looks up the names of its source
    return functools.wraps(own)(types.FunctionType(method.__code__, known, closure=method.__closure__))


def _arguments(method: Callable) -> list[str]:
    """The names of the arguments that can be given by position."""
    parameters = inspect.signature(method).parameters.values()
    return [p.name for p in parameters if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]


def is_traced_or_transformed() -> bool:
    """Whether a call is traced or transformed, so that the module's original code has to run.

    True under torch.jit.trace, torch.fx, make_fx and non-strict torch.export, on fake tensors, under
    transforms of torch.func, and in forward-mode differentiation. In graphs of torch.compile our ops run.
    """
    if is_transformed():
        return True
    if torch.compiler.is_dynamo_compiling():
        return False
    if _symbolic_trace.is_fx_symbolic_tracing():
        return True
    modes = torch._C._len_torch_dispatch_stack() > 0
    return modes and any(torch._C._get_dispatch_mode(kind) is not None for kind in (_PROXY, _FAKE))


def rule_of(module: nn.Module) -> type[Rule] | None:
    """The rule under which the module is patched."""
    return module.patch_origin[1] if isinstance(module, Rule) else None


def own(module: nn.Module) -> type[nn.Module]:
    """The class of the module without the patch."""
    return module.patch_origin[0] if isinstance(module, Rule) else type(module)


def cannot_swap(module: nn.Module) -> str | None:
    """Why the class of such a module cannot be changed."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript"
    if not has_own_forward(own(module)):
        return "the forward of its class is replaced"
    if "forward" in vars(module):
        return "its forward is replaced on the object, by accelerate for example"
    if cls.__reduce_ex__ is not object.__reduce_ex__ or cls.__reduce__ is not object.__reduce__:
        return "its class overrides pickling"
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
