"""VisualBERT's weights and configs elsewhere: transformers', the published code's, and those of a BERT."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vlmkernels._activations import ACTIVATIONS, HUGGING_FACE
from vlmkernels._files import write_text
from vlmkernels.models.parts.foreign_config import Part
from vlmkernels.models.parts.pretrained import CONFIG_FILE, config_from_dict, naming, save_tensors
from vlmkernels.models.parts.weight_files import WEIGHTS_FILE, Source, read_json, read_state_dict

Config = TypeVar("Config")
Weights = dict[str, Tensor]

CLASSES = {
    "VisualBertForPreTraining": "pretraining",
    "VisualBertForQuestionAnswering": "vqa",
    "VisualBertForVisualReasoning": "nlvr2",
    "VisualBertForMultipleChoice": "vcr",
    "VisualBertForRegionToPhraseAlignment": "phrases",
    "VisualBertModel": "none",
}
# The keys of BertConfig and VisualBertConfig of transformers that are read, with their defaults.
BERT: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
VISUAL: dict[str, Any] = {**BERT, "visual_embedding_dim": 512, "pad_token_id": 1, "architectures": None}
# What is fixed in a VisualBERT here.
BERT_FIXED = {"is_decoder": False, "add_cross_attention": False}
VISUAL_FIXED = {"bypass_transformer": False, "tie_word_embeddings": True}
FIELDS = {  # of VisualBertConfig -> of transformers' configs
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "dropout": "hidden_dropout_prob",
    "max_positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "eps": "layer_norm_eps",
    "pad_id": "pad_token_id",
}
TIED = {
    "cls.predictions.decoder.weight": "visual_bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
TEXT = "visual_bert."
TEXT_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")
TABLE_HEADS = ("pretraining", "phrases")  # with a table of words
# The published code's names -> ours.
UCLANLP = (
    ("bert.bert.", "visual_bert."),
    ("bert.cls.", "cls."),
    ("bert.classifier.", "cls."),
    ("bert.flickr_attention.", "attention."),
)
EMBEDDING_NAMES = tuple(
    (f"visual_bert.embeddings.{theirs}.", f"visual_bert.embeddings.{ours}.")
    for theirs, ours in (
        ("token_type_embeddings_visual", "visual_token_type_embeddings"),
        ("position_embeddings_visual", "visual_position_embeddings"),
        ("projection", "visual_projection"),
    )
)
OLD = {"gamma": "weight", "beta": "bias"}
OWN = ("match_label", "region_type", "context_length")  # that transformers keeps and does not read
DEFAULT_LENGTH = 128


def copy_text_tables(embeddings: nn.Module) -> None:
    """Types and positions of regions start as those of words, as in the published code."""
    with torch.no_grad():
        for name in TEXT_TABLES[1:]:
            table = embeddings.get_parameter(f"{name}.weight")
            embeddings.get_parameter(f"visual_{name}.weight").copy_(table)


def from_hf(config_class: type[Config], source: Source, given: Mapping[str, Any]) -> tuple[Config, Weights]:
    """The config and weights of one of transformers' classes."""
    state = read_state_dict(source)
    with naming(source):
        weights = _hf_names(state)
        known = {**infer(weights), "region_type": 1, **_beside(source, _visual_fields), **given}
        return _config(config_class, known, weights), weights


def from_uclanlp(
    config_class: type[Config], source: Source, given: Mapping[str, Any]
) -> tuple[Config, Weights]:
    """The config and weights of the published code."""
    state = read_state_dict(source)
    with naming(source):
        weights = _untied(
            {
                _renamed(name, (*UCLANLP, *EMBEDDING_NAMES)): x
                for name, x in state.items()
                if "detector." not in name
            }
        )
        known = {**infer(weights), "region_type": 0, "match_label": 1, **given}
        return _config(config_class, known, weights), weights


