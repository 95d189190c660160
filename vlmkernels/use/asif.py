"""ASIF on files: make and change a folder of anchors, search, classify and explain with it."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import os
from collections.abc import Iterator, Sequence, Sized
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from vlmkernels._optional import cache_folder
from vlmkernels.data import load_pairs, read_image
from vlmkernels.data._text import printable
from vlmkernels.models.asif import ASIF, TEMPLATES, Explanation, K, P
from vlmkernels.models.parts.anchors import MANIFEST, AnchorFolder

from .encoders import LITE0, MINILM, Encoder, image_encoder, same_encoder, source_of, text_encoder
from .images import find_images, read_files, readable
from .search import Found, embedded_files

log = logging.getLogger("vlmkernels.use.asif")
EMBEDDED = ("emoji3:style-train", "emoji3:style-test")  # the anchors of those who give none
AT_ONCE = 1024  # pairs that are encoded before they are written


@dataclasses.dataclass(frozen=True)
class Encoders:
    """The two encoders of an ASIF."""

    image: Encoder
    text: Encoder

    @classmethod
    def of(cls, image: str | None = None, text: str | None = None, device: str = "auto") -> Encoders:
        """By the names that `image_encoder` and `text_encoder` take; without one the packaged networks."""
        return cls(image_encoder(image or LITE0, device=device), text_encoder(text or MINILM, device=device))


@dataclasses.dataclass(frozen=True)
class Changed:
    """A folder of anchors after a change: how many there are, how many came or went, and the pairs that could
    not be read with the reason."""

    folder: Path
    anchors: int
    change: int
    skipped: dict[str, str]

    def __str__(self) -> str:
        what = f"{abs(self.change)} {'added' if self.change >= 0 else 'removed'}"
        return f"{what}, {self.anchors} anchors: {printable(self.folder)}"


def build(
    folder: str | os.PathLike[str],
    data: Sequence[str] = EMBEDDED,
    *,
    encoders: Encoders | None = None,
    dtype: str = "float32",
    allow_pipe: bool = False,
) -> Changed:
    """Make a folder of anchors of the pairs of data sets (`vlmkernels.data.load_pairs`).

    ValueError if there is one already, or if no pair can be read.
    """
    encoders = encoders or Encoders.of()
    probes = (encoders.image, Image.new("RGB", (64, 64))), (encoders.text, "a")
    image, text = (encoder([probe]).shape[1] for encoder, probe in probes)
    AnchorFolder.create(
        folder,
        image_width=image,
        text_width=text,
        image_encoder=encoders.image.name,
        text_encoder=encoders.text.name,
        dtype=dtype,
    )
    return add(folder, data, encoders=encoders, allow_pipe=allow_pipe)


def add(
    folder: str | os.PathLike[str],
    data: Sequence[str],
    *,
    encoders: Encoders | None = None,
    device: str = "auto",
    allow_pipe: bool = False,
) -> Changed:
    """Add the pairs of data sets. Those that are there already, by name and text, are not computed again.

    `encoders` are by default those that made the anchors; ValueError for others. Pairs are added some at a
    time: a process that is killed has added those before.
    """
    anchors = AnchorFolder(folder)
    encoders = _checked(anchors, encoders, device)
    before, known = len(anchors), set(anchors.described())
    skipped: dict[str, str] = {}

    def new() -> Iterator[tuple[Any, str, str]]:
        for spec in data:
            for sample in readable(load_pairs(spec, allow_pipe=allow_pipe), None, skipped):
                name = name_of(spec, sample["key"])
                if (name, sample["text"]) not in known:
                    yield sample["image"], name, sample["text"]

    pairs = new()
    while part := list(itertools.islice(pairs, AT_ONCE)):
        images, names, texts = zip(*part, strict=True)
        anchors.add(encoders.image(images), encoders.text(texts), names, texts)
        log.info("%d anchors", len(anchors))
    if not len(anchors):
        raise ValueError(f"data: no pair can be read from {', '.join(data)}")
    return Changed(anchors.folder, len(anchors), len(anchors) - before, skipped)


def name_of(spec: str, key: str) -> str:
    """The name of an anchor: the path of its image in a table, the key in tars after these, or in emoji3."""
    if ".tar" in spec:
        return f"{spec}:{key}"
    return str(Path(spec).parent / key) if Path(spec).suffix else key


def remove(folder: str | os.PathLike[str], names: Sequence[str]) -> Changed:
    """Remove the anchors of these names; in a name `*`, `?` and `[...]` stand for others, as in a shell.

    ValueError naming those that no anchor has.
    """
    anchors = AnchorFolder(folder)
    pairs = list(anchors.described())
    exact = {name for name, _ in pairs}
    gone = {
        name: {pair for pair in pairs if (pair[0] == name if name in exact else fnmatchcase(pair[0], name))}
        for name in names
    }
    if absent := [name for name, matching in gone.items() if not matching]:
        raise ValueError(f"names must be of anchors, got {', '.join(absent)}")
    count = anchors.remove(set().union(*gone.values()))
    return Changed(anchors.folder, len(anchors), -count, {})


def open_asif(
    folder: str | os.PathLike[str] | None = None,
    *,
    encoders: Encoders | None = None,
    k: int = K,
    p: float = P,
    search: str = "exact",
    device: str = "auto",
) -> ASIF:
    """An ASIF over a folder of anchors, and the encoders that made it.

    Without a folder the anchors are the pictures of emoji3, encoded once and kept in the user's cache.
    """
    if folder is None:
        encoders = encoders or Encoders.of(device=device)
        folder = _embedded_anchors(encoders)
    anchors = AnchorFolder(folder)
    if not len(anchors):
        raise ValueError(f"anchors: {folder} has none")
    encoders = _checked(anchors, encoders, device)
    return ASIF(encoders.image, encoders.text, anchors, k=k, p=p, search=search)


def _embedded_anchors(encoders: Encoders) -> Path:
    """The folder of emoji3's anchors by these encoders, completed where an earlier call was interrupted."""
    names = f"{encoders.image.name}\0{encoders.text.name}"
    folder = cache_folder() / "asif" / hashlib.sha256(os.fsencode(names)).hexdigest()[:32]
    whole = sum(len(cast(Sized, load_pairs(name))) for name in EMBEDDED)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        started = (folder / MANIFEST).exists()
        if not started or len(AnchorFolder(folder)) < whole:
            log.info("the pictures of emoji3 are encoded once, in some minutes, to %s", printable(folder))
            (add if started else build)(folder, EMBEDDED, encoders=encoders)
    return folder


