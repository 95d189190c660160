"""A model with what its inputs need: the tokenizer and the image transform, kept together in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vlmkernels._files import write_text
from vlmkernels.data import (
    CLIP_MEAN,
    CLIP_STD,
    CaptionTokenizer,
    ClipTokenizer,
    Emoji3,
    ImageTransform,
    WordPieceTokenizer,
    image_transform,
    load_tokenizer,
)
from vlmkernels.models import align, clip, decoder, flamingo, simvlm
from vlmkernels.models._files import check_content, read_json
from vlmkernels.models._pretrained import config_from_dict, naming
from vlmkernels.models._pretrained import read_config as read_model_config

from .config import CAPTIONERS, TrainConfig

TRANSFORM_FILE = "transform.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
LARGEST_SIDE = 8192  # of an image that a transform makes
# Fields of a model's config, and of its tokenizer, that are one id.
TOKEN_IDS = {
    "eot_id": "eot_id",
    "eos_id": "eot_id",
    "bos_id": "sot_id",
    "pad_id": "pad_id",
    "media_token_id": "image_id",
    "endofchunk_token_id": "endofchunk_id",
}
ALIGN_MEAN = ALIGN_STD = (0.5, 0.5, 0.5)
SIGLIP_START = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}  # Zhai et al. 2023, section 3.2

Model = clip.CLIP | align.ALIGN | decoder.CausalLM | flamingo.Flamingo | simvlm.SimVLM
MODELS: dict[str, Any] = {
    cls.model_type: cls
    for cls in (clip.CLIP, align.ALIGN, decoder.CausalLM, flamingo.Flamingo, simvlm.SimVLM)
}
MODULES: dict[str, Any] = {
    "clip": clip,
    "siglip": clip,
    "align": align,
    "lm": decoder,
    "flamingo": flamingo,
    "simvlm": simvlm,
}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What a training run ends with, and what the other commands begin with.

    ``transform`` maps a PIL image to float32 [3, H, W], and is None for a language model; ``tokenizer`` maps
    a list of B texts to int64 [B, L].
    """

    model: Model
    tokenizer: ClipTokenizer | WordPieceTokenizer
    transform: ImageTransform | None

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors, transform.json (if any) and the tokenizer's two files."""
        path = Path(folder)
        self.model.save_pretrained(path)
        self.tokenizer.save(path)
        if self.transform is not None:
            values = self.transform.for_inference().to_dict()
            write_text(path / TRANSFORM_FILE, json.dumps(values, indent=2) + "\n")


def load_bundle(folder: str | os.PathLike[str], device: torch.device | str = "cpu") -> Bundle:
    """Read what :meth:`Bundle.save` wrote, the model in eval mode on ``device``.

    FileNotFoundError names a file that is missing, ValueError one that is damaged, holds what its model does
    not take, or belongs to another model.
    """
    path = Path(folder)
    with _of_a_model():
        kind = _type_of(read_model_config(path))
        if kind not in MODELS:
            raise ValueError(f"{path} holds a model of type {kind!r}, expected one of {', '.join(MODELS)}")
        tokenizer = _read_tokenizer(path)
        transform = None if kind == decoder.CausalLM.model_type else _read_transform(path)
        model = MODELS[kind].from_pretrained(path, device=device)
        _check_parts(path, model.config, tokenizer, transform)
    return Bundle(model, tokenizer, transform)


