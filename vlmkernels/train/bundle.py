"""A model with what its inputs need: the tokenizer and the image transform, kept together in one folder."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from vlmkernels.data import CLIP_MEAN, CLIP_STD, Emoji3, ImageTransform, image_transform
from vlmkernels.data.tokenizer import ClipTokenizer, WordPieceTokenizer, load_tokenizer
from vlmkernels.models import align, clip
from vlmkernels.models._pretrained import read_config as read_model_config

from .checkpoint import write_file
from .config import TrainConfig

TRANSFORM_FILE = "transform.json"
ALIGN_MEAN = ALIGN_STD = (0.5, 0.5, 0.5)
SIGLIP_START = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}  # Zhai et al. 2023, section 3.2


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a training run ends with, and what eval, embed and search begin with.

    ``transform`` maps a PIL image to float32 [3, H, W], ``tokenizer`` a list of B texts to int64 [B, L].
    """

    model: clip.CLIP | align.ALIGN
    tokenizer: ClipTokenizer | WordPieceTokenizer
    transform: ImageTransform

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors, transform.json and the tokenizer's two files."""
        path = Path(folder)
        self.model.save_pretrained(path)
        self.tokenizer.save(path)
        values = self.transform.for_inference().to_dict()
        write_file(path / TRANSFORM_FILE, (json.dumps(values, indent=2) + "\n").encode())


def load_bundle(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Bundle:
    """Read what :meth:`Bundle.save` wrote, the model in eval mode on ``device``.

    FileNotFoundError names a file that is missing, ValueError a model that is not known.
    """
    path = Path(folder)
    for name in ("config.json", TRANSFORM_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(f"model: {path} holds no {name}; a folder such as RUN/final is wanted")
    kinds: dict[str, type[clip.CLIP] | type[align.ALIGN]] = {"clip": clip.CLIP, "align": align.ALIGN}
    kind = read_model_config(path).get("model_type")
    if kind not in kinds:
        raise ValueError(f"model: {path} holds a model of type {kind!r}, expected one of {', '.join(kinds)}")
    return Bundle(
        kinds[kind].from_pretrained(path, device=device), load_tokenizer(path), _read_transform(path)
    )


def _read_transform(folder: Path) -> ImageTransform:
    return ImageTransform.from_dict(json.loads((folder / TRANSFORM_FILE).read_text(encoding="utf-8")))


def check_model(kind: str, config: TrainConfig) -> None:
    """ValueError unless ``config.init`` or the model configuration makes a model of this kind."""
    if config.init is not None:
        where, fields = f"init: {config.init}", read_model_config(config.init)
    else:
        where, fields = "model_options: init_logit_bias", dataclasses.asdict(model_config(kind, config))
    found = "align"
    if fields.get("model_type", kind) != "align":
        found = "clip" if fields.get("init_logit_bias") is None else "siglip"
    if found != kind:
        raise ValueError(f"{where} makes a model for {found}, not for {kind}")


def build_transform(kind: str, config: TrainConfig) -> ImageTransform:
    """The inference transform of ``config.init``, or for the image size and normalisation of the model."""
    if config.init is not None:
        return _read_transform(Path(config.init))
    model = model_config(kind, config)
    if isinstance(model, clip.ClipConfig):
        return image_transform(model.image_size, CLIP_MEAN, CLIP_STD)
    return image_transform(model.image_size, ALIGN_MEAN, ALIGN_STD, interpolation="bilinear")


def build_tokenizer(kind: str, config: TrainConfig, source: Any) -> ClipTokenizer | WordPieceTokenizer:
    """The tokenizer of ``config.init``, or CLIP's, or ALIGN's word pieces, read or learned from the data.

    Word pieces are learned from the names and tags of emoji3 or the captions of a table; ValueError for tars.
    """
    if config.init is not None:
        return load_tokenizer(config.init)
    model = model_config(kind, config)
    if isinstance(model, clip.ClipConfig):
        return ClipTokenizer(model.context_length, model.vocab_size)
    if config.tokenizer is not None:
        return WordPieceTokenizer.from_file(config.tokenizer, model.context_length)
    if config.streams:
        raise ValueError(
            f"tokenizer: word pieces cannot be learned from tars, a file is wanted for {config.data}"
        )
    texts = list(source.names)
    if isinstance(source, Emoji3):
        texts = [text for concept in source.concepts for text in (concept.label, *concept.tags)]
    return WordPieceTokenizer.train(texts, model.vocab_size, model.context_length)


def build_model(
    kind: str, config: TrainConfig, tokenizer: ClipTokenizer | WordPieceTokenizer
) -> clip.CLIP | align.ALIGN:
    """A new model for the tokenizer's ids, or that of ``config.init``."""
    if config.init is not None:
        return load_bundle(config.init).model
    sizes = model_config(kind, config)
    sizes = dataclasses.replace(sizes, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id)
    return clip.CLIP(sizes) if isinstance(sizes, clip.ClipConfig) else align.ALIGN(sizes)


def model_config(kind: str, config: TrainConfig) -> Any:
    """The named model configuration with ``model_options`` applied. ValueError lists what is known."""
    known = align.CONFIGS if kind == "align" else clip.CONFIGS
    if config.model not in known:
        raise ValueError(f"model: {kind} has no configuration {config.model!r}; it has {', '.join(known)}")
    base: Any = known[config.model]
    options: dict[str, Any] = dict(SIGLIP_START) if kind == "siglip" else {}
    options |= {name: tuple(v) if isinstance(v, list) else v for name, v in config.model_options.items()}
    fields = [field.name for field in dataclasses.fields(base)]
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise ValueError(f"model_options: unknown fields {', '.join(unknown)}; known are {', '.join(fields)}")
    if kind != "align" and "vocab_size" in options:
        options.setdefault("eot_id", options["vocab_size"] - 1)
    return dataclasses.replace(base, **options)