def from_bert(config_class: type[Config], source: Source, given: Mapping[str, Any]) -> tuple[Config, Weights]:
    """The config of a VisualBERT with the sizes of a BERT, and its weights that are those of the BERT."""
    state = read_state_dict(source)
    with naming(source):
        weights = {}
        for name, x in state.items():
            name = _modern(name.removeprefix("bert."))
            if name.startswith(("embeddings.", "encoder.", "pooler.")):
                weights[f"visual_bert.{name}"] = x
            elif name.startswith("cls."):
                weights[name] = x
        weights = _untied(weights)
        sizes = infer(weights)
        known = {**sizes, **_beside(source, _bert_fields), **given}
        known |= {name: sizes[name] for name in ("vocab_size", "width", "layers", "mlp_width")}
        if known.setdefault("head", "pretraining") not in ("pretraining", "phrases"):
            weights = {name: x for name, x in weights.items() if not name.startswith("cls.")}
        layers = {f"{TEXT}encoder.layer.{i}.attention.self.query.weight" for i in range(sizes["layers"])}
        tables = {f"{TEXT}embeddings.{name}.weight" for name in (*TEXT_TABLES, "LayerNorm")}
        if missing := sorted((tables | layers) - weights.keys()):
            raise ValueError(f"state_dict must be a BERT's, but it has no {', '.join(missing)}")
        return _config(config_class, known, {}), weights


def to_hf(config: Any, weights: Mapping[str, Tensor]) -> Weights:
    """With the tied weights under both of their names."""
    _refuse_tower(config)
    strip = TEXT if config.head == "none" else ""
    tied = {name: weights[own] for name, own in TIED.items() if own in weights and config.head in TABLE_HEADS}
    return {name.removeprefix(strip): x for name, x in {**weights, **tied}.items()}


def to_uclanlp(config: Any, weights: Mapping[str, Tensor]) -> Weights:
    _refuse_tower(config)
    back = [(ours, theirs) for theirs, ours in (*EMBEDDING_NAMES, *UCLANLP)]
    if config.head not in TABLE_HEADS:
        back = [pair for pair in back if pair != ("cls.", "bert.cls.")]
    named = {_renamed(name, back): x for name, x in weights.items()}
    if config.head in TABLE_HEADS:
        table = "bert.cls.predictions.decoder.weight"
        named[table] = weights[TIED[_renamed(table, UCLANLP)]]
    return named


