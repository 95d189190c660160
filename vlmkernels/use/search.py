"""Images of a folder ranked by a text: the inner product of their embeddings."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vlmkernels._files import digest, stamp
from vlmkernels._optional import cache_folder
from vlmkernels.data._text import printable

from .bundle import load_model
from .embed import encode_files, encode_texts, read_embeddings, write_embeddings
from .images import find_images

log = logging.getLogger("vlmkernels.use.search")


@dataclasses.dataclass(frozen=True)
class Hit:
    """An image and its similarity to the text, a cosine in [-1, 1]."""

    path: Path
    score: float


@dataclasses.dataclass(frozen=True)
class Found:
    """The best hits first; how many images were searched, how many of these came from the cache; the skipped
    ones with the reason."""

    hits: list[Hit]
    searched: int
    cached: int
    skipped: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(f"{hit.score:.4f}  {printable(hit.path)}" for hit in self.hits)


def search(
    model_folder: str | os.PathLike[str],
    query_text: str,
    folder: str | os.PathLike[str],
    k: int = 10,
    *,
    cache: bool = True,
    batch_size: int = 256,
    device: str = "auto",
) -> Found:
    """Rank the images below ``folder`` by ``query_text`` and return the ``k`` best (all, if there are fewer).

    With ``cache`` the embeddings are kept in :func:`cache_file` and reused for images with the same path,
    size and modification time. A cache that cannot be read or written only costs time. ValueError when
    no image can be read.
    """
    if not query_text.strip():
        raise ValueError("query_text must not be empty")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    files = find_images([folder])
    model, tokenizer, transform = load_model(model_folder, device)

    def encode(files: Sequence[Path]) -> tuple[Tensor, list[Path], dict[str, str]]:
        return encode_files(model, transform, files, batch_size=batch_size)

    embedded = embedded_files(files, encode, (lambda: cache_file(model_folder, folder)) if cache else None)
    scores = embedded.images @ encode_texts(model, tokenizer, [query_text])[0]
    return embedded.found(scores, k)


@dataclasses.dataclass(frozen=True)
class EmbeddedFiles:
    """The images that can be read, their features [N, D], how many of these were in the cache, and the other
    images with the reason."""

    paths: list[Path]
    images: Tensor
    cached: int
    skipped: dict[str, str]

    def found(
        self,
        scores: Tensor,  # [N]
        k: int,
    ) -> Found:
        """The k images with the highest scores."""
        order = scores.argsort(descending=True, stable=True)[:k].tolist()
        hits = [Hit(self.paths[i], scores[i].item()) for i in order]
        return Found(hits, len(self.paths), self.cached, self.skipped)


def embedded_files(
    files: Sequence[Path],
    encode: Callable[[Sequence[Path]], tuple[Tensor, list[Path], dict[str, str]]],
    place: Callable[[], Path] | None,
) -> EmbeddedFiles:
    """The features of image files by ``encode`` (see :func:`encode_files`) or from the file ``place()``.

    None keeps no features. ValueError when no image can be read.
    """
    store = None
    if place is not None:
        try:
            store = place()
        except OSError as error:
            log.warning("no embeddings are kept: %s", printable(error))
    known = _read(store) if store else {}
    stamps = {file: stamp(file) for file in files}
    new = [file for file in files if stamps[file] not in known]
    features, kept, skipped = encode(new)
    fresh = {stamps[file]: feature for file, feature in zip(kept, features, strict=True)}
    rows = [(file, fresh.get(stamps[file], known.get(stamps[file]))) for file in files]
    paths = [file for file, feature in rows if feature is not None]
    if not paths:
        raise ValueError(
            f"folder: none of {len(files)} images can be read, first {next(iter(skipped.items()))}"
        )
    images = torch.stack([feature for _, feature in rows if feature is not None])
    if store and kept:
        _write(store, images, [stamps[file] for file in paths])
    return EmbeddedFiles(paths, images, len(paths) - len(kept), skipped)


def cache_file(model_folder: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Where the embeddings of ``folder`` by this model are kept, below $XDG_CACHE_HOME or ~/.cache.

    The name is a hash of the model's files and the folder's path.
    """
    found = hashlib.sha256(os.fsencode(os.path.realpath(folder)))
    for file in sorted(path for path in Path(model_folder).iterdir() if path.is_file()):
        found.update(os.fsencode(f"\0{file.name}\0{digest(file)}"))
    return cache_folder() / "search" / f"{found.hexdigest()[:32]}.safetensors"


def _read(store: Path) -> dict[str, Tensor]:
    try:
        features, keys = read_embeddings(store)
        return dict(zip(keys, features, strict=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("the cache %s is not used: %s", printable(store), error)
        return {}


def _write(store: Path, features: Tensor, keys: list[str]) -> None:
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_embeddings(store, features, keys)
    except OSError as error:
        log.warning("the cache %s cannot be written: %s", printable(store), error)
