"""CLIP's state dicts between the names of openai/CLIP (which are ours) and those of Hugging Face."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmkernels.models._clip_sources import OPEN_CLIP_FILE, OPEN_CLIP_WEIGHTS, hf_fields, open_clip_fields
from vlmkernels.models.parts.pretrained import CONFIG_FILE, naming
from vlmkernels.models.parts.weight_files import Source, read_json, read_state_dict, weights_file

OPENAI_BUFFERS = ("input_resolution", "context_length", "vocab_size")
NOT_IN_SHAPES = ("quick_gelu", "vision_heads", "text_heads")
NOT_IN_SHAPES_OF_CLIPA = ("vision_pool", "text_pool", "text_causal")

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


class Converted(NamedTuple):
    """Weights under our names, and the fields of ClipConfig that come with them, with their origin."""

    weights: dict[str, Tensor]
    fields: dict[str, Any]
    origin: str = ""


def from_openai(source: Source) -> Converted:
    """Weights of openai/CLIP or open_clip, without buffers; of a folder, the file that open_clip would load.

    The fields are those of open_clip_config.json beside the file. Without it, OpenAI's own checkpoints are
    recognised by their buffers: they have QuickGELU and heads of 64 channels.
    """
    if not isinstance(source, Mapping) and Path(source).is_dir():
        source = weights_file(source, OPEN_CLIP_WEIGHTS)
    state_dict = read_state_dict(source)
    out = {}
    for name, tensor in state_dict.items():
        if name in OPENAI_BUFFERS or name.endswith("attn_mask"):
            continue
        out[name.removeprefix("text.")] = tensor  # the text tower of open_clip's CustomTextCLIP
    for name in ("logit_scale", "logit_bias"):
        if name in out and out[name].shape == (1,):  # open_clip's nonscalar_logit_scale
            out[name] = out[name].reshape(())
    fields, origin = _beside(
        source, OPEN_CLIP_FILE, lambda config: open_clip_fields(config.get("model_cfg", config))
    )
    if not fields and any(name in state_dict for name in OPENAI_BUFFERS):
        fields = {"quick_gelu": True, "vision_heads": None, "text_heads": None}
        origin = f"OpenAI's own checkpoint (it has {', '.join(OPENAI_BUFFERS[:-1])} or {OPENAI_BUFFERS[-1]})"
    return Converted(out, fields, origin)


def _beside(
    source: Source, name: str, convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[dict[str, Any], str]:
    """The fields of the config `name` beside a file, and its path; empty if there is none."""
    if isinstance(source, Mapping) or not (path := Path(source).parent / name).is_file():
        return {}, ""
    with naming(path):
        return convert(read_json(path)), str(path)


def from_hf(source: Source) -> Converted:
    """Weights of Hugging Face's CLIPModel; the fields are those of config.json beside the file."""
    if not isinstance(source, Mapping) and Path(source).is_dir():
        source = weights_file(source)
    state_dict = {
        name: tensor
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
    # check_weights reports the rest of the state dict as unknown.
    return Converted({**out, **state_dict}, *_beside(source, CONFIG_FILE, hf_fields))


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


def check_activation(known: Mapping[str, Any], quick_gelu: bool, origin: str) -> None:
    """ValueError if the weights were trained with another activation."""
    if known.get("quick_gelu", quick_gelu) != quick_gelu:
        name = "GELU" if quick_gelu else "QuickGELU"
        raise ValueError(
            f"quick_gelu: {origin} was trained with {name}, but quick_gelu={quick_gelu}: pass "
            f"quick_gelu={not quick_gelu} (open_clip's names of QuickGELU end in -quickgelu), or "
            "check_activation=False to load it anyway"
        )


def complete(weights: Mapping[str, Tensor], fields: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` of ClipConfig and those that the shapes determine; ValueError for fields in neither."""
    out = {**infer_sizes(weights), **fields}
    wanted = NOT_IN_SHAPES + (() if out["vision_ln_pre"] else NOT_IN_SHAPES_OF_CLIPA)
    if missing := [name for name in wanted if name not in out]:
        raise ValueError(
            f"{', '.join(missing)}: not determined by shapes, and there is no config beside the weights; "
            f"pass each as an argument (None means heads of 64 channels), put {OPEN_CLIP_FILE} or Hugging "
            f"Face's {CONFIG_FILE} beside the file, or load into a model with a known config"
        )
    return out


def infer_sizes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of ClipConfig that shapes of our state dict determine; ValueError if it is not a CLIP's."""
    needed = {
        "text_projection": 2,
        "positional_embedding": 2,
        "token_embedding.weight": 2,
        "visual.conv1.weight": 4,
    }
    vit = "visual.proj" in state_dict
    grid_name = "visual.positional_embedding" if vit else "visual.attnpool.positional_embedding"
    needed[grid_name] = 2
    if missing := [name for name in needed if name not in state_dict]:
        raise ValueError(f"state_dict must be a CLIP's, but it has no {', '.join(missing)}")
    if flat := [name for name, dims in needed.items() if state_dict[name].ndim != dims]:
        raise ValueError(
            f"state_dict must be a CLIP's, but {', '.join(flat)} have another number of dimensions"
        )
    grid = round(max(len(state_dict[grid_name]) - 1, 0) ** 0.5)
    vocab_size, text_width = state_dict["token_embedding.weight"].shape
    fields: dict[str, Any] = {
        "embed_dim": state_dict["text_projection"].shape[1],
        "context_length": len(state_dict["positional_embedding"]),
        "vocab_size": vocab_size,
        "text_width": text_width,
        "text_layers": _count(state_dict, r"transformer\.resblocks\.(\d+)\."),
        "text_mlp_width": _mlp_width(state_dict, "transformer", text_width),
        "eot_id": vocab_size - 1,
        "vision_ln_pre": True,
    }
    if "logit_bias" in state_dict:
        fields["init_logit_bias"] = float(state_dict["logit_bias"])
    if not vit:
        stages = [_count(state_dict, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
        width = 2 * len(state_dict["visual.conv1.weight"])
        resnet = {"vision_layers": tuple(stages), "vision_width": width, "patch_size": None}
        return {**fields, **resnet, "image_size": grid * 32}
    width, _, _, patch_size = state_dict["visual.conv1.weight"].shape
    return {
        **fields,
        "image_size": grid * patch_size,
        "vision_layers": _count(state_dict, r"visual\.transformer\.resblocks\.(\d+)\."),
        "vision_width": width,
        "vision_mlp_width": _mlp_width(state_dict, "visual.transformer", width),
        "vision_ln_pre": "visual.ln_pre.weight" in state_dict,
        "patch_size": patch_size,
    }


def _mlp_width(state_dict: Mapping[str, Tensor], tower: str, width: int) -> int | None:
    weight = state_dict.get(f"{tower}.resblocks.0.mlp.c_fc.weight")
    return None if weight is None or len(weight) == 4 * width else len(weight)


def _count(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers `pattern`, matched at the start of a name, captures."""
    matches = (re.match(pattern, name) for name in state_dict)
    return len({match.group(1) for match in matches if match})
