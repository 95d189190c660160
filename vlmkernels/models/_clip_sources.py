"""The config beside the weights of a CLIP, open_clip's or Hugging Face's, as fields of ClipConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlmkernels.models.parts.foreign_config import Part

OPEN_CLIP_FILE = "open_clip_config.json"
# In the order in which open_clip looks for them.
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)

# open_clip's CLIPVisionCfg and CLIPTextCfg: the keys that are read, with their defaults, ...
VISION: dict[str, Any] = {
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "patch_size": 16,
    "image_size": 224,
    "no_ln_pre": False,
    "pool_type": "tok",
    "final_ln_after_pool": False,
    "norm_kwargs": None,
}
TEXT: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "no_causal_mask": False,
    "pool_type": "argmax",
    "eos_id": 2,
    "norm_kwargs": None,
    "hf_tokenizer_name": None,
}
# ... those of features that a CLIP here does not have, ...
BLOCK_FIXED = {
    "ls_init_value": None,
    "act_kwargs": None,
    "block_type": None,
    "qk_norm": False,
    "scaled_cosine_attn": False,
    "scale_heads": False,
    "scale_attn_inner": False,
    "scale_attn": False,
    "scale_fc": False,
}
VISION_FIXED = {
    **BLOCK_FIXED,
    "timm_model_name": None,
    "attentional_pool": False,
    "pos_embed_type": "learnable",
}
TEXT_FIXED = {
    **BLOCK_FIXED,
    "hf_model_name": None,
    "embed_cls": False,
    "proj_type": "linear",
    "proj_bias": False,
}
TOP: dict[str, Any] = {
    "embed_dim": 0,
    "vision_cfg": None,
    "text_cfg": None,
    "quick_gelu": False,
    "init_logit_scale": None,
    "init_logit_bias": None,
}
# ... and those that have no effect without the above, or only on training and tokens.
IGNORED = (
    *("patch_dropout", "output_tokens", "attn_pooler_queries", "attn_pooler_heads", "pad_id"),
    *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    *("hf_model_pretrained", "hf_proj_type", "hf_pooler_type", "tokenizer_mode", "tokenizer_kwargs"),
)


def open_clip_fields(model_cfg: Any) -> dict[str, Any]:
    """Fields of ClipConfig for open_clip's model config; ValueError listing what is not supported."""
    top = Part(
        "model_cfg", model_cfg, TOP, {"multimodal_cfg": None}, ("custom_text", "nonscalar_logit_scale")
    )
    loose = ("layers", "patch_size", "image_size")
    vision = Part("vision_cfg", top["vision_cfg"], VISION, VISION_FIXED, IGNORED, loose)
    text = Part("text_cfg", top["text_cfg"], TEXT, TEXT_FIXED, IGNORED)
    resnet = type(vision["layers"]) is list
    pool = vision["pool_type"], vision["final_ln_after_pool"]
    if not resnet and pool not in (("tok", False), ("tok", True), ("avg", True)):
        vision.fault("pool_type", '"tok", or "avg" with final_ln_after_pool')
    if text["pool_type"] not in ("argmax", "eos", "last"):
        text.fault("pool_type", '"argmax", "eos" or "last"')
    if text["pool_type"] == "argmax" and text["hf_tokenizer_name"]:
        text.fault(
            "pool_type", '"eos" or "last" (the highest id is the end of text only in CLIP\'s vocabulary)'
        )
    if vision["head_width"] < 1:
        vision.fault("head_width", "1 or more")
    for part in (vision, text):
        if not 0 < part["mlp_ratio"] < 1000:
            part.fault("mlp_ratio", "more than 0 and less than 1000")
    vision_eps, text_eps = _eps(vision), _eps(text)
    image_size, patch_size = vision.side("image_size"), None if resnet else vision.side("patch_size")
    if faults := [*top.faults, *vision.faults, *text.faults]:
        raise ValueError("; ".join(faults))
    fields: dict[str, Any] = {
        "embed_dim": top["embed_dim"],
        "image_size": image_size,
        "vision_layers": vision["layers"],
        "vision_width": vision["width"],
        "vision_heads": vision["width"] * (32 if resnet else 1) // vision["head_width"],
        "patch_size": patch_size,
        "context_length": text["context_length"],
        "vocab_size": text["vocab_size"],
        "text_width": text["width"],
        "text_layers": text["layers"],
        "text_heads": text["heads"],
        "text_mlp_width": _mlp_width(text["width"], int(text["width"] * text["mlp_ratio"])),
        "text_eps": text_eps,
        "quick_gelu": top["quick_gelu"],
        "eot_id": text["eos_id"] if text["pool_type"] == "eos" else text["vocab_size"] - 1,
        "text_pool": "last" if text["pool_type"] == "last" else "eot",
        "text_causal": not text["no_causal_mask"],
        "init_logit_bias": top["init_logit_bias"],
    }
    if top["init_logit_scale"] is not None:
        fields["init_logit_scale"] = top["init_logit_scale"]
    if not resnet:
        fields |= {
            "vision_mlp_width": _mlp_width(vision["width"], int(vision["width"] * vision["mlp_ratio"])),
            "vision_eps": vision_eps,
            "vision_ln_pre": not vision["no_ln_pre"],
            "vision_pool": "mean" if vision["pool_type"] == "avg" else "class",
        }
    return fields


