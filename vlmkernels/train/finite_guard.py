"""Keeps numbers that are not finite from the weights and from the disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .objective import process_count, sum_over_processes

TRIES = 32  # of a gradient scaler: each halves a scale that starts at 2^16


class FiniteGuard:
    """Stops all updates from the first step on whose loss or gradient norm is not finite, on any process.

    On the CPU :meth:`check` raises at that step. On other devices it does not wait for the device:
    ``optimizer``, a fused one, is told on the device to skip its updates (by ``found_inf``, as a gradient
    scaler does), and :meth:`read` raises later. With a gradient scaler (``scaled``) a gradient too large for
    its scale is skipped by the scaler, up to TRIES consecutive steps.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, step: int, *, scaled: bool = False
    ) -> None:
        self.at_once, self.scaled, self.first = device.type == "cpu", scaled, step
        self.passed = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros_like(self.passed)
        self.tripped = torch.zeros((), dtype=torch.bool, device=device)
        self.values = torch.zeros(2, device=device)  # loss and norm of the step that tripped it
        optimizer.register_step_pre_hook(self._notify)

    def check(self, loss: Tensor, norm: Tensor) -> None:
        """To be called before every update; ``norm`` is that of the joint batch's gradient."""
        values = sum_over_processes(torch.stack((loss.detach().float(), norm.float())))
        if self.at_once:
            if not all(map(math.isfinite, values.tolist())):
                self._stop(values)
            self.passed += 1
            return
        loss_is_finite, norm_is_finite = values.isfinite()
        if self.scaled:
            self.skipped = torch.where(norm_is_finite, 0, self.skipped + 1)
            norm_is_finite = self.skipped < TRIES
        fault = ~(loss_is_finite & norm_is_finite)
        self.values = torch.where(self.tripped | ~fault, self.values, values)
        self.tripped = self.tripped | fault
        self.passed += ~self.tripped

    def skip(self) -> None:
        """Replaces :meth:`check` for a step without samples, which has no loss and no update."""
        self.passed += ~self.tripped

    def read(self) -> None:
        """FloatingPointError naming the step that tripped the guard, if any; waits for the device."""
        if self.tripped:
            self._stop(self.values)

    def _stop(self, values: Tensor) -> None:
        step = self.first + int(self.passed) + 1
        loss, norm = (values / process_count()).tolist()
        what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        raise FloatingPointError(f"{what} at step {step}; lower lr or raise warmup_steps")

    def _notify(self, optimizer: Any, *step_arguments: Any) -> None:
        if not self.at_once:
            tripped = self.tripped.float()
            scalers = getattr(optimizer, "found_inf", tripped)
            optimizer.found_inf = torch.maximum(scalers, tripped)


def check_finite(step: int, **states: Any) -> None:
    """FloatingPointError naming the tensors of ``states`` with a number that is not finite."""
    wrong = [name for name, tensor in _tensors(states) if not tensor.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise FloatingPointError(f"not finite after step {step}: {', '.join(wrong[:3])}{more}; lower lr")


def _tensors(state: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, by their path."""
    if isinstance(state, Tensor):
        yield name, state
    elif isinstance(state, (dict, list, tuple)):
        entries = state.items() if isinstance(state, dict) else enumerate(state)
        for key, value in entries:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))
