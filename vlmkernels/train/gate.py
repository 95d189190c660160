"""Only finite numbers pass: from a step to the weights, and from the weights to the disk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .objective import process_count, sum_over_processes

TRIES = 32  # of a gradient scaler: each halves a scale that starts at 2^16


class Gate:
    """Closes for good at the first step with a loss or gradient norm that is not finite, on any process.

    On the CPU :meth:`check` raises at that step. On other devices it waits for nothing: ``optimizer``, a
    fused one, is told on the device to leave the weights alone (by its ``found_inf``, as a gradient scaler
    does), and :meth:`read` raises later. With a gradient scaler (``scaled``) a gradient too large for its
    scale is the scaler's to skip, up to TRIES steps on end.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, device: torch.device, step: int, *, scaled: bool = False
    ) -> None:
        self.at_once, self.scaled, self.first = device.type == "cpu", scaled, step
        self.passed = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros_like(self.passed)
        self.closed = torch.zeros((), dtype=torch.bool, device=device)
        self.values = torch.zeros(2, device=device)  # loss and norm at which it closed
        optimizer.register_step_pre_hook(self._tell)

    def check(self, loss: Tensor, norm: Tensor) -> None:
        """Before every update; ``norm`` is that of the gradient on all processes together."""
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
        self.values = torch.where(self.closed | ~fault, self.values, values)
        self.closed = self.closed | fault
        self.passed += ~self.closed

    def pass_over(self) -> None:
        """In place of :meth:`check` for a step without samples, which has no loss and updates nothing."""
        self.passed += ~self.closed

    def read(self) -> None:
        """FloatingPointError naming the step at which the gate closed, if it has; waits for the device."""
        if self.closed:
            self._stop(self.values)

    def _stop(self, values: Tensor) -> None:
        step = self.first + int(self.passed) + 1
        loss, norm = (values / process_count()).tolist()
        what = f"the norm of the gradient is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        raise FloatingPointError(f"{what} at step {step}; lower lr or raise warmup_steps")

    def _tell(self, optimizer: Any, *step_arguments: Any) -> None:
        if not self.at_once:
            closed = self.closed.float()
            scalers = getattr(optimizer, "found_inf", closed)
            optimizer.found_inf = torch.maximum(scalers, closed)


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
