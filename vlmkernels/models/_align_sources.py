"""The config beside the weights of Hugging Face's ALIGN, as fields of AlignConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmkernels._activations import HUGGING_FACE
from vlmkernels.models.parts.efficientnet import CHANNELS, EXPANSIONS, KERNELS, REPEATS, STRIDES
from vlmkernels.models.parts.foreign_config import Part

# Hugging Face's AlignTextConfig and AlignVisionConfig: the keys that are read, with their defaults, ...
TEXT: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "image_size": 600,
    "width_coefficient": 2.0,
    "depth_coefficient": 3.1,
    "strides": list(STRIDES),
    "hidden_act": "swish",
    "batch_norm_eps": 0.001,
    "drop_connect_rate": 0.2,
}
# ... and what is fixed in an ALIGN here.
TEXT_FIXED = {"type_vocab_size": 2}
VISION_FIXED = {
    "num_channels": 3,
    "depth_divisor": 8,
    "kernel_sizes": list(KERNELS),
    "in_channels": [32, *CHANNELS[:-1]],
    "out_channels": list(CHANNELS),
    "depthwise_padding": [],
    "num_block_repeats": list(REPEATS),
    "expand_ratios": list(EXPANSIONS),
    "squeeze_expansion_ratio": 0.25,
    "pooling_type": "mean",
}


def hf_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of AlignConfig for the config.json of an AlignModel; ValueError listing what is unsupported."""
    if config.get("model_type") != "align":
        raise ValueError(f"model_type must be 'align', got {config.get('model_type')!r}")
    top = Part("config", config, {"projection_dim": 640, "temperature_init_value": 1.0}, {})
    text = Part("text_config", config.get("text_config") or {}, TEXT, TEXT_FIXED)
    vision = Part(
        "vision_config", config.get("vision_config") or {}, VISION, VISION_FIXED, loose=("image_size",)
    )
    image_size = vision.side("image_size")
    if text["hidden_act"] not in HUGGING_FACE:
        text.fault("hidden_act", f"one of {', '.join(HUGGING_FACE)}")
    if text["attention_probs_dropout_prob"] != text["hidden_dropout_prob"]:
        text.fault("attention_probs_dropout_prob", "hidden_dropout_prob")
    if HUGGING_FACE.get(vision["hidden_act"]) != "silu":
        vision.fault("hidden_act", '"swish"')
    if faults := [*top.faults, *text.faults, *vision.faults]:
        raise ValueError("; ".join(faults))
    return {
        "embed_dim": top["projection_dim"],
        "image_size": image_size,
        "image_width": vision["width_coefficient"],
        "image_depth": vision["depth_coefficient"],
        "image_strides": vision["strides"],
        "image_padding": "fixed",
        "drop_rate": vision["drop_connect_rate"],
        "batch_norm_eps": vision["batch_norm_eps"],
        "vocab_size": text["vocab_size"],
        "context_length": min(64, text["max_position_embeddings"]),
        "max_positions": text["max_position_embeddings"],
        "text_width": text["hidden_size"],
        "text_layers": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        "text_mlp_width": text["intermediate_size"],
        "text_activation": HUGGING_FACE[text["hidden_act"]],
        "text_eps": text["layer_norm_eps"],
        "text_dropout": text["hidden_dropout_prob"],
        "pad_id": text["pad_token_id"],
        "init_temperature": top["temperature_init_value"],
    }