def _checked(anchors: AnchorFolder, encoders: Encoders | None, device: str) -> Encoders:
    """The encoders that made the anchors; ValueError if these are others."""
    made_by = anchors.image_encoder, anchors.text_encoder
    image, text = map(source_of, made_by)
    encoders = encoders or Encoders.of(image, text, device=device)
    faults = [
        f"{side}_encoder must be {wanted}, which made the anchors in {anchors.folder}, got {found.name}"
        for side, found, wanted in zip(
            ("image", "text"), (encoders.image, encoders.text), made_by, strict=True
        )
        if not same_encoder(found.name, wanted)
    ]
    if faults:
        raise ValueError("; ".join(faults))
    return encoders


def encode_files(encoder: Encoder, files: Sequence[Path]) -> tuple[Tensor, list[Path], dict[str, str]]:
    """Features [K, D] of the images that can be read, these K files, and the others with the reason."""
    kept: list[Path] = []
    skipped: dict[str, str] = {}

    def prepared() -> Iterator[Any]:
        for file, image in read_files(encoder.prepare, files, skipped):
            kept.append(file)
            yield image

    parts = list(encoder.batches(prepared()))
    return torch.cat(parts) if parts else torch.zeros(0, 0), kept, skipped


def search(
    asif: ASIF, text: str, folder: str | os.PathLike[str], k: int = 10, *, cache: bool = True
) -> Found:
    """The ``k`` images below ``folder`` with the highest scores for ``text``, each score a cosine.

    With ``cache`` features are kept as by `vlmkernels.use.search.search`. ValueError when no image can be
    read.
    """
    if not text.strip():
        raise ValueError("text must not be empty")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    encoder = _image_encoder(asif)

    def place() -> Path:
        origin = os.fsencode(f"{encoder.name}\0{os.path.realpath(folder)}")
        return cache_folder() / "asif" / f"{hashlib.sha256(origin).hexdigest()[:32]}.safetensors"

    files = find_images([folder])
    images = embedded_files(files, lambda new: encode_files(encoder, new), place if cache else None)
    return images.found(asif.similarity(images.images, [text])[:, 0], k)


@dataclasses.dataclass(frozen=True)
class Classified:
    """The classes of each image, the highest score first, and the images that cannot be read."""

    classes: dict[Path, list[tuple[str, float]]]
    skipped: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(
            f"{printable(path)}\t" + "\t".join(f"{printable(name)} {score:.4f}" for name, score in found)
            for path, found in self.classes.items()
        )


def classify(
    asif: ASIF,
    inputs: Sequence[str | os.PathLike[str]],
    classes: Sequence[str],
    *,
    templates: Sequence[str] = TEMPLATES,
    top: int = 3,
) -> Classified:
    """Zero-shot classes of images, files and folders: the maximum of the scores over the templates."""
    if top < 1:
        raise ValueError(f"top must be at least 1, got {top}")
    files = find_images(inputs)
    features, kept, skipped = encode_files(_image_encoder(asif), files)
    if not kept:
        raise ValueError(
            f"inputs: none of {len(files)} images can be read, first {next(iter(skipped.items()))}"
        )
    best = asif.classify(features, classes, templates).sort(dim=1, descending=True, stable=True)
    rows = zip(best.values[:, :top].tolist(), best.indices[:, :top].tolist(), strict=True)
    found = [[(classes[c], score) for score, c in zip(*row, strict=True)] for row in rows]
    return Classified(dict(zip(kept, found, strict=True)), skipped)


def explain(
    asif: ASIF, image: str | os.PathLike[str] | None = None, text: str | None = None, count: int = 10
) -> Explanation:
    """The anchors that decided the score of an image file and a text, or that represent one of them."""
    shown = None if image is None else read_image(image)
    return asif.explain(shown, text, count)


def explanation_text(explanation: Explanation) -> str:
    """The score and its parts, a line each."""
    lines = [f"score {explanation.score:.4f}, {explanation.anchors} anchors"]
    for part in explanation.parts:
        name, caption = printable(part.name), printable(part.caption)
        lines.append(f"{100 * part.share:5.1f} %  {name}  {caption}")
    return "\n".join(lines)


def _image_encoder(asif: ASIF) -> Encoder:
    if not isinstance(asif.image_encoder, Encoder):
        raise ValueError(f"asif must have an Encoder of images, got {type(asif.image_encoder).__name__}")
    return asif.image_encoder
