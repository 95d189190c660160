"""Weights of VisualGPT by the names of the authors' code (Vision-CAIR/VisualGPT), both ways.

Their decoder has GPT-2's names and weights [in, out], their encoder those of Meshed-Memory Transformer. Their
modules also have weights that no computation reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

BUFFER_SIZE = 60  # of the causal masks that their attention stores
UNREAD = re.compile(
    r"(?:^|\.)(?:running_\w+|attn\.bias|enc_dec_attn\.bias|enc_dec_attn\.c_attn\.(?:weight|bias)"
    r"|attention\.c_attn_(?:query|key|value)\.(?:weight|bias))$"
)
# Ours -> theirs, of a layer; several are stacked along the outputs. "T": theirs is [in, out].
DECODER = {
    "ln_1": "ln_1",
    "attn.c_attn": "attn.c_attn T",
    "attn.c_proj": "attn.c_proj T",
    "cross.q_proj": "enc_dec_attn.fc_q",
    "cross.kv_proj": "enc_dec_attn.fc_k enc_dec_attn.fc_v",
    "cross.out_proj": "enc_dec_attn.c_proj T",
    "ln_2": "ln_2",
    "mlp.c_fc": "mlp.c_fc T",
    "mlp.c_proj": "mlp.c_proj T",
}
ENCODER = {
    "attn.in_proj_": "mhatt.attention.fc_q mhatt.attention.fc_k mhatt.attention.fc_v",
    "attn.out_proj": "mhatt.attention.fc_o",
    "norm_1": "mhatt.layer_norm",
    "mlp.c_fc": "pwff.fc1",
    "mlp.c_proj": "pwff.fc2",
    "norm_2": "pwff.layer_norm",
}
WHOLE = {
    "encoder.projection": "encoder.fc",
    "encoder.norm": "encoder.layer_norm",
    "transformer.ln_f": "decoder.transformer.ln_f",
}
TABLES = {
    "transformer.wte.weight": "decoder.transformer.wte.weight",
    "transformer.wpe.weight": "decoder.transformer.wpe.weight",
}


def _modules(layers: int, encoder_layers: int) -> dict[str, str]:
    """Ours -> theirs of all modules whose weights are stacked or transposed at most."""
    found = dict(WHOLE)
    for i in range(encoder_layers):
        place = f"encoder.layers.{i}."
        for ours, theirs in ENCODER.items():
            found[place + ours] = " ".join(place + n for n in theirs.split())
    for i in range(layers):
        place = f"decoder.transformer.h.{i}."
        for ours, theirs in DECODER.items():
            names = [n if n == "T" else place + n for n in theirs.split()]
            found[f"transformer.h.{i}.{ours}"] = " ".join(names)
    return found


def _own(module: str, kind: str) -> str:
    return module + kind if module.endswith("_") else f"{module}.{kind}"


def _counted(state_dict: Mapping[str, Tensor], pattern: str) -> int:
    return len({match.group(1) for name in state_dict if (match := re.match(pattern, name))})


def from_original(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Sizes for the config, and the weights by our names. ValueError lists missing and unknown keys."""
    given = {name: x for name, x in state_dict.items() if not UNREAD.search(name)}
    layers = _counted(given, r"decoder\.transformer\.h\.(\d+)\.")
    levels = _counted(given, r"encoder\.layers\.(\d+)\.")
    tables = ("encoder.fc.weight", *TABLES.values())
    if not layers or not levels or any(given.get(name, torch.empty(0)).dim() != 2 for name in tables):
        wanted = "encoder.fc.weight, encoder.layers.*, decoder.transformer.{wte,wpe}.weight and .h.*"
        raise ValueError(f"state_dict must be of the authors' VisualGPT, with {wanted}")
    table = given["decoder.transformer.wte.weight"]
    head = given.pop("decoder.lm_head.decoder.weight", table)
    faults = []
    if head is not table and not torch.equal(head, table):
        faults.append("decoder.lm_head.decoder.weight must equal decoder.transformer.wte.weight")
    left = set(given) - set(TABLES.values())
    weights = {ours: given[theirs] for ours, theirs in TABLES.items()}

    def take(name: str) -> Tensor:
        if name not in given:
            missing.append(name)
            return table.new_empty(0, 0)
        left.discard(name)
        return given[name]

    missing: list[str] = []
    width = table.shape[1]
    for ours, theirs in _modules(layers, levels).items():
        names = [name for name in theirs.split() if name != "T"]
        for kind in ("weight", "bias"):
            parts = [take(f"{name}.{kind}") for name in names]
            if not missing:
                whole = torch.cat(parts) if len(parts) > 1 else parts[0]
                turned = theirs.endswith(" T") and kind == "weight"
                weights[_own(ours, kind)] = whole.T.contiguous() if turned else whole
    for i in range(layers):
        gates = [f"decoder.transformer.h.{i}.fc_alpha{level + 1}" for level in range(levels)]
        products, biases = ([take(f"{gate}.{kind}") for gate in gates] for kind in ("weight", "bias"))
        if not missing:
            place = f"transformer.h.{i}"
            weights[f"{place}.gate_text.weight"] = torch.cat([x[:, :width] for x in products])
            weights[f"{place}.gate_text.bias"] = torch.cat(biases)
            for level, x in enumerate(products):
                weights[f"{place}.gate_visual.{level}.weight"] = x[:, width:].contiguous()
    lists = (("missing", missing), ("unknown", sorted(left)))
    faults += [f"{len(names)} {what}: {', '.join(names)}" for what, names in lists if names]
    if faults:
        raise ValueError("state_dict: " + "; ".join(faults))
    return {
        "region_width": given["encoder.fc.weight"].shape[1],
        "width": width,
        "encoder_layers": levels,
        "encoder_mlp_width": weights["encoder.layers.0.mlp.c_fc.weight"].shape[0],
        "layers": layers,
        "heads": max(width // 64, 1),
        "context_length": len(given["decoder.transformer.wpe.weight"]),
        "mlp_ratio": weights["transformer.h.0.mlp.c_fc.weight"].shape[0] // width,
        "vocab_size": len(table),
    }, weights


def to_original(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """`weights` of a model of regions with gates by their names, the unread ones included. ValueError."""
    if config.image_size is not None or config.fusion != "srau":
        got = f"image_size {config.image_size}, fusion {config.fusion!r}"
        raise ValueError(f"the authors' code has region features and gates alone, got {got}")
    out = {theirs: weights[ours] for ours, theirs in TABLES.items()}
    for ours, theirs in _modules(config.layers, config.encoder_layers).items():
        names = [name for name in theirs.split() if name != "T"]
        for kind in ("weight", "bias"):
            whole = weights[_own(ours, kind)]
            turned = theirs.endswith(" T") and kind == "weight"
            for name, part in zip(names, whole.chunk(len(names)), strict=True):
                out[f"{name}.{kind}"] = part.T.contiguous() if turned else part.contiguous()
    table = out["decoder.transformer.wte.weight"]
    out["decoder.lm_head.decoder.weight"] = table
    width, heads = config.width, config.heads
    causal = table.new_ones(BUFFER_SIZE, BUFFER_SIZE).tril()[None, None]
    for i in range(config.layers):
        place, ours = f"decoder.transformer.h.{i}", f"transformer.h.{i}"
        texts = weights[f"{ours}.gate_text.weight"].chunk(config.encoder_layers)
        biases = weights[f"{ours}.gate_text.bias"].chunk(config.encoder_layers)
        for level, (text, bias) in enumerate(zip(texts, biases, strict=True)):
            visual = weights[f"{ours}.gate_visual.{level}.weight"]
            out[f"{place}.fc_alpha{level + 1}.weight"] = torch.cat([text, visual], 1)
            out[f"{place}.fc_alpha{level + 1}.bias"] = bias.contiguous()
        out[f"{place}.attn.bias"] = out[f"{place}.enc_dec_attn.bias"] = causal
        out[f"{place}.enc_dec_attn.c_attn.weight"] = table.new_zeros(width, 3 * width)
        out[f"{place}.enc_dec_attn.c_attn.bias"] = table.new_zeros(3 * width)
        for kind in ("keys", "values"):
            out[f"{place}.attn.running_{kind}"] = table.new_zeros(heads, 0, width // heads)
    for i in range(config.encoder_layers):
        for which in ("query", "key", "value"):
            place = f"encoder.layers.{i}.mhatt.attention.c_attn_{which}"
            out[f"{place}.weight"] = table.new_zeros(width, width)
            out[f"{place}.bias"] = table.new_zeros(width)
    out["decoder.transformer.running_seq"] = torch.zeros(1, dtype=torch.int64)
    out["decoder.running_mask_self_attention"] = torch.zeros(1, 1, 0, dtype=torch.bool)
    return out
