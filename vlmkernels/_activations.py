"""The activations of the dense layers' ops: the modules that compute them, here and in other libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels._modules import has_own_forward


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the approximation of GELU in OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1.702 * x).sigmoid()


class SquaredReLU(nn.Module):
    """max(x, 0)^2, the activation of Flamingo (Alayrac et al. 2022, appendix A.1)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class Activation(NamedTuple):
    module: Callable[[], nn.Module]
    onednn: tuple[str, str] | None = None  # name and form by which oneDNN fuses it with a product
    others: tuple[str, ...] = ()  # classes of other libraries
    hugging_face: tuple[str, ...] = ()  # in configurations


ACTIVATIONS = {
    "gelu": Activation(
        module=nn.GELU,
        onednn=("gelu", "none"),
        others=("timm.layers.activations.GELU", "transformers.activations.GELUActivation"),
        hugging_face=("gelu",),
    ),
    "gelu_tanh": Activation(
        module=partial(nn.GELU, approximate="tanh"),
        onednn=("gelu", "tanh"),
        others=(
            "timm.layers.activations.GELUTanh",
            "transformers.activations.GELUTanh",
            "transformers.activations.NewGELUActivation",
        ),
        hugging_face=("gelu_new", "gelu_pytorch_tanh"),
    ),
    "quick_gelu": Activation(
        module=QuickGELU,
        others=(
            "open_clip.transformer.QuickGELU",
            "timm.layers.activations.QuickGELU",
            "transformers.activations.QuickGELUActivation",
        ),
        hugging_face=("quick_gelu",),
    ),
    "silu": Activation(
        module=nn.SiLU,
        onednn=("swish", ""),
        others=("transformers.activations.SiLUActivation",),
        hugging_face=("silu", "swish"),
    ),
    "relu": Activation(module=nn.ReLU, onednn=("relu", ""), hugging_face=("relu",)),
    "squared_relu": Activation(
        module=SquaredReLU,
        others=("transformers.activations.ReLUSquaredActivation",),
        hugging_face=("relu2",),
    ),
}
HUGGING_FACE = {word: name for name, activation in ACTIVATIONS.items() for word in activation.hugging_face}
_OURS = {type(activation.module()): name for name, activation in ACTIVATIONS.items()}
_OTHERS = {cls: name for name, activation in ACTIVATIONS.items() for cls in activation.others}


def activation_of(module: nn.Module) -> str | None:
    """The ops' name of the activation that a module computes when called; None if it is none of theirs."""
    cls = type(module)
    if not has_own_forward(cls):
        return None
    if cls is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(module.approximate))
    return _OURS.get(cls) or _OTHERS.get(f"{cls.__module__}.{cls.__qualname__}")
