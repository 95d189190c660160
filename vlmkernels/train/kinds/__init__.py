"""The kinds of training, one file each, listed in ``KINDS``.

A kind is imported on first use, so that ``vlmkernels.use`` can look up the kind of a trained model while the
kinds are built on ``vlmkernels.use``.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._kind import Kind

KINDS = {
    "clip": "vlmkernels.train.kinds.clip:Clip",
    "align": "vlmkernels.train.kinds.align:Align",
    "siglip": "vlmkernels.train.kinds.siglip:Siglip",
    "distill": "vlmkernels.train.kinds.distill:Distill",
    "lm": "vlmkernels.train.kinds.lm:LanguageModel",
    "flamingo": "vlmkernels.train.kinds.flamingo:Flamingo",
    "simvlm": "vlmkernels.train.kinds.simvlm:SimVLM",
    "virtex": "vlmkernels.train.kinds.virtex:VirTex",
    "visualgpt": "vlmkernels.train.kinds.visualgpt:VisualGPT",
    "visualbert": "vlmkernels.train.kinds.visualbert:VisualBert",
    "vild": "vlmkernels.train.kinds.vild:Vild",
}


def find(name: str) -> Kind:
    """The kind of this name. ValueError lists all names."""
    if name not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {name!r}")
    return pkgutil.resolve_name(KINDS[name])()


def every() -> list[Kind]:
    """All kinds, in the order of ``KINDS``."""
    return [find(name) for name in KINDS]


def embedders() -> list[Kind]:
    """The kinds whose models embed images and texts."""
    return [kind for kind in every() if kind.embeds]


def captioners() -> list[Kind]:
    """The kinds whose models generate captions of images."""
    return [kind for kind in every() if kind.captions]


def matchers() -> list[Kind]:
    """The kinds whose models judge whether a text belongs to an image."""
    return [kind for kind in every() if kind.matches]


def detectors() -> list[Kind]:
    """The kinds whose models find objects of any categories in images."""
    return [kind for kind in every() if kind.detects]


def probed() -> list[Kind]:
    """The kinds whose models have features of images."""
    return [kind for kind in every() if kind.has_features]


def model_types(kinds: Sequence[Kind]) -> list[str]:
    """The types of their models, each once."""
    return list(dict.fromkeys(kind.model.model_type for kind in kinds))


def of_config(fields: Mapping[str, Any]) -> Kind | None:
    """The kind of a model with these fields of config.json: the first that gives such models."""
    return next((kind for kind in every() if kind.trains(fields)), None)


def name_of(fields: Mapping[str, Any]) -> str:
    """The name of the kind of :func:`of_config`, or the type of a model that no kind trains."""
    kind = of_config(fields)
    return str(fields.get("model_type")) if kind is None else kind.name


def of_model(model: Any) -> Any:
    """The kind that trains a model. ValueError if none does."""
    kind = of_config({"model_type": model.model_type, **dataclasses.asdict(model.config)})
    if kind is None:
        raise ValueError(f"model: no kind of training has models of type {model.model_type}")
    return kind
