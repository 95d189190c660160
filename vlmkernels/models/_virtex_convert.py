"""The weights of kdexd/virtex, 370 tensors for bicaptioning with a ResNet-50 and one layer.

What both heads share is there under the names of each, the word embedding also as the weight of the output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmkernels.models.parts.pretrained import naming
from vlmkernels.models.parts.weight_files import Source, read_state_dict

# (ours, the original's), by prefix; layers are those of nn.TransformerDecoder.
TEXTUAL = (
    ("visual_projection.", "visual_projection."),
    ("embedding.", "embedding."),
    ("output_bias", "output.bias"),
)
LAYER = (
    ("attn.", "self_attn."),
    ("cross.out_proj.", "multihead_attn.out_proj."),
    ("mlp.c_fc.", "linear1."),
    ("mlp.c_proj.", "linear2."),
    ("ln_1.", "norm1."),
    ("ln_cross.", "norm2."),
    ("ln_2.", "norm3."),
)
HEADS = {"decoder.": "textual.", "backward_decoder.": "backward_textual."}
_LAYER = re.compile(r"(layers\.\d+\.)(.+)")
_TIED = ("output.weight", "embedding.words.weight")


def to_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names and tensors of the original; shared tensors are there under every name."""
    found = {f"visual.cnn.{name[7:]}": value for name, value in weights.items() if name.startswith("visual.")}
    if "classifier.weight" in weights:
        return found | {
            f"textual.output.{name}": weights[f"classifier.{name}"] for name in ("weight", "bias")
        }
    for decoder, head in HEADS.items():
        own = {name: value for name, value in weights.items() if name.startswith(decoder)}
        if not own:
            continue
        shared = {n: v for n, v in weights.items() if n.startswith(tuple(ours for ours, _ in TEXTUAL))}
        found |= {head + _renamed(name, TEXTUAL): value for name, value in shared.items()}
        found[head + "output.weight"] = weights["embedding.words.weight"]
        for name, value in own.items():
            inner = name.removeprefix(decoder)
            layer = _LAYER.fullmatch(inner)
            if layer is None:
                found[f"{head}transformer.{inner}"] = value
            elif layer[2].startswith("cross.q_proj."):
                kind = layer[2].removeprefix("cross.q_proj.")
                rest = own[f"{decoder}{layer[1]}cross.kv_proj.{kind}"]
                key = f"{head}transformer.{layer[1]}multihead_attn.in_proj_{kind}"
                found[key] = torch.cat([value, rest])
            elif not layer[2].startswith("cross.kv_proj."):
                found[f"{head}transformer.{layer[1]}{_renamed(layer[2], LAYER)}"] = value
    return found


def from_original(source: Source) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names, and the fields of VirTexConfig that they determine."""
    given = read_state_dict(source)
    with naming(source):
        return _converted(given), _shown(given)


def _converted(given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    back = [(theirs, ours) for ours, theirs in TEXTUAL]
    layers = [(theirs, ours) for ours, theirs in LAYER]
    if _is_classifier(given):
        back = [("output.", "classifier.")]
    for name, value in given.items():
        head = next((head for head in HEADS.values() if name.startswith(head)), None)
        if head is None:
            found[name.replace("visual.cnn.", "visual.", 1)] = value
            continue
        inner = name.removeprefix(head)
        decoder = next(ours for ours, theirs in HEADS.items() if theirs == head)
        layer = _LAYER.fullmatch(inner.removeprefix("transformer."))
        if inner == _TIED[0] and not _is_classifier(given):
            inner = _TIED[1]
        if not inner.startswith("transformer."):
            ours = _renamed(inner, back)
            if ours in found and not torch.equal(found[ours], value):
                raise ValueError(f"{name} must equal what it is tied to, as in a VirTex of kdexd/virtex")
            found[ours] = value
        elif layer is None:
            found[decoder + inner.removeprefix("transformer.")] = value
        elif layer[2].startswith("multihead_attn.in_proj_"):
            kind = layer[2].removeprefix("multihead_attn.in_proj_")
            query, rest = value.split([len(value) // 3, len(value) - len(value) // 3])
            found[f"{decoder}{layer[1]}cross.q_proj.{kind}"] = query
            found[f"{decoder}{layer[1]}cross.kv_proj.{kind}"] = rest
        else:
            found[f"{decoder}{layer[1]}{_renamed(layer[2], layers)}"] = value
    return found


def _renamed(name: str, table: Any) -> str:
    """The name with the first prefix of the table that it has replaced; unknown names stay."""
    for old, new in table:
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _is_classifier(given: Mapping[str, Tensor]) -> bool:
    return "textual.embedding.words.weight" not in given


def _shown(given: Mapping[str, Tensor]) -> dict[str, Any]:
    """ValueError naming the key that is missing."""
    try:
        stem, middle = given["visual.cnn.conv1.weight"], given["visual.cnn.layer1.0.conv2.weight"]
        stages = sorted({name.split(".")[2] for name in given if name.startswith("visual.cnn.layer")})
        sizes: dict[str, Any] = {
            "conv_blocks": tuple(
                len({name.split(".")[3] for name in given if name.startswith(f"visual.cnn.{stage}.")})
                for stage in stages
            ),
            "conv_width": stem.shape[0],
            "conv_widen": middle.shape[0] // stem.shape[0],
        }
        if _is_classifier(given):
            vocab_size = given["textual.output.weight"].shape[0]
            return {**sizes, "task": "token_classification", "vocab_size": vocab_size}
        vocab_size, width = given["textual.embedding.words.weight"].shape
        context_length = given["textual.embedding.positions.weight"].shape[0]
    except KeyError as missing:
        raise ValueError(f"state_dict must be that of a kdexd/virtex, but it has no key {missing}") from None
    layers = {n.split(".")[3] for n in given if n.startswith("textual.transformer.layers.")}
    both = any(name.startswith("backward_textual.") for name in given)
    return {
        **sizes,
        "task": "bicaptioning" if both else "captioning",
        "width": width,
        "layers": len(layers),
        "pre_norm": "textual.transformer.norm.weight" in given,
        "context_length": context_length,
        "vocab_size": vocab_size,
    }