def write_hf(config: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """A folder that the class of transformers with this head reads."""
    content = to_hf(config, weights)
    classes = {head: name for name, head in CLASSES.items()}
    fields = {theirs: getattr(config, ours) for ours, theirs in FIELDS.items()}
    fields |= {"architectures": [classes[config.head]], "model_type": "visual_bert"}
    fields |= {"attention_probs_dropout_prob": config.dropout, "visual_embedding_dim": config.visual_dim}
    fields |= {"hidden_act": ACTIVATIONS[config.activation].hugging_face[0]}
    fields |= {name: getattr(config, name) for name in OWN}
    if config.head in ("vqa", "nlvr2"):
        fields["id2label"] = {str(i): f"LABEL_{i}" for i in range(config.answers)}
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: x.detach().cpu().contiguous() for name, x in content.items() if name not in TIED}
    save_tensors(stored, folder / WEIGHTS_FILE, {"format": "pt"})
    write_text(folder / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")


def infer(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields that names and shapes determine; ValueError if a matrix that tells them is missing."""
    needed = {
        "vocab_size": ("embeddings.word_embeddings.weight", 0),
        "width": ("embeddings.word_embeddings.weight", 1),
        "max_positions": ("embeddings.position_embeddings.weight", 0),
        "token_types": ("embeddings.token_type_embeddings.weight", 0),
        "mlp_width": ("encoder.layer.0.intermediate.dense.weight", 0),
    }
    if missing := sorted(
        name
        for name in {name for name, _ in needed.values()}
        if TEXT + name not in weights or weights[TEXT + name].dim() != 2
    ):
        raise ValueError(f"state_dict must be a BERT's, but it has no matrix {', '.join(missing)}")
    sizes: dict[str, Any] = {
        field: weights[TEXT + name].shape[axis] for field, (name, axis) in needed.items()
    }
    layers = {
        match[1] for name in weights if (match := re.match(r"visual_bert\.encoder\.layer\.(\d+)\.", name))
    }
    sizes |= {"layers": len(layers), "context_length": min(DEFAULT_LENGTH, sizes["max_positions"])}
    projection = weights.get(TEXT + "embeddings.visual_projection.weight")
    if projection is None:
        return sizes
    sizes["visual_dim"] = projection.shape[-1]
    classes = weights.get("cls.weight")
    if "cls.predictions.bias" in weights:
        sizes["head"] = "phrases" if "attention.query.weight" in weights else "pretraining"
    elif classes is None:
        sizes["head"] = "none"
    else:
        sizes["head"] = {1: "vcr", 2: "nlvr2"}.get(len(classes), "vqa")
        sizes["answers"] = len(classes)
    return sizes


def _config(config_class: type[Config], known: dict[str, Any], weights: Mapping[str, Tensor]) -> Config:
    if "heads" not in known:
        raise ValueError(
            f"heads: not determined by shapes, and there is no {CONFIG_FILE} beside the weights; pass it"
        )
    if "cls.seq_relationship.weight" in weights and "match_label" not in known:
        raise ValueError(
            "match_label must be 1 if class 1 of the pretraining head means that a text belongs to its image "
            "(the published code, and weights converted from it), or 0 if class 0 does (the documentation of "
            "transformers); the weights do not tell"
        )
    return config_from_dict(config_class, known)


def _beside(source: Source, read: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """The fields in the config.json beside a file or in a folder, if there is one."""
    if isinstance(source, Mapping):
        return {}
    path = (Path(source) if Path(source).is_dir() else Path(source).parent) / CONFIG_FILE
    if not path.is_file():
        return {}
    content = read_json(path)
    with naming(path):
        return read(content)


def _visual_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for the config.json of a VisualBert class; ValueError listing what is not supported."""
    if config.get("model_type") != "visual_bert":
        raise ValueError(f"model_type must be 'visual_bert', got {config.get('model_type')!r}")
    part = Part("config", config, VISUAL, {**BERT_FIXED, **VISUAL_FIXED}, loose=("architectures",))
    names = part["architectures"] or []
    found = [CLASSES[name] for name in names if name in CLASSES]
    if names and not found:
        part.fault("architectures", f"one of {', '.join(CLASSES)}")
    fields = _fields(part)
    fields |= {name: config[name] for name in OWN if name in config}
    fields["visual_dim"] = part["visual_embedding_dim"]
    return {**fields, "head": found[0]} if found else fields


def _bert_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields for the config.json of a BERT."""
    if config.get("model_type") != "bert":
        raise ValueError(f"model_type must be 'bert', got {config.get('model_type')!r}")
    return _fields(Part("config", config, BERT, BERT_FIXED))


def _fields(part: Part) -> dict[str, Any]:
    if part["hidden_act"] not in HUGGING_FACE:
        part.fault("hidden_act", f"one of {', '.join(HUGGING_FACE)}")
    if part["attention_probs_dropout_prob"] != part["hidden_dropout_prob"]:
        part.fault("attention_probs_dropout_prob", "hidden_dropout_prob")
    if part.faults:
        raise ValueError("; ".join(part.faults))
    fields = {ours: part[theirs] for ours, theirs in FIELDS.items()}
    length = min(DEFAULT_LENGTH, part["max_position_embeddings"])
    return {**fields, "activation": HUGGING_FACE[part["hidden_act"]], "context_length": length}


def _hf_names(state: Mapping[str, Tensor]) -> Weights:
    """Those of a class with a head, without buffers and the second names of tied weights."""
    inner = ("embeddings.", "encoder.", "pooler.")
    return _untied({TEXT + name if name.startswith(inner) else name: x for name, x in state.items()})


def _untied(weights: Mapping[str, Tensor]) -> Weights:
    """Without buffers and tied weights, which must equal those they are tied to; ValueError if not."""
    out = {_modern(name): x for name, x in weights.items() if not name.endswith("position_ids")}
    faults = []
    for name, own in TIED.items():
        x = out.pop(name, None)
        if x is not None and own in out and not (x is out[own] or torch.equal(x, out[own])):
            faults.append(f"{name} must equal {own}, to which it is tied")
    if faults:
        raise ValueError("state_dict: " + "; ".join(faults))
    return out


def _modern(name: str) -> str:
    """The name without those of LayerNorm's weights in the first BERTs."""
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda old: "LayerNorm." + OLD[old[1]], name)


def _renamed(name: str, names: Any) -> str:
    for old, new in names:
        if name.startswith(old):
            name = new + name.removeprefix(old)
    return name


def _refuse_tower(config: Any) -> None:
    if config.conv_blocks:
        raise ValueError(
            "conv_blocks: this layout has no place for an image tower; save it in this library's"
        )