@contextlib.contextmanager
def _of_a_model() -> Iterator[None]:
    """Says of an error that a model is wrong."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model: {error}") from error
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def _type_of(fields: dict[str, Any]) -> str:
    """The "model_type" of config.json as text, whatever it is."""
    return str(fields.get("model_type"))


def _read_tokenizer(folder: Path) -> ClipTokenizer | WordPieceTokenizer:
    files = [folder / name for name in TOKENIZER_FILES]
    for file in files:
        check_content(file)
    try:
        return load_tokenizer(folder)
    except Exception as error:  # the tokenizers package raises that for every fault
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        names = " and ".join(map(str, files))
        raise ValueError(f"{names}: no tokenizer ({reason}); copy both from the trained model") from error


def _read_transform(folder: Path) -> ImageTransform:
    path = folder / TRANSFORM_FILE
    fields = read_json(path)
    with naming(path):
        transform = config_from_dict(ImageTransform, fields)
        for name in ("image_size", "resize_size"):
            size = getattr(transform, name)
            if max(size if isinstance(size, tuple) else (size or 0,)) > LARGEST_SIDE:
                raise ValueError(f"{name} is {size}, wants at most {LARGEST_SIDE}")
    return transform


def _check_parts(folder: Path, config: Any, tokenizer: Any, transform: ImageTransform | None) -> None:
    """ValueError unless the tokens and the images are those of the model."""
    faults = []
    text = getattr(config, "language", config)
    for name in ("vocab_size", "context_length"):
        if getattr(tokenizer, name) > getattr(text, name):
            got, most = getattr(tokenizer, name), getattr(text, name)
            faults.append(f"{name} of the tokenizer is {got}, of the model {most}")
    largest = max(tokenizer._tokenizer.get_vocab().values(), default=0)
    if largest >= tokenizer.vocab_size:
        faults.append(f"tokenizer.json has the id {largest}, the tokenizer {tokenizer.vocab_size} ids")
    for ours, theirs in TOKEN_IDS.items():
        if hasattr(config, ours) and hasattr(tokenizer, theirs):
            got, wanted = getattr(tokenizer, theirs), getattr(config, ours)
            if got != wanted:
                faults.append(f"{theirs} of the tokenizer is {got}, the model has {ours} {wanted}")
    image = getattr(config, "vision", config)
    if transform is not None and config.__class__ is not align.AlignConfig:  # which takes images of any size
        side = image.image_size
        if transform.image_size not in (side, (side, side)):
            faults.append(f"{TRANSFORM_FILE} makes images of {transform.image_size}, the model wants {side}")
    if faults:
        raise ValueError(f"{folder}: parts of different models: " + "; ".join(faults))


def check_model(kind: str, config: TrainConfig) -> None:
    """ValueError unless ``config`` makes a model of this kind, from ``init``, its parts or its sizes."""
    faults = []
    if config.init is not None:
        fields = read_model_config(config.init)
        where, found = f"init: {config.init}", _kind_of(fields)
    else:
        where, found = "model_options: init_logit_bias", kind
        if kind in ("clip", "siglip"):
            found = _kind_of({"model_type": "clip", **dataclasses.asdict(model_config(kind, config))})
    if found != kind:
        faults.append(f"{where} makes a model for {found}, not for {kind}")
    parts = {"vision": ("clip", "siglip"), "language_model": ("lm",)}
    for name, kinds in parts.items():
        folder = getattr(config, name)
        if kind != "flamingo" or config.init is not None:
            if folder is not None:
                faults.append(f"{name} belongs to a flamingo without init, got {folder}")
        elif folder is None:
            faults.append(
                f"{name}: flamingo needs the folder of a trained {kinds[0]} (RUN/final), frozen in it"
            )
        elif (given := _kind_of(read_model_config(folder))) not in kinds:
            faults.append(f"{name}: {folder} holds a model for {given}, expected {kinds[0]}")
    if config.images_per_row > 1 and kind not in ("lm", "flamingo"):
        faults.append(f"images_per_row belongs to lm and flamingo, got {config.images_per_row}")
    if faults:
        raise ValueError("; ".join(faults))


def _kind_of(fields: dict[str, Any]) -> str:
    """The kind of training whose model has these fields of config.json."""
    model_type = _type_of(fields)
    if model_type == "clip":
        return "clip" if fields.get("init_logit_bias") is None else "siglip"
    return {"decoder": "lm"}.get(model_type, model_type)


def build_transform(kind: str, config: TrainConfig) -> ImageTransform | None:
    """The inference transform of ``config.init``, of the vision tower, or for the model's images."""
    if kind == "lm":
        return None
    folder = config.init or (config.vision if kind == "flamingo" else None)
    if folder is not None:
        return _read_transform(Path(folder))
    model = model_config(kind, config)
    if kind in ("clip", "siglip"):
        return image_transform(model.image_size, CLIP_MEAN, CLIP_STD)
    return image_transform(model.image_size, ALIGN_MEAN, ALIGN_STD, interpolation="bilinear")


