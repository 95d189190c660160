"""Weights packed for inference on a CPU: `vlmkernels.prepare_for_inference`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels import _packed


class Prepared:
    """The result of `prepare_for_inference`: `packed` names, `skipped` names with reasons, and `undo()`.

    As a context manager it calls `undo()` at the end of the block.
    """

    def __init__(self, packed: dict[str, tuple[nn.Module, Tensor]], skipped: dict[str, str]) -> None:
        self._layers = packed
        self.packed = list(packed)
        self.skipped = skipped

    def undo(self) -> None:
        """Frees the packed copies and restores the model. A second call does nothing."""
        for module, weight in self._layers.values():
            _packed.PACKED.pop(id(weight), None)
            if isinstance(module.__dict__.get("forward"), _Forward):
                del module.forward
        self._layers = {}

    def __enter__(self) -> "Prepared":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.undo()


class _Forward:
    """The forward of a plain nn.Linear whose weight is packed."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def __call__(self, input: Tensor) -> Tensor:
        module = self.module
        if torch.compiler.is_compiling():
            return nn.functional.linear(input, module.weight, module.bias)
        out = _packed.packed_linear(input, module.weight, module.bias, "none", None)
        return nn.functional.linear(input, module.weight, module.bias) if out is None else out


def prepare_for_inference(model: nn.Module) -> Prepared:
    """Packs the weights of the linear layers of `model` for products without gradients on the CPU.

    Every ``torch.nn.Linear`` stores a second copy of its weight in the layout of oneDNN's micro-kernels,
    which otherwise is created in every call. If no gradient is recorded (``torch.no_grad()`` or
    ``torch.inference_mode()``) these layers use it, and so do `vlmkernels.linear`, `mlp` and `gated_mlp` on
    the same weights. Otherwise, under autocast and in ``torch.compile``, everything runs as before.
    Parameters, their names and the state dict are unchanged, and results differ by rounding only.

    After a change in place (``copy_``, ``load_state_dict``, an optimizer step) or of its memory, the next use
    of a weight raises a RuntimeError. Changes that do not increase torch's version counter are not detected:
    in-place writes through ``weight.data``, through ``weight.detach().numpy()`` or by another process.

    Args:
        model: in eval mode.

    Returns:
        A handle with the names of the packed layers, the reasons why others are not, and ``undo()``; also a
        context manager.

    Raises:
        ValueError: the model is in training mode, or was prepared before.
    """
    if model.training:
        raise ValueError("prepare_for_inference: the model is in training mode, call model.eval() first")
    layers = {name: (module, weight) for name, module, weight in _layers(model)}
    if any(_packed.entry_of(weight) for _, weight in layers.values()):
        raise ValueError("prepare_for_inference: the model is prepared already, call undo() first")
    packed: dict[str, tuple[nn.Module, Tensor]] = {}
    skipped: dict[str, str] = {}
    for name, (module, weight) in layers.items():
        reason = _packed.why_not(weight) if type(weight) is nn.Parameter else "not a plain parameter"
        if reason:
            skipped[name] = reason
            continue
        _packed.pack(weight)
        # A forward that was overridden or replaced is kept.
        own = module.__dict__.get("forward")
        replaceable = type(module).forward is nn.Linear.forward and (own is None or isinstance(own, _Forward))
        if isinstance(module, nn.Linear) and replaceable:
            module.forward = _Forward(module)  # type: ignore[method-assign]
        packed[name] = module, weight
    return Prepared(packed, skipped)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Linear layers, and other weights that a module declares as passed to `vlmkernels.linear`."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module, module.weight
        for attribute in getattr(module, "linear_weights", ()):
            yield f"{name}.{attribute}".lstrip("."), module, getattr(module, attribute)


__all__ = ["Prepared", "prepare_for_inference"]
