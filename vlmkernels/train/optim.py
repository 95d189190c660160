"""The optimizer, its schedule, the average of the weights, and Lookahead."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: those of 2 axes or more decay; gains, biases and scales do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, config: TrainConfig, groups: list[dict] | None = None
) -> torch.optim.Optimizer:
    """Fused, and therefore able to skip an update on the device: see `finite_guard`."""
    if groups is None:
        own = getattr(model, "parameter_groups", None)  # a model may define its own
        groups = own(config.weight_decay) if own else parameter_groups(model, config.weight_decay)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """Of step 0, 1, ...: linear from lr/warmup_steps to lr, then half a cosine that ends at min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def build_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """An exponential moving average of the parameters, buffers copied; None when ``decay`` is 0."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


class Lookahead:
    """Slow weights, moved every `steps` updates: slow += alpha (fast - slow), and fast = slow.

    Zhang et al. 2019 (arXiv:1907.08610). The updates are those of any optimizer, whose state it leaves alone.
    """

    def __init__(self, parameters: Sequence[Tensor], steps: int, alpha: float) -> None:
        self.parameters, self.steps, self.alpha = list(parameters), steps, alpha
        self.slow = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def after_update(self, updates: int) -> None:
        """To be called after each update with their number so far."""
        if updates % self.steps == 0:
            for slow, fast in zip(self.slow, self.parameters, strict=True):
                slow.lerp_(fast, self.alpha)
                fast.copy_(slow)

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """The slow weights in place of the fast ones inside the block."""
        fast = [parameter.detach().clone() for parameter in self.parameters]
        self._place(self.slow)
        try:
            yield
        finally:
            self._place(fast)

    @torch.no_grad()
    def _place(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"slow": self.slow}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for slow, value in zip(self.slow, state["slow"], strict=True):
            slow.copy_(value)


def build_lookahead(model: nn.Module, config: TrainConfig) -> Lookahead | None:
    """Of the trainable parameters; None when ``config.lookahead_steps`` is 0."""
    if not config.lookahead_steps:
        return None
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Lookahead(trainable, config.lookahead_steps, config.lookahead_alpha)
