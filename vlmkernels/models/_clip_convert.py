"""CLIP's state dicts between the names of openai/CLIP (which are ours) and those of Hugging Face."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmkernels.models._pretrained import WEIGHTS_FILE, read_config, read_state_dict

Source = Mapping[str, Any] | str | os.PathLike[str]
OPENAI_BUFFERS = ("input_resolution", "context_length", "vocab_size")

# Names outside the transformer blocks, ours -> Hugging Face's ("pre_layrnorm" is spelled so there).
HF_NAMES = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
HF_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
HF_TOWERS = {"transformer": "text_model.encoder", "visual.transformer": "vision_model.encoder"}
HF_PARTS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def from_openai(source: Source, quick_gelu: bool, check_activation: bool) -> dict[str, Tensor]:
    """Weights of openai/CLIP or open_clip under our names, without buffers; floats as fp32."""
    state_dict = read_state_dict(source)
    if any(name in state_dict for name in OPENAI_BUFFERS) and not quick_gelu and check_activation:
        raise ValueError(
            "quick_gelu: this is OpenAI's own checkpoint (it has input_resolution, context_length or "
            "vocab_size), trained with QuickGELU, and the config has quick_gelu=False: take one with "
            'quick_gelu=True ("ViT-B-32-quickgelu"), or pass check_activation=False to load it all the same'
        )
    out = {}
    for name, tensor in state_dict.items():
        if name in OPENAI_BUFFERS or name.endswith("attn_mask"):
            continue
        # open_clip's CustomTextCLIP keeps the text tower under "text."; fp16 checkpoints train and run as
        # fp32 here.
        out[name.removeprefix("text.")] = tensor.float() if tensor.is_floating_point() else tensor
    for name in ("logit_scale", "logit_bias"):
        if name in out and out[name].shape == (1,):  # open_clip's nonscalar_logit_scale
            out[name] = out[name].reshape(())
    return out


def from_hf(source: Source) -> dict[str, Tensor]:
    """Weights of Hugging Face's CLIPModel under our names; floats as fp32."""
    state_dict = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in read_state_dict(source).items()
        if not name.endswith("embeddings.position_ids")
    }
    out = {}
    for ours, theirs in HF_NAMES.items():
        if theirs in state_dict:
            out[ours] = state_dict.pop(theirs)
    for ours, theirs in HF_TRANSPOSED.items():
        if theirs in state_dict:
            out[ours] = state_dict.pop(theirs).T.contiguous()
    for ours, theirs in HF_TOWERS.items():
        for index in range(_count(state_dict, rf"{re.escape(theirs)}\.layers\.(\d+)\.")):
            block, layer = f"{ours}.resblocks.{index}", f"{theirs}.layers.{index}"
            for kind in ("weight", "bias"):
                for our_part, their_part in HF_PARTS.items():
                    if f"{layer}.{their_part}.{kind}" in state_dict:
                        out[f"{block}.{our_part}.{kind}"] = state_dict.pop(f"{layer}.{their_part}.{kind}")
                names = [f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
                if all(name in state_dict for name in names):
                    out[f"{block}.attn.in_proj_{kind}"] = torch.cat([state_dict.pop(name) for name in names])
    return {**out, **state_dict}  # what is left is reported as unknown by load_weights


def to_hf(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of Hugging Face's CLIPModel."""
    out: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        block = re.fullmatch(r"((?:visual\.)?transformer)\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if name in HF_NAMES:
            out[HF_NAMES[name]] = tensor
        elif name in HF_TRANSPOSED:
            out[HF_TRANSPOSED[name]] = tensor.T.contiguous()
        elif block is None:
            raise ValueError(f"Hugging Face's CLIPModel has no place for {name}")
        else:
            tower, index, part, kind = block.groups()
            layer = f"{HF_TOWERS[tower]}.layers.{index}"
            if part == "attn.in_proj":
                for letter, third in zip("qkv", tensor.chunk(3), strict=True):
                    out[f"{layer}.self_attn.{letter}_proj.{kind}"] = third.clone()
            else:
                out[f"{layer}.{HF_PARTS[part]}.{kind}"] = tensor
    return out


def read_hf_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Converted weights of a Hugging Face CLIP folder, and the ClipConfig fields that shapes do not show."""
    config = read_config(folder)
    text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
    activations = {part.get("hidden_act", "quick_gelu") for part in (text, vision)}
    if (
        config.get("model_type") != "clip"
        or len(activations) > 1
        or not activations <= {"quick_gelu", "gelu"}
    ):
        got = f"model_type {config.get('model_type')!r}, hidden_act {sorted(activations)}"
        raise ValueError(f"{folder}: wants a CLIPModel with one hidden_act, quick_gelu or gelu; got {got}")
    eot_id = text.get("eos_token_id", 49407)
    fields = {
        "quick_gelu": activations == {"quick_gelu"},
        "vision_heads": vision.get("num_attention_heads", 12),
        "text_heads": text.get("num_attention_heads", 8),
    }
    # Configs written before transformers 4.31 say 2, which is not the id: there the highest id is meant.
    return from_hf(Path(folder) / WEIGHTS_FILE), fields if eot_id == 2 else {**fields, "eot_id": eot_id}


def infer_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of ClipConfig that the shapes of our state dict determine; ValueError if it is no CLIP's."""
    needed = ("text_projection", "positional_embedding", "token_embedding.weight", "visual.conv1.weight")
    missing = [name for name in needed if name not in state_dict]
    vit = "visual.proj" in state_dict
    grid_name = "visual.positional_embedding" if vit else "visual.attnpool.positional_embedding"
    if missing or grid_name not in state_dict:
        raise ValueError(f"state_dict is not a CLIP's: it has no {', '.join(missing or [grid_name])}")
    grid = round((state_dict[grid_name].shape[0] - 1) ** 0.5)
    if vit:
        vision_width, _, _, patch_size = state_dict["visual.conv1.weight"].shape
        vision_layers: Any = _count(state_dict, r"visual\.transformer\.resblocks\.(\d+)\.")
        image_size = grid * patch_size
    else:
        vision_width, patch_size = 2 * state_dict["visual.conv1.weight"].shape[0], None
        vision_layers = tuple(_count(state_dict, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4))
        image_size = grid * 32
    vocab_size = state_dict["token_embedding.weight"].shape[0]
    bias = state_dict.get("logit_bias")
    return {
        "embed_dim": state_dict["text_projection"].shape[1],
        "image_size": image_size,
        "vision_layers": vision_layers,
        "vision_width": vision_width,
        "patch_size": patch_size,
        "context_length": state_dict["positional_embedding"].shape[0],
        "vocab_size": vocab_size,
        "text_width": state_dict["text_projection"].shape[0],
        "text_layers": _count(state_dict, r"transformer\.resblocks\.(\d+)\."),
        "eot_id": vocab_size - 1,
        "init_logit_bias": None if bias is None else float(bias),
    }


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers `pattern`, matched at the start of a name, captures."""
    matches = (re.match(pattern, name) for name in state_dict)
    return len({match.group(1) for match in matches if match})