def build_tokenizer(kind: str, config: TrainConfig, source: Any) -> ClipTokenizer | WordPieceTokenizer:
    """The tokenizer of ``config.init``, of the language model, or a new one.

    CLIP has its own, and models that write captions the same with two more ids; ALIGN's word pieces are read
    from ``config.tokenizer`` or learned from the names and tags of emoji3 or the captions of the data.
    ValueError for tars, from which they cannot be learned.
    """
    folder = config.init or (config.language_model if kind == "flamingo" else None)
    if folder is not None:
        return _read_tokenizer(Path(folder))
    model = model_config(kind, config)
    if kind in CAPTIONERS:
        return CaptionTokenizer(model.context_length, model.vocab_size)
    if kind != "align":
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


def build_model(kind: str, config: TrainConfig, tokenizer: Any) -> Model:
    """A new model for the tokenizer's ids, or that of ``config.init``."""
    if config.init is not None:
        return load_bundle(config.init).model
    sizes = model_config(kind, config)
    if kind == "flamingo":
        return _build_flamingo(sizes, config, tokenizer)
    ids = {"vocab_size": tokenizer.vocab_size}
    if kind == "simvlm":
        ids |= {"bos_id": tokenizer.sot_id, "eos_id": tokenizer.eot_id}
    if kind != "lm":
        ids["pad_id"] = tokenizer.pad_id
    return MODELS[{"siglip": "clip", "lm": "decoder"}.get(kind, kind)](dataclasses.replace(sizes, **ids))


def _build_flamingo(
    sizes: flamingo.FlamingoConfig, config: TrainConfig, tokenizer: CaptionTokenizer
) -> flamingo.Flamingo:
    """New resampler and gated layers between a trained image tower and a trained language model."""
    assert config.vision is not None, "checked by check_model"
    assert config.language_model is not None, "checked by check_model"
    tower: Any = load_bundle(config.vision).model
    language: Any = load_bundle(config.language_model).model
    sizes = dataclasses.replace(
        sizes,
        vision=tower.config,
        language=language.config,
        media_token_id=tokenizer.image_id,
        endofchunk_token_id=tokenizer.endofchunk_id,
    )
    return flamingo.Flamingo(sizes, vision_encoder=tower.visual, lang_encoder=language)


def model_config(kind: str, config: TrainConfig) -> Any:
    """The named model configuration with ``model_options`` applied. ValueError lists what is known."""
    known = MODULES[kind].CONFIGS
    if config.model not in known:
        raise ValueError(f"model: {kind} has no configuration {config.model!r}; it has {', '.join(known)}")
    base: Any = known[config.model]
    options: dict[str, Any] = dict(SIGLIP_START) if kind == "siglip" else {}
    options |= config.model_options
    fields = [field.name for field in dataclasses.fields(base)]
    unknown = sorted(str(name) for name in options if name not in fields)
    if unknown:
        raise ValueError(f"model_options: unknown fields {', '.join(unknown)}; known are {', '.join(fields)}")
    for name, place in (("eot_id", 1), ("eos_id", 1), ("bos_id", 2)):  # within a vocabulary of another size
        if name in fields and isinstance(options.get("vocab_size"), int):
            options.setdefault(name, options["vocab_size"] - place)
    return config_from_dict(type(base), {**{name: getattr(base, name) for name in fields}, **options})
