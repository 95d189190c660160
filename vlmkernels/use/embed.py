"""Embeddings of image files and of texts by a trained model, and the file format for them."""

from __future__ import annotations

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

from vlmkernels._files import write_atomic
from vlmkernels.data._text import printable
from vlmkernels.models.parts.pretrained import save_tensors

from .bundle import check_batch_size, inference, load_model
from .images import find_images, read_files

KINDS = ("images", "texts")
FORMATS = (".safetensors", ".npz")


@dataclasses.dataclass(frozen=True)
class Embedded:
    """The result of :func:`embed`: ``skipped`` maps each image that could not be read to the reason."""

    out: Path
    count: int
    width: int
    skipped: dict[str, str]
    kind: str = "images"

    def __str__(self) -> str:
        return f"{self.count} {self.kind}, {self.width} numbers each: {printable(self.out)}"


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
    JSON list of N paths or texts, and ``kind``) or .npz (arrays ``embeddings`` and ``keys``). It is
    written atomically. An image that cannot be read is skipped and listed in the result. ValueError when
    nothing can be embedded or ``out`` cannot be written.
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
        raise ValueError("inputs must not be empty")
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
    return Embedded(target, len(keys), features.shape[1], skipped, kind)


def _check_writable(path: Path) -> None:
    """Create the folder of ``path``; ValueError if no file can be written there, before any work is done."""
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
    """Write features and keys atomically, in the format of ``path``'s extension; or OSError."""
    if path.suffix != ".npz":
        described = {"keys": json.dumps(list(keys)), **(metadata or {})}
        return save_tensors({"embeddings": features.contiguous()}, path, described)

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:  # numpy would add an extension to a name
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


def _width(model: nn.Module) -> int:
    return cast(Any, model).config.embed_dim
