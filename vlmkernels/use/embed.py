"""Embeddings of image files and of texts by a trained model, and the file they are kept in."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from vlmkernels._files import write_atomic
from vlmkernels.data import BrokenImageError, Sample, read_image
from vlmkernels.data.images import transformed
from vlmkernels.data.samples import warn_skipped
from vlmkernels.models._pretrained import save_tensors

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
EMBEDDERS = ("clip", "align")
KINDS = ("images", "texts")
FORMATS = (".safetensors", ".npz")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """What :func:`embed` did: ``skipped`` maps the name of an image that could not be read to the reason."""

    out: Path
    count: int
    width: int
    skipped: dict[str, str]


def load_model(
    folder: str | os.PathLike[str], device: str = "auto", *, kinds: Sequence[str] = EMBEDDERS
) -> tuple[nn.Module, Any, Any]:
    """(model, tokenizer, transform) of a folder that training wrote (RUN/final), the model in evaluation
    mode.

    ``device`` is "auto" (a CUDA device if there is one), "cpu" or a torch device. ``kinds`` are the model
    types that will do. FileNotFoundError or ValueError name what is missing or does not fit.
    """
    from .bundle import load_bundle

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"model: no folder {folder}; RUN/final of a training run is wanted")
    bundle = load_bundle(folder, _usable(device))
    found = bundle.model.model_type
    if found not in kinds:
        raise ValueError(f"model: {folder} holds a model of type {found}, this takes {', '.join(kinds)}")
    return bundle.model, bundle.tokenizer, bundle.transform and bundle.transform.for_inference()


def _usable(device: str) -> torch.device:
    """ValueError unless tensors can be made and read on the device, "auto" being the best there is."""
    try:
        found = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.zeros((), device=found).item()
    except Exception as error:  # its type depends on what is wrong with the device
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise ValueError(f"device: {str(device)!r} cannot be used here: {reason}") from error
    return found


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients for a block, and the earlier mode afterwards; gives the model's
    device."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield next(model.parameters()).device
    finally:
        model.train(training)


def encode_texts(
    model: nn.Module, tokenizer: Callable[[list[str]], Tensor], texts: Sequence[str], *, batch_size: int = 256
) -> Tensor:
    """float32 [len(texts), E] on the CPU, L2-normalised."""
    check_batch_size(batch_size)
    with inference(model) as device:
        parts = [
            cast(Any, model).encode_text(
                tokenizer(list(texts[i : i + batch_size])).to(device), normalize=True
            )
            for i in range(0, len(texts), batch_size)
        ]
    return torch.cat(parts).float().cpu() if parts else torch.zeros(0, _width(model))


def encode_images(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """float32 [N, E] on the CPU, L2-normalised, of batches [B, 3, H, W]."""
    with inference(model) as device:
        parts = [
            cast(Any, model).encode_image(images.to(device), normalize=True).float().cpu()
            for images in batches
        ]
    return torch.cat(parts) if parts else torch.zeros(0, _width(model))


def encode_files(
    model: nn.Module,
    transform: Callable[[Image.Image], Tensor],
    files: Sequence[Path],
    *,
    batch_size: int = 256,
) -> tuple[Tensor, list[Path], dict[str, str]]:
    """Embeddings [K, E] of the files that can be read, these K files, and the others with the reason."""
    check_batch_size(batch_size)
    kept: list[Path] = []
    skipped: dict[str, str] = {}

    def batches() -> Iterator[Tensor]:
        images = read_files(transform, files, skipped)
        while batch := list(itertools.islice(images, batch_size)):
            kept.extend(file for file, _ in batch)
            yield torch.stack([image for _, image in batch])

    features = encode_images(model, batches())
    return features, kept, skipped


def read_files(
    transform: Callable[[Image.Image], Tensor], files: Iterable[Path], skipped: dict[str, str]
) -> Iterator[tuple[Path, Tensor]]:
    """The files with their transformed images; what cannot be read goes to ``skipped`` with the reason."""
    for file in files:
        try:
            image = transformed(transform, read_image(file))
        except BrokenImageError as error:
            skipped[str(file)] = str(error)
            warn_skipped(str(file), str(error))
        else:
            yield file, image


def find_images(inputs: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The files named in ``inputs`` and the images below the folders in it, in a fixed order, each once.

    Below a folder hidden files and folders are passed over; a folder that cannot be listed is given as if it
    were an image, so that whoever reads it reports it. FileNotFoundError for a path that does not exist,
    ValueError when there is no image at all.
    """
    found: dict[Path, None] = {}
    names = [Path(name) for name in inputs]
    for path in names:
        if os.path.isdir(path):
            found.update(dict.fromkeys(sorted(_images_below(path))))
        elif os.path.lexists(path):
            found[path] = None
        else:
            raise FileNotFoundError(f"inputs: no file or folder {path}")
    if not found:
        where = ", ".join(str(name) for name in names) or "an empty list"
        raise ValueError(f"inputs: no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in {where}")
    return list(found)


