"""Parameter names and options of the resampler and the gated block in other code bases.

    options = BLOCK_PRESETS["idefics"]
    block = GatedCrossAttentionBlock(4096, 1280, heads=32, dim_head=128, ff_dim=11008, **options)
    load_family_state_dict(block, weights, "idefics", prefix="model.gated_cross_attn_layers.0.")

Sources of the names: open_flamingo 2.0.1, flamingo-pytorch 0.1.2 (lucidrains), flamingo-mini, transformers
5.23.0 (idefics, idefics2, mllama), meta-llama/llama-models (mllama_meta); "flamingo" is the paper.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmkernels.nn.perceiver import PerceiverResampler

_RMS: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu"}

# Differences from the constructors' defaults, except sizes.
BLOCK_PRESETS: dict[str, dict[str, Any]] = {
    "flamingo": {"activation": "squared_relu"},
    "open_flamingo": {"empty_row": "uniform"},
    "lucidrains": {"empty_row": "uniform"},
    "flamingo_mini": {"empty_row": "uniform"},
    "idefics": {**_RMS, "eps": 1e-6},
    "mllama": {**_RMS, "eps": 1e-5, "qk_norm": True, "empty_row": "all", "ffn_on_empty": False},
    "mllama_meta": {**_RMS, "eps": 1e-5, "qk_norm": True, "ffn_on_empty": False},
}
RESAMPLER_PRESETS: dict[str, dict[str, Any]] = {
    "flamingo": {"activation": "squared_relu"},
    "open_flamingo": {},
    "lucidrains": {"max_num_media": 4},
    "flamingo_mini": {"max_num_frames": 4},
    "idefics": {"activation": "relu"},
    "idefics2": {**_RMS, "eps": 1e-6},
}

# Our module or parameter -> theirs; several are concatenated in ours along the rows. Absent: the same name.
_MLP = {"ff.1": "mlp.gate_proj mlp.up_proj", "ff.3": "mlp.down_proj"}
_BLOCK_NAMES: dict[str, dict[str, str]] = {
    "flamingo": {},
    "open_flamingo": {},
    "lucidrains": {},
    "flamingo_mini": {"attn_gate": "alpha_attn", "ff_gate": "alpha_ffw", "ff": "ffw"},
    "idefics": {
        "attn.norm": "input_layernorm",
        "attn.to_q": "cross_attn.q_proj",
        "attn.to_kv": "cross_attn.k_proj cross_attn.v_proj",
        "attn.to_out": "cross_attn.o_proj",
        "attn.q_norm": "cross_attn.q_layer_norm",
        "attn.k_norm": "cross_attn.k_layer_norm",
        "attn_gate": "alpha_cross_attn",
        "ff.0": "post_attention_layernorm",
        **_MLP,
        "ff_gate": "alpha_dense",
    },
    "mllama": {
        "attn.norm": "input_layernorm",
        "attn.to_q": "cross_attn.q_proj",
        "attn.to_kv": "cross_attn.k_proj cross_attn.v_proj",
        "attn.to_out": "cross_attn.o_proj",
        "attn": "cross_attn",
        "attn_gate": "cross_attn_attn_gate",
        "ff.0": "post_attention_layernorm",
        **_MLP,
        "ff_gate": "cross_attn_mlp_gate",
    },
    "mllama_meta": {
        "attn.norm": "attention_norm",
        "attn.to_q": "attention.wq",
        "attn.to_kv": "attention.wk attention.wv",
        "attn.to_out": "attention.wo",
        "attn": "attention",
        "attn_gate": "gate_attn",
        "ff.0": "ffn_norm",
        "ff.1": "feed_forward.w1 feed_forward.w3",
        "ff.3": "feed_forward.w2",
        "ff_gate": "gate_ffwd",
    },
}
_RESAMPLER_NAMES: dict[str, dict[str, str]] = {
    "flamingo": {},
    "open_flamingo": {},
    "lucidrains": {"media_time_embs": "media_pos_emb"},
    "flamingo_mini": {"frame_embs": "time_pos_emb", "layers.#.0.to_kv": "layers.#.0.to_k layers.#.0.to_v"},
    "idefics": {
        "layers.#.0.norm_media": "blocks.#.0.context_layer_norm",
        "layers.#.0.norm_latents": "blocks.#.0.latents_layer_norm",
        "layers.#.0.to_q": "blocks.#.0.q_proj",
        "layers.#.0.to_kv": "blocks.#.0.k_proj blocks.#.0.v_proj",
        "layers.#.0.to_out": "blocks.#.0.output_proj",
        "layers.#.0.q_norm": "blocks.#.0.q_layer_norm",
        "layers.#.0.k_norm": "blocks.#.0.k_layer_norm",
        "layers.#.1.0": "blocks.#.1.ln",
        "layers.#.1.1": "blocks.#.1.fc",
        "layers.#.1.3": "blocks.#.1.c_proj",
        "norm": "layer_norm",
    },
    "idefics2": {
        "layers.#.0.norm_media": "layers.#.input_context_norm",
        "layers.#.0.norm_latents": "layers.#.input_latents_norm",
        "layers.#.0.to_q": "layers.#.self_attn.q_proj",
        "layers.#.0.to_kv": "layers.#.self_attn.k_proj layers.#.self_attn.v_proj",
        "layers.#.0.to_out": "layers.#.self_attn.o_proj",
        "layers.#.1.0": "layers.#.post_attention_layernorm",
        "layers.#.1.1": "layers.#.mlp.gate_proj layers.#.mlp.up_proj",
        "layers.#.1.3": "layers.#.mlp.down_proj",
    },
}


def load_family_state_dict(
    module: nn.Module, state_dict: Mapping[str, Tensor], family: str, *, prefix: str = ""
) -> None:
    """Fills a `PerceiverResampler` or `GatedCrossAttentionBlock` from a state dict with a family's names.

    Args:
        module: the module, built with the sizes of the weights and the options of the family's preset.
        state_dict: the family's weights; only names that begin with `prefix` are read.
        family: a key of `BLOCK_PRESETS` or `RESAMPLER_PRESETS`.
        prefix: of the module in that state dict, "model.layers.3.gated_cross_attn_layer." for example.

    Raises:
        ValueError: an unknown family, or all missing, unexpected and mis-shaped names.
    """
    theirs = {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix) and "rotary_emb." not in name  # a table, not weights
    }
    own = module.state_dict()
    sources = {key: _names(key, module, family) for key in own}
    wanted = [name for names in sources.values() for name in names]
    missing = [prefix + name for name in wanted if name not in theirs]
    unknown = [prefix + name for name in theirs if name not in wanted]
    shapes, weights = [], {}
    for key, names in sources.items():
        parts = [theirs[name] for name in names if name in theirs]
        if len(parts) < len(names):
            continue
        fits = len({part.shape[1:] for part in parts}) == 1
        tensor = torch.cat(parts) if fits and len(parts) > 1 else parts[0]
        if not fits or _squeezed(tensor) != _squeezed(own[key]):
            got = " and ".join(f"{prefix}{name} {list(theirs[name].shape)}" for name in names)
            shapes.append(f"{got} for {list(own[key].shape)}")
        weights[key] = tensor
    faults = [
        f"{len(names)} {kind}: {', '.join(names)}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise ValueError(
            f"state_dict does not match {type(module).__name__} as {family}: {'; '.join(faults)}"
        )
    module.load_state_dict({key: tensor.reshape(own[key].shape) for key, tensor in weights.items()})


def family_state_dict(module: nn.Module, family: str, *, prefix: str = "") -> dict[str, Tensor]:
    """The weights of `module` with a family's names and shapes; the inverse of `load_family_state_dict`."""
    result = {}
    for key, tensor in module.state_dict().items():
        names = _names(key, module, family)
        if family == "flamingo_mini" and key == "frame_embs":
            tensor = tensor[:, None]
        if family == "idefics" and key.endswith("_gate") and tensor.numel() > 1:
            tensor = tensor[None, None]
        parts = tensor.chunk(len(names)) if len(names) > 1 else (tensor,)
        result.update({prefix + name: part for name, part in zip(names, parts, strict=True)})
    return result


def _names(key: str, module: nn.Module, family: str) -> list[str]:
    """Their names for one of our parameters."""
    known = _RESAMPLER_NAMES if isinstance(module, PerceiverResampler) else _BLOCK_NAMES
    if family not in known:
        raise ValueError(f"family must be one of {', '.join(known)}, got {family!r}")
    layer = re.match(r"layers\.(\d+)\.", key)
    general = f"layers.#.{key[layer.end() :]}" if layer else key
    parts = general.split(".")
    for length in range(len(parts), 0, -1):
        ours = ".".join(parts[:length])
        if ours in known[family]:
            rest = general[len(ours) :]
            names = [name + rest for name in known[family][ours].split()]
            return [name.replace("#", layer[1]) if layer else name for name in names]
    return [key]


def _squeezed(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]
