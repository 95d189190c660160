"""Language models of transformers, whose loss in training is `vlmkernels.linear_cross_entropy`.

Their own forward runs, with a head that returns `UncomputedLogits` instead of logits: all that it does with
them, and all that transformers' loss functions do, is to scale them by a number, view them as rows, and take
their cross-entropy. `_logits` reads in the source of the forward that this is so.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmkernels
from vlmkernels._arguments import under_autocast
from vlmkernels._modules import can_be_fused, is_exactly, must_be_called
from vlmkernels.integrations import _logits
from vlmkernels.integrations._swap import Rule, override, own, qualified_name

_MODEL = "transformers.modeling_utils.PreTrainedModel"
_LOSSES = ("ForCausalLMLoss", "ForMaskedLMLoss")  # of transformers.loss.loss_utils
_IDEFICS_HEAD = "transformers.models.idefics.modeling_idefics.IdeficsDecoupledLinear"
_DEEPEST = 4  # modules from a model to its head


class UncomputedLogits:
    """The logits hidden weight^T + bias, times a scale, of which only the cross-entropy is computed."""

    def __init__(self, hidden: Tensor, head: Any, scale: float, dtype: torch.dtype) -> None:
        self.hidden = hidden  # [..., D]
        self.head = head  # weight [V, D], bias [V] or None
        self.scale = scale
        self.dtype = dtype  # of the logits, which is that of their loss

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.weight.shape[0]))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> UncomputedLogits:
        return self

    def float(self) -> UncomputedLogits:
        return UncomputedLogits(self.hidden, self.head, self.scale, torch.float32)

    def view(self, *shape: Any) -> UncomputedLogits:
        *rows, classes = shape[0] if isinstance(shape[0], tuple | list) else shape
        if classes not in (-1, self.shape[-1]):
            raise ValueError(f"UncomputedLogits of {self.shape[-1]} classes cannot be viewed as {shape}")
        hidden = self.hidden.reshape(*rows, self.hidden.shape[-1])
        return UncomputedLogits(hidden, self.head, self.scale, self.dtype)

    def __mul__(self, factor: Any) -> UncomputedLogits:
        if not isinstance(factor, int | float):
            return NotImplemented
        return UncomputedLogits(self.hidden, self.head, self.scale * factor, self.dtype)

    def __truediv__(self, divisor: Any) -> UncomputedLogits:
        return self * (1 / divisor) if isinstance(divisor, int | float) else NotImplemented

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _cross_entropy(*args, **(kwargs or {})) if function is F.cross_entropy else NotImplemented

    def computed(self) -> Tensor:
        logits = self.head(self.hidden) * self.scale
        return logits.float() if self.dtype == torch.float32 else logits


def _cross_entropy(
    logits: UncomputedLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """torch's function of this name, whose arguments these are."""
    if not weight is size_average is reduce is None or logits.hidden.dim() > 2:
        return NotImplemented
    hidden, head, scale = logits.hidden, logits.head, None
    if logits.scale != 1:
        work = torch.promote_types(hidden.dtype, torch.float32)
        scale = torch.full(head.weight.shape[:1], logits.scale, dtype=work, device=hidden.device)
    loss = vlmkernels.linear_cross_entropy(
        hidden, head.weight, target, bias=head.bias, column_scale=scale,
        ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing,
    )  # fmt: skip
    return loss if under_autocast(hidden.device.type) else loss.to(logits.dtype)


class _View:
    """A module as its own forward sees it, with the head at the end of a path returning UncomputedLogits."""

    def __init__(self, module: Any, path: tuple[str, ...]) -> None:
        object.__setattr__(self, "_module", module)
        object.__setattr__(self, "_path", path)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return _View(value, self._path[1:]) if self._path[:1] == (name,) else value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._path:
            return own(self._module).forward(self, *args, **kwargs)
        return _uncomputed(self._module, *args, **kwargs)


def _uncomputed(head: nn.Module, input: Tensor) -> UncomputedLogits:
    """What the head returns in a view, called as torch.nn.Linear."""
    return UncomputedLogits(input, head, 1.0, input.dtype)


