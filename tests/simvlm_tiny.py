"""A SimVLM small enough for tests, with every parameter and statistic away from its initial value."""

import torch
from torch import Tensor

from vlmkernels.models.simvlm import SimVLM, SimVLMConfig

FORMS = ("encoder_decoder", "prefix_lm")


def tiny_config(form: str = "encoder_decoder", **fields) -> SimVLMConfig:
    """9 image tokens, width 32, 2 + 2 layers, 31 token ids."""
    sizes = {
        "image_size": 24,
        "conv_blocks": (1, 1, 1),
        "conv_width": 4,
        "conv_pool": False,
        "width": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "heads": 4,
        "context_length": 12,
        "vocab_size": 31,
    }
    return SimVLMConfig(form=form, **{**sizes, **fields})


def randomize(model: torch.nn.Module, scale: float = 1.0) -> None:
    """Weights at which every branch, bias and table matters."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("running_var", "norm.weight")) or (
                name.endswith("weight") and tensor.dim() == 1
            ):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(("bias", "running_mean")):
                tensor.normal_(std=1.0 if "relative" in name else 0.2)
            elif tensor.is_floating_point() and tensor.dim() == 4:
                tensor.normal_(std=(2.0 / tensor[0].numel()) ** 0.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=scale * tensor.shape[-1] ** -0.5)


def tiny_model(form: str = "encoder_decoder", *, scale: float = 1.0, **fields) -> SimVLM:
    """In evaluation mode and float64, so that parity is exact but for rounding."""
    model = SimVLM(tiny_config(form, **fields))
    randomize(model, scale)
    return model.double().eval()


def tiny_batch(size: int = 4, length: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens and the lengths of the texts (the first is `length` long)."""
    images = torch.randn(size, 3, 24, 24, dtype=torch.float64)
    tokens = torch.randint(3, 31, (size, length))
    lengths = torch.randint(3, length + 1, (size,))
    lengths[0] = length
    tokens[:, 0] = 1
    tokens[torch.arange(size), lengths - 1] = 2
    tokens[torch.arange(length) >= lengths[:, None]] = 0
    return images, tokens, lengths
