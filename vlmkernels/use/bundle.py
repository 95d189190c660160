"""A model with its tokenizer and image transform, in one folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmkernels._files import write_text
from vlmkernels.data import ClipTokenizer, ImageTransform, WordPieceTokenizer, load_tokenizer
from vlmkernels.models.parts.pretrained import Pretrained, config_from_dict, naming, read_config
from vlmkernels.models.parts.weight_files import check_content, read_json
from vlmkernels.train import kinds

TRANSFORM_FILE = "transform.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
LARGEST_SIDE = 8192  # of an image that a transform returns
# Fields of a model's config, and of its tokenizer, that are one id.
TOKEN_IDS = {
    "eot_id": "eot_id",
    "eos_id": "eot_id",
    "bos_id": "sot_id",
    "pad_id": "pad_id",
    "media_token_id": "image_id",
    "endofchunk_token_id": "endofchunk_id",
    "start_id": "image_id",
    "end_id": "endofchunk_id",
}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """The result of a training run, which the other commands load.

    ``transform`` maps a PIL image to float32 [3, H, W], and is None for a language model; ``tokenizer`` maps
    a list of B texts to int64 [B, L].
    """

    model: Pretrained
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

    FileNotFoundError names a missing file, ValueError one that is damaged, has values that its model does not
    accept, or belongs to another model.
    """
    path = Path(folder)
    with _of_a_model():
        fields = read_config(path)
        kind = kinds.of_config(fields)
        if kind is None:
            found, known = str(fields.get("model_type")), kinds.model_types(kinds.every())
            raise ValueError(f"model_type in {path} must be one of {', '.join(known)}, got {found!r}")
        tokenizer = read_tokenizer(path)
        transform = read_transform(path) if kind.sees_images else None
        model = kind.model.from_pretrained(path, device=device)
        _check_parts(path, kind, model.config, tokenizer, transform)
    return Bundle(model, tokenizer, transform)


def load_model(
    folder: str | os.PathLike[str], device: str = "auto", *, fitting: Sequence[kinds.Kind] | None = None
) -> tuple[nn.Module, Any, Any]:
    """(model, tokenizer, transform) of a folder that training wrote (RUN/final), the model in evaluation
    mode.

    ``device`` is "auto" (a CUDA device if there is one), "cpu" or a torch device. ``fitting`` are the kinds
    of training whose models are accepted, by default those that embed. FileNotFoundError or ValueError name
    what is missing or does not match.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"model: folder {folder} does not exist; pass RUN/final of a training run")
    bundle = load_bundle(folder, usable(device))
    found, wanted = bundle.model.model_type, kinds.model_types(fitting or kinds.embedders())
    if found not in wanted:
        raise ValueError(f"model: {folder} must be of type {' or '.join(wanted)}, got {found}")
    return bundle.model, bundle.tokenizer, bundle.transform and bundle.transform.for_inference()


def usable(device: str) -> torch.device:
    """ValueError unless tensors can be created and read on the device; "auto" prefers a CUDA device."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.zeros((), device=found).item()
    except Exception as error:  # its type depends on what is wrong with the device
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device: {str(device)!r} cannot be used here: {reason}") from error
    return found


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients inside the block; yields the model's device."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def check_batch_size(batch_size: int) -> None:
    """ValueError unless positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


@contextlib.contextmanager
def _of_a_model() -> Iterator[None]:
    """Adds to an error that it is about the model."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model: {error}") from error
    except ValueError as error:
        raise ValueError(f"model: {error}") from error


def read_tokenizer(folder: Path) -> ClipTokenizer | WordPieceTokenizer:
    """The tokenizer of a trained model's folder. ValueError for a damaged one."""
    files = [folder / name for name in TOKENIZER_FILES]
    for file in files:
        check_content(file)
    try:
        return load_tokenizer(folder)
    except Exception as error:  # the tokenizers package raises Exception itself
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        names = " and ".join(map(str, files))
        raise ValueError(
            f"{names} are not a tokenizer ({reason}); copy both from the trained model"
        ) from error


def read_transform(folder: Path) -> ImageTransform:
    """The image transform of a trained model's folder. ValueError for a damaged one."""
    path = folder / TRANSFORM_FILE
    fields = read_json(path)
    with naming(path):
        transform = config_from_dict(ImageTransform, fields)
        for name in ("image_size", "resize_size"):
            size = getattr(transform, name)
            if max(size if isinstance(size, tuple) else (size or 0,)) > LARGEST_SIDE:
                raise ValueError(f"{name} must be at most {LARGEST_SIDE}, got {size}")
    return transform


def _check_parts(
    folder: Path, kind: kinds.Kind, config: Any, tokenizer: Any, transform: ImageTransform | None
) -> None:
    """ValueError unless tokenizer and transform match the model."""
    faults = []
    text = kind.text_config(config)
    for name in ("vocab_size", "context_length"):
        if getattr(tokenizer, name) > getattr(text, name):
            got, most = getattr(tokenizer, name), getattr(text, name)
            faults.append(f"{name} of the tokenizer must be at most {most}, as in the model, got {got}")
    largest = max(tokenizer._tokenizer.get_vocab().values(), default=0)
    if largest >= tokenizer.vocab_size:
        faults.append(f"ids in tokenizer.json must be below {tokenizer.vocab_size}, got {largest}")
    for ours, theirs in TOKEN_IDS.items():
        if hasattr(config, ours) and hasattr(tokenizer, theirs):
            got, wanted = getattr(tokenizer, theirs), getattr(config, ours)
            if got != wanted:
                faults.append(f"{theirs} of the tokenizer must be {wanted}, {ours} of the model, got {got}")
    side = None if transform is None else kind.image_side(config)
    if transform is not None and side is not None and transform.image_size not in (side, (side, side)):
        faults.append(
            f"image_size in {TRANSFORM_FILE} must be {side}, as in the model, got {transform.image_size}"
        )
    if faults:
        raise ValueError(f"{folder}: parts of different models: " + "; ".join(faults))