class FusedLoss(Rule):
    """Models of transformers that take labels and have a head for the tokens."""

    patch_needs = frozenset({"fused_loss"})
    patch_runs = "vlmkernels.linear_cross_entropy for the loss, in training with labels"
    patch_methods = ()

    @classmethod
    def patch_bases(cls, original: type[nn.Module]) -> tuple[type, ...]:
        """Our forward comes directly before the one that computes the loss, after what subclasses add."""
        base: Any = _with_labels(original)
        return (cls, *(() if original is base else (original,)), _fused(base), base)

    @classmethod
    def patch_matches(cls, module: Any) -> bool:
        if all(qualified_name(c) != _MODEL for c in own(module).__mro__):
            return False
        return _with_labels(own(module)) is not None and module.get_output_embeddings() is not None

    @classmethod
    def patch_refuses(cls, module: Any) -> str | None:
        base: Any = _with_labels(own(module))
        classes: Any = own(module).__mro__
        for sub in classes[: classes.index(base)]:
            if "forward" in vars(sub) and not _logits.returns_that_of_its_base(sub.forward):
                return f"the forward of {sub.__name__} may use the logits"
        path = _path(module, base.__module__, _calls_loss_function(base))
        if isinstance(path, str):
            return path
        step, forward = module, base.forward
        for name in path:
            why = _logits.other_use(forward, step, name, has_loss=step is module)
            if why is not None:
                return f"the forward of {own(step).__name__} {why}"
            step = getattr(step, name)
            forward = own(step).forward
        return None


def _with_labels(original: type[nn.Module]) -> type[nn.Module] | None:
    """The class whose forward takes the labels."""
    for cls in original.__mro__:
        forward = vars(cls).get("forward")
        if isinstance(forward, FunctionType) and "labels" in inspect.signature(forward).parameters:
            return cls
    return None


@functools.cache
def _fused(base: Any) -> type[nn.Module]:
    """A class with the forward of `base` in which the loss is fused."""
    position = list(inspect.signature(base.forward).parameters).index("labels") - 1
    calls_loss_function = _calls_loss_function(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if labels is None or not self.training:
            return base.forward(self, *args, **kwargs)
        path = _path(self, base.__module__, calls_loss_function)
        if isinstance(path, str):
            return base.forward(self, *args, **kwargs)
        return _without_logits(base.forward(_View(self, path), *args, **kwargs))  # type: ignore[arg-type]

    return type(base.__name__, (nn.Module,), {"forward": override(forward, base, "forward")})


def _without_logits(output: Any) -> Any:
    """The output with None for the logits; with the logits, if no loss was computed from them."""
    if isinstance(output, dict):
        loss = output.get("loss")
    else:
        loss = output[0] if isinstance(output, tuple) else None
    return _known(output, isinstance(loss, Tensor))


def _known(value: Any, has_loss: bool) -> Any:
    """The value without UncomputedLogits, which are in tuples and outputs alone (see `_logits`)."""
    if isinstance(value, UncomputedLogits):
        return None if has_loss else value.computed()
    if type(value) is tuple:
        return tuple([_known(part, has_loss) for part in value])
    if isinstance(value, dict) and any(isinstance(part, UncomputedLogits | tuple) for part in value.values()):
        return type(value)(**{name: _known(part, has_loss) for name, part in value.items()})
    return value


def _path(model: Any, source: str, calls_loss_function: bool) -> tuple[str, ...] | str:
    """The names from a model to its head, or why the head has to be called.

    On the way are only modules from `source`, the model's own file, and no wrappers (sharding, checkpointing,
    adapters) that came after `patch_refuses` had read their forward.
    """
    head = model.get_output_embeddings()
    path = _names(model, head)
    if path is None:
        return "its head is not one of its modules"
    if not _is_linear(head):
        return f"its head is {qualified_name(own(head))}, not torch.nn.Linear"
    if must_be_called(head):
        return "hooks on its head"
    if not can_be_fused(head, own(head)):
        return "the weight of its head is a subclass of Tensor"
    if calls_loss_function and not _is_known(model.loss_function):
        return "its loss_function is not one of transformers"
    for name in path[:-1]:
        model = getattr(model, name)
        if own(model).__module__ != source:
            return f"its head is inside {qualified_name(own(model))}"
        if must_be_called(model):
            return f"hooks on {name}"
    return path


def _names(module: nn.Module, head: nn.Module) -> tuple[str, ...] | None:
    """The names of the modules from one to another below it."""
    for depth in range(_DEEPEST):
        path = _names_at(module, head, depth)
        if path is not None:
            return path
    return None


def _names_at(module: nn.Module, head: nn.Module, depth: int) -> tuple[str, ...] | None:
    for name, child in module._modules.items():
        if depth == 0 and child is head:
            return (name,)
        path = _names_at(child, head, depth - 1) if depth > 0 and child is not None else None
        if path is not None:
            return (name, *path)
    return None


def _is_linear(head: Any) -> bool:
    if qualified_name(own(head)) == _IDEFICS_HEAD:
        return head.out_additional_features == 0
    return is_exactly(head, nn.Linear)


def _calls_loss_function(base: Any) -> bool:
    return "loss_function" in inspect.unwrap(base.forward).__code__.co_names


def _is_known(function: Any) -> bool:
    return (
        isinstance(function, FunctionType)
        and function.__module__ == "transformers.loss.loss_utils"
        and function.__name__ in _LOSSES
    )


FUSED_LOSS: tuple[type[Rule], ...] = (FusedLoss,)