def _eps(part: Part) -> float:
    options = part["norm_kwargs"] or {}
    if not isinstance(options, Mapping) or options.keys() - {"eps"}:
        part.fault("norm_kwargs", "null or contain only eps")
        return 1e-5
    return options.get("eps", 1e-5)


def _mlp_width(width: int, hidden: int) -> int | None:
    return None if hidden == 4 * width else hidden


# Hugging Face's CLIPTextConfig, CLIPVisionConfig and CLIPConfig: the keys that are read, with their defaults.
HF_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
HF_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def hf_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of ClipConfig for the config.json of a CLIPModel; ValueError listing what is not supported."""
    if config.get("model_type") != "clip":
        raise ValueError(f"model_type must be 'clip', got {config.get('model_type')!r}")
    top = Part("config", config, {"projection_dim": 512}, {})
    text = Part("text_config", _hf_part(config, "text_config"), HF_TEXT, {})
    sides = ("image_size", "patch_size")
    vision = Part(
        "vision_config", _hf_part(config, "vision_config"), HF_VISION, {"num_channels": 3}, loose=sides
    )
    image_size, patch_size = (vision.side(name) for name in sides)
    if text["hidden_act"] not in ("quick_gelu", "gelu") or text["hidden_act"] != vision["hidden_act"]:
        text.fault("hidden_act", f'"quick_gelu" or "gelu", as in vision_config ({vision["hidden_act"]!r})')
    if faults := [*top.faults, *text.faults, *vision.faults]:
        raise ValueError("; ".join(faults))
    eot_id = text["eos_token_id"]
    return {
        "embed_dim": top["projection_dim"],
        "image_size": image_size,
        "vision_layers": vision["num_hidden_layers"],
        "vision_width": vision["hidden_size"],
        "vision_heads": vision["num_attention_heads"],
        "vision_mlp_width": _mlp_width(vision["hidden_size"], vision["intermediate_size"]),
        "vision_eps": vision["layer_norm_eps"],
        "patch_size": patch_size,
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "text_width": text["hidden_size"],
        "text_layers": text["num_hidden_layers"],
        "text_heads": text["num_attention_heads"],
        "text_mlp_width": _mlp_width(text["hidden_size"], text["intermediate_size"]),
        "text_eps": text["layer_norm_eps"],
        "quick_gelu": text["hidden_act"] == "quick_gelu",
        # Configs written before transformers 4.31 have 2 here; their end of text is the highest id.
        "eot_id": text["vocab_size"] - 1 if eot_id == 2 else eot_id,
    }


def _hf_part(config: Mapping[str, Any], name: str) -> Any:
    """A tower's config; if an old file has it twice, the one that transformers uses."""
    twice = config.get(f"{name}_dict")
    return (config.get(name) or {}) if twice is None else twice
