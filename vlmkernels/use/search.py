"""Images of a folder ranked by a text: the inner product of their embeddings."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from pathlib import Path

import torch

from vlmkernels._files import stamp
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
    store = None
    if cache:
        try:
            store = cache_file(model_folder, folder)
        except OSError as error:
            log.warning("no embeddings are kept: %s", printable(error))
    known = _read(store) if store else {}
    stamps = {file: stamp(file) for file in files}
    new = [file for file in files if stamps[file] not in known]
    features, kept, skipped = encode_files(model, transform, new, batch_size=batch_size)
    fresh = {stamps[file]: feature for file, feature in zip(kept, features, strict=True)}
    rows = [(file, fresh.get(stamps[file], known.get(stamps[file]))) for file in files]
    paths = [file for file, feature in rows if feature is not None]
    if not paths:
        raise ValueError(f"folder: none of {len(files)} images in {folder} can be read")
    images = torch.stack([feature for _, feature in rows if feature is not None])
    if store and kept:
        _write(store, images, [stamps[file] for file in paths])
    scores = images @ encode_texts(model, tokenizer, [query_text])[0]
    order = scores.argsort(descending=True, stable=True)[:k].tolist()
    hits = [Hit(paths[i], scores[i].item()) for i in order]
    return Found(hits, len(paths), len(paths) - len(kept), skipped)


def cache_file(model_folder: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Path:
    """Where the embeddings of ``folder`` by this model are kept, below $XDG_CACHE_HOME or ~/.cache.

    The name is a hash of the model's files and the folder's path.
    """
    digest = hashlib.sha256(os.fsencode(os.path.realpath(folder)))
    for file in sorted(path for path in Path(model_folder).iterdir() if path.is_file()):
        digest.update(os.fsencode(f"\0{file.name}\0"))
        with open(file, "rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    return cache_folder() / "search" / f"{digest.hexdigest()[:32]}.safetensors"


def _read(store: Path) -> dict[str, torch.Tensor]:
    try:
        features, keys = read_embeddings(store)
        return dict(zip(keys, features, strict=True))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("the cache %s is not used: %s", printable(store), error)
        return {}


def _write(store: Path, features: torch.Tensor, keys: list[str]) -> None:
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_embeddings(store, features, keys)
    except OSError as error:
        log.warning("the cache %s cannot be written: %s", printable(store), error)