def _images_below(folder: Path) -> list[Path]:
    found: list[Path] = []

    def on_error(error: OSError) -> None:
        found.append(Path(error.filename))

    for parent, folders, files in os.walk(folder, onerror=on_error):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names = (name for name in files if not name.startswith("."))
        found += [Path(parent, n) for n in names if os.path.splitext(n)[1].lower() in IMAGE_SUFFIXES]
    return found


def readable(
    dataset: Any, transform: Callable[[Image.Image], Any] | None, skipped: dict[str, str]
) -> Iterator[Sample]:
    """The samples in order, each once, their PIL images transformed unless ``transform`` is None.

    Those that cannot be transformed, or for which a map-style data set raises BrokenImageError, go to
    ``skipped`` with the reason.
    """
    streams = isinstance(dataset, IterableDataset)
    items: Iterable[Any] = dataset if streams else range(len(dataset))
    for item in items:
        try:
            sample = item if streams else dataset[item]
        except BrokenImageError as error:
            if error.key is not None:
                skipped[error.key] = str(error)
            continue
        if transform is not None and isinstance(sample["image"], Image.Image):
            try:
                sample = Sample(**{**sample, "image": transformed(transform, sample["image"])})  # type: ignore[typeddict-item]
            except BrokenImageError as error:
                skipped[sample["key"]] = str(error)
                warn_skipped(sample["key"], str(error))
                continue
        yield sample


def embed(
    model_folder: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    kind: str = "images",
    batch_size: int = 256,
    device: str = "auto",
) -> Embedded:
    """Embed image files and folders (``kind="images"``) or texts (``kind="texts"``) and write them to
    ``out``.

    ``out`` ends in .safetensors (tensor ``embeddings`` float32 [N, E], L2-normalised; metadata ``keys``, a
    JSON list of N paths or texts, and ``kind``) or .npz (arrays ``embeddings`` and ``keys``). It is whole or
    absent. An image that cannot be read is left out and named in the result. ValueError when nothing can be
    embedded or ``out`` cannot be written.
    """
    target = Path(out)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if target.suffix not in FORMATS:
        raise ValueError(f"out must end in {' or '.join(FORMATS)}, got {str(target)!r}")
    if isinstance(inputs, (str, os.PathLike)):
        raise ValueError(f"inputs must be a sequence of {kind}, got one {type(inputs).__name__}")
    files = find_images(inputs) if kind == "images" else []
    if kind == "texts" and not inputs:
        raise ValueError("inputs: no text")
    _check_writable(target)
    model, tokenizer, transform = load_model(model_folder, device)
    skipped: dict[str, str] = {}
    if kind == "images":
        features, kept, skipped = encode_files(model, transform, files, batch_size=batch_size)
        keys = [str(file) for file in kept]
        if not kept:
            raise ValueError(
                f"inputs: none of {len(files)} images can be read, first {next(iter(skipped.items()))}"
            )
    else:
        keys = [str(text) for text in inputs]
        features = encode_texts(model, tokenizer, keys, batch_size=batch_size)
    write_embeddings(target, features, keys, {"kind": kind})
    return Embedded(target, len(keys), features.shape[1], skipped)


def _check_writable(path: Path) -> None:
    """Make the folder of ``path``; ValueError where no file can be written there, before any work is done."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ValueError(f"out: {path} cannot be written: {error.strerror or error}") from error


def write_embeddings(
    path: Path,
    features: Tensor,  # [N, E]
    keys: Sequence[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write features and keys, whole or not at all, in the format of ``path``'s ending; or OSError."""
    if path.suffix != ".npz":
        described = {"keys": json.dumps(list(keys)), **(metadata or {})}
        return save_tensors({"embeddings": features.contiguous()}, path, described)

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:  # numpy would add an ending to a name
            numpy.savez(file, embeddings=features.numpy(), keys=numpy.array(keys, dtype=str))

    return write_atomic(path, write)


def read_embeddings(path: str | os.PathLike[str]) -> tuple[Tensor, list[str]]:
    """Features [N, E] and keys of a file that :func:`embed` wrote. FileNotFoundError, or ValueError for
    another file."""
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"embeddings: no file {source}")
    try:
        if source.suffix == ".npz":
            with numpy.load(source, allow_pickle=False) as arrays:
                return torch.from_numpy(arrays["embeddings"]), arrays["keys"].tolist()
        with safe_open(source, "pt") as file:
            return file.get_tensor("embeddings"), json.loads((file.metadata() or {})["keys"])
    except Exception as error:
        raise ValueError(f"embeddings: {source} was not written by embed: {error}") from error


def check_batch_size(batch_size: int) -> None:
    """ValueError unless positive."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def _width(model: nn.Module) -> int:
    return cast(Any, model).config.embed_dim
